"""A folder of graphs as Parquet files. A save is atomic: a reader sees a graph whole or not at all.

store.json                   the version of the format
graphs/<graph_id>/           one graph as it was saved, see `graphs.folder`; what checks added, see `graphs.additions`
packs/                       many graphs in few files, see `graphs.packs`; a graph's folder comes before its pack
annotations/<graph_id>.json  what people added to the graph, wherever it is, see `graphs.annotations`
comparisons/                 several graphs as one, see `graphs.comparisons`
features/<name>.parquet      what is known about the features of one transcoder
queries/<name>.sql           SQL that was saved by name
"""

import builtins
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graphs.additions import ADDITIONS, added_files, fitted, write_rows
from graphs.annotations import NOTHING, Annotations, read_annotations, supernode_table, write_annotations
from graphs.columns import info_from_row, infos_from_table
from graphs.compact import Compacted, compact_folder, mark_deleted
from graphs.comparisons import Comparison, check_comparison, comparison_contents, delete_comparison, save_comparison
from graphs.content import UNLIMITED, Content, Limits
from graphs.description import check_folder, check_is_store, check_writable, create_folder
from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, locked_folder, reading, write_atomically
from graphs.folder import DAMAGE, HEAD, Checked, Head, check_graph, head_stamp, is_unchanged, read_graph, write_graph
from graphs.graph import AttributionGraph, GraphInfo
from graphs.merge import Merged
from graphs.names import check_graph_id, closest, digest, graph_id_of, is_graph_id, one_line, shown, slug, some
from graphs.packs import DELETED, PACKS, Pack, deleted_versions, hidden_graphs, read_packed, read_packs, without
from graphs.queries import check_query, delete_query, query_names, read_query, write_query
from graphs.schema import tables
from graphs.side_files import DamagedFile, damaged_files

_TRANSCODER = b"transcoder"
_PARTS = ("graphs", "features")  # folders that all that trace write to
_ATTEMPTS = 50  # of a reader whose graphs are moved or deleted under its hands


@dataclass(frozen=True)
class StoredGraph:
    """What a list of graphs shows of one, without its nodes and edges."""

    graph_id: str
    info: GraphInfo
    n_nodes: int
    n_edges: int


@dataclass(frozen=True)
class DamagedGraph:
    """A graph whose files are not all there and whole."""

    graph_id: str
    reason: str


@dataclass(frozen=True)
class _Packed:
    """The packs at one moment, and the graphs of them that do not count: deleted, or in a folder of their own."""

    packs: list[Pack]
    hidden: set[str]


class GraphStore:
    """A folder of graphs; a folder that does not exist yet is created by the first save."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._checked: dict[str, Checked] = {}
        self._packs: dict[str, Pack] = {}
        check_folder(self.folder)

    def check_writable(self) -> None:
        """Raise `GraphError` unless graphs and their features can be saved here."""
        check_writable(self.folder, _PARTS)

    def save(self, graph: AttributionGraph, annotations: Annotations | None = None) -> str:
        """Put the graph into the store and return its id; the same question asked again replaces its graph.

        What people added to it stays, or becomes what is given.
        """
        graph_id = graph_id_of(graph.info)
        with file_errors_as_graph_errors(f"save graph {graph_id} to {self.folder}"):
            create_folder(self.folder)
            with locked_folder(self._path(graph_id)):
                if annotations is not None:
                    write_annotations(self.folder, graph_id, annotations)  # first, so that no graph lacks them
                write_graph(self._path(graph_id), graph, graph_id)
        return graph_id

    def annotations(self, graph_id: str) -> Annotations:
        """What people added to the graph."""
        self._require(graph_id)
        return read_annotations(self.folder, graph_id)

    def annotate(self, graph_id: str, annotations: Annotations) -> None:
        """Replace what people added to the graph."""
        with file_errors_as_graph_errors(f"annotate graph {graph_id} in {self.folder}"), self._kept(graph_id):
            write_annotations(self.folder, graph_id, annotations)

    def load(self, graph_id: str) -> AttributionGraph:
        """The graph that was saved under this id. Raises `GraphError` if there is none or its files are damaged."""
        folder = self._path(graph_id)
        for _ in range(_ATTEMPTS):
            saved = head_stamp(folder)
            # it may be in a pack, but only if it is not in its folder
            pack = self._in_pack(graph_id) if saved is None else None
            if saved is None and pack is None:
                raise self._unknown(graph_id)
            try:
                return read_graph(folder) if pack is None else read_packed(pack, graph_id)
            except DAMAGE as error:
                # it is no damage if it was replaced, moved or deleted meanwhile
                now = self._in_pack(graph_id) if pack is not None else None
                if head_stamp(folder) == saved and (pack is None or (now is not None and now.name == pack.name)):
                    raise GraphError(
                        f"graph {graph_id} is damaged: {one_line(error)}; trace it again or delete it."
                    ) from error
        raise GraphError(f"graph {graph_id} is moved faster than it can be read; ask again later.")

    def version(self, graph_id: str) -> Hashable:
        """Another one after the graph was saved again, moved into a pack or deleted."""
        saved = head_stamp(self._path(graph_id))
        pack = self._in_pack(graph_id) if saved is None else None
        return saved if pack is None else pack.name

    def find(self, graph_id: str) -> StoredGraph | None:
        """What a list shows of this graph; None if it is not there or damaged."""
        folder, row = self._path(graph_id), None
        with suppress(*DAMAGE):
            row = self._head(folder).row
        if row is None and not (folder / HEAD).exists():  # it may be in a pack, but only if it is not here
            pack = self._in_pack(graph_id)
            row = pack.row(graph_id) if pack is not None and not pack.problem else None
        return None if row is None else StoredGraph(graph_id, info_from_row(row), row["n_nodes"], row["n_edges"])

    def list(self) -> "builtins.list[StoredGraph]":
        """All graphs that are whole, newest first."""
        table = self.table()
        columns = [table[name].to_pylist() for name in ("graph_id", "n_nodes", "n_edges")]
        return [
            StoredGraph(graph_id, info, n_nodes, n_edges)
            for graph_id, n_nodes, n_edges, info in zip(*columns, infos_from_table(table), strict=True)
        ]

    def table(self) -> pa.Table:
        """Table `graphs`: one row per graph that is whole, newest first."""
        heads, damaged = self._in_folders()
        table = _graphs_table(heads, self._packed(heads, damaged))
        return table.sort_by([("created_at", "descending"), ("graph_id", "descending")])

    def damaged(self) -> "builtins.list[DamagedGraph]":
        """The graphs that lists and queries leave out, and why."""
        heads, found = self._in_folders()
        packed = self._packed(heads, found)
        for pack in packed.packs:
            if pack.problem:
                ids = without(pack.index, packed.hidden)["graph_id"].to_pylist()
                found += [DamagedGraph(graph_id, pack.problem) for graph_id in ids or [f"{PACKS}/{pack.name}"]]
        return found

    def damaged_files(self) -> "builtins.list[DamagedFile]":
        """The files beside the graphs that queries leave out, and why."""
        return damaged_files(self.folder)

    def ids(self) -> "builtins.list[str]":
        """The ids of all graphs, damaged or not."""
        folders = {folder.name for folder in self._folders()}
        packed = self._packed_now()
        ids = (graph_id for pack in packed.packs for graph_id in pack.places if graph_id not in packed.hidden)
        return sorted(folders.union(ids))

    def resolve(self, text: str) -> str:
        """The id that the text is, or is the only one to begin with. Raises `GraphError` that names the closest."""
        known = self.ids()
        if text in known:
            return text
        matches = [graph_id for graph_id in known if text and graph_id.startswith(text)]
        if len(matches) > 1:
            raise GraphError(f"{shown(text)} could be {some(matches)}; give more of the id.")
        if not matches:
            raise self._unknown(text)
        return matches[0]

    def delete(self, graph_id: str) -> None:
        """Remove the graph and all that belongs to it."""
        with (
            file_errors_as_graph_errors(f"delete graph {graph_id} from {self.folder}"),
            self._kept(graph_id) as folder,
            locked_folder(folder),  # so that nobody saves the graph meanwhile, and makes the folder if it is packed
        ):
            pack = self._in_pack(graph_id)
            if pack is not None:  # first: without its folder, an older version in a pack would be the graph
                mark_deleted(self.folder, graph_id, pack.versions[graph_id])
            (folder / HEAD).unlink(missing_ok=True)  # first, so that what is left is no graph
            write_annotations(self.folder, graph_id, NOTHING)
            shutil.rmtree(folder)

    def compact(self, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Compacted:
        """Move all graphs into few files that are small and quick to query; damaged ones stay where they are.

        Others may save, delete, read and compact at the same time, and a kill loses nothing. `on_progress` hears how
        many graphs of how many are written.
        """
        check_is_store(self.folder)  # or else a folder inside a store would become another one
        with file_errors_as_graph_errors(f"compact {self.folder}"):
            create_folder(self.folder)  # as one of this version
            return compact_folder(self.folder, on_progress)

    def save_features(self, table: pa.Table, transcoder: str) -> None:
        """Put what is known about a transcoder's features into the store, in place of what was known before."""
        schema = tables()["features"]
        try:
            rows = table.select(schema.names).cast(schema)
        except (KeyError, ValueError) as error:  # Arrow's own errors are of these kinds
            raise GraphError(f"the features do not fit table features: {one_line(error)}.") from error
        named = sorted({str(name) for name in rows["transcoder"].unique().to_pylist()} - {transcoder})
        if named:
            raise GraphError(f"features of {some(named)} were given as those of {transcoder}; save each on its own.")
        rows = rows.replace_schema_metadata({_TRANSCODER: transcoder})
        path = self._features_path(transcoder)
        with file_errors_as_graph_errors(f"save features to {self.folder}"):
            create_folder(self.folder)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, partial(pq.write_table, rows, compression="zstd"))

    def save_comparison(self, about: Comparison, merged: Merged) -> None:
        """Put a comparison of graphs into the store, in place of one of the same name."""
        create_folder(self.folder)
        save_comparison(self.folder, about, merged)

    def delete_saved(self, comparisons: Sequence[str] = (), queries: Sequence[str] = ()) -> None:
        """Remove comparisons and SQL by name. Raises `GraphError`, and removes nothing, if one is not there."""
        check_writable(self.folder)
        for name in comparisons:
            check_comparison(self.folder, name)
        for name in queries:
            check_query(self.folder, name)
        for name in comparisons:
            delete_comparison(self.folder, name)
        for name in queries:
            delete_query(self.folder, name)

    def has_features(self, transcoder: str) -> bool:
        """Whether the store knows the features of this transcoder."""
        return self._features_path(transcoder).is_file()

    def save_rows(self, table: str, graph_id: str, rows: pa.Table) -> None:
        """Put rows of table interventions or validations to a graph, in place of those it had there."""
        rows = fitted(table, rows, graph_id)
        with (
            file_errors_as_graph_errors(f"save {table} of {graph_id} to {self.folder}"),
            self._kept(graph_id) as folder,
            locked_folder(folder),
        ):
            write_rows(folder, table, rows)

    def save_query(self, name: str, sql: str) -> None:
        """Save SQL under a name."""
        with file_errors_as_graph_errors(f"save query {name} to {self.folder}"):
            create_folder(self.folder)
            write_query(self.folder, name, sql)

    def saved_query(self, name: str) -> str:
        """The SQL that was saved under this name. Raises `GraphError` if there is none."""
        return read_query(self.folder, name)

    def saved_query_names(self) -> "builtins.list[str]":
        """The names of all saved SQL."""
        return query_names(self.folder)

    def sql(self, query: str, /, **parameters: object) -> pa.Table:
        """The answer to one SELECT over the store's tables; `$name` in the query stands for a parameter.

        Damaged graphs are left out. Raises `GraphError` with DuckDB's message.
        """
        return self.query(query, parameters)

    def query(self, sql: str, parameters: Mapping[str, object], limits: Limits = UNLIMITED) -> pa.Table:
        """As `sql`, with limits on what the query takes and gives."""
        from graphs import database  # and with it DuckDB, which who only lists or opens graphs need not wait for

        parent = self.folder / "graphs"
        with reading(parent) if parent.is_dir() else nullcontext():
            for _ in range(_ATTEMPTS):
                contents = self._contents()
                try:
                    return database.query(contents, sql, parameters, limits)
                except GraphError:
                    # a version of a graph never changes, but it goes when the graph is deleted
                    if all(path.exists() for content in contents.values() for path in content.paths):
                        raise
        raise GraphError(f"graphs in {self.folder} are deleted faster than they can be read; ask again later.")

    def _path(self, graph_id: str) -> Path:
        check_graph_id(graph_id)
        return self.folder / "graphs" / graph_id

    def _require(self, graph_id: str) -> Path:
        """The graph's folder, which is not there if it is packed. Raises `GraphError` if there is no such graph."""
        folder = self._path(graph_id)
        if not (folder / HEAD).exists() and self._in_pack(graph_id) is None:
            raise self._unknown(graph_id)
        return folder

    @contextmanager
    def _kept(self, graph_id: str) -> Iterator[Path]:
        """As `_require`, and nobody else deletes the graph meanwhile: what is put beside it is not left without it."""
        check_writable(self.folder)
        self._require(graph_id)  # or else the lock would make folders where there is no store
        with locked_folder(self.folder / PACKS / DELETED):
            yield self._require(graph_id)

    def _unknown(self, text: str) -> GraphError:
        known = self.ids()
        close = closest(text, known)
        hint = f"the closest are {some(close)}" if close else f"trace list names the {len(known)} in {self.folder}"
        return GraphError(f"there is no graph {shown(text)}; {hint}.")

    def _folders(self) -> Iterator[Path]:
        parent = self.folder / "graphs"
        if parent.is_dir():
            for name in sorted(os.listdir(parent)):
                if is_graph_id(name) and (parent / name / HEAD).exists():
                    yield parent / name

    def _in_folders(self) -> "tuple[builtins.list[Head], builtins.list[DamagedGraph]]":
        """The graphs in folders of their own."""
        found = [self._head_or_damage(folder) for folder in self._folders()]
        heads = [head for head in found if isinstance(head, Head)]
        return heads, [graph for graph in found if isinstance(graph, DamagedGraph)]

    def _head_or_damage(self, folder: Path) -> Head | DamagedGraph | None:
        for _ in range(_ATTEMPTS):
            before = head_stamp(folder)
            try:
                return self._head(folder)
            except DAMAGE as error:
                if before is not None and head_stamp(folder) == before:
                    return DamagedGraph(folder.name, one_line(error))
                if head_stamp(folder) is None:  # it was deleted or moved just now
                    return None
        return DamagedGraph(folder.name, "it is replaced faster than it can be read")

    def _head(self, folder: Path) -> Head:
        """The graph's head, checked once as long as its files stay the same. Raises one of `DAMAGE`."""
        checked = self._checked.get(folder.name)
        if checked is None or not is_unchanged(folder, checked):
            checked = self._checked[folder.name] = check_graph(folder)
        return checked.head

    def _packed_now(self) -> _Packed:
        deleted = deleted_versions(self.folder)  # before the packs, as it says
        packs = read_packs(self.folder, self._packs)
        return _Packed(packs, hidden_graphs(packs, deleted))

    def _packed(self, heads: "builtins.list[Head]", damaged: "builtins.list[DamagedGraph]") -> _Packed:
        """What is in packs beside these graphs in folders, which must be read first: graphs move from there here."""
        packed = self._packed_now()
        in_folders = (*(head.graph_id for head in heads), *(graph.graph_id for graph in damaged))
        replaced = {graph_id for graph_id in in_folders if any(graph_id in pack.places for pack in packed.packs)}
        return _Packed(packed.packs, packed.hidden | replaced)

    def _in_pack(self, graph_id: str) -> Pack | None:
        packed = self._packed_now()
        packs = [pack for pack in packed.packs if graph_id in pack.places and graph_id not in packed.hidden]
        return packs[0] if packs else None

    def _features_path(self, transcoder: str) -> Path:
        return self.folder / "features" / f"{slug(transcoder) or 'transcoder'}-{digest([transcoder])}.parquet"

    def _contents(self) -> dict[str, Content]:
        """What is in every table; damaged files are left out."""
        heads, damaged = self._in_folders()
        packed = self._packed(heads, damaged)
        readable = [pack for pack in packed.packs if not pack.problem]
        absent = frozenset.intersection(*(pack.absent for pack in readable)) if readable else frozenset()
        graphs = _graphs_table(heads, packed)
        contents = {"graphs": Content(graphs)}
        for part in ("nodes", "edges"):
            files = [(getattr(head, part), head.graph_id) for head in heads]
            packs = [pack.path(part) for pack in readable]
            contents[part] = Content(files=files, packs=packs, hidden=packed.hidden, absent=absent)
        features: builtins.list[tuple[Path, str]] = []
        for path in sorted((self.folder / "features").glob("[!.]*.parquet")):
            with suppress(*DAMAGE):
                features.append((path, (pq.read_metadata(path).metadata or {}).get(_TRANSCODER, b"").decode()))
        added: dict[str, builtins.list[tuple[Path, str]]] = {table: [] for table in ADDITIONS}
        for table, path, graph_id in added_files(self.folder / "graphs"):
            added[table].append((path, graph_id))
        contents |= {name: Content(files=files) for name, files in ({"features": features} | added).items()}
        contents["supernodes"] = Content(supernode_table(self.folder, graphs["graph_id"].to_pylist()))
        return contents | comparison_contents(self.folder)


def _graphs_table(heads: list[Head], packed: _Packed) -> pa.Table:
    empty = tables()["graphs"].empty_table()
    found = [without(pack.index, packed.hidden).select(empty.column_names) for pack in packed.packs if not pack.problem]
    return pa.concat_tables([empty, *(head.table for head in heads), *found]).combine_chunks()
