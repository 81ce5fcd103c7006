"""circuit-tracer's two layouts, of which the cross-layer one is the native one.

Cross-layer: W_enc_{i}.safetensors holds W_enc_{i} (feature, d_model), b_enc_{i}, b_dec_{i} and perhaps threshold_{i}
and W_skip_{i} (applied as x @ W_skip); W_dec_{i}.safetensors holds W_dec_{i} (feature, layers from i on, d_model).
Per-layer: layer_{i}.safetensors holds W_enc, W_dec (feature, d_model), b_enc, b_dec and perhaps
activation_function.threshold or k, and W_skip (applied as x @ W_skip.T). config.yaml names the hooks in both, and may
list the files of another layout, one per layer.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from transcoders import hub
from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats import gemma_scope
from transcoders.formats.checks import in_every_layer, whole_number
from transcoders.settings import Settings, read_settings
from transcoders.stored import Encoder, Stored, TensorFile, map_tensors, per_layer

CROSS_LAYER, PER_LAYER = "cross_layer_transcoder", "transcoder_set"
CROSS_LAYER_NAMES = ("W_enc", "b_enc", "b_dec", "threshold", "W_skip")
PER_LAYER_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "activation_function.threshold", "k", "W_skip")
ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}
"""By what config.yaml calls them, in lower case."""


def is_one(folder: Path) -> bool:
    """Whether config.yaml names circuit-tracer's kind of model, or the files are named as circuit-tracer's are."""
    names = ("W_enc_0.safetensors", "layer_0.safetensors")
    return "model_kind" in read_settings(folder / "config.yaml") or any((folder / name).is_file() for name in names)


def read(folder: Path) -> Stored:
    """A cross-layer or per-layer transcoder."""
    meta = read_settings(folder / "config.yaml")
    if meta.get("model_kind") not in (CROSS_LAYER, PER_LAYER):
        raise TranscoderError(f"{folder}/config.yaml names no model_kind; expected {CROSS_LAYER} or {PER_LAYER}.")
    files = [hub.locate(path, folder) for path in _listed(meta)]
    if meta.need("model_kind") == PER_LAYER:
        return _read_per_layer(folder, meta, files)
    if files:
        _kind(meta, has_threshold=True, has_k=False)  # or it says that config.yaml means something else
        return gemma_scope.read_cross_layer(list(dict.fromkeys(files)), *_hooks(meta))
    return _read_cross_layer(folder, meta)


def write(stored: Stored, folder: Path, dtype: torch.dtype, on_layer: Callable[[int, int], None]) -> None:
    """Write a transcoder into a folder, a layer at a time; `dtype` is that of the matrices, biases are float32."""
    config = stored.config
    meta = {
        "model_kind": CROSS_LAYER if config.cross_layer else PER_LAYER,
        "model_name": config.model_name,
        "feature_input_hook": config.reads,
        "feature_output_hook": config.writes,
    }
    if config.activation == "topk":
        meta |= {"activation": "topk", "k": config.k}
    write_layer = _write_cross_layer if config.cross_layer else _write_per_layer
    for layer in range(config.n_layers):
        write_layer(stored, folder, dtype, layer)
        on_layer(layer + 1, config.n_layers)
    (folder / "config.yaml").write_text(yaml.safe_dump(meta, sort_keys=False), encoding="utf-8")


def _write_cross_layer(stored: Stored, folder: Path, dtype: torch.dtype, layer: int) -> None:
    _save(_named(stored.encoder(layer), dtype, layer), folder / f"W_enc_{layer}.safetensors")
    decoder = stored.decoder(layer, torch.arange(stored.config.n_features))
    _save({f"W_dec_{layer}": decoder.to(dtype)}, folder / f"W_dec_{layer}.safetensors")


def _write_per_layer(stored: Stored, folder: Path, dtype: torch.dtype, layer: int) -> None:
    decoder = stored.decoder(layer, torch.arange(stored.config.n_features))
    tensors = _named_per_layer(stored.encoder(layer), dtype) | {"W_dec": decoder[:, 0].to(dtype)}
    _save(tensors, folder / f"layer_{layer}.safetensors")


def _read_cross_layer(folder: Path, meta: Settings) -> Stored:
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    if n_layers == 0:
        raise TranscoderError(f"{folder} holds no W_enc_0.safetensors; copy the whole transcoder folder.")
    encoders = [map_tensors(folder / f"W_enc_{layer}.safetensors") for layer in range(n_layers)]
    for layer, file in enumerate(encoders):
        file.refuse_others([f"{name}_{layer}" for name in CROSS_LAYER_NAMES])
    has_threshold, has_skip = (
        in_every_layer(encoders, [f"{name}_{layer}" for layer in range(n_layers)]) for name in ("threshold", "W_skip")
    )
    n_features, d_model = encoders[0].take("W_enc_0", -1, -1).shape
    activation = _activation(meta, has_threshold, None)
    config = TranscoderConfig(n_layers, d_model, n_features, *activation, *_hooks(meta), skip=has_skip)
    parts, files, decoders = [], [], []
    for layer, file in enumerate(encoders):
        files.append(map_tensors(folder / f"W_dec_{layer}.safetensors"))
        files[layer].refuse_others([f"W_dec_{layer}"])
        decoders.append(files[layer].take(f"W_dec_{layer}", n_features, n_layers - layer, d_model))
        parts.append(
            Encoder(
                file.take(f"W_enc_{layer}", n_features, d_model), file.take(f"b_enc_{layer}", n_features),
                file.take(f"b_dec_{layer}", d_model),
                file.take(f"threshold_{layer}", n_features) if config.activation == "jumprelu" else None,
                file.take(f"W_skip_{layer}", d_model, d_model) if config.skip else None,
            )
        )  # fmt: skip
    return Stored(
        "circuit-tracer, cross-layer", config, decoders[0].dtype,
        parts.__getitem__, lambda layer, rows: files[layer].rows(f"W_dec_{layer}", rows), mapped=decoders.__getitem__,
    )  # fmt: skip


def _read_per_layer(folder: Path, meta: Settings, listed: list[Path]) -> Stored:
    files = listed or [
        folder / f"layer_{layer}.safetensors" for layer in range(len(list(folder.glob("layer_*.safetensors"))))
    ]
    if not files:
        raise TranscoderError(f"{folder} holds no layer_0.safetensors; copy the whole transcoder folder.")
    layers, counts, folded = [], [], ()
    for path in files:
        file = map_tensors(path)
        counts.append(_k_of(file))
        if gemma_scope.is_layer(file):
            layers.append(gemma_scope.layer_weights(file))
            folded = gemma_scope.FOLDED
        else:
            layers.append(_layer_weights(file))
    first = layers[0][0]
    if len(set(counts)) > 1:
        other = next(layer for layer, count in enumerate(counts) if count != counts[0])
        raise TranscoderError(
            f"k is {counts[other]} in {files[other]} and {counts[0]} in {files[0]}; expected the same of every layer: "
            "copy or download the whole transcoder again."
        )
    activation = _activation(meta, first.threshold is not None, counts[0])
    config = TranscoderConfig(
        len(layers), first.W_enc.shape[1], first.W_enc.shape[0], *activation, *_hooks(meta),
        cross_layer=False, skip=first.W_skip is not None,
    )  # fmt: skip
    return per_layer("circuit-tracer, per-layer", config, layers, files, folded)


def _layer_weights(file: TensorFile) -> tuple[Encoder, Tensor]:
    file.refuse_others(PER_LAYER_NAMES)
    W_enc = file.take("W_enc", -1, -1)
    n_features, d_model = W_enc.shape
    is_turned = file.take("W_dec", -1, -1).shape == (d_model, n_features)  # as early revisions have it
    W_dec = file.tensors["W_dec"].T if is_turned and n_features != d_model else file.take("W_dec", n_features, d_model)
    threshold = "activation_function.threshold"
    encoder = Encoder(
        W_enc, file.take("b_enc", n_features), file.take("b_dec", d_model),
        file.take(threshold, n_features) if threshold in file else None,
        file.take("W_skip", d_model, d_model).T if "W_skip" in file else None,
    )  # fmt: skip
    return encoder, W_dec


def _k_of(file: TensorFile) -> int | None:
    """How many features a layer keeps, where its file says so."""
    if "k" not in file:
        return None
    value = float(file.take("k"))  # whatever its dtype became
    if not value.is_integer():
        raise TranscoderError(f"k in {file.path} is {value}; expected a whole number: copy or download it again.")
    return int(value)


def _named(encoder: Encoder, dtype: torch.dtype, layer: int) -> dict[str, Tensor]:
    """The tensors of W_enc_{layer}.safetensors."""
    tensors = {
        f"W_enc_{layer}": encoder.W_enc.to(dtype),
        f"b_enc_{layer}": encoder.b_enc.float(),
        f"b_dec_{layer}": encoder.b_dec.float(),
    }
    if encoder.threshold is not None:
        tensors[f"threshold_{layer}"] = encoder.threshold.float()
    if encoder.W_skip is not None:  # versions of circuit-tracer up to 0.5.0 ignore it
        tensors[f"W_skip_{layer}"] = encoder.W_skip.to(dtype)
    return tensors


def _named_per_layer(encoder: Encoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of layer_{layer}.safetensors, but for the decoder."""
    tensors = {"W_enc": encoder.W_enc.to(dtype), "b_enc": encoder.b_enc.float(), "b_dec": encoder.b_dec.float()}
    if encoder.threshold is not None:
        tensors["activation_function.threshold"] = encoder.threshold.float()
    if encoder.W_skip is not None:
        tensors["W_skip"] = encoder.W_skip.T.to(dtype)
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _activation(meta: Settings, has_threshold: bool, stored_k: int | None) -> tuple[str, int]:
    """The activation function and its k: what config.yaml says and the tensors imply, which must agree."""
    kind, said_k = _kind(meta, has_threshold=has_threshold, has_k=stored_k is not None), meta.get("k")
    if kind != "topk":
        if kind == "relu" and said_k and meta.get("activation") is None:
            raise TranscoderError(
                f"{meta.path} says k: {said_k!r} and no activation; expected activation: topk, or relu without k."
            )
        return kind, 0
    k = whole_number(meta, "k", stored_k)
    if stored_k not in (None, k):
        raise TranscoderError(
            f"{meta.path} says k: {k}, but the files beside it hold k = {stored_k}; correct the wrong one, or leave k "
            "out of config.yaml."
        )
    return kind, k


def _kind(meta: Settings, *, has_threshold: bool, has_k: bool) -> str:
    """The activation function of this configuration."""
    said = meta.get("activation")
    implied = "topk" if has_k else "jumprelu" if has_threshold else "relu"
    kind = implied if said is None else ACTIVATIONS.get(str(said).lower())
    if kind is None:
        raise TranscoderError(f"activation in {meta.path} is {said!r}; expected relu, jumprelu or topk.")
    if (kind == "jumprelu") != has_threshold or (has_k and kind != "topk"):
        held = " and ".join(["thresholds"] * has_threshold + ["k"] * has_k) or "no thresholds"
        raise TranscoderError(
            f"{meta.path} means activation {kind}, but the transcoder's files hold {held}; expected thresholds with "
            "jumprelu and only with it, k only with topk: correct activation, or copy the files again."
        )
    return kind


def _hooks(meta: Settings) -> tuple[str, str, str]:
    """What is read, what is written, and of which model."""
    reads, writes = meta.get("feature_input_hook"), meta.get("feature_output_hook")
    return reads or "hook_resid_mid", writes or "hook_mlp_out", meta.get("model_name") or ""


def _listed(meta: Settings) -> list[str]:
    """The files that config.yaml lists, in order of layers."""
    entries = meta.get("transcoders") or []
    if not isinstance(entries, list):
        raise TranscoderError(f"transcoders in {meta.path} is {entries!r}; expected a list of files, one per layer.")
    paths = []
    for layer, entry in enumerate(entries):
        said = entry if isinstance(entry, dict) else {"filepath": entry}
        if not isinstance(said.get("filepath"), str) or said.get("layer", layer) != layer:
            raise TranscoderError(
                f"transcoders in {meta.path} has {entry!r} for layer {layer}; expected the file of that layer."
            )
        paths.append(said["filepath"])
    return paths
