"""The transcoder that comes out of a training run, still in the run's last checkpoint: weights are read where they are
used, a layer at a time, and the optimiser's moments, which are twice as large, never."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.progress import COMMON, latest, read_layer, read_tensors, read_weight
from transcoders.scales import folded, scales_of
from transcoders.stored import Encoder, Stored


def result_of(folder: Path, shape: TranscoderConfig, config: TrainConfig) -> Stored:
    """All processes' features together, in float32, reading and writing activations as they come from the model."""
    checkpoint = latest(folder)
    if checkpoint is None:
        raise TranscoderError(f"{folder} has no checkpoint yet; train on.")
    common = read_tensors(checkpoint / COMMON)
    has_threshold = config.activation in ("batchtopk", "jumprelu")

    def decoder(layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        all_rows = read_weight(checkpoint, f"W_dec.{layer}").float()
        return all_rows if torch.equal(rows, torch.arange(len(all_rows))) else all_rows[rows]

    def threshold(layer: int) -> Float[Tensor, " feature"]:
        """What fired above one contribution for all layers has a threshold for every feature."""
        if config.activation == "jumprelu":
            return read_layer(checkpoint, "threshold", layer)
        norms = read_weight(checkpoint, f"W_dec.{layer}").flatten(1).float().norm(dim=1)
        return common["threshold"] / norms.clamp(min=1e-12)

    def encoder(layer: int) -> Encoder:
        return Encoder(
            read_layer(checkpoint, "W_enc", layer).float(), read_layer(checkpoint, "b_enc", layer).float(),
            common["weight:b_dec"][layer].float(), threshold(layer) if has_threshold else None,
            common["weight:W_skip"][layer].float() if shape.skip else None,
        )  # fmt: skip

    saved = replace(shape, activation="jumprelu", k=0) if has_threshold else shape
    return folded(Stored("checkpoint", saved, torch.float32, encoder, decoder), scales_of(common))
