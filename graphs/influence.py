"""Influence of nodes and edges on the logits, and the two scores that say how much of it is explained.

With the inputs of every target normalised to sum to 1 in absolute value, Ã[t, s] = |w| / Σ_s |w|, the influence is
I = p·(Ã + Ã² + …) = p·((I - Ã)⁻¹ - I), where p holds the weights of what is explained: the probabilities of tokens,
and 1 for other targets. "Logits" are all targets, also an explained feature.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind, logit_weights
from graphs.incoming import TINY, Incoming, incoming, into, passed_back, received
from graphs.shapes import Bool, Float, Float64, Int


@dataclass(frozen=True)
class Scores:
    """How much of the influence on the logits is explained; both lie in [0, 1]."""

    replacement: float
    """Influence of tokens over that of tokens and errors: the share of end-to-end influence without errors."""
    completeness: float
    """Mean share of a target's inputs that are not errors, weighted by the target's influence."""


def input_share(target: Int[ndarray, "edge"], weight: Float[ndarray, "edge"], n_nodes: int) -> Float64[ndarray, "edge"]:
    """Ã: the part of its target's input that an edge brings, |w| / Σ|w| over the target's incoming edges."""
    strength = np.abs(weight).astype(np.float64)
    strengths = np.bincount(target, strength, minlength=n_nodes)
    return strength / np.maximum(strengths[target], TINY)


def whole_input_share(graph: AttributionGraph) -> Float64[ndarray, "edge"]:
    """The same of all that its target received, whether or not it is an edge here, where that is known."""
    strength = np.abs(graph.weight).astype(np.float64)
    kept = np.bincount(graph.target, strength, minlength=graph.n_nodes)
    return strength / np.maximum(np.fmax(kept, graph.input_size), TINY)[graph.target]


def influence_by_length(
    source: Int[ndarray, "edge"],
    target: Int[ndarray, "edge"],
    weight: Float[ndarray, "edge"],
    logit_weight: Float[ndarray, "node"],
) -> Float64[ndarray, "length node"]:
    """p·Ã^length for length 0, 1, 2, …: influence over paths of exactly so many edges."""
    from scipy.sparse import csr_array  # loaded where it is used: a list of graphs need not wait for it

    n_nodes = len(logit_weight)
    share = input_share(target, weight, n_nodes)
    back = csr_array((share, (source, target)), shape=(n_nodes, n_nodes))
    steps = [logit_weight.astype(np.float64)]
    while (step := back @ steps[-1]).any():
        steps.append(step)
        if len(steps) > n_nodes:
            raise GraphError("the edges form a cycle, so influence has no end; give an acyclic graph.")
    return np.stack(steps)


def node_influence(
    source: Int[ndarray, "edge"],
    target: Int[ndarray, "edge"],
    weight: Float[ndarray, "edge"],
    logit_weight: Float[ndarray, "node"],
) -> Float64[ndarray, "node"]:
    """Influence of every node on the logits, over paths of one edge or more; every source precedes its target.

    A target passes its influence back to its sources in proportion to |weight|.
    Signs are ignored: a strongly inhibiting edge matters as much as an exciting one.
    """
    return influence_over(incoming(source, target, weight), logit_weight)


def influence_over(edges: Incoming, logit_weight: Float[ndarray, "node"]) -> Float64[ndarray, "node"]:
    """The same over edges grouped by target."""
    return passed_back(edges, received(edges), logit_weight) - logit_weight


def edge_influence(
    source: Int[ndarray, "edge"],
    target: Int[ndarray, "edge"],
    weight: Float[ndarray, "edge"],
    logit_weight: Float[ndarray, "node"],
) -> Float64[ndarray, "edge"]:
    """Influence that flows through each edge: its share of the target's input times the target's influence.

    An explained logit counts with its probability on top.
    """
    edges = incoming(source, target, weight)
    result = np.empty(len(source))
    result[edges.as_given] = flow(edges, logit_weight)
    return result


def flow(edges: Incoming, logit_weight: Float[ndarray, "node"]) -> Float64[ndarray, "edge"]:
    """The same for edges grouped by target, in their order."""
    total = received(edges)
    reach = passed_back(edges, total, logit_weight)
    return np.abs(edges.weight) * np.repeat(reach[edges.node] / np.maximum(total, TINY), edges.count)


def cumulative_share(influence: Float[ndarray, "node"]) -> Float64[ndarray, "node"]:
    """Share of all influence held by nodes at least as influential, so equal nodes get equal values.

    Nodes without influence get 1; NaN stays NaN and counts for nothing.
    """
    ranked = np.sort(influence[~np.isnan(influence)].astype(np.float64))[::-1]
    total = np.cumsum(ranked)
    if len(total) == 0 or total[-1] == 0:
        return np.where(np.isnan(influence), np.nan, 1.0)
    # ascending order for searchsorted: how many nodes are at least as influential
    at_least = len(ranked) - np.searchsorted(ranked[::-1], influence, side="left")
    share = total[np.maximum(at_least, 1) - 1] / total[-1]
    return np.where(np.isnan(influence), np.nan, share)


def score(graph: AttributionGraph, nodes: Bool[ndarray, "node"] | None = None) -> Scores:
    """Replacement and completeness of the graph, or of the part of it that a mask keeps.

    Tokens and logits always count as kept. What a removed feature sends is an unexplained input of its targets, so
    its edges are first added, signed, to the error node of the same layer and position. Nothing enters a removed
    node. If nothing reaches tokens and errors, both scores are 0.
    """
    edges, kept = graph.incoming, np.ones(graph.n_nodes, bool)
    if nodes is not None:
        kept = nodes | always_kept(graph)
        edges = into(edges, kept)
    unexplained = (graph.kind == NodeKind.ERROR) | (~kept & (graph.kind == NodeKind.FEATURE))
    explained = replace(edges, weight=np.where(unexplained[edges.source], 0, edges.weight))
    from_errors = _folded(edges, unexplained, _places(graph))
    total = received(explained) + from_errors
    reach = passed_back(explained, total, logit_weights(graph))
    followed = reach[edges.node] * (total > 0)
    unknown = float((followed * from_errors / np.maximum(total, TINY)).sum())
    known = float(reach[graph.kind == NodeKind.TOKEN].sum())
    return Scores(ratio(known, known + unknown), ratio(float(followed.sum()) - unknown, float(followed.sum())))


def _folded(edges: Incoming, folded: Bool[ndarray, "node"], place: Int[ndarray, "node"]) -> Float64[ndarray, "row"]:
    """Per row what comes from the folded nodes: absolute values of the signed sums over each place."""
    chosen = np.flatnonzero(folded[edges.source])
    n_places = int(place.max(initial=0)) + 1
    key = edges.row[chosen].astype(np.int64) * n_places + place[edges.source[chosen]]
    weight = edges.weight[chosen].astype(np.float64)
    if len(key):  # neighbours are of one place more often than not
        start = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
        key, weight = key[start], np.add.reduceat(weight, start)
    pair, group = np.unique(key, return_inverse=True)
    size = np.abs(np.bincount(group, weight, minlength=len(pair)))
    return np.bincount(pair // n_places, size, minlength=len(edges.node)).astype(np.float64)  # of nothing: whole


def score_from(graph: AttributionGraph, influence: Float[ndarray, "node"]) -> Scores:
    """The scores of a whole graph whose influence is known: nothing is computed from its edges.

    What errors have is what the targets' inputs have from errors.
    """
    reach = influence + logit_weights(graph)
    unknown = float(reach[graph.kind == NodeKind.ERROR].sum())
    known = float(reach[graph.kind == NodeKind.TOKEN].sum())
    has_inputs = graph.incoming.node[received(graph.incoming) > 0]
    followed = float(reach[has_inputs].sum())
    return Scores(ratio(known, known + unknown), ratio(followed - unknown, followed))


def always_kept(graph: AttributionGraph) -> Bool[ndarray, "node"]:
    """Tokens and logits: the ends of every explanation, which no pruning takes away."""
    return (graph.kind == NodeKind.TOKEN) | (graph.kind == NodeKind.LOGIT)


def _places(graph: AttributionGraph) -> Int[ndarray, "node"]:
    """One number per (layer, position)."""
    return (graph.layer.astype(np.int64) + 1) * (len(graph.info.tokens) + 1) + graph.position + 1


def ratio(part: float, whole: float) -> float:
    """A share; 0 of nothing."""
    # rounding may carry a sum of shares past 1 by one unit in the last place
    return float(min(max(part / whole, 0.0), 1.0)) if whole > 0 else 0.0
