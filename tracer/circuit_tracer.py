"""Graphs that circuit-tracer saved with torch (`.pt`), read without running what a file may hold.

Such a file is a pickle. Only tensors, numbers and texts are taken from it: its settings object is an inert record, and
anything else that it names is refused.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from graphs import AttributionGraph, GraphInfo, NodeKind
from graphs.interchange import with_influence
from graphs.interchange_fields import LARGEST_INDEX
from graphs.interchange_metadata import words_of
from graphs.interchange_nodes import MOST_LAYERS, ROUNDING
from tracer.errors import TraceError

_UNKNOWN = ("pre_activation", "bias", "remainder", "input_size", "influence", "cumulative_influence")
_AXES = {
    "adjacency_matrix": 2,
    "active_features": 2,
    "input_tokens": 1,
    "selected_features": 1,
    "activation_values": 1,
    "logit_probabilities": 1,
}


class _Record:
    """Stands for an object of circuit-tracer's: holds what was saved of it and does nothing."""


class _Target(tuple):
    """Stands for its `LogitTarget`, a pair of text and vocabulary number."""

    def __new__(cls, *parts: Any) -> "_Target":
        return super().__new__(cls, parts)


_ORDER = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT)
_STANDINS = [
    (_Record, "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig"),
    (_Record, "transformer_lens.HookedTransformerConfig.HookedTransformerConfig"),
    (_Target, "circuit_tracer.attribution.targets.LogitTarget"),
]


def read_circuit_tracer_graph(path: Path, token_text: Callable[[int], str] = "#{}".format) -> AttributionGraph:
    """The whole graph in a `.pt` file of circuit-tracer, which has numbers of tokens but not their texts.

    Raises `TraceError` that says what the file holds instead.
    """
    saved = _load(path)
    tensors = {name: _tensor(path, name, saved.get(name), n_axes) for name, n_axes in _AXES.items()}
    settings = getattr(saved.get("cfg"), "__dict__", {})
    n_layers = settings.get("n_layers")
    if not isinstance(n_layers, int) or isinstance(n_layers, bool) or not 1 <= n_layers <= MOST_LAYERS:
        raise TraceError(f"{path} does not say how many layers the model has; export it as JSON with circuit-tracer.")
    columns = _columns(path, tensors, _targets(path, saved, token_text), n_layers)
    order = np.lexsort((np.arange(len(columns["kind"])), columns["kind"], columns["layer"]))
    matrix = tensors["adjacency_matrix"][order][:, order]
    target, source = matrix.nonzero()
    info = _info(saved, settings, tensors, n_layers, token_text)
    columns |= _texts(columns, info)
    graph = AttributionGraph(
        info=info, source=source, target=target, weight=matrix[target, source],
        **{name: column[order] for name, column in columns.items()},
        **{name: np.full(len(order), np.nan) for name in _UNKNOWN},
    )  # fmt: skip
    return with_influence(graph)


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_STANDINS), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore", UserWarning)  # of old protocols, which are refused if they must be
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search("GLOBAL (\\S+)", str(error))
        what = f"it names {named.group(1)[:80]}" if named else "it is no plain .pt file"
        raise TraceError(
            f"{path} was not opened: {what}, and what such a file names may run code; if you trust it, open it with "
            "circuit-tracer and import the JSON that it exports."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise TraceError(f"{path} cannot be read as a .pt file ({reason}); save the graph again.") from error
    if not isinstance(saved, dict):
        raise TraceError(f"{path} holds no dictionary; it is no graph of circuit-tracer.")
    return saved


def _tensor(path: Path, name: str, value: object, n_axes: int) -> ndarray:
    if not isinstance(value, torch.Tensor) or value.dim() != n_axes or value.is_sparse or value.is_complex():
        raise TraceError(f"{path} has no {name} of {n_axes} axes; it is no graph of circuit-tracer.")
    # a tensor may claim to be larger than what is saved of it
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise TraceError(f"{path}: {name} repeats its numbers; it was not written by circuit-tracer.")
    given = value.detach()
    return (given.float() if given.is_floating_point() else given.long()).numpy()


def _targets(path: Path, saved: dict[str, Any], token_text: Callable[[int], str]) -> list[tuple[str, int]]:
    """Name and vocabulary number of what is explained; numbers alone in files before 0.4."""
    given = saved.get("logit_targets", saved.get("logit_tokens"))
    if isinstance(given, torch.Tensor) and given.dim() == 1:
        return [(token_text(int(number)), int(number)) for number in given.tolist()]
    targets = given if isinstance(given, list) else []
    if not targets or not all(
        isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], int)
        for one in targets
    ):
        raise TraceError(f"{path} has no logit_targets; it is no graph of circuit-tracer.")
    return [(one[0], one[1]) for one in targets]


def _columns(
    path: Path, tensors: dict[str, ndarray], targets: list[tuple[str, int]], n_layers: int
) -> dict[str, ndarray]:
    """The nodes in the order of the matrix: features, errors layer by layer, tokens, logits."""
    active, selected, tokens = (tensors[name] for name in ("active_features", "selected_features", "input_tokens"))
    if not len(tokens):
        raise TraceError(f"{path} has no input_tokens; it is no graph of circuit-tracer.")
    counts = (len(selected), n_layers * len(tokens), len(tokens), len(targets))
    if active.shape[1] != 3 or tensors["adjacency_matrix"].shape != (sum(counts), sum(counts)):
        raise TraceError(f"{path}: the matrix is not of {sum(counts)} nodes, as its features, tokens and logits are.")
    if len(selected) and (selected.min() < 0 or selected.max() >= min(len(active), len(tensors["activation_values"]))):
        raise TraceError(f"{path}: selected_features names features that are not active; save the graph again.")
    if len(tensors["logit_probabilities"]) != len(targets):
        raise TraceError(f"{path}: there are not as many logit_probabilities as logit_targets; save the graph again.")
    feature = active[selected]
    _check_range(path, "a layer", feature[:, 0], n_layers - 1)
    _check_range(path, "a position", feature[:, 1], len(tokens) - 1)
    _check_range(path, "a feature's number", feature[:, 2], LARGEST_INDEX)
    _check_range(path, "a token's number", tokens, LARGEST_INDEX)
    _check_range(path, "a target's number", np.array([number for _, number in targets], object), LARGEST_INDEX)
    _check_range(path, "a probability", tensors["logit_probabilities"], 1, ROUNDING)
    places, last = np.arange(len(tokens)), np.full(len(targets), len(tokens) - 1)
    none, nan = np.full(sum(counts), -1), np.full(sum(counts), np.nan)
    parts = {
        "kind": [np.full(count, kind) for count, kind in zip(counts, _ORDER, strict=True)],
        "layer": [feature[:, 0], np.repeat(np.arange(n_layers), len(tokens)), -np.ones(counts[2], int),
                  np.full(counts[3], n_layers)],
        "position": [feature[:, 1], np.tile(places, n_layers), places, last],
    }  # fmt: skip
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    columns |= {"feature": none, "token_id": none.copy(), "activation": nan, "probability": nan.copy()}
    columns["feature"][: counts[0]] = feature[:, 2]
    columns["activation"][: counts[0]] = tensors["activation_values"][selected]
    columns["token_id"][sum(counts[:2]) :] = np.concatenate([tokens, [number for _, number in targets]])
    columns["probability"][sum(counts[:3]) :] = tensors["logit_probabilities"]
    name = np.full(sum(counts), None, object)
    name[sum(counts[:3]) :] = [text for text, _ in targets]
    return columns | {"token": name}


def _check_range(path: Path, name: str, values: ndarray, most: int, tolerance: float = 0.0) -> None:
    outside = values[~((values >= 0) & (values <= most + tolerance))]  # also what is no number
    if len(outside):
        raise TraceError(f"{path}: {name} is {outside[0]}; expected 0 to {most}; save the graph again.")


def _info(
    saved: dict[str, Any], settings: dict[str, Any], tensors: dict[str, ndarray], n_layers: int,
    token_text: Callable[[int], str],
) -> GraphInfo:  # fmt: skip
    token_ids = tuple(tensors["input_tokens"].tolist())
    tokens = tuple(token_text(number) for number in token_ids)
    prompt, scan, model = saved.get("input_string"), saved.get("scan"), settings.get("model_name")
    prompt = prompt if isinstance(prompt, str) else "".join(tokens)
    return GraphInfo(
        prompt=prompt,
        tokens=tokens,
        token_ids=token_ids,
        words=words_of(prompt, tokens),
        model=str(model or "unknown"),
        model_revision="",
        transcoder=", ".join(map(str, scan)) if isinstance(scan, list) else str(scan or "unknown"),
        transcoder_revision="",
        created_at=datetime.now(UTC),
        tool_version="circuit-tracer .pt",
        n_layers=n_layers,
        n_active_features=len(tensors["active_features"]),
        config=json.dumps({"imported": {"format": "circuit-tracer .pt"}}),
    )


def _texts(columns: dict[str, ndarray], info: GraphInfo) -> dict[str, ndarray]:
    """Tokens, words and labels of the nodes."""
    place, name = columns["position"], columns["token"]
    named = np.array([text is not None for text in name], bool)
    token = np.where(named, name, np.array(info.tokens, object)[place])
    word = np.where(named, [str(text).strip() for text in name], np.array(info.words, object)[place])
    return {"token": token, "word": word, "label": np.full(len(place), "", object)}
