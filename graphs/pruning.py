"""Keep the part of a graph that carries most of the influence: first nodes, then edges, then no loose ends."""

from dataclasses import replace

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind, logit_weights, subgraph
from graphs.incoming import into, out_of, received
from graphs.influence import always_kept, flow, influence_over, score, score_from
from graphs.shapes import Bool, Float, Int


def prune(graph: AttributionGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
    """The nodes that hold `node_threshold` of all influence, and the edges that hold `edge_threshold` of what is left.

    Tokens and logits stay. The influence columns and the scores without `pruned_` remain those of the graph given,
    so give the whole graph, not one that was pruned before; where it has no influence columns yet, it is computed.
    Thresholds of 1 drop only what has no influence.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < threshold <= 1:
            raise GraphError(f"{name} is {threshold}; give a share of the influence above 0 and at most 1.")
    weights = logit_weights(graph)
    unknown = np.isnan(graph.influence[graph.kind != NodeKind.LOGIT]).any()
    influence = influence_over(graph.incoming, weights) if unknown else np.nan_to_num(graph.influence)
    nodes = keep_largest(influence, node_threshold) | always_kept(graph)

    # influence is shared out anew among the nodes that are left
    edges = out_of(into(graph.incoming, nodes), nodes)
    alive = np.sort(edges.as_given[keep_largest(flow(edges, weights), edge_threshold)])

    nodes, alive = _without_loose_ends(graph, nodes, alive)
    graph = _with_input_size(graph)
    whole, pruned = score_from(graph, influence), score(graph, nodes)
    info = replace(
        graph.info,
        replacement_score=whole.replacement,
        completeness_score=whole.completeness,
        pruned_replacement_score=pruned.replacement,
        pruned_completeness_score=pruned.completeness,
    )
    return replace(subgraph(graph, nodes, alive), info=info)


def _with_input_size(graph: AttributionGraph) -> AttributionGraph:
    """The graph, which is whole, with Σ|input| of its edges where that is not known otherwise."""
    targets, size = graph.incoming.node, graph.input_size.copy()
    size[targets] = np.where(np.isnan(size[targets]), received(graph.incoming), size[targets])
    return replace(graph, input_size=size)


def keep_largest(scores: Float[ndarray, "entry"], threshold: float) -> Bool[ndarray, "entry"]:
    """The largest scores that together hold the threshold's share of the total.

    The one that crosses the threshold and all equal to it are kept; a threshold of 1 keeps every score above 0.
    """
    ranked = np.sort(scores.astype(np.float64))[::-1]
    total = np.cumsum(ranked)
    # a running sum reaches its total before the smallest scores are in, so 1 is not left to rounding
    if threshold >= 1 or len(total) == 0 or total[-1] == 0:
        return scores > 0
    crossing = int(np.searchsorted(total / total[-1], threshold, side="left"))
    return scores >= ranked[min(crossing, len(ranked) - 1)]


def _without_loose_ends(
    graph: AttributionGraph, nodes: Bool[ndarray, "node"], edges: Int[ndarray, "kept"]
) -> tuple[Bool[ndarray, "node"], Int[ndarray, "left"]]:
    """Drop features and errors that feed nothing, and features that nothing feeds, until none is left."""
    feature, error = graph.kind == NodeKind.FEATURE, graph.kind == NodeKind.ERROR
    while True:
        feeds, is_fed = np.zeros((2, graph.n_nodes), bool)
        feeds[graph.source[edges]] = is_fed[graph.target[edges]] = True
        kept = nodes & (feeds | ~(feature | error)) & (is_fed | ~feature)
        if np.array_equal(kept, nodes):
            return nodes, edges
        nodes = kept
        edges = edges[nodes[graph.source[edges]] & nodes[graph.target[edges]]]
