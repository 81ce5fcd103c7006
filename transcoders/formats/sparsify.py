"""EleutherAI's sparsify and clt-training: per layer a folder (layers.{i}.mlp, h.{i}.mlp) of cfg.json, sae.safetensors.

sparsify trains per-layer transcoders. In clt-training a layer also writes to the layers above: with decoders stored at
the source layer (one per target, or one for all) or at the target layer (one per source, stacked, or one for all).
Inputs and outputs may be scaled: x̂ = x √d / in_norm; y = (…) out_norm / √d. Active features may be given an offset and
a scale for each target.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats.checks import usable, whole_number
from transcoders.settings import Settings, read_settings
from transcoders.stored import Encoder, Stored, TensorFile, map_tensors

FOLDER = re.compile(r"(?:.*\.)?(?:h|layers)\.(\d+)\.mlp")
BEFORE_NORM = ("post_attention_layernorm", "pre_feedforward_layernorm", "ln_2")
"""Modules whose input is the residual stream before the MLP: a run may read there rather than at the MLP."""
KNOWN = re.compile(r"encoder\.(weight|bias)|(W_dec|b_dec|W_skip|post_enc|post_enc_scale)(s\.\d+)?|(in|out)_norm")
SETTINGS = {
    "W_skip": "skip_connection", "post_enc_scale": "post_encoder_scale",
    "in_norm": "normalize_io", "out_norm": "normalize_io",
}  # fmt: skip
"""The setting with which each tensor is saved, and only with it."""
REFUSED = {
    "topk_coalesced": "keeps the largest activations of all layers together",
    "secondary_target_tied": "leaves other layers' scales out",
}


def is_one(folder: Path) -> bool:
    """Whether there is a folder of an MLP with a sparse coder in it."""
    return bool(_layer_folders(folder))


def read(folder: Path) -> Stored:
    """A per-layer or cross-layer transcoder."""
    folders = _layer_folders(folder)
    if sorted(folders) != list(range(len(folders))):
        raise TranscoderError(f"{folder} holds layers {sorted(folders)}; expected every layer from 0 on.")
    layers = [_Layer.open(folders[layer]) for layer in range(len(folders))]
    n_features, d_model = layers[0].file.take("encoder.weight", -1, -1).shape
    meta, variant = layers[0].meta, layers[0].variant
    for layer in layers:
        _refuse_what_cannot_be_exact(layer, layers[0])
        _refuse_offsets(layer)
    _refuse_other_shapes(layers)
    is_jump = meta.get("activation") == "jumprelu"
    config = TranscoderConfig(
        len(layers), d_model, n_features, "jumprelu" if is_jump else "topk", 0 if is_jump else whole_number(meta, "k"),
        _reads(folder), "mlp.hook_out", cross_layer=layers[0].n_targets > 1, skip=bool(meta.get("skip_connection")),
    )  # fmt: skip
    weights = _Weights(layers, config, variant)
    weights.check_skips()
    folded = ("skip connections transposed",) if config.skip else ()
    if meta.get("normalize_io"):
        folded += ("input and output norms folded",)
    if config.cross_layer:
        folded += ("biases of layer pairs summed", f"{variant} decoders written out per pair of layers")
    layout = "clt-training" if config.cross_layer else "sparsify"
    dtype = layers[0].file.tensors["encoder.weight"].dtype
    return Stored(layout, config, dtype, weights.encoder, weights.decoder, folded)


@dataclass(frozen=True)
class _Layer:
    """The folder of one layer."""

    meta: Settings
    file: TensorFile

    @classmethod
    def open(cls, folder: Path) -> "_Layer":
        file = map_tensors(folder / "sae.safetensors")
        file.refuse_others([name for name in file.tensors if KNOWN.fullmatch(name)])
        layer = cls(read_settings(folder / "cfg.json"), file)
        for name in file.tensors:
            layer.refuse_unused(name)
        return layer

    def refuse_unused(self, name: str) -> None:
        """Refuse a tensor that the settings do not speak of: it would be left out."""
        stem, _, number = name.partition("s.")
        setting = SETTINGS.get(stem)
        if setting and not self.meta.get(setting):
            raise TranscoderError(
                f"{self.file.path} holds {name}, but cfg.json beside it does not say {setting}: true; copy both again."
            )
        if number and int(number) >= self.n_targets:
            raise TranscoderError(
                f"{self.file.path} holds {name}, but cfg.json beside it says n_targets: {self.n_targets}; copy both "
                "again."
            )

    @property
    def n_targets(self) -> int:
        """How many layers it writes to, its own included."""
        return max(1, whole_number(self.meta, "n_targets", 0))

    @property
    def variant(self) -> str:
        coalesce = self.meta.get("coalesce_topk", "none")
        return coalesce if coalesce != "none" else "source-tied" if self.meta.get("per_source_tied") else "untied"

    def norm(self, side: str) -> float:
        """The scale of one side: √d where the run had none."""
        d_model = self.file.tensors["encoder.weight"].shape[1]
        if not self.meta.get("normalize_io"):
            return d_model**0.5
        return float(usable(self.file.take(f"{side}_norm", 1), f"{side}_norm", self.file.path))

    def at(self, name: str, offset: int, *shape: int) -> Tensor:
        """A tensor that may be stored once, or once for each target."""
        numbered = f"{name}s.{offset}"
        return self.file.take(numbered if numbered in self.file or offset else name, *shape)

    def offset(self, target: int, n_features: int) -> Float[Tensor, " feature"]:
        """Added to active features on their way to a target; nothing where it was never trained."""
        stored = f"post_encs.{target}" in self.file or "post_enc" in self.file
        return self.at("post_enc", target, n_features).float() if stored else torch.zeros(n_features)


@dataclass(frozen=True)
class _Weights:
    layers: Sequence[_Layer]
    config: TranscoderConfig
    variant: str

    def encoder(self, layer: int) -> Encoder:
        here, n_features, d_model = self.layers[layer], self.config.n_features, self.config.d_model
        to_unit = d_model**0.5 / here.norm("in")
        W_enc = here.file.take("encoder.weight", n_features, d_model).float() * to_unit
        b_enc = here.file.take("encoder.bias", n_features).float()
        offset = here.offset(0, n_features)
        threshold = None
        if self.config.activation == "jumprelu":
            b_enc, threshold = b_enc + offset, offset
        W_skip = None
        if self.config.skip:
            W_skip = here.at("W_skip", 0, d_model, d_model).T.float() * (to_unit * self._from_unit(layer))
        return Encoder(W_enc, b_enc, self._bias(layer) * self._from_unit(layer), threshold, W_skip)

    def decoder(self, layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        return torch.stack([self._pair(layer, layer + k, rows) for k in range(self.config.reach(layer))], dim=1)

    def check_skips(self) -> None:
        """A skip connection to a later layer has no place in a transcoder of ours."""
        d_model = self.config.d_model
        for layer in self.layers:
            for name in layer.file.tensors:
                late = re.fullmatch(r"W_skips\.[1-9]\d*", name)
                if late and bool(layer.file.take(name, d_model, d_model).any()):
                    raise TranscoderError(
                        f"{layer.file.path} has skip connections to later layers ({name}), which cannot be traced; "
                        "use a run with skip_connection false, or with coalesce_topk."
                    )

    def _pair(self, source: int, target: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Decoder rows from one layer to another."""
        n_features, d_model = self.config.n_features, self.config.d_model
        offset, here = target - source, self.layers[source]
        if offset >= here.n_targets:
            return torch.zeros(len(rows), d_model)
        match self.variant:
            case "per-layer":
                stacked = self.layers[target].file.take("W_dec", (target + 1) * n_features, d_model)
                written = stacked[source * n_features + rows]
            case "concat":
                written = self.layers[target].file.take("W_dec", n_features, d_model)[rows]
            case "source-tied":
                written = here.file.take("W_dec", n_features, d_model)[rows]
            case _:
                written = here.at("W_dec", offset, n_features, d_model)[rows]
        written = written.float() * (self._from_unit(target) / self._share(offset, target))
        if here.meta.get("post_encoder_scale"):
            written = written * here.at("post_enc_scale", offset, n_features)[rows, None].float()
        return written

    def _bias(self, target: int) -> Float[Tensor, " d_model"]:
        d_model = self.config.d_model
        if self.variant in ("per-layer", "concat"):
            return self.layers[target].file.take("b_dec", d_model).float()
        total = torch.zeros(d_model)
        for source in self.config.sources(target):
            if target - source < self.layers[source].n_targets:
                bias = self.layers[source].at("b_dec", target - source, d_model).float()
                total += bias / self._share(target - source, target)
        return total

    def _share(self, offset: int, target: int) -> int:
        """What is written from below is divided by the number of layers below, if the run says so."""
        divided = self.layers[target].meta.get("divide_cross_layer") and self.variant in ("untied", "source-tied")
        return max(1, target) if divided and offset else 1

    def _from_unit(self, layer: int) -> float:
        return self.layers[layer].norm("out") / self.config.d_model**0.5


def _refuse_what_cannot_be_exact(layer: _Layer, first: _Layer) -> None:
    meta, where = layer.meta, layer.file.path.parent
    for flag, what in REFUSED.items():
        if meta.get(flag):
            raise TranscoderError(f"{where} was trained with {flag}, which {what}; such a transcoder cannot be read.")
    activation = meta.get("activation", "topk")
    if activation not in ("topk", "jumprelu") or layer.variant == "group":
        what = activation if layer.variant != "group" else "coalesce_topk group"
        raise TranscoderError(f"{where} uses {what}, which has no equal here; expected activation topk.")
    if not meta.get("transcode", False):
        raise TranscoderError(f"{where} is a sparse autoencoder, which encodes MLP outputs; expected transcode: true.")
    if (activation, layer.variant, meta.need("k")) != (
        first.meta.get("activation", "topk"),
        first.variant,
        first.meta.need("k"),
    ):
        raise TranscoderError(
            f"{where} has another activation, k or kind of decoder than layer 0; expected one of all."
        )


def _refuse_other_shapes(layers: Sequence[_Layer]) -> None:
    """Refuse layers that do not fit together: what only some of them have would be left out."""
    first = layers[0]
    for number, layer in enumerate(layers):
        where = layer.file.path.parent
        if bool(layer.meta.get("skip_connection")) != bool(first.meta.get("skip_connection")):
            raise TranscoderError(f"{where} and layer 0 differ in skip_connection; expected it of all layers or none.")
        if layer.n_targets > (len(layers) - number if first.n_targets > 1 else 1):
            raise TranscoderError(
                f"{where} writes to {layer.n_targets} layers, more than there are above it, or more than layer 0 does; "
                "copy the missing layers."
            )


def _refuse_offsets(layer: _Layer) -> None:
    """Refuse what is added to active features, unless it makes a threshold."""
    where, activation = layer.file.path.parent, layer.meta.get("activation", "topk")
    n_features = layer.file.take("encoder.weight", -1, -1).shape[0]
    offsets = [layer.offset(target, n_features) for target in range(layer.n_targets)]
    if any(bool(offset.isnan().any()) for offset in offsets):
        raise TranscoderError(f"post_enc in {layer.file.path} holds NaN; copy or download the transcoder again.")
    if activation == "topk" and any(bool(offset.any()) for offset in offsets):
        raise TranscoderError(
            f"{where} adds post_enc to active features, which is exact only where fewer than k features are active; "
            'if k is such a cap, write "activation": "jumprelu" into every cfg.json.'
        )
    if activation == "jumprelu" and any(bool((p != offsets[0]).any() or (p < 0).any()) for p in offsets):
        raise TranscoderError(
            f"{where} has a negative post_enc, or another one for each target; a JumpReLU has one threshold ≥ 0."
        )


def _reads(folder: Path) -> str:
    """The MLP's own input, unless the run's config.json names the norm before it."""
    run = read_settings(folder / "config.json")
    hooks = run.get("hookpoints_in")
    if not hooks or all(hook.endswith(".mlp") for hook in hooks):
        return "mlp.hook_in"
    if all(hook.endswith(BEFORE_NORM) for hook in hooks):
        return "hook_resid_mid"
    raise TranscoderError(f"{run.path} reads {', '.join(hooks[:3])} …; expected the MLPs or the norms before them.")


def _layer_folders(folder: Path) -> dict[int, Path]:
    paths = folder.glob("*.mlp") if folder.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := FOLDER.fullmatch(path.name))}
    return {layer: path for layer, path in found.items() if (path / "cfg.json").is_file()}
