"""Rows of direct effects → attribution graph: node columns and edges, in topological order."""

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from numpy import ndarray

from graphs import AttributionGraph, GraphInfo, NodeKind, cumulative_share
from tracer.replacement import LocalReplacementModel
from tracer.rows import Rows, Sources, attribution_rows, ignore
from tracer.targets import Targets


def attribute(
    local: LocalReplacementModel,
    targets: Targets,
    *,
    sources: Sources | None = None,
    coverage: float = 0.99,
    max_features: int | None = None,
    batch_size: int = 256,
    labels: dict[tuple[int, int], str] | None = None,
    on_progress: Callable[[int, int], None] = ignore,
) -> AttributionGraph:
    """The attribution graph of one prompt: all active features, errors and tokens, and the rows `coverage` asks for.

    `labels` names features by (layer, feature). For more targets on the same prompt prepare `Sources(local)` once.
    """
    rows = attribution_rows(
        local, targets, sources=sources, coverage=coverage, max_features=max_features, batch_size=batch_size,
        on_progress=on_progress,
    )  # fmt: skip
    return _assemble(local, targets, rows, labels or {})


def _assemble(
    local: LocalReplacementModel, targets: Targets, rows: Rows, labels: dict[tuple[int, int], str]
) -> AttributionGraph:
    prompt, features = local.prompt, local.features
    n_layers, n_positions, n_active = local.n_layers, local.n_positions, len(features.layer)
    n_sources, n_targets = len(rows.influence), len(targets.names)

    # One entry per source in the order of the rows' columns (features | errors | tokens), then the targets.
    error_layer, error_position = np.divmod(np.arange(n_layers * n_positions), n_positions)
    kind = np.repeat(
        [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT],
        [n_active, n_layers * n_positions, n_positions, n_targets],
    )
    layer = np.concatenate([_numpy(features.layer), error_layer, np.full(n_positions, -1), targets.layers])
    position = np.concatenate([_numpy(features.position), error_position, np.arange(n_positions), targets.positions])
    feature = np.full(n_sources + n_targets, -1)
    feature[:n_active] = _numpy(features.feature)
    feature[n_sources:] = targets.features
    token_id = np.full(n_sources + n_targets, -1)
    token_id[n_sources - n_positions : n_sources] = prompt.token_ids
    token_id[n_sources:] = targets.token_ids
    # Position 0 has no error: what its MLPs write is part of every target's bias.
    exists = ~((kind == NodeKind.ERROR) & (position == 0))
    # In a layer the kinds follow each other, and a feature that is explained comes last.
    order = np.lexsort((feature, position, kind, layer))
    order = order[exists[order]]
    number = np.full(n_sources + n_targets, -1)
    number[order] = np.arange(len(order))

    effect = _numpy(rows.effect)
    row, column = np.nonzero(effect)
    row_entry = _row_entries(_numpy(rows.target), n_active, n_sources)
    source, target, weight = number[column], number[row_entry[row]], effect[row, column]
    by_target = np.lexsort((source, target))

    empty = np.full(n_sources + n_targets, np.nan)
    activation, pre_activation, bias, influence, probability = (empty.copy() for _ in range(5))
    activation[:n_active] = _numpy(features.activation)
    pre_activation[:n_active] = _numpy(features.pre_activation)
    pre_activation[n_sources:] = _numpy(targets.value)
    bias[row_entry] = _numpy(rows.bias)
    influence[:n_sources] = _numpy(rows.influence)
    probability[n_sources:] = _numpy(targets.weight)
    cumulative = empty.copy()
    cumulative[:n_sources] = cumulative_share(influence[:n_sources])
    return AttributionGraph(
        info=_info(local, rows, n_active),
        kind=kind[order], layer=layer[order], position=position[order], feature=feature[order],
        token_id=token_id[order], activation=activation[order], pre_activation=pre_activation[order],
        bias=bias[order], influence=influence[order], cumulative_influence=cumulative[order],
        probability=probability[order],
        token=_texts([*(prompt.tokens[p] for p in position[:n_sources]), *targets.names])[order],
        word=_texts([*(prompt.words[p] for p in position[:n_sources]), *(n.strip() for n in targets.names)])[order],
        label=_texts([labels.get((int(a), int(b)), "") for a, b in zip(layer, feature, strict=True)])[order],
        source=source[by_target], target=target[by_target], weight=weight[by_target],
    )  # fmt: skip


def _row_entries(target: ndarray, n_active: int, n_sources: int) -> ndarray:
    """Row targets in the numbering of sources and targets: explained targets come after all sources."""
    return np.where(target < n_active, target, target - n_active + n_sources)


def _info(local: LocalReplacementModel, rows: Rows, n_active: int) -> GraphInfo:
    prompt, origin = local.prompt, local.origin
    return GraphInfo(
        prompt=prompt.text, tokens=prompt.tokens, token_ids=prompt.token_ids, words=prompt.words,
        model=origin.model, model_revision=origin.model_revision,
        transcoder=origin.transcoder, transcoder_revision=origin.transcoder_revision,
        created_at=datetime.now(UTC), tool_version=version("clt-tracer"),
        n_layers=local.n_layers, n_active_features=n_active,
        coverage=rows.coverage, skipped_influence=rows.skipped_influence,
        logits_error=rows.logits_error, conservation_error=rows.conservation_error,
    )  # fmt: skip


def _numpy(tensor: torch.Tensor) -> ndarray:
    return tensor.detach().cpu().numpy()


def _texts(values: list[str]) -> ndarray:
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result
