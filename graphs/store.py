"""A folder of graphs as Parquet files. A save is atomic: a reader sees a graph whole or not at all.

    store.json
    graphs/<graph_id>/graph.parquet          one row; putting it in place is the commit
    graphs/<graph_id>/nodes-<nonce>.parquet  the nonce is in the metadata of graph.parquet
    graphs/<graph_id>/edges-<nonce>.parquet
    features/<name>.parquet                  one file per transcoder
"""

import builtins
import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graphs import database
from graphs.columns import edges_to_table, graph_from_tables, info_from_row, info_to_table, nodes_to_table
from graphs.errors import GraphError
from graphs.files import (
    file_errors_as_graph_errors,
    is_temporary,
    locked_folder,
    new_nonce,
    sync_folder,
    temporary_path,
    write_atomically,
    write_durably,
)
from graphs.graph import AttributionGraph, GraphInfo
from graphs.schema import SCHEMA_VERSION, tables

FORMAT = "clt-tracer store"

_NONCE = b"nonce"
_TRANSCODER = b"transcoder"
_GRAPH_FILE = "graph.parquet"
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_UNREADABLE = (pa.ArrowException, OSError)
_ATTEMPTS = 50  # of a reader whose graph is replaced under its hands


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


class GraphStore:
    """A folder of graphs; a folder that does not exist yet is created by the first save."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder)

    def save(self, graph: AttributionGraph) -> str:
        """Put the graph into the store and return its id; the same question asked again replaces its graph."""
        graph_id = _graph_id(graph.info)
        with file_errors_as_graph_errors(f"save graph {graph_id} to {self.folder}"):
            _create(self.folder)
            with locked_folder(self._path(graph_id)):
                _write_graph(self._path(graph_id), graph, graph_id)
        return graph_id

    def load(self, graph_id: str) -> AttributionGraph:
        """The graph that was saved under this id. Raises `GraphError` if there is none or its files are damaged."""
        folder = self._existing(graph_id)
        for _ in range(_ATTEMPTS):
            nonce = None
            try:
                nonce = _nonce(folder / _GRAPH_FILE)
                return _read_graph(folder)
            except (*_UNREADABLE, KeyError) as error:
                reason = error
            with suppress(*_UNREADABLE):
                if _nonce(folder / _GRAPH_FILE) != nonce:
                    continue  # replaced while we read
            break
        raise GraphError(f"graph {graph_id} is damaged: {_one_line(reason)}; trace it again or delete it.")

    def list(self) -> "builtins.list[StoredGraph]":
        """All graphs that are whole, newest first."""
        found = []
        for folder in self._folders():
            with suppress(*_UNREADABLE):
                if _damage(folder) is None:
                    row = _read(folder / _GRAPH_FILE, "graphs").to_pylist()[0]
                    found.append(StoredGraph(folder.name, info_from_row(row), row["n_nodes"], row["n_edges"]))
        return sorted(found, key=lambda stored: (stored.info.created_at, stored.graph_id), reverse=True)

    def damaged(self) -> "builtins.list[DamagedGraph]":
        """The graphs that lists and queries leave out, and why."""
        found = ((folder, _damage(folder)) for folder in self._folders())
        return [DamagedGraph(folder.name, reason) for folder, reason in found if reason is not None]

    def resolve(self, text: str) -> str:
        """The id that the text is, or is the only one to begin with. Raises `GraphError` that names the closest."""
        known = [folder.name for folder in self._folders()]
        if text in known:
            return text
        matches = [graph_id for graph_id in known if text and graph_id.startswith(text)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise GraphError(f"{_shown(text)} could be {_some(matches)}; give more of the id.")
        close = difflib.get_close_matches(text, known, n=3, cutoff=0.3)
        hint = f"the closest are {_some(close)}" if close else f"the store {self.folder} has {len(known)} graphs"
        raise GraphError(f"there is no graph {_shown(text)}; {hint}.")

    def delete(self, graph_id: str) -> None:
        """Remove the graph and all that belongs to it."""
        folder = self._existing(graph_id)
        with file_errors_as_graph_errors(f"delete graph {graph_id} from {self.folder}"), locked_folder(folder):
            (folder / _GRAPH_FILE).unlink(missing_ok=True)  # first, so that what is left is no graph
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    def save_features(self, table: pa.Table, transcoder: str) -> None:
        """Put the inventory of a transcoder's features into the store, in place of an older one."""
        schema = tables()["features"]
        try:
            rows = table.select(schema.names).cast(schema)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise GraphError(f"the features do not fit table features: {_one_line(error)}.") from error
        named = set(rows["transcoder"].unique().to_pylist())
        if not named <= {transcoder}:
            raise GraphError(f"features of {_some(sorted(map(str, named)))} were given for {transcoder}; save each apart.")
        path = self._features_path(transcoder)
        rows = rows.replace_schema_metadata({_TRANSCODER: transcoder})
        with file_errors_as_graph_errors(f"save features to {self.folder}"):
            _create(self.folder)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, partial(pq.write_table, rows, compression="zstd"))

    def has_features(self, transcoder: str) -> bool:
        """Whether the store has the inventory of this transcoder's features."""
        return self._features_path(transcoder).is_file()

    def sql(self, query: str, /, **parameters: object) -> pa.Table:
        """The answer to one SELECT over the store's tables; `$name` in the query stands for a parameter.

        Damaged graphs are left out. Raises `GraphError` with DuckDB's message.
        """
        for _ in range(_ATTEMPTS):
            files = self._files()
            before = _versions(files)
            try:
                answer = database.query(files, query, parameters)
            except GraphError:
                if _versions(files) == before:
                    raise
                continue
            if _versions(files) == before:  # or else rows of two versions of a graph may be mixed
                return answer
        raise GraphError(f"graphs in {self.folder} were replaced faster than they could be read; ask again.")

    def _path(self, graph_id: str) -> Path:
        if not _ID.fullmatch(graph_id):
            raise GraphError(
                f"{_shown(graph_id)} is no graph id; ids are up to 64 of a-z, 0-9, '_', '.' and '-', and begin with a "
                "letter or digit."
            )
        return self.folder / "graphs" / graph_id

    def _existing(self, graph_id: str) -> Path:
        folder = self._path(graph_id)
        if not (folder / _GRAPH_FILE).exists():
            self.resolve(graph_id + "\0")  # never found; raises with the closest ids
        return folder

    def _folders(self) -> Iterator[Path]:
        parent = self.folder / "graphs"
        if parent.is_dir():
            for folder in sorted(parent.iterdir()):
                if _ID.fullmatch(folder.name) and (folder / _GRAPH_FILE).exists():
                    yield folder

    def _features_path(self, transcoder: str) -> Path:
        return self.folder / "features" / f"{_slug(transcoder, 'transcoder')}-{_digest([transcoder])}.parquet"

    def _files(self) -> dict[str, "builtins.list[tuple[Path, str]]"]:
        """The files of every table, each with the value of its first column."""
        files: dict[str, builtins.list[tuple[Path, str]]] = {name: [] for name in tables()}
        for folder in self._folders():
            with suppress(*_UNREADABLE):
                if _damage(folder) is None:
                    nonce = _nonce(folder / _GRAPH_FILE)
                    files["graphs"].append((folder / _GRAPH_FILE, folder.name))
                    files["nodes"].append((folder / f"nodes-{nonce}.parquet", folder.name))
                    files["edges"].append((folder / f"edges-{nonce}.parquet", folder.name))
        for path in sorted((self.folder / "features").glob("[!.]*.parquet")):
            with suppress(*_UNREADABLE, KeyError):
                files["features"].append((path, pq.read_metadata(path).metadata[_TRANSCODER].decode()))
        return files
