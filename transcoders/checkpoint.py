"""A folder in circuit-tracer's cross-layer layout, and the transcoder in it.

W_enc_{i}.safetensors holds W_enc_{i} (feature, d_model), b_enc_{i}, b_dec_{i} and, for JumpReLU, threshold_{i};
W_dec_{i}.safetensors holds W_dec_{i} (feature, layers from i on, d_model); config.yaml names the hooks.
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


def load(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CrossLayerTranscoder:
    """Read a transcoder folder."""
    folder = Path(source)
    meta = _read_config(folder)
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    if n_layers == 0:
        raise TranscoderError(
            f"{folder} holds no W_enc_0.safetensors; expected circuit-tracer's cross-layer layout "
            "(config.yaml, W_enc_*.safetensors, W_dec_*.safetensors)."
        )
    encoders = [_read(folder / f"W_enc_{layer}.safetensors") for layer in range(n_layers)]
    decoders = [_read(folder / f"W_dec_{layer}.safetensors") for layer in range(n_layers)]
    n_features, d_model = _tensor(encoders[0], folder, "W_enc_0").shape
    activation = "jumprelu" if "threshold_0" in encoders[0] else meta.get("activation", "relu")
    config = TranscoderConfig(
        n_layers, d_model, n_features, activation, int(meta.get("k", 0)) if activation == "topk" else 0,
        meta.get("feature_input_hook", "hook_resid_mid"), meta.get("feature_output_hook", "hook_mlp_out"),
        meta.get("model_name", ""),
    )  # fmt: skip
    transcoder = CrossLayerTranscoder(config)
    with torch.no_grad():
        for layer, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
            _copy(transcoder.W_enc[layer], _tensor(encoder, folder, f"W_enc_{layer}"), f"W_enc_{layer}")
            _copy(transcoder.b_enc[layer], _tensor(encoder, folder, f"b_enc_{layer}"), f"b_enc_{layer}")
            _copy(transcoder.b_dec[layer], _tensor(encoder, folder, f"b_dec_{layer}"), f"b_dec_{layer}")
            _copy(transcoder.W_dec[layer], _tensor(decoder, folder, f"W_dec_{layer}"), f"W_dec_{layer}")
            if activation == "jumprelu":
                _copy(transcoder.threshold[layer], _tensor(encoder, folder, f"threshold_{layer}"), f"threshold_{layer}")
    return transcoder.to(device=device, dtype=dtype).eval().requires_grad_(False)


def save(transcoder: CrossLayerTranscoder, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a transcoder folder; `dtype` is that of encoder and decoder matrices (biases stay float32)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = transcoder.config
    meta = {
        "model_kind": "cross_layer_transcoder",
        "model_name": config.model_name,
        "feature_input_hook": config.reads,
        "feature_output_hook": config.writes,
    }
    if config.activation == "topk":
        meta |= {"activation": "topk", "k": config.k}
    for layer in range(config.n_layers):
        encoder = {
            f"W_enc_{layer}": transcoder.W_enc[layer].to(dtype),
            f"b_enc_{layer}": transcoder.b_enc[layer].float(),
            f"b_dec_{layer}": transcoder.b_dec[layer].float(),
        }
        if config.activation == "jumprelu":
            encoder[f"threshold_{layer}"] = transcoder.threshold[layer].float()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.items()}
        save_file(tensors, folder / f"W_enc_{layer}.safetensors")
        decoder = transcoder.W_dec[layer].detach().to(dtype).cpu().contiguous()
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(meta, sort_keys=False), encoding="utf-8")


def revision(folder: str | Path) -> str:
    """Ten hexadecimal digits that change with the weights in a folder (its safetensors files)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _read_config(folder: Path) -> dict:
    path = folder / "config.yaml"
    if not path.is_file():
        raise TranscoderError(f"{path} does not exist; expected a transcoder folder in circuit-tracer's layout.")
    meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta.get("model_kind") != "cross_layer_transcoder":
        raise TranscoderError(f"{path} is not of model_kind cross_layer_transcoder; only those can be read yet.")
    return meta


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TranscoderError(f"{path} is missing; copy the whole transcoder folder.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise TranscoderError(f"{path} cannot be read ({error}); copy or download it again.") from error


def _tensor(tensors: dict[str, Tensor], folder: Path, name: str) -> Tensor:
    if name not in tensors:
        raise TranscoderError(f"{folder} lacks the tensor {name}; expected circuit-tracer's cross-layer layout.")
    return tensors[name]


def _copy(parameter: Tensor, value: Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise TranscoderError(f"{name} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}.")
    parameter.copy_(value)
