"""CLT-Forge: clt_weights.safetensors, or rank{r}_clt_weights.safetensors with the features split, and clt_cfg.json.

Decoders are stored by pairs of layers, source by source: (0, 0), (0, 1) … (0, L − 1), (1, 1) …, each pair with a bias
of its own. Inputs and outputs are scaled, one number per layer: z = c_in x W_enc + b_enc; y = (Σ a W_dec + Σ b_dec) /
c_out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats.checks import usable, whole_number
from transcoders.settings import read_settings
from transcoders.stored import Encoder, Stored, TensorFile, feature_rows, map_tensors

READS = "ln2.hook_normalized"
"""CLT-Forge writes down no hooks: it always trains on this one and hook_mlp_out."""
KNOWN = (
    "W_enc", "b_enc", "W_dec", "b_dec", "log_threshold", "W_dec_base", "lora_A", "lora_B",
    "estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out",
    "feature_count", "layer_mask", "l_idx", "k_idx",
)  # fmt: skip
LOW_RANK = ("W_dec_base", "lora_A", "lora_B")
FOLDED = ("input and output scales folded", "biases of layer pairs summed", "encoders transposed")


def is_one(folder: Path) -> bool:
    """Whether clt_cfg.json is there."""
    return (folder / "clt_cfg.json").is_file()


def read(folder: Path) -> Stored:
    """A cross-layer or per-layer transcoder, whole or in shards."""
    meta = read_settings(folder / "clt_cfg.json")
    shards = _shards(folder)
    n_layers, d_model = whole_number(meta, "n_layers"), whole_number(meta, "d_in")
    forge = _Weights(shards, n_layers, d_model, bool(meta.get("cross_layer_decoders", True)))
    n_features = sum(len(part) for part in forge.encoders(0))
    if n_features != meta.need("d_latent"):
        raise TranscoderError(
            f"{folder} holds {n_features} features a layer of {meta.need('d_latent')}: shards are missing, or "
            "overwrote each other when they were saved; copy or save all of them again."
        )
    activation = meta.get("activation_fn", "jumprelu")
    if activation not in ("jumprelu", "topk"):
        raise TranscoderError(f"{folder} uses {activation}, which has no equal here; expected jumprelu or topk.")
    k = whole_number(meta, "k") if activation == "topk" else 0
    config = TranscoderConfig(
        forge.n_layers, forge.d_model, n_features, activation, k, READS, "hook_mlp_out",
        meta.get("model_name") or "", forge.cross_layer,
    )  # fmt: skip
    layout = "CLT-Forge" if len(shards) == 1 else f"CLT-Forge, {len(shards)} shards"
    lora = ("low-rank decoders multiplied out",) if forge.is_lora else ()
    dtype = shards[0].tensors["W_enc"].dtype

    def encoder(layer: int) -> Encoder:
        return _encoder(forge, layer, config)

    def decoder(layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        written = [forge.pair(layer, target, rows) for target in range(layer, layer + config.reach(layer))]
        return torch.stack(written, dim=1) / forge.scale("out")[layer : layer + config.reach(layer), None]

    return Stored(layout, config, dtype, encoder, decoder, FOLDED + lora)


@dataclass(frozen=True)
class _Weights:
    """The tensors of all shards."""

    shards: list[TensorFile]
    n_layers: int
    d_model: int
    cross_layer: bool

    @property
    def n_pairs(self) -> int:
        return self.n_layers * (self.n_layers + 1) // 2 if self.cross_layer else self.n_layers

    @property
    def is_lora(self) -> bool:
        return "W_dec" not in self.shards[0]

    def encoders(self, layer: int) -> list[Float[Tensor, "_ d_model"]]:
        return [shard.take("W_enc", self.n_layers, self.d_model, -1)[layer].T for shard in self.shards]

    def per_feature(self, name: str, layer: int) -> Float[Tensor, " feature"]:
        return torch.cat([shard.take(name, self.n_layers, -1)[layer] for shard in self.shards]).float()

    def bias(self) -> Float[Tensor, "pair d_model"]:
        return self.shards[0].take("b_dec", self.n_pairs, self.d_model).float()

    def scale(self, side: str) -> Float[Tensor, " layer"]:
        name = f"estimated_norm_scaling_factor_{side}"
        return usable(self.shards[0].take(name, self.n_layers).float(), name, self.shards[0].path)

    def number(self, source: int, target: int) -> int:
        """Of a pair of layers, in the order of the files."""
        if not self.cross_layer:
            return source
        return source * self.n_layers - source * (source - 1) // 2 + target - source

    def pair(self, source: int, target: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Decoder rows from one layer to another."""
        if not self.is_lora:
            pair, shape = self.number(source, target), (self.n_pairs, -1, self.d_model)
            return feature_rows([shard.take("W_dec", *shape)[pair] for shard in self.shards], rows).float()
        [file] = self.shards
        base = file.take("W_dec_base", self.n_layers, -1, self.d_model)[source][rows].float()
        if source == target:
            return base
        n_off_diagonal = self.n_pairs - self.n_layers
        pair = self.number(source, target) - source - 1  # the pairs of a layer with itself are not among these
        left = file.take("lora_A", n_off_diagonal, -1, -1)[pair][rows].float()
        return base + left @ file.take("lora_B", n_off_diagonal, -1, self.d_model)[pair].float()


def _encoder(forge: _Weights, layer: int, config: TranscoderConfig) -> Encoder:
    W_enc = torch.cat(forge.encoders(layer)).float() * forge.scale("in")[layer]
    threshold = forge.per_feature("log_threshold", layer).exp() if config.activation == "jumprelu" else None
    biases = [forge.bias()[forge.number(source, layer)] for source in config.sources(layer)]
    b_dec = torch.stack(biases).sum(0) / forge.scale("out")[layer]
    return Encoder(W_enc, forge.per_feature("b_enc", layer), b_dec, threshold)


def _shards(folder: Path) -> list[TensorFile]:
    """The weights file, or its shards in order of their rank."""
    ranks = {
        int(match[1]): path
        for path in folder.glob("rank*_clt_weights.safetensors")
        if (match := re.match(r"rank(\d+)_", path.name))
    }
    if sorted(ranks) != list(range(len(ranks))):
        raise TranscoderError(f"{folder} holds shards {sorted(ranks)}; expected all from 0 on, copy the missing ones.")
    files = [map_tensors(path) for _, path in sorted(ranks.items())] or [
        map_tensors(folder / "clt_weights.safetensors")
    ]
    for file in files:
        file.refuse_others([*KNOWN, *(name for name in file.tensors if name.startswith("model."))])
        if "W_dec" in file and any(name in file for name in LOW_RANK):
            raise TranscoderError(f"{file.path} holds decoders both whole (W_dec) and low-rank; expected one kind.")
    if len(files) > 1 and any("W_dec_base" in file for file in files):
        raise TranscoderError(f"{folder} holds low-rank decoders in shards, which cannot be joined; save them as one.")
    return files
