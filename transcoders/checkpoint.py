"""Folders in circuit-tracer's two layouts, and the transcoders in them. The first is the native one.

Cross-layer: W_enc_{i}.safetensors holds W_enc_{i} (feature, d_model), b_enc_{i}, b_dec_{i} and, for JumpReLU,
threshold_{i}; W_dec_{i}.safetensors holds W_dec_{i} (feature, layers from i on, d_model). Per-layer:
layer_{i}.safetensors holds W_enc, W_dec (feature, d_model), b_enc, b_dec and perhaps activation_function.threshold and
W_skip (applied as x @ W_skip.T). config.yaml names the hooks in both.
"""

import hashlib
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.model import CrossLayerTranscoder

CROSS_LAYER, PER_LAYER = "cross_layer_transcoder", "transcoder_set"


def load(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CrossLayerTranscoder:
    """Read a transcoder folder."""
    folder = Path(source)
    meta = _read_config(folder)
    parts = _cross_layer_parts(folder) if meta["model_kind"] == CROSS_LAYER else _per_layer_parts(folder)
    return assemble(parts, meta, folder).to(device=device, dtype=dtype).eval().requires_grad_(False)


def assemble(parts: list[dict[str, Tensor]], meta: dict, folder: Path) -> CrossLayerTranscoder:
    """A transcoder from one dictionary of tensors per layer, named as the parameters are.

    W_dec is (feature, reach, d_model); "threshold" and "W_skip" may be absent.
    """
    n_layers = len(parts)
    n_features, d_model = parts[0]["W_enc"].shape
    activation = "jumprelu" if "threshold" in parts[0] else meta.get("activation", "relu")
    config = TranscoderConfig(
        n_layers, d_model, n_features, activation, int(meta.get("k", 0)) if activation == "topk" else 0,
        meta.get("feature_input_hook", "hook_resid_mid"), meta.get("feature_output_hook", "hook_mlp_out"),
        meta.get("model_name", ""), meta["model_kind"] == CROSS_LAYER, "W_skip" in parts[0],
    )  # fmt: skip
    transcoder = CrossLayerTranscoder(config)
    with torch.no_grad():
        for layer, part in enumerate(parts):
            targets = {
                "W_enc": transcoder.W_enc[layer], "b_enc": transcoder.b_enc[layer],
                "b_dec": transcoder.b_dec[layer], "W_dec": transcoder.W_dec[layer],
            }  # fmt: skip
            if activation == "jumprelu":
                targets["threshold"] = transcoder.threshold[layer]
            if transcoder.W_skip is not None:
                targets["W_skip"] = transcoder.W_skip[layer]
            for name, parameter in targets.items():
                _copy(parameter, part, name, layer, folder)
    return transcoder


def save(transcoder: CrossLayerTranscoder, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a transcoder folder; `dtype` is that of encoder and decoder matrices (biases stay float32)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = transcoder.config
    meta = {
        "model_kind": CROSS_LAYER if config.cross_layer else PER_LAYER,
        "model_name": config.model_name,
        "feature_input_hook": config.reads,
        "feature_output_hook": config.writes,
    }
    if config.activation == "topk":
        meta |= {"activation": "topk", "k": config.k}
    write = _write_cross_layer if config.cross_layer else _write_per_layer
    for layer in range(config.n_layers):
        write(transcoder, layer, folder, dtype)
    (folder / "config.yaml").write_text(yaml.safe_dump(meta, sort_keys=False), encoding="utf-8")


def revision(folder: str | Path) -> str:
    """Ten hexadecimal digits that change with the weights in a folder (its safetensors files)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise TranscoderError(f"{path} is missing; copy the whole transcoder folder.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise TranscoderError(f"{path} cannot be read ({error}); copy or download it again.") from error


def _cross_layer_parts(folder: Path) -> list[dict[str, Tensor]]:
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    if n_layers == 0:
        raise TranscoderError(
            f"{folder} holds no W_enc_0.safetensors; expected circuit-tracer's cross-layer layout "
            "(config.yaml, W_enc_*.safetensors, W_dec_*.safetensors)."
        )
    parts = []
    for layer in range(n_layers):
        tensors = read_tensors(folder / f"W_enc_{layer}.safetensors")
        tensors |= read_tensors(folder / f"W_dec_{layer}.safetensors")
        parts.append({name.removesuffix(f"_{layer}"): tensor for name, tensor in tensors.items()})
        if "W_enc" not in parts[-1]:
            raise TranscoderError(f"{folder} lacks the tensor W_enc_{layer}; expected circuit-tracer's layout.")
    return parts


def _per_layer_parts(folder: Path) -> list[dict[str, Tensor]]:
    n_layers = len(list(folder.glob("layer_*.safetensors")))
    if n_layers == 0:
        raise TranscoderError(
            f"{folder} holds no layer_0.safetensors; expected circuit-tracer's per-layer layout "
            "(config.yaml, layer_*.safetensors)."
        )
    parts = []
    for layer in range(n_layers):
        part = read_tensors(folder / f"layer_{layer}.safetensors")
        if "W_enc" not in part or "W_dec" not in part:
            raise TranscoderError(f"{folder}/layer_{layer}.safetensors lacks W_enc or W_dec.")
        part["W_dec"] = part["W_dec"][:, None]
        if "activation_function.threshold" in part:
            part["threshold"] = part.pop("activation_function.threshold")
        if "W_skip" in part:
            part["W_skip"] = part["W_skip"].T
        parts.append(part)
    return parts


def _write_cross_layer(transcoder: CrossLayerTranscoder, layer: int, folder: Path, dtype: torch.dtype) -> None:
    encoder = {
        f"W_enc_{layer}": transcoder.W_enc[layer].to(dtype),
        f"b_enc_{layer}": transcoder.b_enc[layer].float(),
        f"b_dec_{layer}": transcoder.b_dec[layer].float(),
    }
    if transcoder.config.activation == "jumprelu":
        encoder[f"threshold_{layer}"] = transcoder.threshold[layer].float()
    if transcoder.W_skip is not None:  # circuit-tracer has no place for it and ignores it
        encoder[f"W_skip_{layer}"] = transcoder.W_skip[layer].to(dtype)
    _write(encoder, folder / f"W_enc_{layer}.safetensors")
    _write({f"W_dec_{layer}": transcoder.W_dec[layer].to(dtype)}, folder / f"W_dec_{layer}.safetensors")


def _write_per_layer(transcoder: CrossLayerTranscoder, layer: int, folder: Path, dtype: torch.dtype) -> None:
    tensors = {
        "W_enc": transcoder.W_enc[layer].to(dtype), "W_dec": transcoder.W_dec[layer][:, 0].to(dtype),
        "b_enc": transcoder.b_enc[layer].float(), "b_dec": transcoder.b_dec[layer].float(),
    }  # fmt: skip
    if transcoder.config.activation == "jumprelu":
        tensors["activation_function.threshold"] = transcoder.threshold[layer].float()
    if transcoder.W_skip is not None:
        tensors["W_skip"] = transcoder.W_skip[layer].T.to(dtype)
    _write(tensors, folder / f"layer_{layer}.safetensors")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _read_config(folder: Path) -> dict:
    path = folder / "config.yaml"
    if not path.is_file():
        raise TranscoderError(f"{path} does not exist; expected a transcoder folder in circuit-tracer's layout.")
    meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta.get("model_kind") not in (CROSS_LAYER, PER_LAYER):
        raise TranscoderError(f"{path} names no model_kind; expected {CROSS_LAYER} or {PER_LAYER}.")
    return meta


def _copy(parameter: Tensor, part: dict[str, Tensor], name: str, layer: int, folder: Path) -> None:
    if name not in part:
        raise TranscoderError(f"{folder} lacks the tensor {name} of layer {layer}; copy the whole folder.")
    value = part[name]
    if parameter.shape != value.shape:
        raise TranscoderError(
            f"{name} of layer {layer} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}."
        )
    parameter.copy_(value)
