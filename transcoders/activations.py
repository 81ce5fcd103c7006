"""Stream what MLPs read and write out of any model of a known family."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from transcoders.errors import TranscoderError
from transcoders.families import Layer, dissect, epsilon
from transcoders.model import CrossLayerTranscoder

RESIDUAL = "hook_resid_mid"
"""The residual stream before the MLP's norm."""
BEFORE_GAIN = "ln2.hook_normalized"
"""The output of an RMSNorm but for its gain; of a LayerNorm all of it. Otherwise the MLP's own input is read."""
BEFORE_POST_NORM = "mlp.hook_out"
"""The MLP's own output; the other hook to write, hook_mlp_out, is what is added to the residual stream."""


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the input and the output of each named module during the forward passes inside the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def record(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
            seen[name] = (arguments[0], output[0] if isinstance(output, tuple) else output)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mlp_activations(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch position"],
    keep: Bool[Tensor, "batch position"],
    reads: str,
    writes: str = "hook_mlp_out",
) -> tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]:
    """What every MLP reads and writes, at the named hooks, at the kept tokens of right-padded sequences."""
    layers = dissect(model).layers
    sites = {f"read {i}": read_site(layer, reads) for i, layer in enumerate(layers)}
    sites |= {f"write {i}": write_site(layer, writes) for i, layer in enumerate(layers)}
    with recording(sites) as seen:
        model.base_model(tokens)
    inputs = torch.stack([as_read(layer, reads, seen[f"read {i}"][0][keep]) for i, layer in enumerate(layers)])
    outputs = torch.stack([seen[f"write {i}"][1][keep] for i in range(len(layers))])
    return inputs, outputs


def read_site(layer: Layer, reads: str) -> nn.Module:
    """The module at whose input a transcoder reads, or computes what it reads (see `as_read`)."""
    if reads == BEFORE_GAIN and layer.mlp_norm is None:
        raise TranscoderError(
            f"the transcoder reads {BEFORE_GAIN}, but this model has no norm before its MLPs; it is of another model."
        )
    before_norm = reads == RESIDUAL or reads_before_gain(layer, reads)
    return layer.mlp_norm if before_norm and layer.mlp_norm is not None else layer.mlp


def reads_before_gain(layer: Layer, reads: str) -> bool:
    """Whether a transcoder reads a norm without its gain: no module gives that."""
    return reads == BEFORE_GAIN and not isinstance(layer.mlp_norm, nn.LayerNorm)


def as_read(layer: Layer, reads: str, x: Float[Tensor, "*position d_model"]) -> Float[Tensor, "*position d_model"]:
    """What a transcoder reads at the hook `reads`, from the input of the read site."""
    if not reads_before_gain(layer, reads):
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as the norms of all families do
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon(layer.mlp_norm)).rsqrt()).to(x.dtype)


def write_site(layer: Layer, writes: str) -> nn.Module:
    """The module whose output a transcoder stands in for at the hook `writes`."""
    return layer.mlp if writes == BEFORE_POST_NORM or layer.mlp_post_norm is None else layer.mlp_post_norm


@contextmanager
def replaced_mlps(
    model: PreTrainedModel, transcoder: CrossLayerTranscoder, *, layers: Collection[int] | None = None
) -> Iterator[None]:
    """Inside the block the MLPs of these layers, or all, are replaced by the transcoder: attention live, no errors.

    What stands in for an MLP is written by features of its own and all earlier layers, replaced or not. Position 0
    keeps the model's own MLP outputs: it holds the attention sink, and features never live there.
    """
    parts = dissect(model).layers
    config = transcoder.config
    replaced = range(config.n_layers) if layers is None else layers
    sources = sorted({source for layer in replaced for source in config.sources(layer)})
    inputs: dict[int, Tensor] = {}
    writes: dict[int, tuple[Tensor, ...]] = {}

    def remember(layer: int):
        def record(module: nn.Module, arguments: tuple) -> None:
            inputs[layer] = as_read(parts[layer], config.reads, arguments[0])

        return record

    def replace(layer: int):
        def replacement(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            writes[layer] = transcoder.writes(layer, transcoder.encode_layer(layer, inputs[layer]))
            if layer not in replaced:
                return None
            original = output[0] if isinstance(output, tuple) else output
            total = transcoder.b_dec[layer].expand_as(original).clone()
            if transcoder.W_skip is not None:
                total = total + inputs[layer] @ transcoder.W_skip[layer]
            for source in config.sources(layer):
                total = total + writes[source][layer - source]
            total = torch.cat([original[:, :1], total[:, 1:]], dim=1)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        return replacement

    handles = [read_site(parts[i], config.reads).register_forward_pre_hook(remember(i)) for i in sources]
    handles += [write_site(parts[i], config.writes).register_forward_hook(replace(i)) for i in sources]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
