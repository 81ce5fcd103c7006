"""Tell a graph as a person would: the strongest ways from the prompt's words to the answer, through named features."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from graphs import AttributionGraph, NodeKind, Path, strongest_paths

N_CANDIDATES = 200
"""Strongest paths looked at before those that tell the same story are added up."""


@dataclass(frozen=True)
class Route:
    """Paths that read the same, added up."""

    share: float
    """Part of the answer's input that came along these paths."""
    steps: tuple[str, ...]
    n_paths: int


def answer_node(graph: AttributionGraph) -> int:
    """The explained target with the largest weight."""
    logits = np.flatnonzero(graph.kind == NodeKind.LOGIT)
    return int(logits[np.argmax(graph.probability[logits])])


def feature_paths(graph: AttributionGraph, k: int) -> list[Path]:
    """The k strongest paths from words of the prompt to the answer through at least one feature and no error."""
    words = np.flatnonzero((graph.kind == NodeKind.TOKEN) & (graph.word != ""))
    features = graph.kind == NodeKind.FEATURE
    paths = strongest_paths(graph, words.tolist(), answer_node(graph), k=k + len(words), through=features)
    return [path for path in paths if len(path.nodes) > 2][:k]


def routes(graph: AttributionGraph, n: int = 6) -> list[Route]:
    """The n strongest routes; neighbouring features of one name at one word are one step."""
    shares: dict[tuple[str, ...], float] = {}
    counts: dict[tuple[str, ...], int] = {}
    for path in feature_paths(graph, N_CANDIDATES):
        steps = _steps(graph, path.nodes)
        shares[steps] = shares.get(steps, 0.0) + path.weight
        counts[steps] = counts.get(steps, 0) + 1
    best = sorted(shares, key=lambda steps: -shares[steps])[:n]
    return [Route(shares[steps], steps, counts[steps]) for steps in best]


def path_record(graph: AttributionGraph, path: Path) -> dict:
    """A path as data."""
    return {"weight": path.weight, "nodes": [_node_record(graph, node) for node in path.nodes]}


def _steps(graph: AttributionGraph, nodes: tuple[int, ...]) -> tuple[str, ...]:
    steps: list[str] = []
    previous = None
    for node in nodes:
        name, word = _name(graph, node), str(graph.word[node])
        if (name, word) == previous:
            continue
        previous = (name, word)
        steps.append(name if graph.kind[node] != NodeKind.FEATURE else f"[{name}] at {word}")
    return tuple(steps)


def _name(graph: AttributionGraph, node: int) -> str:
    match int(graph.kind[node]):
        case NodeKind.FEATURE:
            return str(graph.label[node]) or f"L{graph.layer[node]}/{graph.feature[node]}"
        case NodeKind.TOKEN:
            return str(graph.word[node])
        case _:
            return str(graph.token[node]).strip()


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
