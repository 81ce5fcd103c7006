"""Files that are there whole or not at all, and a lock that dies with its owner."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from graphs.errors import GraphError

if sys.platform != "win32":
    import fcntl


def new_nonce() -> str:
    """A name part that no other save has."""
    return secrets.token_hex(8)


def temporary_path(path: Path, nonce: str) -> Path:
    """Where a file is written before it takes its name; readers ignore names that start with a dot."""
    return path.with_name(f".{path.name}.{nonce}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether an interrupted write left this file behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill the file, and return when it is on the disk."""
    write(path)
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place whole: whoever opens the path finds the old content or the new, never a part."""
    temporary = temporary_path(path, new_nonce())
    try:
        write_durably(temporary, write)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in the folder are on the disk."""
    if sys.platform == "win32":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create the folder and be the only one that writes in it; the lock ends with the process at the latest.

    Windows has no such lock: there, do not save one graph from two processes at the same time.
    """
    if sys.platform == "win32":
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # somebody deleted it meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(folder, handle):  # or else somebody deleted it while we waited
                yield
                return
        finally:
            os.close(handle)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever is replaced in the folder meanwhile stays readable: nobody finds the folder `unread`."""
    if sys.platform == "win32":
        yield
        return
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Whether nobody is `reading` the folder; who begins to read waits until this ends."""
    if sys.platform == "win32":
        yield True
        return
    # those who ask queue at the folder above, so that they do not find each other
    with _locked(folder.parent, fcntl.LOCK_EX), ExitStack() as held:
        try:
            held.enter_context(_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free


@contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, operation)
        yield
    finally:
        os.close(handle)


def _is_still(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def file_errors_as_graph_errors(what: str) -> Iterator[None]:
    """Tell a full disk, a missing permission or a file in the way in one line: these are no bugs."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        place = f" ({error.filename})" if error.filename else ""
        raise GraphError(
            f"cannot {what}: {reason}{place}; make room or allow access, or use another folder."
        ) from error
