"""Language-Model-SAEs (lm_saes, later Llamascopium): config.json and sae_weights.safetensors or .pt.

Decoders are stored target by target: W_D.{t} is (source, feature, d_model). Inputs and outputs are scaled per hook, and
features may be gated by their pre-activation times the norm of all their decoders.
"""

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats.checks import whole_number
from transcoders.settings import Settings, read_settings
from transcoders.stored import Encoder, Stored, TensorFile, map_tensors

ACTIVATIONS = ("relu", "jumprelu", "topk")


def is_one(folder: Path) -> bool:
    """Whether config.json names a kind of sparse autoencoder."""
    return "sae_type" in read_settings(folder / "config.json")


def read(folder: Path) -> Stored:
    """A cross-layer transcoder."""
    meta = read_settings(folder / "config.json")
    _refuse_what_cannot_be_exact(folder, meta)
    file = map_tensors(_weights_path(folder))
    hooks = [*meta.need("hook_points_in"), *meta.need("hook_points_out")]
    n_layers, d_model = len(meta.need("hook_points_in")), whole_number(meta, "d_model")
    reads, writes = _hook(meta.need("hook_points_in")), _hook(meta.need("hook_points_out"))
    n_features = file.take("W_E", n_layers, d_model, -1).shape[2]
    if len(hooks) != 2 * n_layers:
        raise TranscoderError(
            f"{meta.path} names {n_layers} hook_points_in and {len(hooks) - n_layers} hook_points_out; expected as "
            "many of both."
        )
    activation = meta.need("act_fn")
    _refuse_others(file, n_layers, activation)
    k = whole_number(meta, "top_k") if activation == "topk" else 0
    config = TranscoderConfig(n_layers, d_model, n_features, activation, k, reads, writes)
    scaled = meta.get("norm_activation", "dataset-wise") == "dataset-wise"
    scales = torch.tensor([_scale(file, hook, d_model) if scaled else 1.0 for hook in hooks])
    gated = bool(meta.get("sparsity_include_decoder_norm", True)) and activation != "relu"
    weights = _Weights(file, config, scales[:n_layers], scales[n_layers:], gated)
    folded = ("encoders transposed", "decoders regrouped by source layer")
    if scaled:
        folded += (
            "dataset-wise norms folded (if this is the end of a training run, rather than one of its checkpoints, they "
            'may be folded already: then set norm_activation to "inference" in config.json)',
        )
    if gated:
        folded += ("decoder norms taken into thresholds" if activation == "jumprelu" else "decoder norms taken out",)
    dtype = file.tensors["W_E"].dtype
    return Stored("Language-Model-SAEs", config, dtype, weights.encoder, weights.decoder, folded)


@dataclass(frozen=True)
class _Weights:
    file: TensorFile
    config: TranscoderConfig
    scale_in: Float[Tensor, " layer"]
    scale_out: Float[Tensor, " layer"]
    gated: bool
    """Whether features are gated by pre-activation × decoder norm."""

    def encoder(self, layer: int) -> Encoder:
        file, config = self.file, self.config
        n_layers, n_features, d_model = config.n_layers, config.n_features, config.d_model
        W_enc = file.take("W_E", n_layers, d_model, n_features)[layer].T.float() * self.scale_in[layer]
        b_enc = file.take("b_E", n_layers, n_features)[layer].float()
        b_dec = file.take(f"b_D.{layer}", d_model).float() / self.scale_out[layer]
        norm = self._norm(layer) if self.gated else torch.ones(n_features)
        if config.activation != "jumprelu":
            return Encoder(W_enc * norm[:, None], b_enc * norm, b_dec)
        name = "activation_function.log_jumprelu_threshold"
        threshold = file.take(name, n_layers, n_features)[layer].float().exp() / norm
        # A feature that writes nothing never fires, even at a threshold of 0 / 0.
        return Encoder(W_enc, b_enc, b_dec, threshold.masked_fill(norm == 0, float("inf")))

    def decoder(self, layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        stored = torch.stack([target[rows] for target in self._targets(layer)], dim=1).float()
        written = stored / self.scale_out[layer:, None]
        if self.gated and self.config.activation == "topk":
            # A feature that writes nothing never fires, and stays at zero.
            written = written / stored.flatten(1).norm(dim=1).clamp(min=torch.finfo().tiny)[:, None, None]
        return written

    def _norm(self, layer: int) -> Float[Tensor, " feature"]:
        """The norm of all decoders of each feature, as stored, one target at a time."""
        return torch.stack([target.float().norm(dim=1) for target in self._targets(layer)]).norm(dim=0)

    def _targets(self, layer: int) -> list[Float[Tensor, "feature d_model"]]:
        """Decoders of a layer's features, by the layer they write to, as stored."""
        n_layers, shape = self.config.n_layers, (self.config.n_features, self.config.d_model)
        return [self.file.take(f"W_D.{target}", target + 1, *shape)[layer] for target in range(layer, n_layers)]


def _refuse_what_cannot_be_exact(folder: Path, meta: Settings) -> None:
    activation, norm = meta.get("act_fn"), meta.get("norm_activation", "dataset-wise")
    if meta.need("sae_type") != "clt":
        raise TranscoderError(
            f"{folder} holds a {meta.need('sae_type')}; expected a cross-layer transcoder (sae_type clt)."
        )
    if activation not in ACTIVATIONS:
        raise TranscoderError(
            f"{folder} uses {activation}, whose active features depend on the batch or on all layers at once; convert "
            "it to jumprelu with the tool that trained it."
        )
    if norm not in ("dataset-wise", "inference"):
        raise TranscoderError(
            f"{folder} is normalised {norm}, by what each prompt holds; that cannot be folded into weights: train with "
            "dataset-wise norms."
        )


def _refuse_others(file: TensorFile, n_layers: int, activation: str) -> None:
    known = ["W_E", "b_E", *(f"{name}.{layer}" for name in ("W_D", "b_D") for layer in range(n_layers))]
    if activation == "jumprelu":
        known.append("activation_function.log_jumprelu_threshold")
    file.refuse_others(
        [*known, *(name for name in file.tensors if name.startswith("dataset_average_activation_norm."))]
    )


def _hook(points: list[str]) -> str:
    """The hook that all layers share, as in blocks.0.ln2.hook_normalized."""
    found = [re.fullmatch(r"blocks\.(\d+)\.(.+)", point) for point in points]
    names = {match[2] for match in found if match}
    if [int(match[1]) for match in found if match] != list(range(len(points))) or len(names) != 1:
        raise TranscoderError(f"hook points are {', '.join(points[:4])} …; expected one hook of every layer from 0 on.")
    return names.pop()


def _scale(file: TensorFile, hook: str, d_model: int) -> float:
    norm = float(file.take(f"dataset_average_activation_norm.{hook}"))
    if not (isfinite(norm) and norm > 0):
        raise TranscoderError(
            f"the average norm at {hook} in {file.path} is {norm}; if it was never set because the norms are folded "
            'already, set norm_activation to "inference" in config.json.'
        )
    return d_model**0.5 / norm


def _weights_path(folder: Path) -> Path:
    if (folder / "sae_weights.dcp").exists():
        raise TranscoderError(
            f"{folder} holds a distributed checkpoint (sae_weights.dcp); load it with the library that wrote it and "
            "save it as sae_weights.safetensors."
        )
    whole = folder / "sae_weights.pt"
    return whole if whole.is_file() else folder / "sae_weights.safetensors"
