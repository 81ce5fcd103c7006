"""What the pages show beyond the picture: a node with its connections, a feature's record, the library's rows."""

from dataclasses import asdict, dataclass
from datetime import datetime

import numpy as np
from numpy import ndarray

from graphs import AttributionGraph, DamagedGraph, GraphStore, NodeKind, without_edges
from graphs.influence import whole_input_share
from graphs.shapes import Float, Integer
from viewer.elements import (
    backbone,
    drawn_nodes,
    edge_elements,
    layer_text,
    layout,
    node_elements,
    node_text,
    percent,
    probability,
    visible,
)

MOST_NODES = 2_000
"""Features and errors drawn at once; 5,000 take a browser seconds."""
MOST_CONNECTIONS = 1_000

_ANSWERS = """
SELECT DISTINCT ON (graph_id)
    graph_id, token, CASE WHEN token_id IS NOT NULL THEN nodes.probability END AS probability
FROM nodes WHERE kind = 'logit' ORDER BY graph_id, nodes.probability DESC, node
"""
_FEATURE = "SELECT * FROM features WHERE transcoder = $transcoder AND layer = $layer AND feature = $feature"
_NODE_COLUMNS = ("activation", "pre_activation", "bias", "influence", "cumulative_influence")


@dataclass(frozen=True)
class LibraryRow:
    """One graph of the store, in the words of the library."""

    graph_id: str
    prompt: str
    answer: str
    probability: str
    model: str
    n_nodes: int
    n_edges: int
    replacement: str
    completeness: str
    created_at: datetime


@dataclass(frozen=True)
class Library:
    """Everything in a store."""

    rows: tuple[LibraryRow, ...]
    damaged: tuple[DamagedGraph, ...]


def library(store: GraphStore) -> Library:
    """All graphs of the store, newest first, and those that cannot be read."""
    stored = store.list()
    answers = {row["graph_id"]: row for row in store.sql(_ANSWERS).to_pylist()} if stored else {}
    rows = []
    for graph in stored:
        info, answer = graph.info, answers.get(graph.graph_id, {})
        rows.append(
            LibraryRow(
                graph_id=graph.graph_id,
                prompt=info.prompt,
                answer=visible(answer.get("token") or ""),
                probability=percent(answer.get("probability")),
                model=info.model,
                n_nodes=graph.n_nodes,
                n_edges=graph.n_edges,
                replacement=score_text(info.replacement_score, info.pruned_replacement_score),
                completeness=score_text(info.completeness_score, info.pruned_completeness_score),
                created_at=info.created_at,
            )
        )
    return Library(tuple(rows), tuple(store.damaged()))


def score_text(raw: float | None, pruned: float | None) -> str:
    """A score before and after pruning."""
    given = [f"{score:.2f}" for score in (raw, pruned) if score is not None and np.isfinite(score)]
    return " → ".join(given) or "–"


def graph_details(graph: AttributionGraph) -> dict:
    """The nodes with their positions, the strongest edges, and the columns and bands around them.

    Of a graph too large to draw only the most important nodes, and the edges between them.
    """
    drawn = drawn_nodes(graph, most=MOST_NODES)
    picture = without_edges(graph, drawn)
    placed, share = layout(picture), whole_input_share(graph)
    reached = graph.cumulative_influence[np.isfinite(graph.cumulative_influence)]
    return {
        "n_nodes": graph.n_nodes,
        "n_edges": graph.n_edges,
        "largest_cumulative": float(reached.max(initial=0.0)),
        "columns": [asdict(span) for span in placed.columns],
        "bands": [asdict(span) for span in placed.bands],
        "nodes": node_elements(picture, placed, np.flatnonzero(drawn)),
        "edges": edge_elements(graph, share, backbone(graph, drawn)),
    }


def node_details(graph: AttributionGraph, node: int) -> dict:
    """The columns of the node and its strongest edges in both directions, each sorted by share."""
    share = whole_input_share(graph)
    incoming, outgoing = np.flatnonzero(graph.target == node), np.flatnonzero(graph.source == node)
    kind, position = NodeKind(graph.kind[node]), int(graph.position[node])
    return {
        "node": node,
        "kind": kind.text,
        "text": node_text(graph, node),
        "layer": layer_text(graph, node),
        "position": position,
        "token": visible(graph.token[node]),
        "place": visible(graph.info.tokens[position]) if position >= 0 else "",
        "label": graph.label[node],
        "feature": int(graph.feature[node]) if kind == NodeKind.FEATURE else None,
        **{name: float(getattr(graph, name)[node]) for name in _NODE_COLUMNS},
        "probability": probability(graph, node),
        "input_by_kind": _share_by_kind(graph, share, incoming),
        "n_incoming": len(incoming),
        "n_outgoing": len(outgoing),
        "incoming": _connections(graph, share, incoming, graph.source),
        "outgoing": _connections(graph, share, outgoing, graph.target),
    }


def feature_record(store: GraphStore, graph: AttributionGraph, node: int) -> dict | None:
    """What the store knows about the node's feature; None if nothing, or if the node is no feature."""
    if graph.kind[node] != NodeKind.FEATURE:
        return None
    rows = store.sql(
        _FEATURE,
        transcoder=graph.info.transcoder,
        layer=int(graph.layer[node]),
        feature=int(graph.feature[node]),
    ).to_pylist()
    return rows[0] if rows else None


def _connections(
    graph: AttributionGraph,
    share: Float[ndarray, "edge"],
    chosen: Integer[ndarray, "chosen"],
    other_ends: Integer[ndarray, "edge"],
) -> list[dict]:
    chosen = chosen[np.lexsort((chosen, -share[chosen]))][:MOST_CONNECTIONS]
    elements = edge_elements(graph, share, chosen)
    return [
        {
            "node": end,
            "kind": NodeKind(graph.kind[end]).text,
            "text": node_text(graph, end),
            "label": graph.label[end],
            "layer": layer_text(graph, end),
            "position": int(graph.position[end]),
            "place": visible(graph.info.tokens[graph.position[end]]) if graph.position[end] >= 0 else "",
            "weight": float(graph.weight[edge]),
            "share": float(share[edge]),
            "element": element,
        }
        for edge, end, element in zip(chosen.tolist(), other_ends[chosen].tolist(), elements, strict=True)
    ]


def _share_by_kind(
    graph: AttributionGraph, share: Float[ndarray, "edge"], incoming: Integer[ndarray, "chosen"]
) -> dict[str, float]:
    total = np.bincount(graph.kind[graph.source[incoming]], share[incoming], minlength=len(NodeKind))
    return {kind.text: float(total[kind]) for kind in NodeKind if total[kind] > 0}
