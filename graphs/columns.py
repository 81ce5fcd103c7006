"""Graphs as Arrow tables and back; NULL in a table is -1, NaN or "" in a graph."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from graphs.errors import GraphError
from graphs.graph import EDGE_COLUMNS, NODE_COLUMNS, AttributionGraph, GraphInfo, NodeKind
from graphs.schema import SCHEMA_VERSION, tables

_WEIGHT_TYPE = b"weight_dtype"
_NULLABLE_NUMBERS = ("position", "feature", "token_id")
_NULLABLE_TEXTS = ("word", "label")
_KIND_NAMES = np.array([kind.text for kind in NodeKind], dtype=object)


def info_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's row of table `graphs`."""
    return _graph_row(graph.info, graph_id, graph.n_nodes, graph.n_edges)


def _graph_row(info: GraphInfo, graph_id: str, n_nodes: int, n_edges: int) -> pa.Table:
    schema = tables()["graphs"]
    derived = {"graph_id": graph_id, "schema_version": SCHEMA_VERSION, "n_nodes": n_nodes, "n_edges": n_edges}
    row = {name: derived[name] if name in derived else getattr(info, name) for name in schema.names}
    return _encoded([row], schema)


def info_from_row(row: dict) -> GraphInfo:
    """What the row of table `graphs` says about the graph."""
    created_at = row["created_at"]
    assert isinstance(created_at, datetime)
    texts = {name: tuple(row[name]) for name in ("tokens", "token_ids", "words")}
    names = [name for name in GraphInfo.__dataclass_fields__ if name not in texts]
    values = {name: row[name] for name in names} | {"created_at": created_at.astimezone(UTC)}
    return GraphInfo(**values, **texts)


def nodes_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's rows of table `nodes`."""
    schema = tables()["nodes"]
    columns: dict[str, pa.Array] = {
        "graph_id": pa.repeat(graph_id, graph.n_nodes),
        "node": pa.array(np.arange(graph.n_nodes, dtype=np.int32)),
    }
    for name in NODE_COLUMNS:
        columns[name] = _to_arrow(name, getattr(graph, name), schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def edges_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's rows of table `edges`; the metadata remembers the precision of the weights."""
    schema = tables()["edges"].with_metadata({_WEIGHT_TYPE: graph.weight.dtype.name})
    arrays = [pa.array(graph.source), pa.array(graph.target), pa.array(graph.weight.astype(np.float64, copy=False))]
    return pa.table([pa.repeat(graph_id, graph.n_edges), *arrays], schema=schema)


def graph_from_tables(info: GraphInfo, nodes: pa.Table, edges: pa.Table) -> AttributionGraph:
    """The graph with this information, these nodes and these edges."""
    columns = {name: _from_arrow(name, nodes[name]) for name in NODE_COLUMNS}
    columns |= {name: _from_arrow(name, edges[name]) for name in EDGE_COLUMNS}
    precision = (edges.schema.metadata or {}).get(_WEIGHT_TYPE, b"float64").decode()
    columns["weight"] = columns["weight"].astype(precision, copy=False)
    return AttributionGraph(info=info, **columns)


def _encoded(rows: list[dict], schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (UnicodeEncodeError, pa.ArrowException, OverflowError) as error:
        raise GraphError(f"what is known about the graph cannot be stored: {' '.join(str(error).split())}") from error


def _to_arrow(name: str, values: ndarray, kind: pa.DataType) -> pa.Array:
    if name == "kind":
        return pa.array(_KIND_NAMES[values], kind)
    if name in _NULLABLE_NUMBERS:
        return pa.array(values, kind, mask=values == -1)
    if values.dtype.kind == "f":
        return pa.array(values, kind, mask=np.isnan(values))
    try:
        return pa.array(values, kind, mask=values == "" if name in _NULLABLE_TEXTS else None)
    except UnicodeEncodeError as error:
        raise GraphError(f"a {name} is no valid Unicode text ({error.reason}); replace lone surrogates.") from error


def _from_arrow(name: str, column: pa.ChunkedArray) -> ndarray:
    if name == "kind":
        names = pa.array(_KIND_NAMES)
        return pc.index_in(column, value_set=names).to_numpy().astype(np.uint8)
    if name in _NULLABLE_NUMBERS:
        column = pc.fill_null(column, -1)
    elif pa.types.is_floating(column.type):
        column = pc.fill_null(column, np.nan)
    elif name in _NULLABLE_TEXTS:
        column = pc.fill_null(column, "")
    return column.to_numpy()
