"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from transcoders.errors import TranscoderError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place whole: whoever opens the path finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Tell a full disk or a missing permission in one line: these are no bugs."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TranscoderError(f"cannot {what}: {reason}; make room or allow access, then run it again.") from error
