"""Nodes of circuit-tracer's graph JSON: one node of ours ↔ one object, with ids that never collide.

What the format has no field for is kept beside it under `clt_tracer`, which other programs ignore.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import numpy as np

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, NodeKind
from graphs.interchange_fields import (
    FLAG,
    INDEX_OR_NONE,
    LARGEST_INDEX,
    LAYER,
    NUMBER,
    SIZE,
    TEXT,
    WHOLE,
    check_field,
    check_object,
    or_null,
    shown,
)

OURS = "clt_tracer"
MOST_LAYERS = 10_000
VIRTUAL = 1_000_000_000
"""Vocabulary number of the first target that is no token: the format knows them by numbers past the vocabulary."""
ROUNDING = 1e-3
"""What shares and probabilities computed in half precision may lie above 1."""

_FEATURE_TYPES = {
    NodeKind.TOKEN: "embedding",
    NodeKind.FEATURE: "cross layer transcoder",
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.LOGIT: "logit",
}
_KINDS = {text: kind for kind, text in _FEATURE_TYPES.items()} | {"unexplored node": NodeKind.FEATURE}
_ID = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_REQUIRED = {
    "node_id": TEXT,
    "feature": or_null(WHOLE),
    "layer": LAYER,
    "ctx_idx": WHOLE,
    "feature_type": TEXT,
    "jsNodeId": TEXT,
    "clerp": TEXT,
}
_OPTIONAL = {
    "influence": or_null(NUMBER),
    "activation": or_null(NUMBER),
    "token_prob": or_null(NUMBER),
    "is_target_logit": FLAG,
    "run_idx": WHOLE,
    "reverse_ctx_idx": WHOLE,
}
_OUR_NUMBERS = ("influence", "pre_activation", "bias", "remainder", "probability")
_OUR_SIZES = ("input_size",)
_OUR_WHOLES = ("layer", "feature", "token_id")
_OUR_TEXTS = ("token", "word", "label")
_OUR_FIELDS = {
    **dict.fromkeys(_OUR_NUMBERS, or_null(NUMBER)),
    **dict.fromkeys(_OUR_SIZES, or_null(SIZE)),
    **dict.fromkeys(_OUR_WHOLES, INDEX_OR_NONE),
    **dict.fromkeys(_OUR_TEXTS, TEXT),
}
_LOGIT_TEXT = re.compile(r'Output "(.*)" \(p=([0-9.eE+-]+)\)', re.DOTALL)


def pair(layer: int, feature: int) -> int:
    """Cantor's number of a feature, as schema version 1 has it in `feature`."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def unpair(number: int) -> tuple[int, int]:
    """The layer and feature with this number."""
    diagonal = (isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def node_ids(graph: AttributionGraph) -> list[str]:
    """The id of every node: unique, and as circuit-tracer gives them since its errors are `{layer}_-1_{position}`."""
    vocabulary = _vocabulary_numbers(graph)
    columns = (graph.kind, graph.layer, graph.position, graph.feature, graph.token_id)
    found = []
    # a loop, because ids are texts
    for node, (kind, layer, position, feature, token_id) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        match kind:
            case NodeKind.TOKEN:
                found.append(f"E_{token_id}_{position}")
            case NodeKind.LOGIT:
                found.append(f"{graph.info.n_layers + 1}_{vocabulary[node]}_{position}")
            case _:
                found.append(f"{layer}_{feature if kind == NodeKind.FEATURE else -1}_{position}")
    if len(set(found)) < len(found) or (graph.n_nodes and graph.position.min() < 0):
        raise GraphError("nodes without a position or number have no id in this format; export to GraphML instead.")
    return found


def node_records(graph: AttributionGraph, ids: list[str]) -> list[dict[str, Any]]:
    """Every node as an object of the JSON."""
    vocabulary = _vocabulary_numbers(graph)
    best = int(np.nan_to_num(graph.probability, nan=-1.0).argmax()) if graph.n_nodes else -1
    return [_record(graph, node, ids[node], vocabulary.get(node), node == best) for node in range(graph.n_nodes)]


def _vocabulary_numbers(graph: AttributionGraph) -> dict[int, int]:
    """Of every target the number that stands for its token."""
    logits = np.flatnonzero(graph.kind == NodeKind.LOGIT).tolist()
    return {
        node: int(graph.token_id[node]) if graph.token_id[node] >= 0 else VIRTUAL + place
        for place, node in enumerate(logits)
    }


def _record(graph: AttributionGraph, node: int, node_id: str, vocabulary: int | None, best: bool) -> dict[str, Any]:
    kind, layer, position = NodeKind(graph.kind[node]), int(graph.layer[node]), int(graph.position[node])
    feature, clerp, probability = -1, str(graph.label[node]), 0.0
    js_id, shown_layer = f"{node_id}-0", str(layer)
    match kind:
        case NodeKind.TOKEN:
            js_id, feature, shown_layer = f"E_{graph.token_id[node]}-{position}", position, "E"
        case NodeKind.FEATURE:
            js_id, feature = f"{layer}_{graph.feature[node]}-0", pair(layer, int(graph.feature[node]))
        case NodeKind.LOGIT:
            assert vocabulary is not None, "every target has a number"
            probability = float(np.nan_to_num(graph.probability[node]))
            js_id, feature, shown_layer = f"L_{vocabulary}-{position}", vocabulary, str(graph.info.n_layers + 1)
            # the viewers look for the quoted token and for p=
            clerp = f'Output "{graph.token[node]}" (p={probability:.3f})'
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": shown_layer,
        "ctx_idx": position,
        "feature_type": _FEATURE_TYPES[kind],
        "token_prob": probability,
        "is_target_logit": best and kind == NodeKind.LOGIT,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": clerp,
        "influence": _or_null(graph.cumulative_influence[node]),
        "activation": _or_null(graph.activation[node]),
        OURS: _ours(graph, node),
    }


def _ours(graph: AttributionGraph, node: int) -> dict[str, Any]:
    """What the format has no place for, where it is not what a reader would take anyway."""
    kind, position = graph.kind[node], int(graph.position[node])
    found: dict[str, Any] = {name: _or_null(getattr(graph, name)[node]) for name in (*_OUR_NUMBERS, *_OUR_SIZES)}
    if kind == NodeKind.LOGIT:
        found |= {name: int(getattr(graph, name)[node]) for name in _OUR_WHOLES}
        found |= {name: str(getattr(graph, name)[node]) for name in _OUR_TEXTS}
        return found
    place = {"token": graph.info.tokens[position], "word": graph.info.words[position]}
    found |= {
        name: str(getattr(graph, name)[node]) for name, text in place.items() if getattr(graph, name)[node] != text
    }
    if kind == NodeKind.TOKEN:
        found["token_id"] = int(graph.token_id[node])
    return {name: value for name, value in found.items() if value is not None}


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class Nodes:
    """The nodes of a file, in its order, as lists that become columns; and what their ids stand for."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.kind: list[int] = []
        self.layer: list[int] = []
        """As the file has it, -1 for tokens."""
        self.position: list[int] = []
        self.feature: list[int] = []
        self.token_id: list[int] = []
        self.activation: list[float] = []
        self.cumulative: list[float] = []
        self.probability: list[float] = []
        self.clerp: list[str] = []
        self.ours: list[Mapping[str, Any]] = []
        self.colliding: dict[int, int] = {}
        """The error node by the feature whose id it has too: circuit-tracer up to 0.5.0 wrote such files."""

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, node: object, number: dict[str, int]) -> None:
        """Check one node and take it in; `number` maps ids to places in the list."""
        where = f"node {len(self.ids)}"
        record = check_object(where, node, {"node_id": TEXT}, {})
        where = f"node {shown(record['node_id'])}"
        check_object(where, record, _REQUIRED, _OPTIONAL)
        if not _ID.fullmatch(record["node_id"]):
            raise GraphError(f"{where}: node_id has up to 64 of A-Z, a-z, 0-9, '_', '.' and '-'; rename the node.")
        kind = _KINDS.get(record["feature_type"])
        if kind is None:
            known = ", ".join(repr(text) for text in _KINDS)
            raise GraphError(f"{where}: feature_type {shown(record['feature_type'])} is not read; expected {known}.")
        layer = _layer(where, record["layer"], kind)
        ours = check_object(where, record.get(OURS, {}), {}, _OUR_FIELDS)
        self._number(where, record, kind, number)
        probability = _probability(record, kind, ours)
        self.kind.append(int(kind))
        self.layer.append(layer)
        self.position.append(_index(where, "ctx_idx", record["ctx_idx"]))
        self.feature.append(_feature(where, record, layer) if kind == NodeKind.FEATURE else -1)
        self.token_id.append(_token_id(where, record, kind))
        self.activation.append(_number(record.get("activation")))
        self.cumulative.append(_number(record.get("influence")))
        for value in (record.get("token_prob"), probability):
            if value is not None and (value < 0 or value > 1 + ROUNDING):
                raise GraphError(f"{where}: token_prob is {shown(value)}; expected a probability, 0 to 1.")
        self.probability.append(probability)
        self.clerp.append(record["clerp"])
        self.ours.append(ours)

    def _number(self, where: str, record: dict[str, Any], kind: NodeKind, number: dict[str, int]) -> None:
        """Give the node its place under its id."""
        place = len(self.ids)
        self.ids.append(record["node_id"])
        other = number.setdefault(record["node_id"], place)
        if other == place:
            return
        kinds = {self.kind[other]: other, int(kind): place}
        if kinds.keys() != {NodeKind.FEATURE, NodeKind.ERROR} or kinds[NodeKind.FEATURE] in self.colliding:
            raise GraphError(f"{where}: node_id is given twice; every node needs its own.")
        self.colliding[kinds[NodeKind.FEATURE]] = kinds[NodeKind.ERROR]
        number[record["node_id"]] = kinds[NodeKind.FEATURE]


def logit_text(clerp: str) -> str:
    """The token in `Output "token" (p=0.9)`."""
    found = _LOGIT_TEXT.match(clerp)
    return found.group(1) if found else clerp


def _probability(record: dict[str, Any], kind: NodeKind, ours: Mapping[str, Any]) -> float:
    if kind != NodeKind.LOGIT:
        return float("nan")
    if "probability" in ours:
        return _number(ours["probability"])
    if record.get("token_prob") is not None:
        return float(record["token_prob"])
    found = _LOGIT_TEXT.match(record["clerp"])
    try:
        return float(found.group(2)) if found else float("nan")
    except ValueError:
        return float("nan")


def _layer(where: str, layer: str | int, kind: NodeKind) -> int:
    if kind == NodeKind.TOKEN:
        return -1
    text = str(layer)
    if not re.fullmatch("[0-9]{1,6}", text, re.ASCII) or int(text) > MOST_LAYERS + 1:
        raise GraphError(
            f"{where}: layer is {shown(layer)}; expected a number up to {MOST_LAYERS}, or 'E' for embeddings."
        )
    return int(text)


def _feature(where: str, record: dict[str, Any], layer: int) -> int:
    """The number within the layer: from the id, or from `feature`, which has been written in three ways."""
    given = record["feature"]
    parts = re.fullmatch("([0-9]{1,9})_([0-9]{1,10})_([0-9]{1,9})", record["node_id"], re.ASCII)
    named = parts and (int(parts[1]), int(parts[3])) == (layer, record["ctx_idx"])
    if given is None and not named:
        raise GraphError(f"{where}: feature is null and the id is not layer_feature_position; give one of them.")
    readings = _readings(given, layer)
    if parts is None or not named:
        return _index(where, "feature", readings[0])
    number = int(parts[2])
    if readings and number not in readings:
        raise GraphError(
            f"{where}: feature is {shown(given)}; expected {pair(layer, number)}, layer and feature paired."
        )
    return _index(where, "feature", number)


def _readings(given: int | float | None, layer: int) -> list[int]:
    """What a feature's number may be, the likeliest first: paired, as layer · 10⁵ + number, or plain."""
    if given is None or given < 0:
        return [] if given is None else [int(given)]
    whole = int(given)
    paired = [unpair(whole)[1]] if unpair(whole)[0] == layer else []
    shifted = [whole - layer * 10**5] if whole >= layer * 10**5 else []
    return [*paired, *shifted, whole]


def _token_id(where: str, record: dict[str, Any], kind: NodeKind) -> int:
    if kind == NodeKind.LOGIT:
        return -1 if record["feature"] is None else _index(where, "feature", record["feature"])
    parts = re.fullmatch("E_([0-9]{1,10})_[0-9]+", record["node_id"], re.ASCII)
    return _index(where, "node_id", int(parts[1])) if kind == NodeKind.TOKEN and parts else -1


def _index(where: str, name: str, value: object) -> int:
    check_field(where, name, value, WHOLE)
    number = int(value)  # type: ignore[call-overload]
    if not 0 <= number <= LARGEST_INDEX:
        raise GraphError(f"{where}: {name} is {shown(value)}; expected a number from 0 to {LARGEST_INDEX}.")
    return number


def _number(value: int | float | None) -> float:
    return float("nan") if value is None else float(value)
