"""What to do when memory runs out, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tracer.errors import TraceError

TRACE_LESS = (
    "attribute fewer features (--max-features 5000, or a lower --coverage), shorten the prompt, or load the weights in "
    "half precision (--dtype bfloat16)"
)


@contextmanager
def explaining_lack_of_memory(advice: str = TRACE_LESS) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or not, into a TraceError that says what takes less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError, known by its text only.
        lacking = "not enough memory" in str(error) or "can't allocate" in str(error)
        if not lacking and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise TraceError(f"memory ran out; {advice}.") from error
