"""From a prompt to an attribution graph: start reading here.

prompt → tokens → local replacement model → targets → attribution rows → graph → pruned graph
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from graphs import AttributionGraph, prune, score_from
from tracer.attribution import attribute
from tracer.choose import choose_targets
from tracer.config import TraceConfig
from tracer.local import LocalReplacementModel
from tracer.memory import explaining_lack_of_memory
from tracer.replacement import ReplacementModel
from tracer.rows import ignore
from tracer.targets import find_position, top_tokens


@dataclass(frozen=True)
class Prediction:
    """A next token and the model's probability of it."""

    token: str
    token_id: int
    probability: float
    position: int
    """The place in the prompt after which the model says it."""


@dataclass(frozen=True)
class Trace:
    """A traced prompt: the graph as asked for, and the counts of the whole graph it was cut from."""

    graph: AttributionGraph
    predictions: tuple[Prediction, ...]
    n_nodes: int
    n_edges: int


@explaining_lack_of_memory()
def trace(
    prompt: str,
    replacement: ReplacementModel,
    config: TraceConfig = TraceConfig(),  # noqa: B008 (a frozen value)
    *,
    labels: dict[tuple[int, int], str] | None = None,
    tags: tuple[tuple[str, str], ...] = (),
    on_progress: Callable[[int, int], None] = ignore,
) -> Trace:
    """Trace one prompt; `labels` names features by (layer, feature), `tags` are kept with the graph."""
    start = time.perf_counter()
    local = replacement.localize(replacement.tokenize(prompt))
    targets = choose_targets(replacement, local, config)
    whole = attribute(
        local, targets, coverage=config.coverage, max_features=config.max_features, row_share=config.row_share,
        batch_size=config.batch_size, labels=labels, on_progress=on_progress,
    )  # fmt: skip
    graph = whole
    if config.prune:
        graph = prune(whole, node_threshold=config.node_threshold, edge_threshold=config.edge_threshold)
    else:
        scores = score_from(whole, np.nan_to_num(whole.influence))
        info = replace(whole.info, replacement_score=scores.replacement, completeness_score=scores.completeness)
        graph = replace(whole, info=info)
    info = replace(
        graph.info,
        seconds=time.perf_counter() - start, peak_memory_mb=_peak_memory_mb(),
        config=config_text(config), tags=tags,
    )  # fmt: skip
    return Trace(replace(graph, info=info), _predictions(replacement, local, config), whole.n_nodes, whole.n_edges)


def config_text(config: TraceConfig) -> str:
    """The settings as they are stored with a graph; they are part of its identity."""
    return json.dumps(asdict(config), sort_keys=True)


def _predictions(
    replacement: ReplacementModel, local: LocalReplacementModel, config: TraceConfig
) -> tuple[Prediction, ...]:
    """The five most probable next tokens, or fewer where those before hold all but a thousandth."""
    at = find_position(local.prompt, config.position)
    ids, probabilities = top_tokens(local, max_logits=5, logit_mass=0.999, position=at)
    return tuple(Prediction(replacement.token_text(i), i, p, at) for i, p in zip(ids, probabilities, strict=True))


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)
