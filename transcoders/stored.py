"""Transcoders that are still in their files: what every reader gives, and what the rest of the package takes.

Tensors are mapped into memory, so naming one costs nothing and values are read from disk where they are used: a reader
describes a whole checkpoint, and whoever asks for ten decoder rows reads ten decoder rows.
"""

import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError, is_lack_of_memory

_UNREADABLE = (
    SafetensorError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError
)  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """One layer's weights but for its decoders."""

    W_enc: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " feature"] | None = None
    """For JumpReLU."""
    W_skip: Float[Tensor, "d_model d_model"] | None = None
    """Applied as x @ W_skip, where there is one."""


@dataclass(frozen=True)
class Stored:
    """A transcoder in files of any layout, in our own terms: scales folded, biases summed, axes in our order."""

    layout: str
    """Whose files they are, for people."""
    config: TranscoderConfig
    dtype: torch.dtype
    """That of the decoders in the files."""
    encoder: Callable[[int], Encoder]
    """By layer."""
    decoder: Callable[[int, Int[Tensor, " row"]], Float[Tensor, "row reach d_model"]]
    """Decoder rows of some features of a layer; nothing else of the decoders is read."""
    folded: tuple[str, ...] = ()
    """What was changed on the way, for people."""
    mapped: Callable[[int], Float[Tensor, "feature reach d_model"] | None] = lambda layer: None
    """By layer all decoder rows, where they lie in a file as they are; else None."""


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, mapped into memory."""

    path: Path
    tensors: dict[str, Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and shape; −1 stands for any length."""
        if name not in self.tensors:
            raise TranscoderError(f"{self.path} lacks the tensor {name}; copy or download the whole transcoder again.")
        tensor = self.tensors[name]
        if tensor.ndim != len(shape) or any(want not in (-1, n) for want, n in zip(shape, tensor.shape, strict=True)):
            expected = str(tuple(shape)).replace("-1", "any")
            raise TranscoderError(
                f"{name} in {self.path} has shape {tuple(tensor.shape)}; expected {expected}: "
                "the files are damaged or of different transcoders."
            )
        return tensor

    def rows(self, name: str, wanted: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
        """Some rows of a tensor, in ascending order; all of them stay mapped."""
        tensor = self.tensors[name]
        if len(wanted) == len(tensor):
            return tensor
        return _read_rows(self.path, name, tensor, wanted) if self.path.suffix == ".safetensors" else tensor[wanted]

    def refuse_others(self, known: Collection[str]) -> None:
        """Refuse tensors that a reader does not know: they may change what the transcoder computes."""
        others = sorted(set(self.tensors) - set(known))
        if others:
            raise TranscoderError(
                f"{self.path} holds {', '.join(others[:4])}, which this reader does not know and must not leave out; "
                "docs/formats.md says what is read."
            )


def expand(place: Path) -> tuple[Path, list[Path]]:
    """A pattern's folder and what matches it; a path without * matches itself."""
    parts = place.parts
    first = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
    if first == len(parts):
        return place, [place]
    base = Path(*parts[:first])
    return base, sorted(base.glob("/".join(parts[first:])))


def map_tensors(path: Path) -> TensorFile:
    """The tensors of a .safetensors, .npz or .pt file; nothing in it is executed.

    MemoryError where the file is sound but there is no room to map it: to copy it again would not help.
    """
    if not path.is_file():
        raise TranscoderError(f"{path} is missing; copy the whole transcoder folder.")
    readers = {".npz": _map_npz, ".pt": _map_torch, ".ckpt": _map_torch}
    try:
        return TensorFile(path, readers.get(path.suffix, load_file)(path))
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if is_lack_of_memory(error):
            raise MemoryError(f"{path} cannot be mapped: {reason}") from error
        raise TranscoderError(f"{path} cannot be read ({reason}); copy or download it again.") from error


def feature_rows(parts: Sequence[Float[Tensor, "_ ..."]], rows: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
    """Rows of a tensor whose features lie in several parts, one after the other; all rows of one part stay mapped."""
    if len(parts) == 1:
        return parts[0] if torch.equal(rows, torch.arange(len(parts[0]))) else parts[0][rows]
    result = parts[0].new_empty(len(rows), *parts[0].shape[1:])
    first = 0
    for part in parts:
        here = (rows >= first) & (rows < first + len(part))
        result[here] = part[rows[here] - first]
        first += len(part)
    return result


def _read_rows(path: Path, name: str, tensor: Tensor, wanted: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
    """Rows of a tensor in a .safetensors file, read: where they are mapped, the system brings 64 kB around each."""
    rows = tensor.new_empty(len(wanted), *tensor.shape[1:])
    size = tensor[:1].nbytes
    content = rows.view(torch.uint8).flatten().numpy().data
    runs = np.split(wanted.numpy(), np.flatnonzero(np.diff(wanted.numpy()) != 1) + 1)
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        done = 0
        for run in filter(len, runs):
            file.seek(start + int(run[0]) * size)
            end = done + len(run) * size
            while done < end and (n := file.readinto(content[done:end])):
                done += n
            if done < end:
                raise TranscoderError(f"{path} ends too early; copy or download it again.")
    return rows


def per_layer(
    layout: str, config: TranscoderConfig, layers: Sequence[tuple[Encoder, Float[Tensor, "feature d_model"]]],
    paths: Sequence[Path], folded: tuple[str, ...] = (),
) -> Stored:  # fmt: skip
    """A per-layer transcoder made of layers that need no folding; `paths` say where each came from."""
    first = layers[0][0]
    for (encoder, _), path in zip(layers, paths, strict=True):
        if _form(encoder) != _form(first):
            raise TranscoderError(
                f"{path} and {paths[0]} are not of one transcoder: widths, thresholds or skip connections differ."
            )
    return Stored(
        layout, config, layers[0][1].dtype, lambda layer: layers[layer][0],
        lambda layer, rows: layers[layer][1][rows][:, None], folded, lambda layer: layers[layer][1][:, None],
    )  # fmt: skip


def _form(encoder: Encoder) -> tuple:
    return encoder.W_enc.shape, encoder.threshold is None, encoder.W_skip is None


def _map_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds Python objects, which could run code; save its weights as safetensors") from error
    for key in ("state_dict", "sae"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _map_npz(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        return {
            member.filename.removesuffix(".npy"): torch.from_numpy(_member(path, archive, member)) for member in members
        }


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ndarray:
    """One array of an .npz file: mapped where it is stored as it is, read where it is compressed."""
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        header = file.tell()
    with path.open("rb") as raw:
        raw.seek(member.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2").tolist()  # lengths in the member's own header, which end it
    start = member.header_offset + 30 + name + extra + header
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "c", start, shape, order)
