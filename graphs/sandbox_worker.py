"""The process in which one query of a stranger runs: reads it from stdin, gives up its rights, answers on stdout."""

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from graphs.content import Limits
from graphs.database import parameter_names
from graphs.errors import GraphError
from graphs.store import GraphStore

if sys.platform != "win32":
    import resource

_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS
_LONGEST_ERROR = 2_000  # a query says what is in its errors
_FOR_DUCKDB = 0.5  # of the address space; the rest is for libraries, Arrow's copies and threads


def main() -> None:
    """Answer the one query on stdin: T, whether rows were left out, and an Arrow stream; or E and one line of text."""
    request = json.loads(sys.stdin.buffer.read())
    _give_up_rights(request["memory"], request["seconds"])
    limits = Limits(
        memory=f"{int(request['memory'] * _FOR_DUCKDB)}B", threads=2, max_rows=request["max_rows"] + 1, plain=True
    )
    try:
        _write(_answer(request, limits))
    except GraphError as error:
        _write(b"E" + str(error)[:_LONGEST_ERROR].encode("utf-8", "replace"))


def _answer(request: dict[str, Any], limits: Limits) -> bytes:
    store, sql = GraphStore(request["folder"]), request["sql"]
    named = parameter_names(sql)
    parameters = {name: value for name, value in request["parameters"].items() if name in named}
    table = store.query(sql, parameters, limits)
    n_cells = (len(table) + 1) * table.num_columns
    if n_cells > request["max_cells"]:
        raise GraphError(
            f"the answer has {len(table)} rows of {table.num_columns} columns, more than {request['max_cells']} "
            "values; ask for fewer columns or rows."
        )
    answer = _encoded(table, request["max_rows"])
    if len(answer) > request["max_bytes"]:
        raise GraphError(
            f"the answer has {len(answer)} bytes, more than {request['max_bytes']}; ask for fewer columns or rows."
        )
    return answer


def _give_up_rights(memory: int, seconds: float) -> None:
    if sys.platform == "win32":
        return
    for limit, value in (
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _address_space() + memory),
        # for each of its threads, and what it has used already; the clock outside comes first
        (resource.RLIMIT_CPU, int(4 * seconds) + 5),
    ):
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # who asked was killed, and with it the clock outside


def _address_space() -> int:
    """What this process has of it, where that can be told."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _encoded(table: pa.Table, max_rows: int) -> bytes:
    sink: Any = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.slice(0, max_rows))
    return b"T" + (b"1" if len(table) > max_rows else b"0") + sink.getvalue().to_pybytes()


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
