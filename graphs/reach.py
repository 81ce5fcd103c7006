"""From which tokens a node can be reached, and whether it reaches the answer: what makes questions about paths quick.

Paths through error nodes do not count, as in `strongest_path`.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy import ndarray

from graphs.graph import AttributionGraph, NodeKind
from graphs.shapes import Bool, UInt8


class Reach(NamedTuple):
    """Two columns of table `nodes` that follow from the edges."""

    reached_from: pa.Array
    """Per node the positions, ascending, from whose tokens a path leads to it."""
    reaches_answer: Bool[ndarray, "node"]
    """Whether a path leads to the logit of most weight, the first of equals."""


def reach(graph: AttributionGraph) -> Reach:
    """The two columns of the graph's nodes; a token is reached from itself, and the answer reaches itself."""
    return Reach(_positions(_reached_from(graph)), _reaches_answer(graph))


def _reached_from(graph: AttributionGraph) -> UInt8[ndarray, "node bytes_of_positions"]:
    """A set of positions per node, one bit each."""
    n_bytes = (len(graph.info.tokens) + 7) // 8
    reached = np.zeros((graph.n_nodes, n_bytes), np.uint8)
    tokens = np.flatnonzero((graph.kind == NodeKind.TOKEN) & (graph.position >= 0))
    place = graph.position[tokens]
    reached[tokens, place // 8] = 0x80 >> (place % 8)
    passes = graph.kind != NodeKind.ERROR
    edges = graph.incoming
    # one target after the other, first to last: each needs the finished sets of all its sources
    for node, start, count in zip(edges.node.tolist(), edges.start.tolist(), edges.count.tolist(), strict=True):
        if passes[node]:
            reached[node] |= np.bitwise_or.reduce(reached[edges.source[start : start + count]], axis=0)
    return reached


def _positions(reached: UInt8[ndarray, "node bytes_of_positions"]) -> pa.Array:
    node, position = np.nonzero(np.unpackbits(reached, axis=1))
    count = np.bincount(node, minlength=len(reached))
    start = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(start), pa.array(position.astype(np.int32)))


def _reaches_answer(graph: AttributionGraph) -> Bool[ndarray, "node"]:
    reaches = np.zeros(graph.n_nodes, bool)
    weighed = np.flatnonzero(~np.isnan(graph.probability))
    if not len(weighed):
        return reaches
    reaches[weighed[np.argmax(graph.probability[weighed])]] = True
    passes = graph.kind != NodeKind.ERROR
    edges = graph.incoming
    for node, start, count in zip(
        edges.node[::-1].tolist(), edges.start[::-1].tolist(), edges.count[::-1].tolist(), strict=True
    ):
        if reaches[node] and passes[node]:
            reaches[edges.source[start : start + count]] = True
    return reaches
