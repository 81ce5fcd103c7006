"""The files of a pack: written graph by graph, and read graph by graph in the same order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graphs.columns import WEIGHT_TYPE, graph_from_tables, info_from_row, nodes_to_table, with_later_columns
from graphs.files import write_durably
from graphs.folder import Stamp, read_saved
from graphs.packs import INDEX_COLUMNS, PARTS, Pack, RowGroups
from graphs.schema import LATER_COLUMNS, tables

ROW_GROUP = {"nodes": 1 << 15, "edges": 1 << 17}
"""Rows that are read to open one graph: enough for quick queries over all, and read in a few milliseconds."""

_OPTIONS: dict[str, Any] = {"compression": "zstd", "compression_level": 6, "write_page_checksum": True}
# bytes of equal rank together: single precision stored as double takes hardly more room
_FLOATS = {field.name: "BYTE_STREAM_SPLIT" for field in tables()["nodes"] if pa.types.is_floating(field.type)}
_PART_OPTIONS: dict[str, dict[str, Any]] = {
    "nodes": {
        "use_dictionary": ["graph_id", "kind", "layer", "position", "token", "word", "label", "token_id"],
        "column_encoding": _FLOATS
        | {"node": "DELTA_BINARY_PACKED", "reached_from.list.element": "DELTA_BINARY_PACKED", "feature": "PLAIN"},
    },
    "edges": {
        "use_dictionary": ["graph_id"],
        # targets ascend, and sources within one target
        "column_encoding": {"source": "DELTA_BINARY_PACKED", "target": "DELTA_BINARY_PACKED"}
        | {"weight": "BYTE_STREAM_SPLIT"},
    },
}


@dataclass(frozen=True)
class Saved:
    """A graph on its way into a pack."""

    index: pa.Table
    """Its row of table `graphs`."""
    version: str
    weight_type: str
    nodes: pa.Table
    edges: pa.Table
    stamp: Stamp | None
    """Of the head of the folder it was read from."""

    @property
    def graph_id(self) -> str:
        return self.index["graph_id"][0].as_py()


class PackWriter:
    """A pack that is being written; not a pack of the store before packs.json names it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.n_edges = 0
        self._paths = {part: folder / f"{part}-{name}.parquet" for part in PARTS}
        self._index: list[pa.Table] = []
        self._rows = {"nodes": 0, "edges": 0}
        self._buffers: dict[str, list[pa.Table]] = {"nodes": [], "edges": []}
        self._files: dict[str, pq.ParquetWriter] = {}

    def add(self, saved: Saved) -> None:
        """Append a graph; graphs come in the order of their ids."""
        place = [[saved.version], [saved.weight_type], [self._rows["nodes"]], [self._rows["edges"]]]
        index = saved.index
        for column, value in zip(INDEX_COLUMNS, place, strict=True):
            index = index.append_column(column, pa.array(value, column.type))
        self._index.append(index)
        self.n_edges += len(saved.edges)
        for part, table in (("nodes", saved.nodes), ("edges", saved.edges)):
            self._rows[part] += len(table)
            self._buffers[part].append(table)
            if sum(map(len, self._buffers[part])) >= ROW_GROUP[part]:
                self._flush(part)

    def close(self) -> None:
        """Write what is left, and return when all of it is on the disk."""
        for part in self._buffers:
            self._flush(part)
            self._files.pop(part).close()
            write_durably(self._paths[part], lambda path: None)
        index = pa.concat_tables(self._index).replace_schema_metadata(None)
        write_durably(self._paths["graphs"], partial(pq.write_table, index, **_OPTIONS))

    def discard(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            file.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def _flush(self, part: str) -> None:
        schema = tables()[part].remove_metadata()
        if part not in self._files:
            self._files[part] = pq.ParquetWriter(self._paths[part], schema, **_OPTIONS, **_PART_OPTIONS[part])
        if self._buffers[part]:
            table = pa.concat_tables(table.cast(schema) for table in self._buffers[part])
            self._files[part].write_table(table, row_group_size=4 * ROW_GROUP[part])
        self._buffers[part].clear()


def saved_in_folder(folder: Path) -> Saved:
    """The graph in a folder of its own. Raises one of `DAMAGE`."""
    head, stamp, nodes, edges = read_saved(folder)
    weight_type = (edges.schema.metadata or {}).get(WEIGHT_TYPE, b"float64").decode()
    return Saved(head.table, head.version, weight_type, _in_todays_columns(head.row, nodes, edges), edges, stamp)


@contextmanager
def saved_in_packs() -> Iterator[Callable[[Pack, str], Saved]]:
    """A reader of graphs in packs, which is quick if they are asked for in the order of their ids."""
    readers: dict[Path, RowGroups] = {}

    def read(pack: Pack, graph_id: str) -> Saved:
        row = pack.row(graph_id)
        rows = {}
        for part in ("nodes", "edges"):
            path = pack.path(part)
            if path not in readers:
                readers[path] = RowGroups(path)
            rows[part] = readers[path].rows(row[f"first_{part[:-1]}"], row[f"n_{part}"], graph_id)
        nodes = _in_todays_columns(row, rows["nodes"], rows["edges"])
        index = pack.index.slice(pack.places[graph_id], 1).select(tables()["graphs"].names)
        return Saved(index, row["version"], row["weight_type"], nodes, rows["edges"], None)

    try:
        yield read
    finally:
        for reader in readers.values():
            reader.close()


def _in_todays_columns(row: dict[str, Any], nodes: pa.Table, edges: pa.Table) -> pa.Table:
    """What follows from the graph is known now, also if it was saved before there was a column for it."""
    if not LATER_COLUMNS["nodes"].keys() - set(nodes.column_names):
        return nodes
    graph = graph_from_tables(info_from_row(row), with_later_columns(nodes, "nodes"), edges)
    return nodes_to_table(graph, row["graph_id"])
