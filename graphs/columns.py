"""Graphs as Arrow tables and back; NULL in a table is -1, NaN or "" in a graph."""

from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from graphs.errors import GraphError
from graphs.graph import EDGE_COLUMNS, NODE_COLUMNS, AttributionGraph, GraphInfo, NodeKind
from graphs.reach import reach
from graphs.schema import LATER_COLUMNS, SCHEMA_VERSION, tables

WEIGHT_TYPE = b"weight_dtype"
"""Where the metadata of table `edges` says how precise the weights are."""

_TUPLES = ("tokens", "token_ids", "words", "tags")
_NULLABLE_NUMBERS = ("position", "feature", "token_id")
_NULLABLE_TEXTS = ("word", "label")
_CHUNK = 1 << 16
_KIND_NAMES = np.array([kind.text for kind in NodeKind], dtype=object)


def info_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's row of table `graphs`."""
    schema = tables()["graphs"]
    row = {"graph_id": graph_id, "schema_version": SCHEMA_VERSION, "n_nodes": graph.n_nodes, "n_edges": graph.n_edges}
    row = {name: row[name] if name in row else getattr(graph.info, name) for name in schema.names}
    try:
        return pa.Table.from_pylist([row], schema=schema)
    except (ValueError, OverflowError) as error:  # Arrow's own errors and lone surrogates are ValueErrors
        raise GraphError(f"what is known about the graph cannot be stored: {' '.join(str(error).split())}") from error


def with_later_columns(table: pa.Table, name: str) -> pa.Table:
    """A saved table in today's columns: what was added since it was saved has one value throughout."""
    lacking = LATER_COLUMNS[name].keys() - set(table.column_names)
    for place, field in enumerate(tables()[name]) if lacking else ():
        if field.name in lacking:
            values = pa.array([LATER_COLUMNS[name][field.name]] * len(table), field.type)
            table = table.add_column(place, field, values)
    return table


def info_from_row(row: dict[str, Any]) -> GraphInfo:
    """What the row of table `graphs` says about the graph."""
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(GraphInfo)}
    values |= {name: tuple(row[name]) for name in _TUPLES}
    return GraphInfo(**values)


def infos_from_table(table: pa.Table) -> list[GraphInfo]:
    """What every row of table `graphs` says; column by column, which is quicker for many."""
    names = [field.name for field in fields(GraphInfo)]
    columns = [table[name].to_pylist() for name in names]
    for place, name in enumerate(names):
        if name in _TUPLES:
            columns[place] = [tuple(values) for values in columns[place]]
    return [GraphInfo(*values) for values in zip(*columns, strict=True)]


def nodes_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's rows of table `nodes`."""
    schema = tables()["nodes"]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "graph_id": _repeated(graph_id, graph.n_nodes),
        "node": pa.array(np.arange(graph.n_nodes, dtype=np.int32)),
    }
    for name in NODE_COLUMNS:
        columns[name] = _to_arrow(name, getattr(graph, name), schema.field(name).type)
    reached = reach(graph)
    columns |= {"reached_from": reached.reached_from, "reaches_answer": pa.array(reached.reaches_answer)}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def edges_to_table(graph: AttributionGraph, graph_id: str) -> pa.Table:
    """The graph's rows of table `edges`; the metadata remembers the precision of the weights."""
    schema = tables()["edges"].with_metadata({WEIGHT_TYPE: graph.weight.dtype.name})
    arrays = [pa.array(graph.source), pa.array(graph.target), pa.array(graph.weight.astype(np.float64, copy=False))]
    return pa.table([_repeated(graph_id, graph.n_edges), *arrays], schema=schema)


def graph_from_tables(info: GraphInfo, nodes: pa.Table, edges: pa.Table) -> AttributionGraph:
    """The graph with this information, these nodes and these edges."""
    columns = {name: _from_arrow(name, nodes[name]) for name in NODE_COLUMNS}
    columns |= {name: _from_arrow(name, edges[name]) for name in EDGE_COLUMNS}
    precision = (edges.schema.metadata or {}).get(WEIGHT_TYPE, b"float64").decode()
    columns["weight"] = columns["weight"].astype(precision, copy=False)
    return AttributionGraph(info=info, **columns)


def _repeated(text: str, n: int) -> pa.ChunkedArray:
    """The text n times, in chunks that share their memory: as one array it may take more than all else of a graph."""
    whole, rest = divmod(n, _CHUNK)
    chunk = pa.repeat(text, _CHUNK if whole else rest)
    return pa.chunked_array([chunk] * whole + [chunk.slice(0, rest)])


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
        kind = pc.call_function("index_in", [column], pc.SetLookupOptions(value_set=pa.array(_KIND_NAMES)))
        return pc.fill_null(kind, 255).to_numpy().astype(np.uint8)  # of a name that is no kind
    if name in _NULLABLE_NUMBERS:
        column = pc.fill_null(column, -1)
    elif pa.types.is_floating(column.type):
        column = pc.fill_null(column, np.nan)
    elif name in _NULLABLE_TEXTS:
        column = pc.fill_null(column, "")
    return column.to_numpy()
