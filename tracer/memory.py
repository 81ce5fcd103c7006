"""How much memory there is, and what to do when it runs out, in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tracer.errors import TraceError


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":  # a container
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Turn a failed allocation, on a GPU or not, into a TraceError that says what takes less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError, known by its text only.
        if type(error) is RuntimeError and "not enough memory" not in str(error) and "can't allocate" not in str(error):
            raise
        raise TraceError(
            "memory ran out; attribute fewer features (--max-features 5000, or a lower --coverage), shorten the "
            "prompt, or load the weights in half precision (--dtype bfloat16)."
        ) from error
