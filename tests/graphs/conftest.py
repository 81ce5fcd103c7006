"""Small graphs for the tests: made by hand, or random with the layout of a traced prompt."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphs import AttributionGraph, GraphInfo, NodeKind, cumulative_share, node_influence

KINDS = {"t": NodeKind.TOKEN, "f": NodeKind.FEATURE, "e": NodeKind.ERROR, "l": NodeKind.LOGIT}


def _make_info(prompt: str = "the capital of", **changes: object) -> GraphInfo:
    words = tuple(prompt.split())
    values = {
        "prompt": prompt,
        "tokens": words,
        "token_ids": tuple(range(len(words))),
        "words": words,
        "model": "tiny",
        "model_revision": "1",
        "transcoder": "tiny-clt",
        "transcoder_revision": "2",
        "created_at": datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "tool_version": "0.1",
        "n_layers": 3,
        "n_active_features": 7,
    }
    return GraphInfo(**(values | changes))


def _make_graph(
    kinds: str, edges: list[tuple[int, int, float]], *, info: GraphInfo | None = None, **columns: list
) -> AttributionGraph:
    """A graph of the kinds (one letter per node: t, f, e, l); columns that are not given have simple values."""
    info = info or _make_info()
    kind = np.array([KINDS[letter] for letter in kinds], dtype=np.uint8)
    number, n_nodes = np.arange(len(kinds)), len(kinds)
    layer = np.select([kind == NodeKind.TOKEN, kind == NodeKind.LOGIT], [-1, info.n_layers], 0)
    is_logit = kind == NodeKind.LOGIT
    values = {
        "kind": kind,
        "layer": layer,
        "position": np.where(kind == NodeKind.TOKEN, number, 0) % len(info.tokens),
        "feature": np.where(kind == NodeKind.FEATURE, number, -1),
        "token_id": np.where((kind == NodeKind.TOKEN) | is_logit, number, -1),
        **{
            name: np.full(n_nodes, np.nan)
            for name in ("activation", "pre_activation", "bias", "remainder", "input_size")
        },
        **{name: np.full(n_nodes, np.nan) for name in ("influence", "cumulative_influence")},
        "probability": np.where(is_logit, 1 / max(is_logit.sum(), 1), np.nan),
        "label": np.full(n_nodes, "", dtype=object),
        "source": np.array([edge[0] for edge in edges], dtype=np.int32),
        "target": np.array([edge[1] for edge in edges], dtype=np.int32),
        "weight": np.array([edge[2] for edge in edges], dtype=np.float64),
    }
    values |= {name: np.array(column) for name, column in columns.items()}
    position = values["position"] % len(info.tokens)
    values.setdefault("token", np.array([info.tokens[p] for p in position], dtype=object))
    values.setdefault("word", np.array([info.words[p] for p in position], dtype=object))
    return AttributionGraph(info=info, **values)


def _random_graph(
    seed: int, *, n_layers: int = 3, density: float = 0.5, prompt: str = "the capital of Texas is", n_features: int = 4
) -> AttributionGraph:
    """Tokens, then per layer some features and errors, then logits; edges from everything to later features and logits.

    Not every place has an error node.
    """
    random = np.random.default_rng(seed)
    info = _make_info(prompt, n_layers=n_layers, config=f'{{"seed": {seed}}}')
    n_tokens = len(info.tokens)
    rows = [(NodeKind.TOKEN, -1, p, -1, p) for p in range(n_tokens)]
    for layer in range(n_layers):
        places = random.permutation([(p, f) for p in range(n_tokens) for f in range(9)])[:n_features]
        rows += [(NodeKind.FEATURE, layer, int(p), int(f), -1) for p, f in places]
        rows += [(NodeKind.ERROR, layer, p, -1, -1) for p in range(n_tokens) if random.random() < 0.6]
    rows += [(NodeKind.LOGIT, n_layers, n_tokens - 1, -1, 100 + i) for i in range(3)]
    kind, layer, position, feature, token_id = np.array(rows).T

    is_target = (kind == NodeKind.FEATURE) | (kind == NodeKind.LOGIT)
    is_source = kind != NodeKind.LOGIT
    possible = is_source[:, None] & is_target & (layer[:, None] < layer)
    source, target = np.nonzero(possible & (random.random(possible.shape) < density))
    words = np.array([info.words[p] for p in position], dtype=object)
    words[kind == NodeKind.LOGIT] = ["Austin", "Dallas", "Paris"]
    label = np.where((kind == NodeKind.FEATURE) & (random.random(len(kind)) < 0.5), "about something", "")
    weight = random.normal(size=len(source))
    probability = np.where(kind == NodeKind.LOGIT, random.dirichlet(np.ones(4))[0], np.nan)
    influence = np.where(is_source, node_influence(source, target, weight, np.nan_to_num(probability)), np.nan)
    received = np.bincount(target, np.abs(weight), minlength=len(kind))
    return AttributionGraph(
        info=info,
        kind=kind.astype(np.uint8),
        layer=layer,
        position=position,
        feature=feature,
        token_id=token_id,
        activation=np.where(kind == NodeKind.FEATURE, random.random(len(kind)), np.nan),
        pre_activation=np.where(is_target, random.normal(size=len(kind)), np.nan),
        bias=np.where(is_target, random.normal(size=len(kind)), np.nan),
        remainder=np.where(is_target, 0, np.nan),
        # some of it is no edge; of every fifth target it is unknown
        input_size=np.where((received > 0) & (np.arange(len(kind)) % 5 > 0), 1.25 * received, np.nan),
        influence=influence,
        cumulative_influence=cumulative_share(influence),
        probability=probability,
        token=words,
        word=words,
        label=label.astype(object),
        source=source,
        target=target,
        weight=weight,
    )


def _dense(graph: AttributionGraph) -> np.ndarray:
    """The adjacency matrix, [target, source]."""
    matrix = np.zeros((graph.n_nodes, graph.n_nodes))
    matrix[graph.target, graph.source] = graph.weight
    return matrix


# functions as fixtures, so that no test module has to import another; one for the session, as hypothesis asks
@pytest.fixture(scope="session")
def make_info() -> Callable[..., GraphInfo]:
    return _make_info


@pytest.fixture(scope="session")
def make_graph() -> Callable[..., AttributionGraph]:
    return _make_graph


@pytest.fixture(scope="session")
def random_graph() -> Callable[..., AttributionGraph]:
    return _random_graph


@pytest.fixture(scope="session")
def dense() -> Callable[[AttributionGraph], np.ndarray]:
    return _dense


def drop_columns(path: Path, names: list[str]) -> None:
    """A file of the store as if it had been written before it had these columns, or a row in its footer."""
    noted = pq.read_metadata(path).metadata or {}
    kept = {key: value for key, value in noted.items() if key not in (b"ARROW:schema", b"row")}
    pq.write_table(pq.read_table(path).drop_columns(names).replace_schema_metadata(kept), path, compression="zstd")
