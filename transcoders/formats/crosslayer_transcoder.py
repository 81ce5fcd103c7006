"""crosslayer-transcoder: config.yaml and checkpoint.safetensors, or a Lightning checkpoint clt.ckpt.

Decoders are stored target by target: decoder.W_{t} is (source, feature, d_model). Inputs and outputs may be
standardised, per layer or per dimension: z = (x − mean_in) / std_in · W + b; y = (Σ a W + b) · std_out + mean_out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats.checks import usable, whole_number
from transcoders.settings import Settings, read_settings
from transcoders.stored import Encoder, Stored, TensorFile, map_tensors

READS, WRITES = "hook_resid_mid", "hook_mlp_out"
"""It writes down no hooks: it reads the input of the norm before the MLP and writes what the MLP adds."""
ACTIVATIONS = {
    "ReLU": "relu", "JumpReLU": "jumprelu", "PerLayerTopK": "topk",
    "BatchTopK": "jumprelu", "PerLayerBatchTopK": "jumprelu",
}  # fmt: skip
"""Batch-top-k keeps one threshold once it is trained, and is a JumpReLU from then on."""
OWN = {
    "JumpReLU": ("nonlinearity.theta", "nonlinearity.bandwidth"),
    "BatchTopK": ("nonlinearity.threshold",), "PerLayerBatchTopK": ("nonlinearity.threshold",),
}  # fmt: skip
"""Tensors that only some nonlinearities have."""
ALWAYS = (
    "encoder.W", "encoder.b", "decoder.b", "input_standardizer.mean", "input_standardizer.std",
    "output_standardizer.mean", "output_standardizer.std",
)  # fmt: skip


def is_one(folder: Path) -> bool:
    """Whether the weights are where it saves them."""
    return any((folder / name).is_file() for name in ("checkpoint.safetensors", "clt.ckpt"))


def read(folder: Path) -> Stored:
    """A cross-layer or per-layer transcoder."""
    parts, is_folded = _parts(folder)
    whole = folder / "checkpoint.safetensors"
    file = _model_of(map_tensors(whole if whole.is_file() else folder / "clt.ckpt"))
    kind = _class(parts.get("nonlinearity"), folder)
    if kind not in ACTIVATIONS:
        raise TranscoderError(f"{folder} uses {kind}; expected one of {', '.join(ACTIVATIONS)}.")
    n_layers, d_model, n_features = file.take("encoder.W", -1, -1, -1).shape
    cross_layer = "decoder.W" not in file
    decoders = [f"decoder.W_{target}" for target in range(n_layers)] if cross_layer else ["decoder.W"]
    file.refuse_others([*ALWAYS, *OWN.get(kind, ()), *decoders])
    meta = Settings(folder / "config.yaml", parts["nonlinearity"].get("init_args") or {})
    if ACTIVATIONS[kind] == "topk" and meta.get("k") is None:
        raise TranscoderError(
            f"{folder}/config.yaml does not say how many features {kind} keeps; add k to its init_args."
        )
    k = whole_number(meta, "k") if ACTIVATIONS[kind] == "topk" else 0
    config = TranscoderConfig(
        n_layers, d_model, n_features, ACTIVATIONS[kind], k, READS, WRITES, cross_layer=cross_layer
    )
    inputs = _standardizer(file, "input_standardizer", parts, config, is_folded)
    outputs = _standardizer(file, "output_standardizer", parts, config, is_folded)
    weights = _Weights(file, config, kind, *inputs, *outputs)
    folded = ["encoders transposed", "decoders regrouped by source layer"]
    if not is_folded:
        folded.append("standardisation of inputs and outputs folded")
    if kind in ("BatchTopK", "PerLayerBatchTopK"):
        folded.append("batch-top-k turned into JumpReLU with its threshold")
    return Stored(
        "crosslayer-transcoder", config, file.tensors["encoder.W"].dtype, weights.encoder, weights.decoder,
        tuple(folded),
    )  # fmt: skip


@dataclass(frozen=True)
class _Weights:
    file: TensorFile
    config: TranscoderConfig
    kind: str
    mean_in: Float[Tensor, "layer #d_model"]
    std_in: Float[Tensor, "layer #d_model"]
    mean_out: Float[Tensor, "layer #d_model"]
    std_out: Float[Tensor, "layer #d_model"]

    def encoder(self, layer: int) -> Encoder:
        file, (n_layers, d_model, n_features) = self.file, self._shape
        W_enc = file.take("encoder.W", n_layers, d_model, n_features)[layer].T.float() / self.std_in[layer]
        b_enc = file.take("encoder.b", n_layers, n_features)[layer].float()
        b_dec = torch.zeros(d_model)
        if "decoder.b" in file or self.config.cross_layer:  # early per-layer decoders have no bias
            b_dec = file.take("decoder.b", n_layers, d_model)[layer].float()
        return Encoder(
            W_enc, b_enc - W_enc @ self.mean_in[layer].expand(d_model),
            b_dec * self.std_out[layer] + self.mean_out[layer], self._threshold(layer),
        )  # fmt: skip

    def decoder(self, layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        n_layers, d_model, n_features = self._shape
        if not self.config.cross_layer:
            stored = self.file.take("decoder.W", n_layers, n_features, d_model)[layer][rows]
            return (stored.float() * self.std_out[layer])[:, None]
        written = [
            self.file.take(f"decoder.W_{target}", target + 1, n_features, d_model)[layer][rows].float()
            * self.std_out[target]
            for target in range(layer, n_layers)
        ]
        return torch.stack(written, dim=1)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.config.n_layers, self.config.d_model, self.config.n_features

    def _threshold(self, layer: int) -> Float[Tensor, " feature"] | None:
        """None fires below zero, whatever was learnt."""
        n_layers, _, n_features = self._shape
        match self.kind:
            case "JumpReLU":
                theta = self.file.take("nonlinearity.theta", 1, n_layers, n_features)[0, layer]
            case "BatchTopK":
                theta = self.file.take("nonlinearity.threshold", 1)
            case "PerLayerBatchTopK":
                theta = self.file.take("nonlinearity.threshold", n_layers)[layer]
            case _:
                return None
        return theta.float().clamp(min=0).expand(n_features)


def _standardizer(
    file: TensorFile, name: str, parts: dict, config: TranscoderConfig, is_folded: bool
) -> tuple[Float[Tensor, "layer #d_model"], Float[Tensor, "layer #d_model"]]:
    """Mean and standard deviation of one side: (0, 1) where there is no standardisation, or none any more."""
    kind = _class(parts.get(name), file.path.parent)
    if is_folded or kind is None or kind.startswith("Identity"):
        return torch.zeros(config.n_layers, 1), torch.ones(config.n_layers, 1)
    if kind.startswith("Dimension"):
        shape = (config.n_layers, config.d_model)
    elif kind.startswith("Layer"):
        shape = (config.n_layers,)
    else:
        raise TranscoderError(
            f"{file.path} is standardised by {kind}, which may depend on the prompt; such a transcoder cannot be read."
        )
    mean, std = (file.take(f"{name}.{part}", *shape).float().reshape(config.n_layers, -1) for part in ("mean", "std"))
    return mean, usable(std, f"{name}.std", file.path)


def _parts(folder: Path) -> tuple[dict, bool]:
    """Which classes the model is made of, and whether its standardisation is folded into its weights."""
    meta = read_settings(folder / "config.yaml")
    model = meta.get("model")
    while isinstance(model, dict) and "model" in model.get("init_args", {}):  # a training run's own config.yaml
        model = model["init_args"]["model"]
    if not isinstance(model, dict) or "nonlinearity" not in model.get("init_args", {}):
        raise TranscoderError(
            f"{meta.path} names no nonlinearity; expected the config.yaml that was saved with the weights."
        )
    return model["init_args"], bool(model.get("is_folded", False))


def _class(part: Any, folder: Path) -> str | None:
    if part is None:
        return None
    if not isinstance(part, dict) or not isinstance(part.get("class_path"), str):
        raise TranscoderError(f"{folder}/config.yaml has {part!r} where a class is named; expected its class_path.")
    return part["class_path"].rpartition(".")[2]


def _model_of(file: TensorFile) -> TensorFile:
    """The tensors of the model by their own names; a Lightning checkpoint also holds what only training needs."""
    if not any(name.startswith("model.") for name in file.tensors):
        return file
    own = {name: tensor for name, tensor in file.tensors.items() if name.startswith("model.")}
    return TensorFile(file.path, {name.removeprefix("model."): tensor for name, tensor in own.items()})
