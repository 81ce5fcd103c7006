"""Stream what MLPs read and write out of any model of a known family."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from transcoders.families import Layer, dissect
from transcoders.model import CrossLayerTranscoder

RESIDUAL = "hook_resid_mid"
"""The residual stream before the MLP's norm; every other hook to read is the MLP's own input."""
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
    inputs = torch.stack([seen[f"read {i}"][0][keep] for i in range(len(layers))])
    outputs = torch.stack([seen[f"write {i}"][1][keep] for i in range(len(layers))])
    return inputs, outputs


def read_site(layer: Layer, reads: str) -> nn.Module:
    """The module whose input a transcoder reads at the hook `reads`."""
    return layer.mlp if reads != RESIDUAL or layer.mlp_norm is None else layer.mlp_norm


def write_site(layer: Layer, writes: str) -> nn.Module:
    """The module whose output a transcoder stands in for at the hook `writes`."""
    return layer.mlp if writes == BEFORE_POST_NORM or layer.mlp_post_norm is None else layer.mlp_post_norm


@contextmanager
def replaced_mlps(model: PreTrainedModel, transcoder: CrossLayerTranscoder) -> Iterator[None]:
    """Inside the block the model's MLPs are replaced by the transcoder: attention live, no error terms.

    Position 0 keeps the model's own MLP outputs: it holds the attention sink, and features never live there.
    """
    layers = dissect(model).layers
    config = transcoder.config
    inputs: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}

    def remember(layer: int):
        def record(module: nn.Module, arguments: tuple) -> None:
            inputs[layer] = arguments[0]

        return record

    def replace(layer: int):
        def replacement(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
            original = output[0] if isinstance(output, tuple) else output
            activations[layer] = transcoder.encode_layer(layer, inputs[layer])
            total = transcoder.b_dec[layer].expand_as(original).clone()
            if transcoder.W_skip is not None:
                total = total + inputs[layer] @ transcoder.W_skip[layer]
            for source in config.sources(layer):
                total = total + activations[source] @ transcoder.W_dec[source][:, layer - source]
            total = torch.cat([original[:, :1], total[:, 1:]], dim=1)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        return replacement

    handles = [
        read_site(layer, config.reads).register_forward_pre_hook(remember(i)) for i, layer in enumerate(layers)
    ]
    handles += [write_site(layer, config.writes).register_forward_hook(replace(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
