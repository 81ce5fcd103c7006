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
from tracer.errors import TraceError
from tracer.local import LocalReplacementModel
from tracer.memory import explaining_lack_of_memory
from tracer.replacement import ReplacementModel
from tracer.rows import ignore
from tracer.sources import Sources
from tracer.targets import Targets, find_position, top_tokens


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
    doubt: str
    """Why the transcoder seems not to be of this model; "" where it is no worse than usual."""


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
    targets = choose_targets(replacement, local, config)  # or it says what is wrong before there is more work
    return _explain(replacement, Sources(local), targets, config, start, labels, tags, on_progress)


@explaining_lack_of_memory()
def prepare(prompt: str, replacement: ReplacementModel) -> Sources:
    """What all traces of a prompt share, whatever they explain: run once for any number of `trace_prepared`."""
    return Sources(replacement.localize(replacement.tokenize(prompt)))


@explaining_lack_of_memory()
def trace_prepared(
    prepared: Sources,
    replacement: ReplacementModel,
    config: TraceConfig = TraceConfig(),  # noqa: B008 (a frozen value)
    *,
    labels: dict[tuple[int, int], str] | None = None,
    tags: tuple[tuple[str, str], ...] = (),
    on_progress: Callable[[int, int], None] = ignore,
) -> Trace:
    """As `trace`, of a prompt that was prepared with this replacement model; `seconds` are without preparing it."""
    start = time.perf_counter()
    if prepared.local.transcoder is not replacement.transcoder:
        raise TraceError("the prompt was prepared with another model or transcoder; prepare it with this one.")
    targets = choose_targets(replacement, prepared.local, config)
    return _explain(replacement, prepared, targets, config, start, labels, tags, on_progress)


def _explain(
    replacement: ReplacementModel, sources: Sources, targets: Targets, config: TraceConfig, start: float,
    labels: dict[tuple[int, int], str] | None, tags: tuple[tuple[str, str], ...],
    on_progress: Callable[[int, int], None],
) -> Trace:  # fmt: skip
    local = sources.local
    whole = attribute(
        local, targets, sources=sources, coverage=config.coverage, max_features=config.max_features,
        row_share=config.row_share, batch_size=config.batch_size, labels=labels, on_progress=on_progress,
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
    return Trace(
        replace(graph, info=info), _predictions(replacement, local, config), whole.n_nodes, whole.n_edges,
        replacement.doubt(local),
    )  # fmt: skip


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
