"""A graph as Cytoscape elements with fixed positions: the prompt runs along x, the layers upward.

A cell is one position in one layer. Its nodes stand in rows of at most `ROW`, logits alone; a column is as wide as its
widest cell, and a band as high as its highest. Screen coordinates: y grows downward, so upper layers have smaller y.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from graphs import AttributionGraph, NodeKind, edge_influence, logit_weights
from graphs.shapes import Bool, Float, Int, Integer

ROW = 4
"""Nodes side by side in a cell before it starts another row."""
SPACING = 34.0
ROW_HEIGHT = 52.0
"""More than the spacing: labels stand below their nodes."""
COLUMN_GAP = 26.0
BAND_GAP = 34.0
SMALLEST, LARGEST = 11.0, 28.0
BACKBONE = 300

_COLUMN_MINIMUM = 68.0
_LONGEST_TEXT = 30


@dataclass(frozen=True)
class Span:
    """A column or band: its name, its middle and how far it extends, in the units of the positions."""

    text: str
    middle: float
    extent: float


@dataclass(frozen=True)
class Layout:
    """Where the nodes stand, and the columns and bands they stand in."""

    x: Float[ndarray, "node"]
    y: Float[ndarray, "node"]
    columns: tuple[Span, ...]
    """One per position of the prompt; before them one without name, without extent if no node lacks a position."""
    bands: tuple[Span, ...]
    """Tokens, the layers, logits."""


def layout(graph: AttributionGraph) -> Layout:
    """Positions of all nodes: in a cell features come before errors and the more important before the less."""
    column, band = graph.position + 1, graph.layer + 1
    n_columns, n_bands = len(graph.info.tokens) + 1, graph.info.n_layers + 2
    rank, count = _ranks(band * n_columns + column, _order_in_cell(graph))
    # logits stand one below the other, so that each has room for its words at its side
    in_a_row = np.where(graph.layer == graph.info.n_layers, 1, ROW)
    row_height = np.where(graph.layer == graph.info.n_layers, SPACING, ROW_HEIGHT)
    row, slot = np.divmod(rank, in_a_row)
    rows = np.ceil(count / in_a_row)

    widest = np.zeros(n_columns)
    np.maximum.at(widest, column, np.minimum(count, in_a_row))
    shown = np.array([""] + [visible(token) for token in graph.info.tokens], dtype=object)
    room = np.array([min(8.5 * len(text) + 12, 2 * _COLUMN_MINIMUM) for text in shown])
    width = np.maximum(np.maximum(widest * SPACING, room), _COLUMN_MINIMUM) + COLUMN_GAP
    width[0] = width[0] if widest[0] else 0.0
    column_middle = np.cumsum(width) - width / 2

    height = np.full(n_bands, ROW_HEIGHT)
    np.maximum.at(height, band, rows * row_height)
    height += BAND_GAP
    band_middle = -(np.cumsum(height) - height / 2)

    slots = np.minimum(in_a_row, count - row * in_a_row)
    names = ["tokens", *(f"L{layer}" for layer in range(graph.info.n_layers)), "output"]
    return Layout(
        x=column_middle[column] + (slot - (slots - 1) / 2) * SPACING,
        y=band_middle[band] + (row - (rows - 1) / 2) * row_height,
        columns=_spans(shown.tolist(), column_middle, width),
        bands=_spans(names, band_middle, height),
    )


def drawn_nodes(graph: AttributionGraph, *, most: int) -> Bool[ndarray, "node"]:
    """Tokens and logits, and of the other nodes the most important: a browser cannot draw any number."""
    inner = (graph.kind == NodeKind.FEATURE) | (graph.kind == NodeKind.ERROR)
    ranked = np.lexsort((np.arange(graph.n_nodes), -importance(graph), ~inner))
    drawn = ~inner
    drawn[ranked[: min(most, int(inner.sum()))]] = True
    return drawn


def node_elements(graph: AttributionGraph, placed: Layout, number: Int[ndarray, "node"] | None = None) -> list[dict]:
    """One element per node; its id is `n` and the node's number, or its number in the graph it was cut from."""
    numbers = range(graph.n_nodes) if number is None else number.tolist()
    size = node_sizes(graph)
    weight = importance(graph)
    # a loop, because every element is a dictionary of texts and numbers
    return [
        {
            "data": {
                "id": f"n{numbers[node]}",
                "node": numbers[node],
                "kind": NodeKind(graph.kind[node]).text,
                "label": short(node_text(graph, node)),
                "text": node_text(graph, node),
                "layer": layer_text(graph, node),
                "place": visible(graph.info.tokens[graph.position[node]]) if graph.position[node] >= 0 else "",
                "influence": float(graph.influence[node]),
                "cumulative": float(graph.cumulative_influence[node]),
                "importance": float(weight[node]),
                "size": round(float(size[node]), 2),
            },
            "position": {"x": round(float(placed.x[node]), 2), "y": round(float(placed.y[node]), 2)},
            "classes": NodeKind(graph.kind[node]).text,
        }
        for node in range(graph.n_nodes)
    ]


def edge_elements(
    graph: AttributionGraph, share: Float[ndarray, "edge"], chosen: Integer[ndarray, "chosen"]
) -> list[dict]:
    """The chosen edges: as wide as their share of the target's input is large, and classed by sign."""
    return [
        {
            "data": {
                "id": f"e{graph.source[edge]}-{graph.target[edge]}",
                "source": f"n{graph.source[edge]}",
                "target": f"n{graph.target[edge]}",
                "width": round(1.0 + 7.0 * float(share[edge]), 2),
            },
            "classes": "positive" if graph.weight[edge] >= 0 else "negative",
        }
        for edge in chosen.tolist()
    ]


def backbone(
    graph: AttributionGraph, drawn: Bool[ndarray, "node"] | None = None, *, most: int = BACKBONE
) -> Int[ndarray, "chosen"]:
    """The edges between drawn nodes that carry most influence to the logits, strongest first."""
    carried = edge_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    between = np.arange(graph.n_edges) if drawn is None else np.flatnonzero(drawn[graph.source] & drawn[graph.target])
    if len(between) > most:  # a full sort of millions is slow
        least = -np.partition(-carried[between], most)[most]
        between = between[carried[between] >= least]
    return between[np.lexsort((between, -carried[between]))][:most]


def importance(graph: AttributionGraph) -> Float[ndarray, "node"]:
    """Influence on what is explained; of a target its weight."""
    return np.nan_to_num(graph.influence, nan=0.0) + logit_weights(graph)


def node_sizes(graph: AttributionGraph) -> Float[ndarray, "node"]:
    """Diameters whose areas grow with importance, each kind measured by its most important node."""
    weight = importance(graph)
    largest = np.zeros(len(NodeKind))
    np.maximum.at(largest, graph.kind, weight)
    part = weight / np.maximum(largest[graph.kind], np.finfo(np.float64).tiny)
    return SMALLEST + (LARGEST - SMALLEST) * np.sqrt(np.clip(part, 0.0, 1.0))


def node_text(graph: AttributionGraph, node: int) -> str:
    """What the node is, in as few words as tell it."""
    kind = NodeKind(graph.kind[node])
    if kind == NodeKind.TOKEN:
        return visible(graph.token[node])
    if kind == NodeKind.LOGIT:
        return f"{visible(graph.token[node])} {percent(probability(graph, node))}".strip()
    if kind == NodeKind.ERROR:
        return f"error {layer_text(graph, node)}"
    return graph.label[node].strip() or f"{layer_text(graph, node)}/{graph.feature[node]}"


def layer_text(graph: AttributionGraph, node: int) -> str:
    """Name of the band that the node stands in."""
    layer = int(graph.layer[node])
    return {-1: "token", graph.info.n_layers: "output"}.get(layer, f"L{layer}")


def probability(graph: AttributionGraph, node: int) -> float:
    """The model's probability of a token that is explained; NaN for targets that are no tokens: they weigh 1."""
    return float(graph.probability[node]) if graph.token_id[node] >= 0 else float("nan")


def visible(token: str) -> str:
    """The token without outer spaces, and with signs for what cannot be seen."""
    text = token.replace("\n", "↵").replace("\t", "⇥").strip()
    return text or ("␣" if token else "")


def short(text: str) -> str:
    """The text, cut to what fits beside a node."""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1].rstrip() + "…"


def percent(part: float | None) -> str:
    """A share in words of a page; "" where there is none."""
    if part is None or np.isnan(part):
        return ""
    return f"{100 * part:.1f} %" if part < 0.0995 else f"{100 * part:.0f} %"


def _order_in_cell(graph: AttributionGraph) -> Int[ndarray, "node"]:
    is_error = graph.kind == NodeKind.ERROR
    return np.lexsort((np.arange(graph.n_nodes), -importance(graph), is_error))


def _ranks(
    cell: Integer[ndarray, "node"], order: Int[ndarray, "node"]
) -> tuple[Int[ndarray, "node"], Int[ndarray, "node"]]:
    """The place of each node among those of its cell, in the given order, and how many there are."""
    order = order[np.argsort(cell[order], kind="stable")]
    _, first, inverse, counts = np.unique(cell[order], return_index=True, return_inverse=True, return_counts=True)
    rank, count = np.zeros(len(cell), dtype=np.int64), np.zeros(len(cell), dtype=np.int64)
    rank[order] = np.arange(len(cell)) - first[inverse]
    count[order] = counts[inverse]
    return rank, count


def _spans(names: list[str], middle: Float[ndarray, "span"], extent: Float[ndarray, "span"]) -> tuple[Span, ...]:
    return tuple(
        Span(name, round(at, 2), round(far, 2))
        for name, at, far in zip(names, middle.tolist(), extent.tolist(), strict=True)
    )
