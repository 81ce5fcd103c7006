"""The error of this package, and what is known of errors of others."""

import errno

import torch


class TranscoderError(ValueError):
    """Something the caller can mend: one line that says what was wrong, what was expected and what to do."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left; torch and safetensors say so on a CPU in the text of the error only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(text in str(error) for text in ("not enough memory", "allocate memory", "can't start new thread"))
