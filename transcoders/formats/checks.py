"""What readers check alike: whole numbers in settings, tensors of every layer or none, values that spoil unnoticed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from transcoders.errors import TranscoderError
from transcoders.settings import Settings
from transcoders.stored import Encoder, Stored, TensorFile


def whole_number(meta: Settings, name: str, default: int | None = None) -> int:
    """A setting that counts something; without a default it must be there."""
    value = meta.need(name) if default is None else meta.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TranscoderError(f"{name} in {meta.path} is {value!r}; expected a whole number: correct it there.")
    return value


def in_every_layer(files: Sequence[TensorFile], names: Sequence[str]) -> bool:
    """Whether each layer's file holds the tensor of its name; where only some do, they are not of one transcoder."""
    held = [name in file for file, name in zip(files, names, strict=True)]
    if any(held) and not all(held):
        has, lacks = held.index(True), held.index(False)
        raise TranscoderError(
            f"{files[lacks].path} lacks {names[lacks]}, but {files[has].path} holds {names[has]}; expected it of every "
            "layer or of none: copy or download the whole transcoder again."
        )
    return all(held)


def usable(scales: Float[Tensor, "..."], name: str, path: Path) -> Float[Tensor, "..."]:
    """Numbers that something is multiplied or divided by, as they are."""
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise TranscoderError(
            f"{name} in {path} is 0, NaN or infinite somewhere; expected numbers to scale with: copy or download the "
            "whole transcoder again."
        )
    return scales


def checked(stored: Stored, folder: Path) -> Stored:
    """The same transcoder, which refuses broken thresholds and skip connections as soon as a layer is read.

    All other broken weights make outputs NaN. A feature whose threshold is NaN only never fires; infinity may be meant.
    """

    def encoder(layer: int) -> Encoder:
        weights = stored.encoder(layer)
        if weights.threshold is not None and bool(weights.threshold.float().isnan().any()):
            broken = weights.threshold.float().isnan().nonzero()[:, 0].tolist()
            raise TranscoderError(
                f"layer {layer} of {folder} has NaN in {len(broken)} of its {len(weights.threshold)} thresholds, first "
                f"for feature {broken[0]}; expected numbers: copy or download the transcoder again."
            )
        if weights.W_skip is not None and not bool(weights.W_skip.float().isfinite().all()):
            raise TranscoderError(
                f"layer {layer} of {folder} has a skip connection (W_skip) with NaN or infinite values; expected "
                "numbers: copy or download the transcoder again."
            )
        return weights

    return replace(stored, encoder=encoder)
