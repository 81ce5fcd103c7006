"""SQL of strangers: each query in a process of its own that may do little, and is killed when it does too much.

DuckDB's own limits do not hold: some functions cannot be interrupted and allocate without asking. So the operating
system's are set as well: address space, processor time, no file may be written, no new rights; and a clock outside.
On Windows and macOS only the clock and DuckDB's own limits hold.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from graphs.errors import GraphError
from graphs.store import GraphStore

_LOOK_AGAIN = 0.2  # seconds until the next look whether somebody still waits
MEMORY = 2 << 30
"""Bytes of address space a query may have, beside what the libraries have before it."""

# isolated (-I), so that neither the environment nor the folder it starts in says what is imported
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from graphs.sandbox_worker import main; main()"
# libraries that reserve no address space in advance
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
_NEEDED_BY_WINDOWS = ("SYSTEMROOT",)
_TABLE, _ERROR = b"T", b"E"


@dataclass(frozen=True)
class Answer:
    """What a query gave."""

    table: pa.Table
    truncated: bool
    """Whether there were more rows."""


def query(
    store: GraphStore,
    sql: str,
    parameters: Mapping[str, object],
    *,
    seconds: float = 5.0,
    memory: int = MEMORY,
    max_rows: int = 1_000,
    max_cells: int = 100_000,
    max_bytes: int = 4 << 20,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Answer:
    """The answer to a query that nobody has looked at. Raises `GraphError` if it fails, or takes too much of anything.

    Parameters are numbers, truth values, texts, None, and lists of them; those that the query does not name are left
    out. Of the answer's columns those that are neither numbers nor truth values, nor lists and the like of them, are
    text. `is_wanted` is asked again and again, and the query stopped when it is not.
    """
    request = {
        "folder": str(store.folder.resolve()),
        "sql": sql.encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
        "parameters": dict(parameters),
        "seconds": seconds,
        "memory": memory,
        "max_rows": max_rows,
        "max_cells": max_cells,
        "max_bytes": max_bytes,
    }
    given = _request(request)
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as stdin:
        stdin.write(given)
        stdin.seek(0)
        code, output = _run(stdin, Path(empty), seconds, is_wanted)
    return _answer(code, output, seconds, memory)


def _request(request: dict[str, object]) -> bytes:
    try:
        return json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise GraphError(f"a parameter is no number, truth value, text or list of them ({error}).") from error


def _run(request: IO[bytes], folder: Path, seconds: float, is_wanted: Callable[[], bool]) -> tuple[int | None, bytes]:
    """Exit status and output of the worker; no status if it had to be killed."""
    path = json.dumps([str(Path(entry).resolve()) for entry in sys.path])
    worker = subprocess.Popen(
        [sys.executable, "-I", "-c", _START, path],
        stdin=request,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=_ENVIRONMENT | {name: os.environ[name] for name in _NEEDED_BY_WINDOWS if name in os.environ},
        close_fds=True,
        start_new_session=True,
    )
    until = time.monotonic() + seconds
    try:
        while True:
            try:
                output, _ = worker.communicate(timeout=min(_LOOK_AGAIN, max(0.0, until - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() >= until:
                    return None, b""
                if not is_wanted():
                    raise GraphError("the query was stopped: nobody waits for its answer any more.") from None
    finally:  # also if somebody interrupts us
        worker.kill()
        worker.communicate()
    return worker.returncode, output


def _answer(code: int | None, output: bytes, seconds: float, memory: int) -> Answer:
    if code is None:
        raise GraphError(f"the query took longer than {seconds:g} s and was stopped; ask for less, or of fewer graphs.")
    if code == 0 and output[:1] == _TABLE:
        with pa.ipc.open_stream(output[2:]) as stream:
            return Answer(stream.read_all(), output[1:2] == b"1")
    if code == 0 and output[:1] == _ERROR:
        raise GraphError(output[1:].decode("utf-8", "replace"))
    raise GraphError(
        f"the query was stopped: it needed more than {memory / 1e9:.1f} GB of memory, or did what it may not; ask for "
        "less, or of fewer graphs."
    )
