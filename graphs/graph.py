"""The attribution graph: frozen columns of nodes and edges, checked once.

Nodes are numbered in topological order (tokens, then layer by layer features, errors and explained features, then what
is explained of the output), and every edge runs from a lower to a higher number. What a node is, is told by its
columns, never by its number.
"""

from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.incoming import Incoming, added_up, incoming, into
from graphs.shapes import Bool, Float, Float64, Int, Integer, Shaped


class NodeKind(IntEnum):
    """What a node stands for; a logit is any explained target, also a difference, a direction or a feature."""

    TOKEN = 0
    FEATURE = 1
    ERROR = 2
    LOGIT = 3

    @property
    def text(self) -> str:
        """The name used in files and in SQL."""
        return self.name.lower()


@dataclass(frozen=True)
class GraphInfo:
    """What is known about a graph as a whole; the fields are columns of table `graphs`."""

    prompt: str
    tokens: tuple[str, ...]
    """Text of each token of the prompt."""
    token_ids: tuple[int, ...]
    words: tuple[str, ...]
    """Per position the whitespace-delimited word of the prompt that holds the token; "" for special tokens."""
    model: str
    model_revision: str
    transcoder: str
    transcoder_revision: str
    created_at: datetime
    tool_version: str
    n_layers: int
    n_active_features: int
    """Features active on the prompt, whether or not they are nodes of this graph."""
    replacement_score: float | None = None
    completeness_score: float | None = None
    pruned_replacement_score: float | None = None
    pruned_completeness_score: float | None = None
    row_share: float = 1.0
    """Share of Σ|input| of each target that its edges held at least before pruning; the rest is in its `remainder`."""
    coverage: float = 1.0
    """1 − the largest share of a layer's influence that attribution left out."""
    skipped_influence: float = 0.0
    """Influence that ends at features without a row: no node's influence is understated by more."""
    logits_error: float = 0.0
    """Largest difference between the logits of the local replacement model and of the model, in largest logits."""
    conservation_error: float = 0.0
    """Largest difference between a target's pre-activation and its edges plus bias, as a share of Σ|edge| + |bias|."""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    config: str = "{}"
    """The settings of the trace, as JSON."""
    tags: tuple[tuple[str, str], ...] = ()
    """What else a file of prompts said about this one: names and values."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.token_ids) == len(self.words):
            raise GraphError(
                f"tokens, token_ids and words have {len(self.tokens)}, {len(self.token_ids)} and {len(self.words)} "
                "entries; give one of each per position."
            )
        if len(dict(self.tags)) < len(self.tags):
            raise GraphError(f"tags has a name twice: {[name for name, _ in self.tags]}; give each name once.")
        if self.created_at.tzinfo is None:
            raise GraphError("created_at has no time zone; use datetime.now(UTC).")
        object.__setattr__(self, "created_at", self.created_at.astimezone(UTC))


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """A directed acyclic graph of direct effects on one prompt.

    Integer columns hold -1 and float columns NaN where a column has no meaning for the kind of node.
    """

    info: GraphInfo

    kind: Integer[ndarray, "node"]
    layer: Integer[ndarray, "node"]
    """-1 for tokens, `n_layers` for logits, but of an explained feature its own."""
    position: Integer[ndarray, "node"]
    feature: Integer[ndarray, "node"]
    """Number within the layer."""
    token_id: Integer[ndarray, "node"]
    activation: Float[ndarray, "node"]
    pre_activation: Float[ndarray, "node"]
    """Value before the nonlinearity; of a token's logit its value less the mean logit."""
    bias: Float[ndarray, "node"]
    """The part of the pre-activation that no edge brings."""
    remainder: Float[ndarray, "node"]
    """The part of the bias that is the sum of inputs that are no edges here: pruned away, or too small to be kept."""
    input_size: Float[ndarray, "node"]
    """Σ|input|, edges here or not; NaN where it is unknown, or there are no inputs."""
    influence: Float[ndarray, "node"]
    """Σ over explained logits k of p_k · B[k, node]; NaN for logits."""
    cumulative_influence: Float[ndarray, "node"]
    """Share of all influence held by nodes at least as influential; small means important; NaN for logits."""
    probability: Float[ndarray, "node"]
    """Weight of a logit in the influence: the model's probability of its token, 1 for a target that is no token."""
    token: Shaped[ndarray, "node"]
    """Text of the prompt's token at the position; of a logit the explained token or the target's name."""
    word: Shaped[ndarray, "node"]
    """As `GraphInfo.words`; of a logit its stripped token."""
    label: Shaped[ndarray, "node"]
    """What the node is about, in words; "" if nobody said."""

    source: Integer[ndarray, "edge"]
    target: Integer[ndarray, "edge"]
    weight: Float[ndarray, "edge"]
    """Direct effect, in units of the target's pre-activation."""

    def __post_init__(self) -> None:
        for name in NODE_COLUMNS + EDGE_COLUMNS:
            object.__setattr__(self, name, _frozen_column(name, getattr(self, name)))
        _check_lengths(self)
        _check_nodes(self)
        _check_edges(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttributionGraph):
            return NotImplemented
        return self.info == other.info and all(
            _equal(getattr(self, name), getattr(other, name)) for name in NODE_COLUMNS + EDGE_COLUMNS
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def incoming(self) -> Incoming:
        """The edges grouped by their targets."""
        return incoming(self.source, self.target, self.weight)

    @property
    def n_nodes(self) -> int:
        return len(self.kind)

    @property
    def n_edges(self) -> int:
        return len(self.source)


EDGE_COLUMNS = ("source", "target", "weight")
NODE_COLUMNS = tuple(f.name for f in fields(AttributionGraph) if f.name not in ("info", *EDGE_COLUMNS))

_DTYPES = {
    "kind": np.uint8,
    **dict.fromkeys(("layer", "position", "feature", "token_id", "source", "target"), np.int32),
    **dict.fromkeys(("token", "word", "label"), np.object_),
}


def logit_weights(graph: AttributionGraph) -> Float64[ndarray, "node"]:
    """How much each node counts as an end of influence: the probability of a logit, 0 for every other node."""
    return np.nan_to_num(graph.probability, nan=0.0)


def subgraph(
    graph: AttributionGraph, nodes: Bool[ndarray, "node"], edges: Int[ndarray, "kept"] | None = None
) -> AttributionGraph:
    """The chosen nodes, renumbered in the same order, and the edges between them (or those of them with a number).

    What the other edges brought becomes part of `remainder` and `bias`, so that edges and bias still add up.
    """
    kept = np.flatnonzero(nodes[graph.source] & nodes[graph.target]) if edges is None else edges
    number = np.cumsum(nodes, dtype=np.int32) - 1
    alone, lost = without_edges(graph, nodes), _lost(graph, nodes, kept)[nodes]
    return replace(
        alone,
        bias=alone.bias + lost,
        remainder=alone.remainder + lost,
        source=number[graph.source[kept]].astype(np.int32),
        target=number[graph.target[kept]].astype(np.int32),
        weight=graph.weight[kept],
    )


def without_edges(graph: AttributionGraph, nodes: Bool[ndarray, "node"]) -> AttributionGraph:
    """The chosen nodes as they are, and nothing between them."""
    columns = {name: getattr(graph, name)[nodes] for name in NODE_COLUMNS}
    return replace(graph, **columns, **{name: getattr(graph, name)[:0] for name in EDGE_COLUMNS})


def _lost(
    graph: AttributionGraph, nodes: Bool[ndarray, "node"], kept: Int[ndarray, "kept"]
) -> Float64[ndarray, "node"]:
    """What the chosen nodes received along edges that are not kept."""
    edges, stays = into(graph.incoming, nodes), np.zeros(graph.n_edges, bool)
    stays[kept] = True
    result = np.zeros(graph.n_nodes)
    result[edges.node] = added_up(replace(edges, weight=np.where(stays[edges.as_given], 0, edges.weight)))
    return result


def _frozen_column(name: str, values: ndarray) -> ndarray:
    """A read-only view of the values in the column's type; the caller's array stays writeable."""
    given = np.asarray(values)
    kept_single = name == "weight" and given.dtype == np.float32
    column = given.astype(np.float32 if kept_single else _DTYPES.get(name, np.float64), copy=False)
    if column.ndim != 1:
        raise GraphError(f"column {name} has shape {column.shape}; give one value per {_axis(name)}.")
    if column.dtype != given.dtype and np.issubdtype(column.dtype, np.integer) and not np.array_equal(column, given):
        raise GraphError(f"column {name} holds values that are no {column.dtype}; give whole numbers in range.")
    if column.dtype == np.object_ and not all(isinstance(text, str) for text in column):
        raise GraphError(f'column {name} holds values that are no text; give strings, "" where there is none.')
    view = column.view()
    view.flags.writeable = False
    return view


def _axis(name: str) -> str:
    return "edge" if name in EDGE_COLUMNS else "node"


def _check_lengths(graph: AttributionGraph) -> None:
    for expected, names in ((graph.n_nodes, NODE_COLUMNS), (graph.n_edges, EDGE_COLUMNS)):
        for name in names:
            if len(getattr(graph, name)) != expected:
                raise GraphError(
                    f"column {name} has {len(getattr(graph, name))} entries, but the graph has {expected} "
                    f"{_axis(name)}s; give one value per {_axis(name)}."
                )


def _check_nodes(graph: AttributionGraph) -> None:
    if np.any(graph.kind > max(NodeKind)):
        raise GraphError(f"kind {graph.kind.max()} is unknown; use 0 token, 1 feature, 2 error or 3 logit.")
    for name, last in (("position", len(graph.info.tokens) - 1), ("layer", graph.info.n_layers)):
        column = getattr(graph, name)
        outside = column[(column < -1) | (column > last)]
        if len(outside):
            raise GraphError(f"{name} {outside[0]} of a node is out of range; the graph's {name}s are -1 … {last}.")
    if np.any((graph.kind != NodeKind.LOGIT) & ~np.isnan(graph.probability)) or np.any(graph.probability < 0):
        raise GraphError("probability must be NaN for nodes other than logits, and not negative for logits.")
    # targets that are no tokens, as two differences, have only their names to tell them apart
    named = (graph.kind == NodeKind.LOGIT) & (graph.token_id == -1)
    _, name = np.unique(np.where(named, graph.token, ""), return_inverse=True)
    keys = np.column_stack((graph.kind, graph.layer, graph.position, graph.feature, graph.token_id, name))
    _, first, count = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if np.any(count > 1):
        kind, layer, position, feature, token_id, _ = keys[first[count > 1][0]].tolist()
        raise GraphError(
            f"two nodes are the same {NodeKind(kind).text} (layer {layer}, position {position}, feature {feature}, "
            f"token_id {token_id}); add their edges together and keep one."
        )


def _check_edges(graph: AttributionGraph) -> None:
    source, target, n_nodes = graph.source, graph.target, graph.n_nodes
    if graph.n_edges == 0:
        return
    if min(source.min(), target.min()) < 0 or max(source.max(), target.max()) >= n_nodes:
        raise GraphError(f"an edge names a node that does not exist; sources and targets are 0 … {n_nodes - 1}.")
    if not np.isfinite(graph.weight).all():
        broken = np.count_nonzero(~np.isfinite(graph.weight))
        raise GraphError(f"{broken} of {len(source)} edge weights are NaN or infinite; look for an overflow upstream.")
    edges = graph.incoming
    again = edges.source[1:] <= edges.source[:-1]
    again[edges.start[1:] - 1] = False
    if again.any():
        keys = np.sort(target.astype(np.int64) * n_nodes + source)
        double = keys[1:][keys[1:] == keys[:-1]]
        if len(double):
            node, end = int(double[0] % n_nodes), int(double[0] // n_nodes)
            raise GraphError(f"edge {node} → {end} is given twice; add the weights and give it once.")


def _equal(ours: ndarray, theirs: ndarray) -> bool:
    return np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")
