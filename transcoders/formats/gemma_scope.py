"""Gemma Scope: the first as layer_{i}/…/params.npz, the second as params.safetensors and params_layer_{i}.safetensors.

Encoders are stored (d_model, feature) and gate relu(z) · 1[z > θ]. The second's cross-layer decoders are
(feature, target layer, d_model) with targets counted from layer 0, those below the feature's own left at zero.
"""

import re
from collections import defaultdict
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from transcoders.config import TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.formats.checks import in_every_layer
from transcoders.settings import read_settings
from transcoders.stored import Encoder, Stored, TensorFile, expand, map_tensors, per_layer

FOLDED = ("encoders transposed",)
NAMES = ("b_enc", "b_dec", "threshold", "affine_skip_connection")
"""Tensors that are named alike in both, besides encoder and decoder."""
HOOKS = {".npz": "ln2.hook_normalized", ".safetensors": "mlp.hook_in"}
"""What the first reads (the norm before its gain) and the second (the MLP's own input); both write hook_mlp_out."""
IN, OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
BACKWARD = 1e-6
"""Decoders to earlier layers are zero; the largest value that still counts as such."""


def is_one(folder: Path) -> bool:
    """Whether there are params.npz, params.safetensors or params_layer_0.safetensors where Gemma Scope has them."""
    return bool(_cross_layer_files(folder) or _layer_files(folder))


def read(folder: Path) -> Stored:
    """A whole transcoder: a folder of cross-layer files, or one per-layer file for every layer."""
    files = _cross_layer_files(folder)
    if files:
        return read_cross_layer(files)
    by_layer = _layer_files(folder)
    for layer, paths in by_layer.items():
        if len(paths) > 1:
            names = ", ".join(str(path.parent) for path in paths[:3])
            raise TranscoderError(
                f"layer {layer} has {len(paths)} transcoders ({names} …); name one of each layer by a pattern, as in "
                f"'{folder}/layer_*_width_16k_l0_small', or list them under transcoders: in a config.yaml."
            )
    if sorted(by_layer) != list(range(len(by_layer))):
        raise TranscoderError(
            f"{folder} holds layers {', '.join(map(str, sorted(by_layer)))}; expected every layer from 0 on."
        )
    paths = [by_layer[layer][0] for layer in range(len(by_layer))]
    model_name = _model_name(paths)
    layers = [layer_weights(map_tensors(path)) for path in paths]
    n_features, d_model = layers[0][0].W_enc.shape
    config = TranscoderConfig(
        len(layers), d_model, n_features, "jumprelu", reads=HOOKS[paths[0].suffix], model_name=model_name,
        cross_layer=False, skip=layers[0][0].W_skip is not None,
    )  # fmt: skip
    return per_layer("Gemma Scope, per-layer", config, layers, paths, FOLDED)


def read_cross_layer(
    paths: list[Path], reads: str = "mlp.hook_in", writes: str = "hook_mlp_out", model_name: str | None = None
) -> Stored:
    """A cross-layer transcoder from its files, one per layer, in order."""
    files = [map_tensors(path) for path in paths]
    n_layers = len(files)
    for file in files:
        file.refuse_others(["w_enc", "w_dec", *NAMES])
    has_skip = in_every_layer(files, ["affine_skip_connection"] * n_layers)
    d_model, n_features = files[0].take("w_enc", -1, -1).shape
    config = TranscoderConfig(
        n_layers, d_model, n_features, "jumprelu", reads=reads, writes=writes,
        model_name=_model_name(paths) if model_name is None else model_name, skip=has_skip,
    )  # fmt: skip
    decoders = [file.take("w_dec", n_features, n_layers, d_model) for file in files]
    encoders = [_encoder(file, "w_enc", d_model, n_features, config.skip) for file in files]

    def decoder(layer: int, rows: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        written = decoders[layer][rows]
        if bool((written[:, :layer].abs() > BACKWARD).any()):
            raise TranscoderError(f"w_dec in {paths[layer]} writes to layers before {layer}; it is not causal.")
        return written[:, layer:]

    return Stored("Gemma Scope, cross-layer", config, decoders[0].dtype, encoders.__getitem__, decoder, FOLDED)


def is_layer(file: TensorFile) -> bool:
    """Whether a file is a per-layer transcoder of Gemma Scope."""
    return file.path.suffix == ".npz" or "w_enc" in file


def layer_weights(file: TensorFile) -> tuple[Encoder, Float[Tensor, "feature d_model"]]:
    """A per-layer transcoder."""
    encoder, decoder = ("W_enc", "W_dec") if file.path.suffix == ".npz" else ("w_enc", "w_dec")
    file.refuse_others([encoder, decoder, *NAMES])
    d_model, n_features = file.take(encoder, -1, -1).shape
    weights = _encoder(file, encoder, d_model, n_features, "affine_skip_connection" in file)
    return weights, file.take(decoder, n_features, d_model)


def _encoder(file: TensorFile, name: str, d_model: int, n_features: int, skip: bool) -> Encoder:
    return Encoder(
        file.take(name, d_model, n_features).T, file.take("b_enc", n_features), file.take("b_dec", d_model),
        file.take("threshold", n_features).clamp(min=0),  # relu(z) is 0 below 0, whatever the threshold
        file.take("affine_skip_connection", d_model, d_model) if skip else None,
    )  # fmt: skip


def _cross_layer_files(folder: Path) -> list[Path]:
    n_layers = len(list(folder.glob("params_layer_*.safetensors"))) if folder.is_dir() else 0
    return [folder / f"params_layer_{layer}.safetensors" for layer in range(n_layers)]


def _layer_files(folder: Path) -> dict[int, list[Path]]:
    """Per-layer files by layer; `folder` may be a pattern that chooses one of several transcoders of a layer."""
    base, entries = expand(folder if "*" in str(folder) else folder / "layer_*")
    found: dict[int, list[Path]] = defaultdict(list)
    for entry in entries:
        layer = re.search(r"layer_(\d+)", str(entry.relative_to(base)))
        if layer:
            found[int(layer[1])] += sorted(entry.rglob("params.npz")) + sorted(entry.rglob("params.safetensors"))
    return {layer: paths for layer, paths in found.items() if paths}


def _model_name(paths: list[Path]) -> str:
    """The model named beside the files, after a look whether they are transcoders at all."""
    name = ""
    for path in paths:
        meta = read_settings(path.parent / "config.json")
        read, written = meta.get("hf_hook_point_in", IN), meta.get("hf_hook_point_out", OUT)
        if not (str(read).endswith(IN) and str(written).endswith(OUT)):
            raise TranscoderError(
                f"{meta.path} reads {read} and writes {written}; expected a transcoder of {IN} to {OUT}."
            )
        kind = str(meta.get("architecture", "jump_relu"))
        if kind.lower() not in ("jump_relu", "jumprelu"):
            raise TranscoderError(f"architecture in {meta.path} is {kind}; expected jump_relu, as Gemma Scope has it.")
        name = meta.get("model_name", name)
    return name
