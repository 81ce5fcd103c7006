"""Influence of nodes and edges on the logits, and the two scores that say how much of it is explained.

With the inputs of every target normalised to sum to 1 in absolute value, Ã[t, s] = |w| / Σ_s |w|, the influence is
I = p·(Ã + Ã² + …) = p·((I - Ã)⁻¹ - I), where p holds the weights of what is explained: the probabilities of tokens,
and 1 for other targets. "Logits" are all targets, also an explained feature.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from scipy.sparse import csr_array

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind, logit_weights


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
    received = np.bincount(target, strength, minlength=n_nodes)
    return strength / np.maximum(received[target], np.finfo(np.float64).tiny)


def influence_by_length(
    source: Int[ndarray, "edge"],
    target: Int[ndarray, "edge"],
    weight: Float[ndarray, "edge"],
    logit_weight: Float[ndarray, "node"],
) -> Float64[ndarray, "length node"]:
    """p·Ã^length for length 0, 1, 2, …: influence over paths of exactly so many edges."""
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
    """Influence of every node on the logits, over paths of one edge or more.

    A target passes its influence back to its sources in proportion to |weight|.
    Signs are ignored: a strongly inhibiting edge matters as much as an exciting one.
    """
    return influence_by_length(source, target, weight, logit_weight)[1:].sum(axis=0)


def edge_influence(
    source: Int[ndarray, "edge"],
    target: Int[ndarray, "edge"],
    weight: Float[ndarray, "edge"],
    logit_weight: Float[ndarray, "node"],
) -> Float64[ndarray, "edge"]:
    """Influence that flows through each edge: its share of the target's input times the target's influence.

    An explained logit counts with its probability on top.
    """
    reach = node_influence(source, target, weight, logit_weight) + logit_weight
    return input_share(target, weight, len(logit_weight)) * reach[target]


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
    flow = _flow(graph, None if nodes is None else nodes | always_kept(graph))
    influence = node_influence(flow.source, flow.target, flow.weight, flow.logit_weight)
    from_errors = influence[flow.is_error].sum()
    from_tokens = influence[flow.is_token].sum()

    share = input_share(flow.target, flow.weight, len(influence))
    error_edge = flow.is_error[flow.source]
    error_share = np.bincount(flow.target[error_edge], share[error_edge], minlength=len(influence))
    has_inputs = np.bincount(flow.target, share, minlength=len(influence)) > 0
    reach = (influence + flow.logit_weight) * has_inputs
    return Scores(
        replacement=_ratio(from_tokens, from_tokens + from_errors),
        completeness=_ratio((reach * (1 - error_share)).sum(), reach.sum()),
    )


def completeness_counting_leaves(graph: AttributionGraph) -> float:
    """Completeness as circuit-tracer computes it, for comparison only.

    Its mean runs over tokens and errors too, which have no inputs and so count as perfectly explained; the value is
    never below `score(graph).completeness`.
    """
    weight = logit_weights(graph)
    reach = node_influence(graph.source, graph.target, graph.weight, weight) + weight
    share = input_share(graph.target, graph.weight, graph.n_nodes)
    from_error = graph.kind[graph.source] == NodeKind.ERROR
    error_share = np.bincount(graph.target[from_error], share[from_error], minlength=graph.n_nodes)
    return _ratio((reach * (1 - error_share)).sum(), reach.sum())


def always_kept(graph: AttributionGraph) -> Bool[ndarray, "node"]:
    """Tokens and logits: the ends of every explanation, which no pruning takes away."""
    return (graph.kind == NodeKind.TOKEN) | (graph.kind == NodeKind.LOGIT)


@dataclass(frozen=True)
class _Flow:
    """The edges that scores look at. Error nodes that the graph lacks are numbered after its own nodes."""

    source: Int[ndarray, "edge"]
    target: Int[ndarray, "edge"]
    weight: Float[ndarray, "edge"]
    logit_weight: Float64[ndarray, "column"]
    is_token: Bool[ndarray, "column"]
    is_error: Bool[ndarray, "column"]


def _flow(graph: AttributionGraph, kept: Bool[ndarray, "node"] | None) -> _Flow:
    is_error, is_token = graph.kind == NodeKind.ERROR, graph.kind == NodeKind.TOKEN
    if kept is None:
        return _Flow(graph.source, graph.target, graph.weight, logit_weights(graph), is_token, is_error)
    column = _error_columns(graph, removed=~kept & (graph.kind == NodeKind.FEATURE))
    n_columns = max(int(column.max(initial=-1)) + 1, graph.n_nodes)
    added = n_columns - graph.n_nodes

    alive = kept[graph.target]
    source, target = column[graph.source[alive]], graph.target[alive].astype(np.int64)
    pair, edge = np.unique(target * n_columns + source, return_inverse=True)
    return _Flow(
        source=pair % n_columns,
        target=pair // n_columns,
        weight=np.bincount(edge, graph.weight[alive], minlength=len(pair)),
        logit_weight=np.pad(logit_weights(graph), (0, added)),
        is_token=np.pad(is_token, (0, added)),
        is_error=np.pad(is_error, (0, added), constant_values=True),
    )


def _error_columns(graph: AttributionGraph, removed: Bool[ndarray, "node"]) -> Int[ndarray, "node"]:
    """Per node the column its edges count in: its own, or for a removed feature that of the error beside it."""
    place = _places(graph)
    column = np.arange(graph.n_nodes)
    errors = np.flatnonzero(graph.kind == NodeKind.ERROR)
    places, group = np.unique(np.concatenate((place[errors], place[removed])), return_inverse=True)
    of_place = graph.n_nodes + np.arange(len(places))
    of_place[group[: len(errors)]] = errors
    column[removed] = of_place[group[len(errors) :]]
    return column


def _places(graph: AttributionGraph) -> Int[ndarray, "node"]:
    """One number per (layer, position)."""
    return (graph.layer.astype(np.int64) + 1) * (len(graph.info.tokens) + 1) + graph.position + 1


def _ratio(part: float, whole: float) -> float:
    # rounding may carry a sum of shares past 1 by one unit in the last place
    return float(min(max(part / whole, 0.0), 1.0)) if whole > 0 else 0.0
