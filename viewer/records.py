"""What the pages show of graphs and nodes, as plain data."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from graphs import (
    AttributionGraph,
    DamagedGraph,
    GraphError,
    GraphStore,
    NodeKind,
    StoredGraph,
    edge_influence,
    logit_weights,
)
from graphs.graph import NODE_COLUMNS
from graphs.influence import input_share
from viewer.elements import (
    axes,
    edge_elements,
    is_always_shown,
    labels_that_fit,
    layer_name,
    make_layout,
    node_elements,
    node_names,
    token_at,
    visible_token,
)

MOST_NODES_AT_FIRST = 400
"""A graph with more features and errors than this opens with the less influential ones hidden."""

_ANSWERS = """
    SELECT graph_id, arg_max(token, probability) AS token, max(probability) AS probability
    FROM nodes WHERE kind = 'logit' GROUP BY graph_id
"""
_FEATURE = "FROM features WHERE transcoder = $transcoder AND layer = $layer AND feature = $feature LIMIT 1"


@dataclass(frozen=True)
class Answer:
    """The likeliest explained token."""

    token: str
    probability: float | None


@dataclass(frozen=True)
class Library:
    """The graphs of a store, newest first, with their answers, and those that cannot be read."""

    graphs: list[tuple[StoredGraph, Answer | None]]
    damaged: list[DamagedGraph]


def library(store: GraphStore) -> Library:
    """All that the list of graphs shows."""
    stored = store.list()
    try:
        rows = store.sql(_ANSWERS).to_pylist()
    except GraphError:
        return _library_one_by_one(store, stored)
    answers = {row["graph_id"]: Answer(visible_token(row["token"]), row["probability"]) for row in rows}
    return Library([(graph, answers.get(graph.graph_id)) for graph in stored], store.damaged())


def answer(graph: AttributionGraph) -> Answer | None:
    """The likeliest of the graph's logits."""
    logits = np.flatnonzero(graph.kind == NodeKind.LOGIT)
    if not len(logits):
        return None
    best = logits[np.argmax(np.nan_to_num(graph.probability[logits]))]
    return Answer(visible_token(graph.token[best]), float(graph.probability[best]))


def graph_record(graph: AttributionGraph, graph_id: str) -> dict:
    """What the page needs to draw the graph, less its edges."""
    layout = make_layout(graph)
    return {
        "graph_id": graph_id,
        "prompt": graph.info.prompt,
        "n_nodes": graph.n_nodes,
        "n_edges": graph.n_edges,
        "threshold": _thresholds(graph),
        "axes": axes(graph, layout),
        "elements": node_elements(graph, layout),
    }


def backbone(graph: AttributionGraph, k: int) -> Int[ndarray, "chosen"]:
    """The k edges through which most influence flows."""
    flow = edge_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    return np.argsort(-flow, kind="stable")[:k]


def node_record(graph: AttributionGraph, node: int, feature: dict | None) -> dict:
    """A node's columns, its edges in both directions strongest first, and what is known about its feature."""
    share = input_share(graph.target, graph.weight, graph.n_nodes)
    strongest = np.argsort(-share, kind="stable")
    inputs = strongest[graph.target[strongest] == node]
    outputs = strongest[graph.source[strongest] == node]
    names = node_names(graph)
    ends = np.concatenate(([node], graph.source[inputs], graph.target[outputs]))
    by_strength = np.argsort(-np.concatenate(([np.inf], share[inputs], share[outputs])), kind="stable")
    return {
        "node": node,
        "name": names[node],
        "place": layer_name(graph, int(graph.layer[node])),
        "at": token_at(graph, node),
        "columns": _columns(graph, node),
        "inputs": _connections(graph, names, graph.source[inputs], graph.weight[inputs], share[inputs]),
        "outputs": _connections(graph, names, graph.target[outputs], graph.weight[outputs], share[outputs]),
        "input_shares": _shares_by_kind(graph, inputs, share),
        "named": [str(end) for end in labels_that_fit(make_layout(graph), names, ends[by_strength].tolist())],
        "elements": edge_elements(graph, np.concatenate((inputs, outputs))),
        "feature": feature,
    }


def feature_record(store: GraphStore, graph: AttributionGraph, node: int) -> dict | None:
    """What the store knows about the node's feature; None for other kinds and unknown features."""
    if graph.kind[node] != NodeKind.FEATURE:
        return None
    place = {"layer": int(graph.layer[node]), "feature": int(graph.feature[node])}
    rows = store.sql(_FEATURE, transcoder=graph.info.transcoder, **place).to_pylist()
    return rows[0] if rows else None


def _library_one_by_one(store: GraphStore, stored: list[StoredGraph]) -> Library:
    """The same where a graph's damage lies deeper than lists look: it is told apart from those that are whole."""
    graphs: list[tuple[StoredGraph, Answer | None]] = []
    damaged = store.damaged()
    for one in stored:
        try:
            graphs.append((one, answer(store.load(one.graph_id))))
        except GraphError as error:
            damaged.append(DamagedGraph(one.graph_id, str(error)))
    return Library(graphs, damaged)


def _thresholds(graph: AttributionGraph) -> dict:
    """Range of the pruning slider in hundredths, so that its end shows all; and where it stands at first."""
    cumulative = np.sort(graph.cumulative_influence[~is_always_shown(graph)])
    largest = np.ceil(100 * cumulative[-1]) / 100 if len(cumulative) else 1.0
    initial = np.floor(100 * cumulative[MOST_NODES_AT_FIRST]) / 100 if len(cumulative) > MOST_NODES_AT_FIRST else largest
    return {"largest": float(largest), "initial": float(initial)}


def _columns(graph: AttributionGraph, node: int) -> dict:
    """The node's row of table `nodes`, with None where a column has no meaning for its kind."""
    row = {name: getattr(graph, name)[node] for name in NODE_COLUMNS}
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    values |= {name: None for name in ("position", "feature", "token_id") if values[name] < 0}
    return values | {"kind": NodeKind(values["kind"]).text}


def _connections(
    graph: AttributionGraph,
    names: list[str],
    others: Int[ndarray, "chosen"],
    weights: ndarray,
    shares: ndarray,
) -> list[dict]:
    return [
        {
            "node": other,
            "name": names[other],
            "kind": NodeKind(int(graph.kind[other])).text,
            "place": layer_name(graph, int(graph.layer[other])),
            "at": token_at(graph, other),
            "weight": weight,
            "share": share,
        }
        for other, weight, share in zip(others.tolist(), weights.tolist(), shares.tolist(), strict=True)
    ]


def _shares_by_kind(graph: AttributionGraph, inputs: Int[ndarray, "chosen"], share: ndarray) -> dict[str, float]:
    kinds = graph.kind[graph.source[inputs]]
    return {kind.text: float(share[inputs][kinds == kind].sum()) for kind in NodeKind if np.any(kinds == kind)}
