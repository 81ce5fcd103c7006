"""Comparisons of graphs as tables of the store.

comparisons/<name>.parquet                one row; putting it in place is the commit
comparisons/<name>.<nonce>.nodes.parquet  the nonce is in the metadata of that row
comparisons/<name>.<nonce>.edges.parquet
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphs.content import Content
from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, locked_folder, new_nonce, write_atomically
from graphs.graph import NodeKind
from graphs.merge import Merged
from graphs.names import shown, some
from graphs.schema import tables

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_NONCE = b"nonce"
_STALE = 3600.0
"""Seconds after which no query can still be reading a version that was replaced."""
_KINDS = np.array([kind.text for kind in NodeKind], object)


@dataclass(frozen=True)
class Comparison:
    """What was compared with what, and how."""

    name: str
    kind: str
    """'diff', 'merge' or 'stability'."""
    graph_ids: Sequence[str]
    alignment: str
    created_at: datetime
    config: str = "{}"
    """Its settings, as JSON."""


def save_comparison(folder: Path, about: Comparison, merged: Merged) -> None:
    """Put the comparison into the store's folder, in place of one of the same name."""
    _check_name(about.name)
    place, nonce = folder / "comparisons", new_nonce()
    row = vars(about) | {"comparison": about.name, "graph_ids": list(about.graph_ids), "n_graphs": merged.n_graphs}
    row |= {"n_nodes": len(merged.kind), "n_edges": len(merged.source)}
    row |= {"node_overlap": merged.node_overlap, "edge_overlap": merged.edge_overlap}
    schema = tables()["comparisons"]
    head = pa.Table.from_pylist([{name: row[name] for name in schema.names}], schema=schema)
    with file_errors_as_graph_errors(f"save comparison {about.name} to {folder}"), locked_folder(place):
        for name, table in (("nodes", node_table(about, merged)), ("edges", edge_table(about, merged))):
            path = place / f"{about.name}.{nonce}.{name}.parquet"
            write_atomically(path, partial(pq.write_table, table, compression="zstd"))
        table = head.replace_schema_metadata({_NONCE: nonce})
        write_atomically(place / f"{about.name}.parquet", partial(pq.write_table, table))
        _remove_stale(place, about.name, nonce)


def check_comparison(folder: Path, name: str) -> None:
    """Raise `GraphError` if there is no comparison of this name."""
    _check_name(name)
    if not (folder / "comparisons" / f"{name}.parquet").exists():
        known = [path.stem for path in _heads(folder)]
        hint = f"there are {some(known)}" if known else "none was saved yet"
        raise GraphError(f"there is no comparison {shown(name)} in {folder}; {hint}.")


def delete_comparison(folder: Path, name: str) -> None:
    """Remove the comparison of this name, if there is one."""
    _check_name(name)
    place = folder / "comparisons"
    with file_errors_as_graph_errors(f"delete comparison {name} from {folder}"), locked_folder(place):
        (place / f"{name}.parquet").unlink(missing_ok=True)  # first, so that what is left is no comparison
        for path in place.glob(f"{name}.*.*.parquet"):
            path.unlink(missing_ok=True)


def node_table(about: Comparison, merged: Merged) -> pa.Table:
    """Rows of table `comparison_nodes`."""
    is_diff, n_nodes = about.kind == "diff", len(merged.kind)
    columns: dict[str, Any] = {
        "comparison": np.full(n_nodes, about.name, object),
        "node": np.arange(n_nodes),
        "kind": _KINDS[merged.kind],
        **{name: getattr(merged, name) for name in ("layer", "position", "feature", "token_id", "token", "label")},
        "n_graphs": merged.count,
        "share": merged.share,
    }
    for name in ("activation", "influence"):
        spread = getattr(merged, name)
        columns |= {f"mean_{name}": spread.mean, f"sd_{name}": spread.deviation}
        columns |= {f"{name}_a": spread.first if is_diff else None, f"{name}_b": spread.second if is_diff else None}
    columns |= {"in_a": merged.in_first if is_diff else None, "in_b": merged.in_second if is_diff else None}
    return _table("comparison_nodes", columns, n_nodes)


def edge_table(about: Comparison, merged: Merged) -> pa.Table:
    """Rows of table `comparison_edges`."""
    is_diff, n_edges = about.kind == "diff", len(merged.source)
    columns = {
        "comparison": np.full(n_edges, about.name, object),
        "source": merged.source,
        "target": merged.target,
        "n_graphs": merged.edge_count,
        "share": merged.edge_share,
        "mean_weight": merged.weight.mean,
        "sd_weight": merged.weight.deviation,
        "weight_a": merged.weight.first if is_diff else None,
        "weight_b": merged.weight.second if is_diff else None,
    }
    return _table("comparison_edges", columns, n_edges)


def comparison_contents(folder: Path) -> dict[str, Content]:
    """What is in the tables of comparisons; damaged ones are left out."""
    heads, nodes, edges = [tables()["comparisons"].empty_table()], [], []
    for path in _heads(folder):
        try:
            with pq.ParquetFile(path) as file:
                head = file.read()
            nonce = (head.schema.metadata or {}).get(_NONCE, b"").decode("ascii", "replace")
            data = [path.with_name(f"{path.stem}.{nonce}.{name}.parquet") for name in ("nodes", "edges")]
            for part, name in zip(data, ("comparison_nodes", "comparison_edges"), strict=True):
                if not pq.read_schema(part).equals(tables()[name]):
                    raise GraphError(f"{part.name} does not have the columns of table {name}")
            heads.append(head.replace_schema_metadata(heads[0].schema.metadata).cast(heads[0].schema))
        except (GraphError, pa.ArrowException, OSError):
            continue
        nodes.append((data[0], path.stem))
        edges.append((data[1], path.stem))
    rows = pa.concat_tables(heads)
    parts = {"comparison_nodes": Content(files=nodes), "comparison_edges": Content(files=edges)}
    return {"comparisons": Content(rows)} | parts


def _heads(folder: Path) -> list[Path]:
    """The files that hold the row of a comparison."""
    found = sorted((folder / "comparisons").glob("[!.]*.parquet"))
    return [path for path in found if _NAME.fullmatch(path.stem)]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise GraphError(f"{shown(name)} is no name; it has up to 64 of a-z, 0-9, '_' and '-'.")


def _table(name: str, columns: dict[str, Any], n_rows: int) -> pa.Table:
    schema = tables()[name]
    arrays = []
    for field in schema:
        values = columns[field.name]
        if values is None:
            arrays.append(pa.nulls(n_rows, field.type))
        elif values.dtype.kind == "f":
            arrays.append(pa.array(values, field.type, mask=np.isnan(values)))
        elif field.name in ("position", "feature", "token_id"):
            arrays.append(pa.array(values, field.type, mask=values == -1))
        else:
            arrays.append(pa.array(values, field.type, mask=values == "" if field.name == "label" else None))
    return pa.table(arrays, schema=schema)


def _remove_stale(place: Path, name: str, nonce: str) -> None:
    for path in place.glob(f"{name}.*.*.parquet"):
        if path.name.split(".")[1] != nonce and time.time() - path.stat().st_mtime > _STALE:
            path.unlink(missing_ok=True)
