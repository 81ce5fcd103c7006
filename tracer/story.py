"""Tell a graph as a person would: the strongest ways from the prompt's words through named features to the targets."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from graphs import AttributionGraph, GraphInfo, NodeKind, Path, strongest_paths

N_CANDIDATES = 200
"""Strongest paths looked at before those that tell the same story are added up."""
MOST_TOLD = 3
"""A story of more targets than this at once is none."""


@dataclass(frozen=True)
class Route:
    """Paths that read the same, added up."""

    share: float
    """Part of the target's input that came along these paths."""
    steps: tuple[str, ...]
    n_paths: int


def told_targets(graph: AttributionGraph) -> list[int]:
    """The explained targets worth a story: those of the largest weights, down to a tenth of the largest."""
    logits = np.flatnonzero(graph.kind == NodeKind.LOGIT)
    logits = logits[np.argsort(-graph.probability[logits], kind="stable")]
    weight = graph.probability[logits]
    return logits[weight >= 0.1 * weight[:1]].tolist()[:MOST_TOLD]


def feature_paths(graph: AttributionGraph, target: int, k: int) -> list[Path]:
    """The k strongest paths from words of the prompt to the target through at least one feature and no error."""
    words = np.flatnonzero((graph.kind == NodeKind.TOKEN) & (graph.word != ""))
    features = graph.kind == NodeKind.FEATURE
    paths = strongest_paths(graph, words.tolist(), target, k=k + len(words), through=features)
    return [path for path in paths if len(path.nodes) > 2][:k]


def routes(graph: AttributionGraph, target: int, n: int) -> list[Route]:
    """The n strongest routes; neighbouring features of one name at one word are one step."""
    shares: dict[tuple[str, ...], float] = {}
    counts: dict[tuple[str, ...], int] = {}
    places = _places(graph.info)
    for path in feature_paths(graph, target, N_CANDIDATES):
        steps = _steps(graph, path.nodes, places)
        shares[steps] = shares.get(steps, 0.0) + path.weight
        counts[steps] = counts.get(steps, 0) + 1
    best = sorted(shares, key=lambda steps: -shares[steps])[:n]
    return [Route(shares[steps], steps, counts[steps]) for steps in best]


def target_name(graph: AttributionGraph, node: int) -> str:
    """What is explained; of what the model says elsewhere than at the end also the place, of a feature its label."""
    name, position, label = str(graph.token[node]).strip(), int(graph.position[node]), str(graph.label[node])
    if graph.feature[node] >= 0:
        return f"{name} [{label}]" if label else name
    return name if position == len(graph.info.tokens) - 1 else f"{name} after {place_text(graph.info, position)}"


def place_text(info: GraphInfo, position: int) -> str:
    """The word at a place of the prompt, numbered if the prompt had it before ("Mary (2nd)"), or the special token."""
    return _places(info)[position] or info.tokens[position].strip()


def target_record(graph: AttributionGraph, node: int) -> dict:
    """An explained target as data."""
    return {
        "node": node,
        "name": str(graph.token[node]),
        "token_id": _or_none(graph.token_id, node),
        "layer": int(graph.layer[node]),
        "position": int(graph.position[node]),
        "feature": _or_none(graph.feature, node),
        "weight": float(graph.probability[node]),
        "value": float(graph.pre_activation[node]),
    }


def path_record(graph: AttributionGraph, path: Path) -> dict:
    """A path as data."""
    return {"weight": path.weight, "nodes": [_node_record(graph, node) for node in path.nodes]}


def _steps(graph: AttributionGraph, nodes: tuple[int, ...], places: list[str]) -> tuple[str, ...]:
    steps: list[str] = []
    previous = None
    for node in nodes:
        position = int(graph.position[node])
        word = places[position] if position >= 0 and graph.kind[node] != NodeKind.LOGIT else str(graph.word[node])
        name = word if graph.kind[node] == NodeKind.TOKEN else _name(graph, node)
        if (name, word) == previous:
            continue
        previous = (name, word)
        steps.append(name if graph.kind[node] != NodeKind.FEATURE else f"[{name}] at {word}")
    return tuple(steps)


def _name(graph: AttributionGraph, node: int) -> str:
    if graph.kind[node] == NodeKind.FEATURE:
        return str(graph.label[node]) or f"L{graph.layer[node]}/{graph.feature[node]}"
    return target_name(graph, node)


def _places(info: GraphInfo) -> list[str]:
    met: Counter[str] = Counter()
    names, last, so_far = [], "", ""
    for word, token in zip(info.words, info.tokens, strict=True):
        if word != last or so_far == word:  # or else it is a further token of the same word
            met[word] += 1
            so_far = ""
        last, so_far = word, so_far + token.strip().removeprefix("##")
        names.append(f"{word} ({_ordinal(met[word])})" if word and met[word] > 1 else word)
    return names


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _node_record(graph: AttributionGraph, node: int) -> dict:
    return {
        "node": node,
        "kind": NodeKind(int(graph.kind[node])).text,
        "layer": _or_none(graph.layer, node),
        "position": _or_none(graph.position, node),
        "feature": _or_none(graph.feature, node),
        "token": str(graph.token[node]),
        "label": str(graph.label[node]) or None,
    }


def _or_none(column: ndarray, node: int) -> int | None:
    return None if column[node] < 0 else int(column[node])
