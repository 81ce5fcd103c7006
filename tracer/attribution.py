"""Rows of direct effects → attribution graph: node columns and edges, in topological order."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from numpy import ndarray

from graphs import AttributionGraph, GraphInfo, NodeKind, cumulative_share
from tracer.local import LocalReplacementModel, Origin, Prompt
from tracer.rows import Rows, attribution_rows, ignore
from tracer.sources import Sources
from tracer.targets import Targets


def attribute(
    local: LocalReplacementModel,
    targets: Targets,
    *,
    sources: Sources | None = None,
    coverage: float = 0.99,
    max_features: int | None = None,
    row_share: float | None = None,
    batch_size: int | None = None,
    labels: dict[tuple[int, int], str] | None = None,
    on_progress: Callable[[int, int], None] = ignore,
) -> AttributionGraph:
    """The attribution graph of one prompt: all active features, errors and tokens, and the rows `coverage` asks for.

    `labels` names features by (layer, feature). For more targets on the same prompt prepare `Sources(local)` once.
    """
    sources = sources or Sources(local)
    rows = attribution_rows(
        local, targets, sources=sources, coverage=coverage, max_features=max_features, row_share=row_share,
        batch_size=batch_size, on_progress=on_progress,
    )  # fmt: skip
    return _assemble(sources, targets, rows, labels or {})


def _assemble(sources: Sources, targets: Targets, rows: Rows, labels: dict[tuple[int, int], str]) -> AttributionGraph:
    """Node columns: one entry per source, then the targets; then all in the order of nodes, where explained features
    follow the other nodes of their layer."""
    local = sources.local
    prompt, features = local.prompt, local.features
    n_sources, n_targets = sources.n_sources, len(targets.names)
    n = n_sources + n_targets
    active = _numpy(sources.number)
    kind = np.full(n, NodeKind.ERROR)
    kind[: local.n_positions], kind[active], kind[n_sources:] = NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.LOGIT
    layer = np.concatenate([_numpy(sources.layer), targets.layers])
    position = np.concatenate([_numpy(sources.position), targets.positions])
    feature, token_id = np.full(n, -1), np.full(n, -1)
    feature[active] = _numpy(features.feature)
    feature[n_sources:] = targets.features
    token_id[: local.n_positions] = prompt.token_ids
    token_id[n_sources:] = targets.token_ids

    order = np.concatenate([np.arange(n_sources), n_sources + _target_order(targets)])
    order = order[np.argsort(layer[order], kind="stable")]
    number = np.empty(n, dtype=np.int32)
    number[order] = np.arange(n, dtype=np.int32)
    entry = np.concatenate([active, np.arange(n_sources, n)])[_numpy(rows.target)]
    source = _numpy(rows.source)
    if (np.diff(number[:n_sources]) != 1).any():  # explained features stand between the layers
        source = number[source]

    empty = np.full(n, np.nan)
    activation, pre_activation, bias, remainder, size, influence, probability = (empty.copy() for _ in range(7))
    activation[active] = _numpy(features.activation)
    pre_activation[active] = _numpy(features.pre_activation)
    pre_activation[n_sources:] = _numpy(targets.value)
    bias[entry], remainder[entry] = _numpy(rows.bias), _numpy(rows.remainder)
    input_size = _numpy(rows.input_size)
    size[entry] = np.where(input_size > 0, input_size, np.nan)
    influence[:n_sources] = _numpy(rows.influence)
    probability[n_sources:] = _numpy(targets.weight)
    cumulative = empty.copy()
    cumulative[:n_sources] = cumulative_share(influence[:n_sources])
    return AttributionGraph(
        info=_info(local, rows, len(active)),
        kind=kind[order], layer=layer[order], position=position[order], feature=feature[order],
        token_id=token_id[order], activation=activation[order], pre_activation=pre_activation[order],
        bias=bias[order], remainder=remainder[order], input_size=size[order], influence=influence[order],
        cumulative_influence=cumulative[order], probability=probability[order],
        token=_texts([*(prompt.tokens[p] for p in position[:n_sources]), *targets.names])[order],
        word=_texts([*(prompt.words[p] for p in position[:n_sources]), *(n.strip() for n in targets.names)])[order],
        label=_texts([labels.get(key, "") for key in zip(layer.tolist(), feature.tolist(), strict=True)])[order],
        source=source, target=np.repeat(number[entry], np.diff(_numpy(rows.start))), weight=_numpy(rows.effect),
    )  # fmt: skip


def _target_order(targets: Targets) -> ndarray:
    """By position, then feature; those of one place as they were given."""
    return np.lexsort((targets.features, targets.positions))


def question(prompt: Prompt, origin: Origin, n_layers: int) -> GraphInfo:
    """What is known of a graph before its prompt is traced."""
    return GraphInfo(
        prompt=prompt.text, tokens=prompt.tokens, token_ids=prompt.token_ids, words=prompt.words,
        model=origin.model, model_revision=origin.model_revision,
        transcoder=origin.transcoder, transcoder_revision=origin.transcoder_revision,
        created_at=datetime.now(UTC), tool_version=version("clt-tracer"), n_layers=n_layers, n_active_features=0,
    )  # fmt: skip


def _info(local: LocalReplacementModel, rows: Rows, n_active: int) -> GraphInfo:
    return replace(
        question(local.prompt, local.origin, local.n_layers),
        n_active_features=n_active,
        coverage=rows.coverage, row_share=rows.row_share, skipped_influence=rows.skipped_influence,
        logits_error=rows.logits_error, conservation_error=rows.conservation_error,
    )  # fmt: skip


def _numpy(tensor: torch.Tensor) -> ndarray:
    return tensor.detach().cpu().numpy()


def _texts(values: list[str]) -> ndarray:
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result
