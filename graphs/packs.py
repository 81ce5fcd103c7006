"""Packs: many graphs in few files, as compaction leaves them, and read while others replace them.

packs/packs.json              names the packs; putting it in place is the commit
packs/graphs-<pack>.parquet   one row per graph, sorted by id: table `graphs`, its version, and where its rows begin
packs/nodes-<pack>.parquet    the rows of all its graphs, one graph after the other
packs/edges-<pack>.parquet
packs/deleted/<graph_id>.<version>   empty: this version of the graph was deleted from the pack that holds it
"""

import json
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphs.columns import WEIGHT_TYPE, graph_from_tables, info_from_row, with_later_columns
from graphs.errors import GraphError
from graphs.folder import DAMAGE, Stamp, check_columns, open_rows, stamp
from graphs.graph import AttributionGraph
from graphs.names import one_line
from graphs.schema import tables

PACKS = "packs"
MANIFEST = "packs.json"
DELETED = "deleted"
PARTS = ("graphs", "nodes", "edges")
INDEX_COLUMNS = pa.schema(
    [("version", pa.string()), ("weight_type", pa.string()), ("first_node", pa.int64()), ("first_edge", pa.int64())]
)
"""What a pack knows of each graph beside table `graphs`."""

_ATTEMPTS = 50  # of a reader whose packs are replaced under its hands


@dataclass(frozen=True)
class Pack:
    """One pack, its index read."""

    name: str
    folder: Path
    index: pa.Table
    """Table `graphs` of the pack, and `INDEX_COLUMNS`."""
    stamps: tuple[Stamp, ...] = ()
    problem: str = ""
    """Why its graphs cannot be read, if they cannot."""
    absent: frozenset[str] = frozenset()
    """Columns of tables `nodes` and `edges` that it was written before."""

    def path(self, part: str) -> Path:
        return self.folder / f"{part}-{self.name}.parquet"

    def row(self, graph_id: str) -> dict[str, Any]:
        """What the index knows of a graph."""
        [row] = self.index.slice(self.places[graph_id], 1).to_pylist()
        return row

    @cached_property
    def places(self) -> dict[str, int]:
        """The row of each graph in the index."""
        return {graph_id: row for row, graph_id in enumerate(self.index["graph_id"].to_pylist())}

    @cached_property
    def versions(self) -> dict[str, str]:
        """The version of each graph."""
        return dict(zip(self.places, self.index["version"].to_pylist(), strict=True))


def read_packs(folder: Path, known: dict[str, Pack]) -> list[Pack]:
    """The store's packs; `known` holds those that were read before, and is brought up to date."""
    for _ in range(_ATTEMPTS):
        names = read_manifest(folder)
        packs = [_opened(folder / PACKS, name, known) for name in names]
        if all(not pack.problem for pack in packs) or read_manifest(folder) == names:
            known.clear()
            known.update({pack.name: pack for pack in packs if not pack.problem})
            return packs
    raise GraphError(f"{folder / PACKS} is replaced faster than it can be read; ask again later.")


def read_manifest(folder: Path) -> list[str]:
    """The names of the store's packs."""
    path = folder / PACKS / MANIFEST
    try:
        names = json.loads(path.read_text("utf-8"))["packs"]
        if not all(isinstance(name, str) and name.isalnum() for name in names):
            raise ValueError(f"packs are {names}")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GraphError(f"{path} is unreadable ({one_line(error)}); restore it, graphs in packs need it.") from error
    return names


def deleted_versions(folder: Path) -> set[tuple[str, str]]:
    """Graph and version of what was deleted from packs.

    Read this before the packs: what was deleted from one that is gone is forgotten.
    """
    parent = folder / PACKS / DELETED
    with suppress(FileNotFoundError):
        return {(path.name.rpartition(".")[0], path.name.rpartition(".")[2]) for path in parent.iterdir()}
    return set()


def hidden_graphs(packs: Iterable[Pack], deleted: set[tuple[str, str]]) -> set[str]:
    """Graphs that are in a pack, but were deleted. Each is in one pack only."""
    versions = {graph_id: version for pack in packs if deleted for graph_id, version in pack.versions.items()}
    return {graph_id for graph_id, version in deleted if versions.get(graph_id) == version}


def without(index: pa.Table, hidden: Iterable[str]) -> pa.Table:
    """The rows of other graphs than the hidden ones."""
    hidden = list(hidden)
    if not hidden or not len(index):
        return index
    return index.filter(~pc.field("graph_id").isin(hidden))


def read_packed(pack: Pack, graph_id: str) -> AttributionGraph:
    """The graph in the pack. Raises one of `DAMAGE`."""
    if pack.problem:
        raise GraphError(pack.problem)
    row = pack.row(graph_id)
    with closing(RowGroups(pack.path("nodes"))) as nodes_file, closing(RowGroups(pack.path("edges"))) as edges_file:
        nodes = nodes_file.rows(row["first_node"], row["n_nodes"], graph_id)
        edges = edges_file.rows(row["first_edge"], row["n_edges"], graph_id)
    edges = edges.replace_schema_metadata({WEIGHT_TYPE: row["weight_type"]})
    return graph_from_tables(info_from_row(row), with_later_columns(nodes, "nodes"), edges)


class RowGroups:
    """A Parquet file of which the row groups that were read last are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_rows(path)
        footer = self._file.metadata
        self._ends = np.cumsum([footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
        self._groups = range(0)
        self._table = self._file.schema_arrow.empty_table()

    def rows(self, first: int, count: int, graph_id: str) -> pa.Table:
        """The rows of one graph. Raises one of `DAMAGE`."""
        begin, end = np.searchsorted(self._ends, [first, first + max(count, 1) - 1], side="right").tolist()
        groups = range(begin, min(end + 1, len(self._ends)))
        if groups != self._groups:
            self._table = self._file.read_row_groups(list(groups), use_threads=len(groups) > 1)
            self._groups = groups
        rows = self._table.slice(first - (int(self._ends[begin - 1]) if begin else 0), count)
        if len(rows) != count or rows["graph_id"].unique().to_pylist() not in ([], [graph_id]):
            raise GraphError(f"{self._path.name} does not hold graph {graph_id} where its index says")
        return rows

    def close(self) -> None:
        self._file.close()


def _opened(folder: Path, name: str, known: dict[str, Pack]) -> Pack:
    pack = known.get(name)
    if pack is not None:
        with suppress(OSError):
            if tuple(stamp(pack.path(part)) for part in PARTS) == pack.stamps:
                return pack
    return _open(folder, name)


def _open(folder: Path, name: str) -> Pack:
    index = pa.schema([*tables()["graphs"], *INDEX_COLUMNS]).empty_table()
    try:
        pack = Pack(name, folder, index)
        stamps = tuple(stamp(pack.path(part)) for part in PARTS)
        index = _read_index(pack.path("graphs"))
        absent = _check_footers(pack, index)
    except DAMAGE as error:
        return Pack(name, folder, index, problem=f"pack {name} is damaged: {one_line(error)}")
    return Pack(name, folder, index, stamps, absent=absent)


def _read_index(path: Path) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    names = [name for name in table.column_names if name not in INDEX_COLUMNS.names]
    if len(names) + len(INDEX_COLUMNS) != table.num_columns:
        raise GraphError(f"{path.name} lacks columns of an index")
    check_columns(table.select(names).schema, "graphs", path.name)
    return with_later_columns(table, "graphs")


def _check_footers(pack: Pack, index: pa.Table) -> frozenset[str]:
    """The columns that the pack was written before, if its files belong together."""
    absent: set[str] = set()
    for part in ("nodes", "edges"):
        footer = pq.read_metadata(pack.path(part))
        columns = footer.schema.to_arrow_schema()
        check_columns(columns, part, pack.path(part).name)
        expected = int(index[f"n_{part}"].to_numpy().sum())
        if footer.num_rows != expected:
            raise GraphError(f"{pack.path(part).name} has {footer.num_rows} rows, not {expected}")
        absent |= set(tables()[part].names) - set(columns.names)
    return frozenset(absent)
