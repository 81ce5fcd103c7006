"""A folder in a publisher's layout is read in three ways, and each must compute what the publisher's formula says."""

from pathlib import Path

import torch
from torch import Tensor

from transcoders import CrossLayerTranscoder, convert, load, load_on_demand, open_stored


def normal(seed: int):
    """A source of random tensors, each other than the last."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def readings(folder: Path, scratch: Path) -> list[CrossLayerTranscoder]:
    """The transcoder in memory, on demand, and in memory after it was converted to the native layout."""
    convert(open_stored(folder), scratch / "converted")
    return [load(folder), load_on_demand(folder), load(scratch / "converted")]


def assert_computes(folder: Path, scratch: Path, inputs: Tensor, expected: Tensor) -> None:
    """Every reading of the folder gives the expected MLP outputs."""
    for transcoder in readings(folder, scratch):
        torch.testing.assert_close(transcoder(inputs), expected, atol=2e-5, rtol=2e-5)
