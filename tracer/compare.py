"""What `trace diff`, `trace merge` and `trace stability` do and print."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from graphs import AttributionGraph, GraphStore, NodeKind
from graphs.comparisons import Comparison
from graphs.interchange_metadata import imported_record, settings_of
from graphs.merge import Merged, merge_graphs, threshold_grid
from graphs.names import digest, some
from tracer.commands import progress
from tracer.errors import TraceError
from tracer.options import DEFAULT_STORE
from tracer.tables import table_text

N_ROWS = 12
"""Nodes and edges that are printed; the tables have all."""


def diff(store: GraphStore, first: str, second: str, alignment: str, name: str | None) -> str:
    """Compare two graphs, save the comparison, and tell what differs most."""
    ids = [store.resolve(first), store.resolve(second)]
    if ids[0] == ids[1]:
        raise TraceError(f"{ids[0]} was given twice; name two graphs.")
    merged, about = _compared(store, "diff", ids, [store.load(one) for one in ids], alignment, name)
    inner = (merged.kind == NodeKind.FEATURE) | (merged.kind == NodeKind.ERROR)
    lines = [f"A        {ids[0]}", f"B        {ids[1]}", _overlap(merged)]
    change = np.nan_to_num(merged.influence.second) - np.nan_to_num(merged.influence.first)
    columns = {"influence A": merged.influence.first, "influence B": merged.influence.second, "B − A": change}
    for title, chosen in (
        ("Only in A", inner & merged.in_first & ~merged.in_second),
        ("Only in B", inner & merged.in_second & ~merged.in_first),
        ("In both, most changed", inner & merged.in_first & merged.in_second),
    ):
        lines += ["", f"{title}: {chosen.sum()} features and errors", _nodes(merged, chosen, np.abs(change), columns)]
    return "\n".join([*lines, "", _saved(store, about)])


def merge(store: GraphStore, graph_ids: Sequence[str], alignment: str, name: str | None, least: float) -> str:
    """Merge several graphs, save the union, and tell what at least so many of them share."""
    ids = list(dict.fromkeys(graph_ids))
    if len(ids) < 2:
        raise TraceError(f"{len(ids)} graphs were named; name two or more to merge.")
    merged, about = _compared(store, "merge", ids, _loaded(store, ids), alignment, name)
    return "\n".join(
        [f"Merged   {len(ids)} graphs", _overlap(merged), "", *_consensus(merged, least), _saved(store, about)]
    )


def stability(
    store: GraphStore, graph_ids: Sequence[str], nodes: Sequence[float], edges: Sequence[float], alignment: str,
    name: str | None, least: float,
) -> str:  # fmt: skip
    """Prune graphs at all pairs of thresholds, save the union, and tell what at least so many of the results share."""
    ids = list(dict.fromkeys(graph_ids))
    n_settings = len(nodes) * len(edges)
    if len(ids) * n_settings < 2:
        raise TraceError("one graph at one pair of thresholds leaves nothing to compare; give several thresholds.")
    graphs = _loaded(store, ids)
    members = [cut for graph in graphs for cut in threshold_grid(graph, nodes, edges)]
    settings = {"node_thresholds": list(nodes), "edge_thresholds": list(edges)}
    every = [graph_id for graph_id in ids for _ in range(n_settings)]
    merged, about = _compared(store, "stability", every, members, alignment, name, settings)
    lines = [f"Pruned   {len(ids)} graphs at {n_settings} pairs of thresholds each"]
    before = [graph_id for graph_id, graph in zip(ids, graphs, strict=True) if _was_pruned(graph)]
    if before:
        lines.append(f"Note     only what was left can be seen of {some(before)}, pruned before; trace with --no-prune")
    lines += [_overlap(merged), ""]
    shares = [1.0, 0.9, 0.5, 0.1]
    counts = {f"{share:.0%}": [(merged.edge_share >= share).sum(), (merged.share >= share).sum()] for share in shares}
    rows = [{"in at least": share, "edges": int(n), "nodes": int(m)} for share, (n, m) in counts.items()]
    return "\n".join(
        [*lines, table_text(pa.Table.from_pylist(rows)), "", *_consensus(merged, least), _saved(store, about)]
    )


def chosen_graphs(store: GraphStore, texts: Sequence[str], query: str | None) -> list[str]:
    """Ids of the graphs that are named, and of those that a query finds in its column graph_id."""
    found = [store.resolve(text) for text in texts]
    if query is not None:
        table = store.sql(query)
        if "graph_id" not in table.column_names:
            raise TraceError(f"the query has the columns {', '.join(table.column_names)}; select graph_id.")
        found += [store.resolve(str(graph_id)) for graph_id in table["graph_id"].unique().to_pylist()]
    return found


def _compared(
    store: GraphStore, kind: str, ids: Sequence[str], graphs: Sequence[AttributionGraph], alignment: str,
    name: str | None, settings: dict | None = None,
) -> tuple[Merged, Comparison]:  # fmt: skip
    config = json.dumps(settings or {}, sort_keys=True)
    about = Comparison(
        name or f"{kind}-{digest([kind, list(ids), alignment, config])}",
        kind,
        ids,
        alignment,
        datetime.now(UTC),
        config,
    )
    merged = merge_graphs(graphs, alignment=alignment)
    store.save_comparison(about, merged)
    return merged, about


def _loaded(store: GraphStore, ids: Sequence[str]) -> list[AttributionGraph]:
    graphs = []
    with progress() as step:
        for done, graph_id in enumerate(ids):
            step("reading graphs", done, len(ids))
            graphs.append(store.load(graph_id))
    return graphs


def _was_pruned(graph: AttributionGraph) -> bool:
    """Whether its settings say that less was saved than was traced, here or by the program it was imported from."""
    settings = settings_of(graph.info)
    imported = imported_record(settings)
    pruning = imported.get("pruning_settings")
    given = imported | (pruning if isinstance(pruning, dict) else {})
    shares = [given.get(name) for name in ("node_threshold", "edge_threshold")]
    return bool(settings.get("prune")) or any(isinstance(share, int | float) and share < 1 for share in shares)


def _overlap(merged: Merged) -> str:
    return (
        f"Overlap  {merged.node_overlap:.0%} of the nodes and {merged.edge_overlap:.0%} of the edges of two graphs are "
        f"in both; the union has {len(merged.kind)} nodes and {len(merged.source)} edges"
    )


def _consensus(merged: Merged, least: float) -> list[str]:
    """Features and edges that at least this share of the graphs have, the most influential first."""
    shared = (merged.kind == NodeKind.FEATURE) & (merged.share >= least)
    columns = {"graphs": merged.count, "influence": merged.influence.mean, "±": merged.influence.deviation}
    lines = [f"Shared   {shared.sum()} features are in {least:.0%} of the graphs or more"]
    lines.append(_nodes(merged, shared, np.nan_to_num(merged.influence.mean), columns))
    edges = np.flatnonzero(merged.edge_share >= least)
    strongest = edges[np.argsort(-np.abs(merged.weight.mean[edges]), kind="stable")][:N_ROWS]
    rows = [
        {
            "from": _name(merged, int(merged.source[edge])), "to": _name(merged, int(merged.target[edge])),
            "graphs": int(merged.edge_count[edge]), "weight": float(merged.weight.mean[edge]),
            "±": float(merged.weight.deviation[edge]),
        }
        for edge in strongest
    ]  # fmt: skip
    lines += ["", f"Shared   {len(edges)} edges are in {least:.0%} of the graphs or more"]
    return [*lines, table_text(pa.Table.from_pylist(rows)) if rows else "none", ""]


def _nodes(merged: Merged, chosen: np.ndarray, by: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    """A table of the chosen nodes, those with the largest values first."""
    places = np.flatnonzero(chosen)
    places = places[np.argsort(-by[places], kind="stable")][:N_ROWS]
    rows = [
        {"node": _name(merged, place), "token": str(merged.token[place]).strip()}
        | {name: _known(column[place].item()) for name, column in columns.items()}
        for place in places.tolist()
    ]
    return table_text(pa.Table.from_pylist(rows)) if rows else "none"


def _known(value: float | int) -> float | int | None:
    return None if np.isnan(value) else value


def _name(merged: Merged, node: int) -> str:
    layer, label = merged.layer[node], str(merged.label[node])
    match int(merged.kind[node]):
        case NodeKind.FEATURE:
            return f"L{layer}/{merged.feature[node]}" + (f" {label}" if label else "")
        case NodeKind.ERROR:
            return f"error L{layer} at {str(merged.token[node]).strip()}"
        case _:
            return str(merged.token[node]).strip()


def _saved(store: GraphStore, about: Comparison) -> str:
    where = "" if str(store.folder) == DEFAULT_STORE else f" {store.folder}"
    query = f"FROM comparison_nodes WHERE comparison = '{about.name}'"
    return f'Saved    {about.name} in {store.folder}; all of it: trace sql{where} "{query}"'
