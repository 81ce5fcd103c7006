"""What to do when memory runs out, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tracer.errors import TraceError
from transcoders.errors import is_lack_of_memory

TRACE_LESS = (
    "attribute fewer features (--max-features 5000, or a lower --coverage), shorten the prompt, or load the weights in "
    "half precision (--dtype bfloat16)"
)
SAVE_LESS = (
    "save less: prune (no --no-prune), or attribute fewer features (--max-features 5000) and keep fewer of their "
    "inputs (--row-share 0.9)"
)
TELL_LESS = "{graph_id} is saved; look at it with trace sql, or on a machine with more memory"
LOAD_LESS = "load the weights in half precision (--dtype bfloat16), or a smaller model or transcoder"


@contextmanager
def explaining_lack_of_memory(advice: str = TRACE_LESS) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or not, into a TraceError that says what takes less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise TraceError(f"memory ran out; {advice}.") from error
