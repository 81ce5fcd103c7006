"""How much memory a training run takes, in a process that has taken none before."""

import re
from pathlib import Path

import torch

from tests.transcoders.test_train import SMALL, trained
from transcoders import TrainConfig


def train(folder: Path, config: TrainConfig) -> None:
    """Write how many bytes were taken at most."""
    torch.set_num_threads(1)
    trained(folder / "small", SMALL)  # what torch itself takes
    before = memory_in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    trained(folder / "run", config)
    (folder / "peak").write_text(str(memory_in_use("VmHWM") - before))


def memory_in_use(name: str) -> int:
    """Bytes of this process now (VmRSS) or at most so far (VmHWM)."""
    [kilobytes] = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
