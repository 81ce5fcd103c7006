"""Several graphs as one: the union of their nodes and edges, with how many have each and how much its values vary.

A node is the same in two graphs if kind, layer, feature, token and place are; places are told by `graphs.alignment`.
Where the place does not count, a graph's nodes that become the same are added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from graphs.alignment import align
from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind
from graphs.names import shown
from graphs.pruning import prune
from graphs.shapes import Bool, Float64, Int


class Spread(NamedTuple):
    """A value over the graphs that have it."""

    mean: Float64[ndarray, "entry"]
    deviation: Float64[ndarray, "entry"]
    """Standard deviation; 0 where one graph has it."""
    first: Float64[ndarray, "entry"]
    """The value in the first graph, NaN where it lacks it."""
    second: Float64[ndarray, "entry"]


@dataclass(frozen=True, eq=False)
class Merged:
    """The union of graphs; nodes are numbered so that every edge leads to a higher number."""

    n_graphs: int
    kind: Int[ndarray, "node"]
    layer: Int[ndarray, "node"]
    position: Int[ndarray, "node"]
    """The place in the aligned prompts; -1 where places do not count."""
    feature: Int[ndarray, "node"]
    token_id: Int[ndarray, "node"]
    token: ndarray
    """Texts of the graph that has the node first."""
    label: ndarray
    count: Int[ndarray, "node"]
    """Graphs that have the node."""
    activation: Spread
    influence: Spread

    source: Int[ndarray, "edge"]
    target: Int[ndarray, "edge"]
    edge_count: Int[ndarray, "edge"]
    weight: Spread

    in_first: Bool[ndarray, "node"]
    in_second: Bool[ndarray, "node"]
    edge_in_first: Bool[ndarray, "edge"]
    edge_in_second: Bool[ndarray, "edge"]
    node_overlap: float
    """Mean over all pairs of graphs of |nodes of both| / |nodes of either|."""
    edge_overlap: float

    @property
    def share(self) -> Float64[ndarray, "node"]:
        """The part of the graphs that have each node."""
        return self.count / self.n_graphs

    @property
    def edge_share(self) -> Float64[ndarray, "edge"]:
        """The part of the graphs that have each edge."""
        return self.edge_count / self.n_graphs


def merge_graphs(graphs: Sequence[AttributionGraph], *, alignment: str = "diff") -> Merged:
    """The union of the graphs; what has a high share of them is their consensus."""
    if len(graphs) < 2:
        raise GraphError(f"{len(graphs)} graphs were given; give two or more to compare.")
    _check_one_transcoder(graphs)
    places = align([graph.info.tokens for graph in graphs], alignment)
    keys, names = _keys(graphs, places)
    unique, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    sizes = np.array([graph.n_nodes for graph in graphs])
    member = np.repeat(np.arange(len(graphs)), sizes)
    number = number.ravel()  # sorted by layer first, so that edges lead to higher numbers
    nodes = _grouped(number, member, len(graphs))
    activation = _values(nodes, np.concatenate([graph.activation for graph in graphs]), np.maximum)
    influence = _values(nodes, np.concatenate([graph.influence for graph in graphs]), np.add)
    edges, weight, ends = _edges(graphs, number, sizes)
    return Merged(
        n_graphs=len(graphs),
        **{name: unique[:, place] for place, name in enumerate(("layer", "kind", "position", "feature", "token_id"))},
        token=names[first],
        label=np.concatenate([graph.label for graph in graphs])[first],
        count=nodes.count,
        activation=activation,
        influence=influence,
        source=ends // len(unique),
        target=ends % len(unique),
        edge_count=edges.count,
        weight=weight,
        in_first=nodes.has(0),
        in_second=nodes.has(1),
        edge_in_first=edges.has(0),
        edge_in_second=edges.has(1),
        node_overlap=nodes.overlap(len(graphs)),
        edge_overlap=edges.overlap(len(graphs)),
    )


def _check_one_transcoder(graphs: Sequence[AttributionGraph]) -> None:
    """Refuse graphs whose features have nothing in common but their numbers."""
    made_by = [(graph.info.transcoder, graph.info.transcoder_revision) for graph in graphs]
    for graph, transcoder in zip(graphs, made_by, strict=True):
        if transcoder != made_by[0]:
            ours, theirs = (" ".join(names).strip() or "unknown" for names in (made_by[0], transcoder))
            raise GraphError(
                f"the graphs of {shown(graphs[0].info.prompt)} and {shown(graph.info.prompt)} are of different "
                f"transcoders ({ours}; {theirs}), whose features of equal numbers differ; compare graphs of one."
            )


def threshold_grid(
    graph: AttributionGraph, node_thresholds: Sequence[float], edge_thresholds: Sequence[float]
) -> list[AttributionGraph]:
    """The graph pruned at every pair of thresholds; merged, their shares say how little an edge depends on them."""
    return [
        prune(graph, node_threshold=node, edge_threshold=edge) for node in node_thresholds for edge in edge_thresholds
    ]


@dataclass(frozen=True)
class _Groups:
    """Which entry of which graph is which of the union."""

    group: Int[ndarray, "pair"]
    """Of each pair of a union's entry and a graph that has it, the entry."""
    member: Int[ndarray, "pair"]
    pair: Int[ndarray, "entry"]
    """The pair that each entry of a graph belongs to."""
    count: Int[ndarray, "group"]

    def has(self, member: int) -> Bool[ndarray, "group"]:
        found = np.zeros(len(self.count), bool)
        found[self.group[self.member == member]] = True
        return found

    def overlap(self, n_members: int) -> float:
        """Mean Jaccard index over all pairs of graphs."""
        from scipy.sparse import csr_array  # loaded where it is used: a list of graphs need not wait for it

        size = np.bincount(self.member, minlength=n_members)
        held = csr_array((np.ones(len(self.group)), (self.member, self.group)), (n_members, len(self.count)))
        both = (held @ held.T).toarray()
        one, other = np.triu_indices(n_members, 1)
        either = size[one] + size[other] - both[one, other]
        return float(np.mean(np.where(either > 0, both[one, other] / np.maximum(either, 1), 1.0)))


def _keys(
    graphs: Sequence[AttributionGraph], places: Sequence[Int[ndarray, "_"]]
) -> tuple[Int[ndarray, "all key"], ndarray]:
    """What makes a node the same in two graphs, and the texts of all nodes."""
    names = np.concatenate([graph.token for graph in graphs])
    token_id = np.concatenate([graph.token_id for graph in graphs]).astype(np.int64)
    kind = np.concatenate([graph.kind for graph in graphs]).astype(np.int64)
    # tokens of unknown number and targets that are no tokens have only their names
    nameless = (token_id == -1) & ((kind == NodeKind.LOGIT) | (kind == NodeKind.TOKEN))
    _, name = np.unique(np.where(nameless, names, "").astype(str), return_inverse=True)
    position = [np.append(place, -1)[graph.position] for graph, place in zip(graphs, places, strict=True)]
    columns = [np.concatenate([getattr(graph, text) for graph in graphs]) for text in ("layer", "feature")]
    return np.column_stack((columns[0], kind, np.concatenate(position), columns[1], token_id, name)), names


def _grouped(number: Int[ndarray, "entry"], member: Int[ndarray, "entry"], n_members: int) -> _Groups:
    pairs, pair = np.unique(number * n_members + member, return_inverse=True)
    group = pairs // n_members
    return _Groups(group, pairs % n_members, pair.ravel(), np.bincount(group))


def _values(groups: _Groups, values: Float64[ndarray, "entry"], add: np.ufunc) -> Spread:
    """Mean and spread over graphs, after the values of one graph's entries that are the same were joined."""
    joined = np.zeros(len(groups.group))
    add.at(joined, groups.pair, np.nan_to_num(values))
    unknown = np.ones(len(groups.group), bool)
    unknown[groups.pair[~np.isnan(values)]] = False
    known = ~unknown
    count = np.bincount(groups.group[known], minlength=len(groups.count))
    with np.errstate(invalid="ignore"):  # of a column without meaning for a node there is no mean
        mean = np.bincount(groups.group[known], joined[known], len(groups.count)) / np.where(count, count, np.nan)
        off = (joined - mean[groups.group]) ** 2
        deviation = np.sqrt(
            np.bincount(groups.group[known], off[known], len(groups.count)) / np.where(count, count, np.nan)
        )
    ends = []
    for one in (0, 1):
        found = np.full(len(groups.count), np.nan)
        chosen = known & (groups.member == one)
        found[groups.group[chosen]] = joined[chosen]
        ends.append(found)
    return Spread(mean, deviation, *ends)


def _edges(
    graphs: Sequence[AttributionGraph], number: Int[ndarray, "all"], sizes: Int[ndarray, "graph"]
) -> tuple[_Groups, Spread, Int[ndarray, "edge"]]:
    """The union of edges, their weights, and their two ends in one number."""
    offset = np.repeat(np.cumsum(sizes) - sizes, [graph.n_edges for graph in graphs])
    source = number[np.concatenate([graph.source for graph in graphs]) + offset]
    target = number[np.concatenate([graph.target for graph in graphs]) + offset]
    n_nodes = int(number.max()) + 1 if len(number) else 1
    ends, edge = np.unique(source * n_nodes + target, return_inverse=True)
    member = np.repeat(np.arange(len(graphs)), [graph.n_edges for graph in graphs])
    groups = _grouped(edge.ravel(), member, len(graphs))
    return groups, _values(groups, np.concatenate([graph.weight for graph in graphs]).astype(np.float64), np.add), ends
