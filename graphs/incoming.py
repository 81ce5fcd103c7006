"""Edges grouped by their target, and influence carried back along them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.shapes import Bool, Float, Float64, Int

TINY = float(np.finfo(np.float64).tiny)
_EDGES_AT_ONCE = 1 << 18
"""Made wide to be summed: all of millions at once would take three times their own memory."""


@dataclass(frozen=True)
class Incoming:
    """Edges in the order of their targets; each target with edges is a row."""

    source: Int[ndarray, "edge"]
    weight: Float[ndarray, "edge"]
    number: Int[ndarray, "edge"] | None
    """Of each among the edges as they were given; None where that is its place here."""
    node: Int[ndarray, "row"]
    """The target of each row, ascending."""
    start: Int[ndarray, "row"]
    """Where its edges start."""
    count: Int[ndarray, "row"]

    @property
    def as_given(self) -> Int[ndarray, "edge"]:
        """The number of each edge among those given."""
        return np.arange(len(self.source)) if self.number is None else self.number

    @property
    def row(self) -> Int[ndarray, "edge"]:
        """The row of each edge."""
        return np.repeat(np.arange(len(self.node), dtype=np.int32), self.count)


def incoming(source: Int[ndarray, "edge"], target: Int[ndarray, "edge"], weight: Float[ndarray, "edge"]) -> Incoming:
    """Group edges by target; every source must precede its target."""
    backward = int(np.count_nonzero(source >= target))
    if backward:
        raise GraphError(
            f"{backward} of {len(source)} edges run backward; sort nodes by layer so that every source "
            "precedes its target."
        )
    number = None
    if (target[1:] < target[:-1]).any():
        number = np.lexsort((source, target))
        source, target, weight = source[number], target[number], weight[number]
    start = np.concatenate([np.zeros(min(1, len(target)), int), np.flatnonzero(target[1:] != target[:-1]) + 1])
    return Incoming(source, weight, number, target[start], start, np.diff(start, append=len(target)))


def into(edges: Incoming, kept: Bool[ndarray, "node"]) -> Incoming:
    """Only the edges whose target is kept."""
    rows = kept[edges.node]
    count = edges.count[rows]
    start = count.cumsum() - count
    small = np.int32 if len(edges.source) < 2**31 else np.int64  # half the memory for millions of edges
    chosen = np.arange(count.sum(), dtype=small)
    chosen += np.repeat((edges.start[rows] - start).astype(small), count)
    number = chosen if edges.number is None else edges.number[chosen]
    return Incoming(edges.source[chosen], edges.weight[chosen], number, edges.node[rows], start, count)


def out_of(edges: Incoming, kept: Bool[ndarray, "node"]) -> Incoming:
    """Only the edges whose source is kept."""
    chosen = np.flatnonzero(kept[edges.source])
    end = np.searchsorted(chosen, edges.start + edges.count)
    count = end - np.searchsorted(chosen, edges.start)
    rows = count > 0
    number = chosen if edges.number is None else edges.number[chosen]
    return Incoming(
        edges.source[chosen], edges.weight[chosen], number, edges.node[rows], (end - count)[rows], count[rows]
    )


def received(edges: Incoming) -> Float64[ndarray, "row"]:
    """Σ|w| of each row."""
    return _summed(edges, np.abs)


def added_up(edges: Incoming) -> Float64[ndarray, "row"]:
    """Σw of each row."""
    return _summed(edges, lambda weight: weight)


def _summed(edges: Incoming, of: Callable[[ndarray], ndarray]) -> Float64[ndarray, "row"]:
    total, stop, end = np.zeros(len(edges.node)), edges.start + edges.count, 0
    while end < len(total):
        first, begin = end, edges.start[end]
        end = max(first + 1, int(np.searchsorted(stop, begin + _EDGES_AT_ONCE, side="right")))
        values = of(edges.weight[begin : stop[end - 1]])
        total[first:end] = np.add.reduceat(values, edges.start[first:end] - begin, dtype=np.float64)
    return total


def passed_back(
    edges: Incoming, total: Float64[ndarray, "row"], reach: Float[ndarray, "node"]
) -> Float64[ndarray, "node"]:
    """What reaches every node when each target passes what reaches it to its sources, in the parts |w| / total.

    `reach` is what each node has to begin with. One pass: rows of one level are fed by lower nodes only, so what
    reaches them is final when their turn comes.
    """
    result = reach.astype(np.float64)
    for first, end in _levels(edges):
        part = slice(edges.start[first], edges.start[end - 1] + edges.count[end - 1])
        each = result[edges.node[first:end]] / np.maximum(total[first:end], TINY)
        passed = np.abs(edges.weight[part]) * np.repeat(each, edges.count[first:end])
        below = int(edges.node[first])
        result[:below] += np.bincount(edges.source[part], passed, minlength=below)
    return result


def _levels(edges: Incoming) -> Iterator[tuple[int, int]]:
    """Runs of rows that feed none of each other, from the last to the first."""
    if len(edges.node) == 0:
        return
    highest_source = np.maximum.reduceat(edges.source, edges.start).tolist()
    node = edges.node.tolist()
    end = len(node)
    while end:
        first, highest = end - 1, highest_source[end - 1]
        while first and highest < node[first - 1]:
            first -= 1
            highest = max(highest, highest_source[first])
        yield first, end
        end = first
