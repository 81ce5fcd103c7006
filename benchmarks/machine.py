"""What a machine can do: its rate in large matrix products and its bandwidth in copies. Needs torch alone."""

import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def now(device: str) -> float:
    """Seconds, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(device: str) -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says of a process begins with what its parent held when it was started
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copying half a gigabyte."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source), device)


def best_seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The shortest of some runs, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return min(seconds)
