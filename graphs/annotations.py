"""What people add to a graph: supernodes, pins and the state of a viewer, as JSON beside the graphs.

annotations/<graph_id>.json   numbers are those of table `nodes`
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from graphs.errors import GraphError
from graphs.files import write_atomically
from graphs.interchange_fields import LIST, OBJECT, TEXT, check_object, is_whole
from graphs.schema import tables


@dataclass(frozen=True)
class Supernode:
    """A name and the nodes that it stands for."""

    name: str
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Annotations:
    """Groups, pinned nodes, and what else a viewer remembers, kept as it was found."""

    supernodes: tuple[Supernode, ...] = ()
    pinned: tuple[int, ...] = ()
    view: dict[str, Any] = field(default_factory=dict)
    """The remaining fields of circuit-tracer's `qParams`, such as `linkType` and `sg_pos`."""

    def __post_init__(self) -> None:
        members = [node for supernode in self.supernodes for node in supernode.nodes]
        twice = [node for node, count in Counter(members).items() if count > 1]
        if twice:
            raise GraphError(f"node {min(twice)} is in two supernodes; a node belongs to one.")


NOTHING = Annotations()


def write_annotations(folder: Path, graph_id: str, annotations: Annotations) -> None:
    """Put them beside the store's graphs, or take away what was there if they say nothing."""
    path = _path(folder, graph_id)
    if annotations == NOTHING:
        path.unlink(missing_ok=True)
        return
    record = {
        "supernodes": [[supernode.name, list(supernode.nodes)] for supernode in annotations.supernodes],
        "pinned": list(annotations.pinned),
        "view": annotations.view,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, indent=1)
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))


def read_annotations(folder: Path, graph_id: str) -> Annotations:
    """What was added to the graph; nothing where nobody did. Raises `GraphError` if the file is damaged."""
    path = _path(folder, graph_id)
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return NOTHING
    except (OSError, ValueError, RecursionError) as error:
        raise GraphError(f"{path} is damaged ({str(error)[:80]}); restore or delete it.") from error
    where = f"{path}: the content"
    check_object(where, record, {"supernodes": LIST, "pinned": LIST, "view": OBJECT}, {})
    supernodes = []
    for place, entry in enumerate(record["supernodes"]):
        pair = dict(zip(("name", "nodes"), entry, strict=False)) if isinstance(entry, list) else entry
        found = check_object(f"{path}: supernode {place}", pair, {"name": TEXT, "nodes": LIST}, {})
        supernodes.append(Supernode(found["name"], _numbers(path, found["nodes"])))
    return Annotations(tuple(supernodes), _numbers(path, record["pinned"]), record["view"])


def supernode_table(folder: Path, graph_ids: Iterable[str]) -> pa.Table:
    """Table `supernodes` of the graphs with these ids; damaged files are left out."""
    rows = []
    known = set(graph_ids)
    for path in sorted((folder / "annotations").glob("[!.]*.json")):
        if path.stem not in known:
            continue
        try:
            found = read_annotations(folder, path.stem)
        except GraphError:
            continue  # as damaged graphs are
        rows += [
            {"graph_id": path.stem, "supernode": supernode.name, "node": node}
            for supernode in found.supernodes
            for node in supernode.nodes
        ]
    return pa.Table.from_pylist(rows, schema=tables()["supernodes"])


def _path(folder: Path, graph_id: str) -> Path:
    return folder / "annotations" / f"{graph_id}.json"


def _numbers(path: Path, values: list[Any]) -> tuple[int, ...]:
    for value in values:
        if not is_whole(value) or not 0 <= value < 1 << 31:
            raise GraphError(f"{path} names {str(value)[:40]!r} as a node; expected its number.")
    return tuple(int(value) for value in values)
