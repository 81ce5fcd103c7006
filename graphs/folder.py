"""The folder of one graph: written so that it is there whole or not at all, and read while others replace it.

graph.parquet          one row; putting it in place is the commit
nodes-<nonce>.parquet  the nonce is in the metadata of graph.parquet, so a replaced version is never mixed in
edges-<nonce>.parquet
"""

import base64
import binascii
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from graphs.columns import (
    edges_to_table,
    graph_from_tables,
    info_from_row,
    info_to_table,
    nodes_to_table,
    with_later_columns,
)
from graphs.errors import GraphError
from graphs.files import is_temporary, new_nonce, sync_folder, temporary_path, unread, write_durably
from graphs.graph import AttributionGraph
from graphs.schema import LATER_COLUMNS, tables

HEAD = "graph.parquet"

DAMAGE = (GraphError, pa.ArrowException, OSError)
"""What reading a folder with broken, missing or foreign files may raise."""

_NONCE = b"nonce"
_TAILS = b"tails"
_ROW = b"row"
_SCHEMA = b"ARROW:schema"
_TAIL = 1 << 14  # bytes that hold the footer of a file of one graph
_ROW_GROUP = 1 << 20  # rows of a file that are written at once
_WRITING, _WRITING_ROW = 1 << 26, 192  # bytes of addresses that writing takes at most, and each row of the group
_ATTEMPTS = 50  # of a reader whose graph is replaced under its hands
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Head:
    """The graph's row of table `graphs`, and the files that belong to it."""

    table: pa.Table
    version: str
    """No other save has it."""
    nodes: Path
    edges: Path
    tails: str
    """Sizes and checksums of the ends of nodes and edges as they were written; "" if they were not noted yet."""

    @cached_property
    def row(self) -> dict[str, Any]:
        [row] = self.table.to_pylist()
        return row

    @property
    def graph_id(self) -> str:
        return self.table["graph_id"][0].as_py()


Stamp = tuple[int, int, int]
"""Changes when a file is replaced or written to."""


@dataclass(frozen=True)
class Checked:
    """A head whose files were found readable, and which files these were."""

    head: Head
    stamps: tuple[Stamp, ...]


def write_graph(folder: Path, graph: AttributionGraph, graph_id: str) -> None:
    """Put the graph into the folder in place of an older version; only one process may do so at a time."""
    nonce = new_nonce()
    head = info_to_table(graph, graph_id)
    paths = (*_data_files(folder, nonce), temporary_path(folder / HEAD, nonce))
    try:
        for path, table in zip(paths, (nodes_to_table(graph, graph_id), edges_to_table(graph, graph_id)), strict=False):
            write_durably(path, partial(_write, table))
        write_durably(paths[-1], partial(_write_head, head, {_NONCE: nonce, _TAILS: _tails(*paths[:2])}))
        sync_folder(folder)
        paths[-1].replace(folder / HEAD)
    except BaseException:
        if not _is_committed(folder, nonce):
            _remove(folder, set(paths))
        raise
    sync_folder(folder)
    # the version that was replaced, and what killed saves left behind; a query may need them until the next save
    with unread(folder.parent) as free:
        if free:
            left = {path for path in folder.iterdir() if is_temporary(path) or _is_data(path)}
            _remove(folder, left - set(paths))


def read_graph(folder: Path) -> AttributionGraph:
    """The graph in the folder. Raises one of `DAMAGE`."""
    return steadily(folder, _read_data)


def check_graph(folder: Path) -> Checked:
    """The graph's head, if the footers of all three files are readable. Raises one of `DAMAGE`."""
    commit = stamp(folder / HEAD)  # before reading, so that a later version does not pass for this one
    return steadily(folder, lambda head: Checked(_check_footers(head), (commit, *map(stamp, (head.nodes, head.edges)))))


def is_unchanged(folder: Path, checked: Checked) -> bool:
    """Whether the folder's files are still those that were checked."""
    head = checked.head
    with suppress(FileNotFoundError):
        return tuple(map(stamp, (folder / HEAD, head.nodes, head.edges))) == checked.stamps
    return False


def read_saved(folder: Path) -> tuple[Head, Stamp, pa.Table, pa.Table]:
    """The graph's head and the stamp of its file, its nodes and its edges. Raises one of `DAMAGE`."""
    commit = stamp(folder / HEAD)
    return steadily(folder, lambda head: (_check_footers(head), commit, _read(head.nodes), _read(head.edges)))


def read_version(folder: Path) -> str:
    """Which save is in the folder. Raises one of `DAMAGE`."""
    return _read_head(folder).version


def remove_saved(folder: Path, saved: Stamp | None) -> None:
    """Take the graph out of its folder if it is still this one, or what is left where none is; needs the folder's lock.

    What others put beside it stays.
    """
    if head_stamp(folder) == saved:
        (folder / HEAD).unlink(missing_ok=True)  # first, so that what is left is no graph
        _remove(folder, {path for path in folder.iterdir() if is_temporary(path) or _is_data(path)})


def steadily(folder: Path, read: Callable[[Head], _Result]) -> _Result:
    """What `read` makes of the graph's head; done again if the graph was replaced meanwhile."""
    head = _read_head(folder)
    for _ in range(_ATTEMPTS):
        try:
            return read(head)
        except DAMAGE:
            before, head = head, _read_head(folder)
            if head.nodes == before.nodes:
                raise
    raise GraphError("it is replaced faster than it can be read")


def stamp(path: Path) -> Stamp:
    """Which version of the file this is."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def head_stamp(folder: Path) -> Stamp | None:
    """Which save is in the folder; None if none is."""
    with suppress(FileNotFoundError):
        return stamp(folder / HEAD)
    return None


def _data_files(folder: Path, nonce: str) -> tuple[Path, Path]:
    return folder / f"nodes-{nonce}.parquet", folder / f"edges-{nonce}.parquet"


def _is_data(path: Path) -> bool:
    return path.match("nodes-*.parquet") or path.match("edges-*.parquet")


def _write(table: pa.Table, path: Path) -> None:
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    if "weight" in table.column_names:
        # bytes of equal rank together: single precision stored as double takes hardly more room
        options |= {"use_dictionary": ["graph_id"], "column_encoding": {"weight": "BYTE_STREAM_SPLIT"}}
    # asked for first, as Arrow ends the process if memory runs out while it writes
    pa.allocate_buffer(_WRITING + min(len(table), _ROW_GROUP) * _WRITING_ROW)
    pq.write_table(table, path, row_group_size=_ROW_GROUP, **options)


def _write_head(head: pa.Table, metadata: dict[bytes, str], path: Path) -> None:
    """One row, which lists and queries read of every graph: plain is smallest and fastest.

    Its footer has the row as well, as Arrow writes batches: thirty columns of one row take longer to read than a file
    takes to open.
    """
    [row] = head.combine_chunks().to_batches()
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, head.schema, write_page_checksum=True, **options) as writer:
        writer.write_table(head)
        content = base64.b64encode(row.serialize())
        writer.add_key_value_metadata(metadata | {_ROW: b"%d:%b" % (zlib.crc32(content), content)})


def _is_committed(folder: Path, nonce: str) -> bool:
    with suppress(*DAMAGE):
        return _read_head(folder).nodes == _data_files(folder, nonce)[0]
    return False


def _remove(folder: Path, paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()  # of a first save that failed; succeeds only if nothing is left


def _read_head(folder: Path) -> Head:
    # one open file, so that row and nonce are of one version
    with pq.ParquetFile(folder / HEAD, page_checksum_verification=True) as file:
        metadata = file.metadata.metadata or {}
        table = _row(metadata) if _ROW in metadata else file.read(use_threads=False)
    nonce = metadata.get(_NONCE, b"").decode("ascii", "replace")
    if not (nonce.isalnum() and table.num_rows == 1):
        raise GraphError(f"{HEAD} has {table.num_rows} rows and nonce {nonce!r}")
    check_columns(table.schema, "graphs", HEAD)
    table = with_later_columns(table, "graphs")
    head = Head(table, nonce, *_data_files(folder, nonce), tails=metadata.get(_TAILS, b"").decode("ascii", "replace"))
    if head.graph_id != folder.name:
        raise GraphError(f"{HEAD} holds graph {head.graph_id}")
    return head


def _row(metadata: dict[bytes, bytes]) -> pa.Table:
    """The one row of a head, out of its footer."""
    checksum, _, content = metadata[_ROW].partition(b":")
    if checksum != b"%d" % zlib.crc32(content):
        raise GraphError(f"the row in the footer of {HEAD} is not the one that was written")
    try:
        row = pa.ipc.read_record_batch(pa.py_buffer(base64.b64decode(content)), _schema(metadata.get(_SCHEMA, b"")))
        row.validate(full=True)  # a checksum proves no good will
    except (binascii.Error, EOFError) as error:
        raise GraphError(f"the row in the footer of {HEAD} cannot be read: {error}") from error
    return pa.Table.from_batches([row])


@lru_cache(16)
def _schema(encoded: bytes) -> pa.Schema:
    """A schema as Arrow notes it in Parquet files; thousands of files have the same."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded)))


def _read_data(head: Head) -> AttributionGraph:
    _check_footers(head)
    return graph_from_tables(info_from_row(head.row), with_later_columns(_read(head.nodes), "nodes"), _read(head.edges))


def _read(path: Path) -> pa.Table:
    with open_rows(path) as file:
        return file.read()


def open_rows(path: Path) -> pq.ParquetFile:
    """Rows of nodes or edges; their graph is read as one text and a number per row, which is much less than texts."""
    return pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["graph_id"])


def _tails(*paths: Path) -> str:
    """Sizes of the files and checksums of their ends."""
    found = []
    for path in paths:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            found.append(f"{size}:{zlib.crc32(file.readall())}")
    return " ".join(found)


def _check_footers(head: Head) -> Head:
    if head.tails and _tails(head.nodes, head.edges) == head.tails:
        return head  # as they were written, which is much quicker to see than what is in them
    for path, name in ((head.nodes, "nodes"), (head.edges, "edges")):
        footer = pq.read_metadata(path)
        check_columns(footer.schema.to_arrow_schema(), name, path.name)
        if footer.num_rows != head.row[f"n_{name}"]:
            raise GraphError(f"{path.name} has {footer.num_rows} rows, not {head.row[f'n_{name}']}")
    return head


def check_columns(schema: pa.Schema, table: str, name: str) -> None:
    """Raise `GraphError` unless these are the columns of the table, today's or those of an older version."""
    lacking = frozenset(LATER_COLUMNS.get(table, {}).keys() - set(schema.names))
    if not schema.equals(_columns_without(lacking, table), check_metadata=False):
        raise GraphError(f"{name} does not have the columns of table {table}")


@cache
def _columns_without(lacking: frozenset[str], table: str) -> pa.Schema:
    return pa.schema([field for field in tables()[table] if field.name not in lacking])
