"""A training run that is killed in the middle of writing its second checkpoint, from where it starts or goes on."""

import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.transcoders.test_train import SMALL, trained

EVERY = 3
"""Steps between checkpoints."""
CONFIG = replace(SMALL, tokens=150 * 256)


def train(folder: Path, log: Path, *, event: int = 0, size: int = 0) -> None:
    """Train until killed: at that event of the file system after the first checkpoint, or when a file is so large.

    The log has a line for every step that was done.
    """
    torch.set_num_threads(1)
    if event:
        _kill_at(event, folder / "checkpoint")
    done = []

    def on_step(step: int, steps: int) -> None:
        done.append(step)
        with log.open("a") as file:
            file.write(f"{step}\n")
        if size and len(done) == EVERY + 1:
            _kill_beyond(size)

    trained(folder, CONFIG, checkpoint_every=EVERY, report_every=10, on_step=on_step)


def _kill_at(event: int, folder: Path) -> None:
    """Kill this process before the nth event there: a file is made, opened, moved or removed. A rename is the first."""
    seen = []

    def count(name: str, arguments: tuple) -> None:
        if name == "os.remove" or (arguments and str(arguments[0]).startswith(str(folder))):
            if seen or name == "os.rename":
                seen.append(name)
            if len(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _kill_beyond(size: int) -> None:
    """Let the system kill this process in the middle of the first write that makes a file larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
