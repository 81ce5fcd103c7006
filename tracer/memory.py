"""How much memory there is, and what to do when it runs out, in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tracer.errors import TraceError


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type == "cuda":  # what torch keeps for the next tensors is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        # in a container; pages of files that were read count as used, but make room when asked
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(pages["inactive_file"]) - int(pages["active_file"])
        free = min(free, int(limit) - used)
    return free


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Turn a failed allocation, on a GPU or not, into a TraceError that says what takes less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError, known by its text only.
        lacking = "not enough memory" in str(error) or "can't allocate" in str(error)
        if not lacking and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise TraceError(
            "memory ran out; attribute fewer features (--max-features 5000, or a lower --coverage), shorten the "
            "prompt, or load the weights in half precision (--dtype bfloat16)."
        ) from error
