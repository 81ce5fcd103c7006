"""One number per layer by which MLP inputs and outputs are multiplied while training; folded into what is saved."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import TranscoderError
from transcoders.stored import Encoder, Stored

SINKS = 0.5
"""Where the largest hundredth of the tokens holds a larger share of what an MLP writes, errors are balanced."""


@dataclass(frozen=True)
class Scales:
    """What makes the mean norm of each layer's inputs and outputs √d_model, and what was seen on the way."""

    inputs: Float[Tensor, " layer"]
    outputs: Float[Tensor, " layer"]
    largest: Float[Tensor, " layer"]
    """Mean norms of the inputs as they come."""
    square: Float[Tensor, " layer"]
    """Mean squared norms of the outputs once they are scaled."""
    has_sinks: bool
    """Whether in some layer few tokens hold most of what the MLP writes."""


def measure_scales(
    inputs: Float[Tensor, "layer token d_model"], outputs: Float[Tensor, "layer token d_model"]
) -> Scales:
    """Scales of some activations as they come from the model."""
    root = inputs.shape[-1] ** 0.5
    read, written = inputs.float().norm(dim=-1), outputs.float().norm(dim=-1)
    check_finite(read, written)
    if not bool((read.mean(1) > 0).all() and (written.mean(1) > 0).all()):
        raise TranscoderError(
            "an MLP of the model reads or writes nothing but zeros; there is nothing to learn from it."
        )
    energy = written.square().sort(dim=1, descending=True).values
    few = max(1, energy.shape[1] // 100)
    share = energy[:, :few].sum(1) / energy.sum(1)
    scale = root / written.mean(1)
    square = written.square().mean(1) * scale.square()
    return Scales(root / read.mean(1), scale, read.mean(1), square, bool((share > SINKS).any()))


def check_finite(*measured: Tensor) -> None:
    """Raise `TranscoderError` if something that was measured of a model's activations is no number."""
    if not all(bool(torch.isfinite(values).all()) for values in measured):
        raise TranscoderError("the model's activations are not finite; check its weights, or load it in float32.")


def scales_of(tensors: dict[str, Tensor]) -> Scales:
    """Those that a checkpoint holds among its tensors."""
    values = {name.removeprefix("scales:"): t for name, t in tensors.items() if name.startswith("scales:")}
    has_sinks = bool(values.pop("has_sinks"))
    return Scales(**values, has_sinks=has_sinks)


def folded(trained: Stored, scales: Scales) -> Stored:
    """A transcoder that learnt from scaled activations, reading and writing them as they come."""

    def encoder(layer: int) -> Encoder:
        scaled, read, written = trained.encoder(layer), scales.inputs[layer], scales.outputs[layer]
        return replace(
            scaled, W_enc=scaled.W_enc * read, b_dec=scaled.b_dec / written,
            W_skip=None if scaled.W_skip is None else scaled.W_skip * (read / written),
        )  # fmt: skip

    def decoder(layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        scaled = trained.decoder(layer, rows)
        return scaled / scales.outputs[layer : layer + scaled.shape[1], None]

    return replace(trained, encoder=encoder, decoder=decoder, mapped=lambda layer: None)
