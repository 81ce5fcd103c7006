"""A folder of graphs as Parquet files. A save is atomic: a reader sees a graph whole or not at all.

store.json             the version of the format
graphs/<graph_id>/     one graph, see `graphs.folder`
annotations/<graph_id>.json  what people added to it, see `graphs.annotations`
comparisons/           several graphs as one, see `graphs.comparisons`
features/<name>.parquet  what is known about the features of one transcoder
"""

import builtins
import difflib
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graphs import database
from graphs.annotations import NOTHING, Annotations, read_annotations, supernode_table, write_annotations
from graphs.columns import info_from_row
from graphs.comparisons import Comparison, comparison_contents, save_comparison
from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, is_temporary, locked_folder, reading, write_atomically
from graphs.folder import DAMAGE, HEAD, Checked, Head, check_graph, is_unchanged, read_graph, write_graph
from graphs.graph import AttributionGraph, GraphInfo
from graphs.merge import Merged
from graphs.schema import SCHEMA_VERSION, tables

FORMAT = "clt-tracer store"

_DESCRIPTION = "store.json"
_TRANSCODER = b"transcoder"
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SLUG_LENGTH = 40
_ATTEMPTS = 50  # of a query whose graphs are deleted under its hands


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
        self._checked: dict[str, Checked] = {}
        _check_folder(self.folder)

    def save(self, graph: AttributionGraph, annotations: Annotations | None = None) -> str:
        """Put the graph into the store and return its id; the same question asked again replaces its graph.

        What people added to it stays, or becomes what is given.
        """
        graph_id = graph_id_of(graph.info)
        with file_errors_as_graph_errors(f"save graph {graph_id} to {self.folder}"):
            _create(self.folder)
            with locked_folder(self._path(graph_id)):
                if annotations is not None:
                    write_annotations(self.folder, graph_id, annotations)  # first, so that no graph lacks them
                write_graph(self._path(graph_id), graph, graph_id)
        return graph_id

    def annotations(self, graph_id: str) -> Annotations:
        """What people added to the graph."""
        self._existing(graph_id)
        return read_annotations(self.folder, graph_id)

    def annotate(self, graph_id: str, annotations: Annotations) -> None:
        """Replace what people added to the graph."""
        with locked_folder(self._existing(graph_id)):
            write_annotations(self.folder, graph_id, annotations)

    def load(self, graph_id: str) -> AttributionGraph:
        """The graph that was saved under this id. Raises `GraphError` if there is none or its files are damaged."""
        folder = self._existing(graph_id)
        try:
            return read_graph(folder)
        except DAMAGE as error:
            raise GraphError(
                f"graph {graph_id} is damaged: {_one_line(error)}; trace it again or delete it."
            ) from error

    def find(self, graph_id: str) -> StoredGraph | None:
        """What a list shows of this graph; None if it is not there or damaged."""
        folder = self._path(graph_id)
        with suppress(*DAMAGE):
            row = self._head(folder).row
            return StoredGraph(graph_id, info_from_row(row), row["n_nodes"], row["n_edges"])
        return None

    def list(self) -> "builtins.list[StoredGraph]":
        """All graphs that are whole, newest first."""
        found = []
        for folder in self._folders():
            with suppress(*DAMAGE):
                row = self._head(folder).row
                found.append(StoredGraph(folder.name, info_from_row(row), row["n_nodes"], row["n_edges"]))
        return sorted(found, key=lambda stored: (stored.info.created_at, stored.graph_id), reverse=True)

    def damaged(self) -> "builtins.list[DamagedGraph]":
        """The graphs that lists and queries leave out, and why."""
        found = []
        for folder in self._folders():
            try:
                self._head(folder)
            except DAMAGE as error:
                if (folder / HEAD).exists():  # or else it was deleted just now
                    found.append(DamagedGraph(folder.name, _one_line(error)))
        return found

    def resolve(self, text: str) -> str:
        """The id that the text is, or is the only one to begin with. Raises `GraphError` that names the closest."""
        known = [folder.name for folder in self._folders()]
        if text in known:
            return text
        matches = [graph_id for graph_id in known if text and graph_id.startswith(text)]
        if len(matches) > 1:
            raise GraphError(f"{_shown(text)} could be {_some(matches)}; give more of the id.")
        if not matches:
            raise self._unknown(text)
        return matches[0]

    def delete(self, graph_id: str) -> None:
        """Remove the graph and all that belongs to it."""
        folder = self._existing(graph_id)
        with file_errors_as_graph_errors(f"delete graph {graph_id} from {self.folder}"), locked_folder(folder):
            (folder / HEAD).unlink(missing_ok=True)  # first, so that what is left is no graph
            shutil.rmtree(folder)
            write_annotations(self.folder, graph_id, NOTHING)

    def save_features(self, table: pa.Table, transcoder: str) -> None:
        """Put what is known about a transcoder's features into the store, in place of what was known before."""
        schema = tables()["features"]
        try:
            rows = table.select(schema.names).cast(schema)
        except (KeyError, ValueError) as error:  # Arrow's own errors are of these kinds
            raise GraphError(f"the features do not fit table features: {_one_line(error)}.") from error
        named = sorted({str(name) for name in rows["transcoder"].unique().to_pylist()} - {transcoder})
        if named:
            raise GraphError(f"features of {_some(named)} were given as those of {transcoder}; save each on its own.")
        rows = rows.replace_schema_metadata({_TRANSCODER: transcoder})
        path = self._features_path(transcoder)
        with file_errors_as_graph_errors(f"save features to {self.folder}"):
            _create(self.folder)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, partial(pq.write_table, rows, compression="zstd"))

    def save_comparison(self, about: Comparison, merged: Merged) -> None:
        """Put a comparison of graphs into the store, in place of one of the same name."""
        _create(self.folder)
        save_comparison(self.folder, about, merged)

    def has_features(self, transcoder: str) -> bool:
        """Whether the store knows the features of this transcoder."""
        return self._features_path(transcoder).is_file()

    def sql(self, query: str, /, **parameters: object) -> pa.Table:
        """The answer to one SELECT over the store's tables; `$name` in the query stands for a parameter.

        Damaged graphs are left out. Raises `GraphError` with DuckDB's message.
        """
        parent = self.folder / "graphs"
        with reading(parent) if parent.is_dir() else nullcontext():
            for _ in range(_ATTEMPTS):
                contents = self._contents()
                try:
                    return database.query(contents, query, parameters)
                except GraphError:
                    # a version of a graph never changes, but it goes when the graph is deleted
                    if all(path.exists() for name in ("nodes", "edges") for path, _ in contents[name]):
                        raise
        raise GraphError(f"graphs in {self.folder} are deleted faster than they can be read; ask again later.")

    def _path(self, graph_id: str) -> Path:
        if not _ID.fullmatch(graph_id):
            raise GraphError(
                f"{_shown(graph_id)} is no graph id; an id has up to 64 of a-z, 0-9, '_', '.' and '-', and begins with "
                "a letter or digit."
            )
        return self.folder / "graphs" / graph_id

    def _existing(self, graph_id: str) -> Path:
        folder = self._path(graph_id)
        if not (folder / HEAD).exists():
            raise self._unknown(graph_id)
        return folder

    def _unknown(self, text: str) -> GraphError:
        known = [folder.name for folder in self._folders()]
        close = difflib.get_close_matches(text, known, n=3, cutoff=0.3)
        hint = f"the closest are {_some(close)}" if close else f"{self.folder} has {len(known)} graphs, list them"
        return GraphError(f"there is no graph {_shown(text)}; {hint}.")

    def _folders(self) -> Iterator[Path]:
        parent = self.folder / "graphs"
        if parent.is_dir():
            for folder in sorted(parent.iterdir()):
                if _ID.fullmatch(folder.name) and (folder / HEAD).exists():
                    yield folder

    def _head(self, folder: Path) -> Head:
        """The graph's head, checked once as long as its files stay the same. Raises one of `DAMAGE`."""
        checked = self._checked.get(folder.name)
        if checked is None or not is_unchanged(folder, checked):
            checked = self._checked[folder.name] = check_graph(folder)
        return checked.head

    def _features_path(self, transcoder: str) -> Path:
        return self.folder / "features" / f"{_slug(transcoder) or 'transcoder'}-{_digest([transcoder])}.parquet"

    def _contents(self) -> dict[str, Any]:
        """What is in every table; damaged files are left out."""
        heads: builtins.list[Head] = []
        for folder in self._folders():
            with suppress(*DAMAGE):
                heads.append(self._head(folder))
        ids = [head.nodes.parent.name for head in heads]
        features: builtins.list[tuple[Path, str]] = []
        for path in sorted((self.folder / "features").glob("[!.]*.parquet")):
            with suppress(*DAMAGE):
                features.append((path, (pq.read_metadata(path).metadata or {}).get(_TRANSCODER, b"").decode()))
        return {
            "graphs": pa.concat_tables([tables()["graphs"].empty_table(), *(head.table for head in heads)]),
            "nodes": [(head.nodes, graph_id) for head, graph_id in zip(heads, ids, strict=True)],
            "edges": [(head.edges, graph_id) for head, graph_id in zip(heads, ids, strict=True)],
            "features": features,
            "supernodes": supernode_table(self.folder, ids),
            **comparison_contents(self.folder),
        }


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise GraphError(f"{folder} is a file, not a folder of graphs; give another path.")
    with file_errors_as_graph_errors(f"read {folder}"):
        entries = [path for path in folder.iterdir() if not is_temporary(path)]
    # store.json is written before anything else
    if entries and not (folder / _DESCRIPTION).exists():
        raise GraphError(f"{folder} belongs to something else: it has no {_DESCRIPTION}; give a new or empty folder.")
    if entries:
        _check_description(folder / _DESCRIPTION)


def _check_description(path: Path) -> None:
    try:
        description = json.loads(path.read_text("utf-8"))
        written_as, version = description["format"], int(description["schema_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraphError(f"{path} is unreadable ({_one_line(error)}); restore it, or give another folder.") from error
    if written_as != FORMAT:
        raise GraphError(f"{path.parent} belongs to something else: its format is {_shown(str(written_as))}.")
    if version > SCHEMA_VERSION:
        raise GraphError(
            f"{path.parent} has schema version {version}, and this program knows versions up to {SCHEMA_VERSION}; "
            "upgrade the program."
        )


def _create(folder: Path) -> None:
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _DESCRIPTION).exists():
        content = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION})
        write_atomically(folder / _DESCRIPTION, partial(Path.write_text, data=content + os.linesep, encoding="utf-8"))


def graph_id_of(info: GraphInfo) -> str:
    """A readable name, and a digest of what was asked: the same question has the same id."""
    text = info.prompt
    for token, word in zip(info.tokens, info.words, strict=True):
        if not word and token.strip():  # a special token
            text = text.replace(token, " ")
    asked = [info.token_ids, info.model, info.model_revision, info.transcoder, info.transcoder_revision, info.config]
    return f"{_slug(text) or 'graph'}-{_digest(asked)}"


def _slug(text: str) -> str:
    """The text's words in lower-case ASCII, joined by '-', as many as fit; "" if there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall("[a-z0-9]+", plain))
    if len(slug) <= _SLUG_LENGTH:
        return slug
    return slug[: slug.rfind("-", 0, _SLUG_LENGTH + 1)] if "-" in slug[:_SLUG_LENGTH] else slug[:_SLUG_LENGTH]


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _shown(text: str) -> str:
    return repr(text[:80])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
