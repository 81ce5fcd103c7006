"""The strongest paths through a graph, and how long the paths are along which influence flows.

A path is as strong as the product of its edges' shares: the part of the end's whole input that came along it, also of
what is no edge of this graph.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind, logit_weights
from graphs.influence import influence_by_length, whole_input_share
from graphs.shapes import Bool, Float64, Int


@dataclass(frozen=True)
class Path:
    """A chain of edges from the first node to the last."""

    weight: float
    """Part of the last node's input that came along this path, in absolute value."""
    nodes: tuple[int, ...]


def strongest_paths(
    graph: AttributionGraph,
    sources: Iterable[int],
    target: int,
    *,
    k: int = 10,
    through: Bool[ndarray, "node"] | None = None,
) -> list[Path]:
    """The k strongest paths from any of the sources to the target, strongest first, fewer if there are not as many.

    `through` says which nodes may lie between the ends.
    """
    starts = np.unique(np.fromiter(sources, dtype=np.int64))
    if k < 1:
        raise GraphError(f"k is {k}; ask for at least one path.")
    for node in (*starts.tolist(), target):
        if not 0 <= node < graph.n_nodes:
            raise GraphError(f"node {node} does not exist; the graph has nodes 0 … {graph.n_nodes - 1}.")
    starts = starts[starts < target]
    best = _best_continuations(graph, starts, target, k, np.ones(graph.n_nodes, bool) if through is None else through)

    order = np.argsort(-best.weight[starts], axis=None, kind="stable")[:k]
    ends = [(int(starts[index // k]), int(index % k)) for index in order]
    return [best.path(node, rank, target) for node, rank in ends if best.weight[node, rank] > 0]


def path_length_distribution(graph: AttributionGraph) -> Float64[ndarray, "length"]:
    """Influence of the token nodes on the logits by the number of edges it took; the index is the length.

    The sum over all lengths is the influence of the tokens, as in the replacement score.
    """
    steps = influence_by_length(graph.source, graph.target, graph.weight, logit_weights(graph))
    return steps[:, graph.kind == NodeKind.TOKEN].sum(axis=1)


@dataclass(frozen=True)
class _Continuations:
    """Per node its k best ways on to the target: how strong, over which next node, and which of its ways."""

    weight: Float64[ndarray, "node rank"]
    next_node: Int[ndarray, "node rank"]
    next_rank: Int[ndarray, "node rank"]

    def path(self, node: int, rank: int, target: int) -> Path:
        weight, nodes = float(self.weight[node, rank]), [node]
        while node != target:
            node, rank = int(self.next_node[node, rank]), int(self.next_rank[node, rank])
            nodes.append(node)
        return Path(weight, tuple(nodes))


def _best_continuations(
    graph: AttributionGraph, starts: Int[ndarray, "start"], target: int, k: int, through: Bool[ndarray, "node"]
) -> _Continuations:
    shape = (graph.n_nodes, k)
    weight, next_node, next_rank = np.zeros(shape), np.full(shape, -1), np.full(shape, -1)
    weight[target, 0] = 1.0

    inside = through.copy()
    inside[target] = True
    begins = inside.copy()
    begins[starts] = True
    share = whole_input_share(graph)
    usable = np.flatnonzero(begins[graph.source] & inside[graph.target] & (graph.target <= target) & (share > 0))
    usable = usable[np.lexsort((graph.target[usable], graph.source[usable]))]
    ends, share = graph.target[usable], share[usable]
    first = np.searchsorted(graph.source[usable], np.arange(target + 1))

    # one node after the other, last first: each needs the finished ways of all its targets
    for node in range(target - 1, -1, -1):
        edges = np.arange(first[node], first[node + 1])
        # an edge whose best way is not among the k best such has none among the k best of all
        edges = edges[_largest(share[edges] * weight[ends[edges], 0], k)]
        ways = (share[edges, None] * weight[ends[edges]]).ravel()
        chosen = _largest(ways, k)
        chosen = chosen[np.argsort(-ways[chosen], kind="stable")[:k]]
        weight[node, : len(chosen)] = ways[chosen]
        next_node[node, : len(chosen)] = ends[edges[chosen // k]]
        next_rank[node, : len(chosen)] = chosen % k
    return _Continuations(weight, next_node, next_rank)


def _largest(values: Float64[ndarray, "value"], k: int) -> Int[ndarray, "some"]:
    """Where the k largest positive numbers stand, with all that equal the last of them, in order."""
    least = np.partition(values, -k)[-k] if len(values) > k else 0.0
    return np.flatnonzero((values >= least) & (values > 0))
