"""How much memory training takes, in a process that has taken none before: at the start, and in a run."""

import re
from pathlib import Path

import torch

from tests.transcoders.test_train import SMALL, trained
from transcoders import TrainConfig
from transcoders.start import start_layer
from transcoders.streams import sample_size

WIDTH = 16
"""Of the MLP inputs and outputs from which features start."""


def train(folder: Path, config: TrainConfig) -> None:
    """Write how many bytes a run took at most."""
    torch.set_num_threads(1)
    trained(folder / "small", SMALL)  # what torch itself takes
    before = _count_from_here()
    trained(folder / "run", config)
    (folder / "peak").write_text(str(_peak_since(before)))


def start(folder: Path, config: TrainConfig) -> None:
    """Write how many bytes it took at most to find the features of one layer."""
    torch.set_num_threads(1)
    small = torch.randn(2, 64, WIDTH, generator=torch.Generator().manual_seed(0))
    start_layer(*small, 8, 4, 0.02, torch.Generator())  # what torch itself takes
    before = _count_from_here()
    inputs, outputs = torch.randn(2, sample_size(config), WIDTH, generator=torch.Generator().manual_seed(0))
    start_layer(inputs, outputs, config.n_features, config.k, 0.02, torch.Generator().manual_seed(1), at_once=2048)
    (folder / "peak").write_text(str(_peak_since(before)))


def _count_from_here() -> tuple[int, int]:
    """Forget the peak so far; returns the bytes in use now, and how many of these are pages of files."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_in_use("VmRSS"), memory_in_use("RssFile")


def _peak_since(before: tuple[int, int]) -> int:
    """The most bytes in use since then, without the code of libraries that was read in meanwhile."""
    in_use, files = before
    return memory_in_use("VmHWM") - in_use - (memory_in_use("RssFile") - files)


def memory_in_use(name: str) -> int:
    """Bytes of this process now (VmRSS), those of files among them (RssFile), or at most so far (VmHWM)."""
    [kilobytes] = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
