"""Graphs with the columns and sizes of traced prompts, made without a model: about 300 nodes and 3,000 edges each."""

import json
from datetime import UTC, datetime, timedelta
from itertools import product

import numpy as np

from graphs import AttributionGraph, GraphInfo, NodeKind, cumulative_share, node_influence

CITIES = (
    "Dallas Houston Oakland Chicago Boston Miami Denver Phoenix Seattle Atlanta Detroit Memphis Omaha Tulsa Tampa Reno "
    "Buffalo Newark Mobile Savannah Paris Lyon Madrid Rome Naples Vienna Prague Oslo Lima Quito Cairo Tunis"
).split()
TEMPLATES = (
    "the capital of the state containing {} is", "the bird of the state containing {} is",
    "people who live in {} speak a language called", "the river that flows through {} is the",
    "the opposite of small is", "calc : 3 6 + 5 9 =", "When Mary and John went to the store , John gave a drink to",
    "the inventor of the telephone was born in",
)  # fmt: skip
PREFIXES = ("", "Fact : ", "I think that ", "Question and answer : ", "As everybody knows , ", "Note that ")
N_LAYERS, N_FEATURES, N_EDGES = 12, 240, 3000


def prompts(count: int) -> list[tuple[str, int]]:
    """That many different prompts, each with a number; about half of them name a city."""
    texts = [prefix + template.format(city) for prefix, city, template in product(PREFIXES, CITIES, TEMPLATES)]
    return [(texts[number % len(texts)], number) for number in range(count)]


def made_graph(prompt: str, number: int) -> AttributionGraph:
    """The graph of a prompt: tokens, features and errors layer by layer, logits; edges sorted by target and source."""
    random = np.random.default_rng(number)
    words = ("<bos>", *prompt.split())
    n_tokens, n_logits, n_errors = len(words), int(random.integers(3, 9)), int(random.integers(25, 60))
    n_inner = N_FEATURES + int(random.integers(-60, 60)) + n_errors
    is_error = np.zeros(n_inner, bool)
    is_error[random.permutation(n_inner)[:n_errors]] = True
    layer, position = np.sort(random.integers(0, N_LAYERS, n_inner)), random.integers(1, n_tokens, n_inner)
    # few features are active in many graphs, as in real ones
    feature = np.where(is_error, -1, (random.zipf(1.3, n_inner) * 7919 + layer * 31) % 16384)
    _, first = np.unique(np.column_stack((layer, position, feature)), axis=0, return_index=True)
    inner = np.sort(first)
    is_error, layer, position, feature = is_error[inner], layer[inner], position[inner], feature[inner]

    kind = np.concatenate([np.full(n_tokens, 0), np.where(is_error, 2, 1), np.full(n_logits, 3)])
    layer = np.concatenate([np.full(n_tokens, -1), layer, np.full(n_logits, N_LAYERS)])
    position = np.concatenate([np.arange(n_tokens), position, np.full(n_logits, n_tokens - 1)])
    feature = np.concatenate([np.full(n_tokens, -1), feature, np.full(n_logits, -1)])
    source, target = _edges(random, kind, layer, position)
    weight = (random.standard_normal(len(source)) * np.exp(random.standard_normal(len(source)))).astype(np.float32)

    is_logit, is_target = kind == NodeKind.LOGIT, (kind == NodeKind.FEATURE) | (kind == NodeKind.LOGIT)
    probability = np.where(is_logit, np.nan, np.nan)
    probability[is_logit] = np.sort(random.dirichlet(np.full(n_logits, 0.4)).astype(np.float32))[::-1]
    answers = random.permutation([f" {city}" for city in CITIES])[:n_logits]
    token = np.array([f" {word}" for word in words], object)[position]
    token[is_logit] = answers
    label = np.full(len(kind), "", object)
    labelled = np.flatnonzero((kind == NodeKind.FEATURE) & (feature % 3 > 0))
    label[labelled] = [f"about topic {number % 400}" for number in feature[labelled].tolist()]
    influence = node_influence(source, target, weight, np.nan_to_num(probability))
    influence = np.where(is_logit, np.nan, influence)
    size = np.bincount(target, np.abs(weight), minlength=len(kind))
    graph = AttributionGraph(
        info=_info(prompt, words, number, int((kind == NodeKind.FEATURE).sum() * 9)),
        kind=kind, layer=layer, position=position, feature=feature,
        token_id=np.where(kind == 0, position + 100, np.where(is_logit, np.arange(len(kind)) + 5000, -1)),
        activation=_single(np.where(kind == NodeKind.FEATURE, random.gamma(2, 3, len(kind)), np.nan)),
        pre_activation=_single(np.where(is_target, random.gamma(2, 3, len(kind)), np.nan)),
        bias=_single(np.where(is_target, random.normal(size=len(kind)), np.nan)),
        remainder=_single(np.where(is_target, random.normal(size=len(kind)), np.nan)),
        input_size=_single(np.where(size > 0, size * random.uniform(1.1, 1.6, len(kind)), np.nan)), influence=influence,
        cumulative_influence=cumulative_share(influence), probability=probability,
        token=token, word=np.array([text.strip() for text in token], object), label=label,
        source=source, target=target, weight=weight,
    )  # fmt: skip
    return graph


def _edges(
    random: np.random.Generator, kind: np.ndarray, layer: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """About N_EDGES edges from earlier layers and positions, to every feature and logit at least one."""
    is_target = (kind == NodeKind.FEATURE) | (kind == NodeKind.LOGIT)
    possible = is_target & (kind != NodeKind.LOGIT)[:, None] & (layer[:, None] < layer)
    possible &= position[:, None] <= position
    source, target = np.nonzero(possible)
    chosen = random.random(len(source)) < N_EDGES / len(source)
    _, first = np.unique(target, return_index=True)
    chosen[first] = True
    source, target = source[chosen], target[chosen]
    order = np.lexsort((source, target))
    return source[order], target[order]


def _info(prompt: str, words: tuple[str, ...], number: int, n_active: int) -> GraphInfo:
    config = {"batch_size": None, "coverage": 0.99, "edge_threshold": 0.98, "logit_mass": 0.95, "max_features": None}
    config |= {"max_logits": 10, "node_threshold": 0.8, "position": -1, "prune": True, "seed": number}
    random = np.random.default_rng(number)
    return GraphInfo(
        prompt=prompt, tokens=words, token_ids=tuple(range(100, 100 + len(words))), words=("", *words[1:]),
        model="made/model", model_revision="0123456789abcdef", transcoder="made/transcoder", transcoder_revision="1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number), tool_version="0.1.0",
        n_layers=N_LAYERS, n_active_features=n_active, coverage=0.99, skipped_influence=0.01,
        replacement_score=float(random.random()), completeness_score=float(random.random()),
        pruned_replacement_score=float(random.random()), pruned_completeness_score=float(random.random()),
        logits_error=3e-7, conservation_error=4e-7, seconds=float(random.random()), peak_memory_mb=812.5,
        config=json.dumps(config),
    )  # fmt: skip


def _single(values: np.ndarray) -> np.ndarray:
    """As a model in single precision gives them."""
    return values.astype(np.float32).astype(np.float64)
