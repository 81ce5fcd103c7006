"""Small graphs, and records of their features, for the tests of the viewer."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from graphs import AttributionGraph, GraphInfo, NodeKind, cumulative_share, node_influence
from graphs.schema import tables


def make_graph(
    prompt: str = "the capital of",
    *,
    n_layers: int = 2,
    per_cell: int = 1,
    label: str = "Texas",
    answer: str = " Austin",
) -> AttributionGraph:
    """Tokens, `per_cell` features and one error per cell, two logits; everything acts on all that comes later."""
    words = tuple(prompt.split())
    last = len(words) - 1
    rows = [(NodeKind.TOKEN, -1, p, -1, p) for p in range(len(words))]
    for layer in range(n_layers):
        for position in range(len(words)):
            rows += [(NodeKind.FEATURE, layer, position, number, -1) for number in range(per_cell)]
            rows.append((NodeKind.ERROR, layer, position, -1, -1))
    rows += [(NodeKind.LOGIT, n_layers, last, -1, 100 + number) for number in range(2)]
    kind, layer, position, feature, token_id = np.array(rows).T
    is_feature, is_logit = kind == NodeKind.FEATURE, kind == NodeKind.LOGIT
    ends = [
        (source, target)
        for target in np.flatnonzero(is_feature | is_logit)
        for source in range(len(rows))
        if layer[source] < layer[target] and position[source] <= position[target]
    ]
    source, target = np.array(ends).T
    weight = np.random.default_rng(0).normal(size=len(ends))
    probability = np.where(is_logit, np.where(token_id == 100, 0.75, 0.125), np.nan)
    influence = np.where(is_logit, np.nan, node_influence(source, target, weight, np.nan_to_num(probability)))
    received = np.bincount(target, np.abs(weight), minlength=len(rows))
    token = np.array([words[p] for p in position], dtype=object)
    token[is_logit] = [answer, " Dallas"]
    return AttributionGraph(
        info=GraphInfo(
            prompt=prompt,
            tokens=words,
            token_ids=tuple(range(len(words))),
            words=words,
            model="tiny",
            model_revision="1",
            transcoder="tiny-clt",
            transcoder_revision="2",
            created_at=datetime(2025, 1, 2, 3, 4, tzinfo=UTC),
            tool_version="0.1",
            n_layers=n_layers,
            n_active_features=7,
            replacement_score=0.5,
            pruned_replacement_score=0.25,
        ),
        kind=kind,
        layer=layer,
        position=position,
        feature=feature,
        token_id=token_id,
        activation=np.where(is_feature, 1.5, np.nan),
        pre_activation=np.where(is_feature | is_logit, 1.75, np.nan),
        bias=np.full(len(rows), np.nan),
        remainder=np.full(len(rows), np.nan),
        input_size=np.where(received > 0, 1.25 * received, np.nan),  # a fifth of it is no edge
        influence=influence,
        cumulative_influence=cumulative_share(influence),
        probability=probability,
        token=token,
        word=token,
        label=np.where(is_feature, label, "").astype(object),
        source=source,
        target=target,
        weight=weight,
    )


def make_features(graph: AttributionGraph, *, text: str = " Texas", label: str = "Texas") -> pa.Table:
    """A record of every feature of the graph."""
    rows = [
        {
            "transcoder": graph.info.transcoder,
            "layer": int(graph.layer[node]),
            "feature": int(graph.feature[node]),
            "density": 0.01,
            "max_activation": 4.0,
            "top_logits": [{"token": " Austin", "value": 1.5}, {"token": text, "value": 0.5}],
            "bottom_logits": [{"token": " the", "value": -0.75}],
            "examples": [{"tokens": ["in", text, " and"], "activations": [0.0, 3.0, 0.0], "position": 1}],
            "histogram": [5, 3, *[0] * 18],
            "label": label,
            "label_source": "fires on",
            "label_precision": 0.8,
            "label_recall": float("nan"),
        }
        for node in np.flatnonzero(graph.kind == NodeKind.FEATURE)
    ]
    unique = {(row["layer"], row["feature"]): row for row in rows}
    return pa.Table.from_pylist(list(unique.values()), schema=tables()["features"])
