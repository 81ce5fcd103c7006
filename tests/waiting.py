"""Waiting for other processes: for what they do rather than for seconds, since machines are slow at times."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

LONGEST = 240.0
"""Seconds; who waits in vain only."""


def wait_until(
    find: Callable[[], Found], process: subprocess.Popen | None = None, *, seconds: float = LONGEST
) -> Found:
    """What is found at last, looking again and again; the process must not end before."""
    until = time.monotonic() + seconds
    while not (found := find()):
        assert process is None or process.poll() is None, f"it ended: {process.communicate()}"
        assert time.monotonic() < until, f"it did not come to it within {seconds} s"
        time.sleep(0.01)
    return found


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """What the process said until its end; one without end is killed, or else it would slow all later tests."""
    try:
        return process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether the process has a handler for the signal by now."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)
