"""Stream what MLPs read and write out of any model of a known family."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from transcoders.families import dissect
from transcoders.model import CrossLayerTranscoder


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the input and the output of each named module during the forward passes inside the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def record(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            seen[name] = (arguments[0], output)

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
) -> tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]:
    """What every MLP reads (at the hook `reads`) and writes at the kept tokens of right-padded sequences."""
    layers = dissect(model).layers
    modules = {f"norm {i}": layer.mlp_norm for i, layer in enumerate(layers)}
    modules |= {f"mlp {i}": layer.mlp for i, layer in enumerate(layers)}
    with recording(modules) as seen:
        model.base_model(tokens)
    side = 0 if reads == "hook_resid_mid" else 1
    inputs = torch.stack([seen[f"norm {i}"][side][keep] for i in range(len(layers))])
    outputs = torch.stack([seen[f"mlp {i}"][1][keep] for i in range(len(layers))])
    return inputs, outputs


@contextmanager
def replaced_mlps(model: PreTrainedModel, transcoder: CrossLayerTranscoder) -> Iterator[None]:
    """Inside the block the model's MLPs are replaced by the transcoder: attention live, no error terms.

    Position 0 keeps the model's own MLP outputs: it holds the attention sink, and features never live there.
    """
    layers = dissect(model).layers
    activations: dict[int, Tensor] = {}
    residual_mid: dict[int, Tensor] = {}

    def remember(layer: int):
        def record(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            residual_mid[layer] = arguments[0] if transcoder.config.reads == "hook_resid_mid" else output

        return record

    def replace(layer: int):
        def output(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            activations[layer] = transcoder.encode_layer(layer, residual_mid[layer])
            total = transcoder.b_dec[layer].expand_as(output).clone()
            for source in range(layer + 1):
                total = total + activations[source] @ transcoder.W_dec[source][:, layer - source]
            return torch.cat([output[:, :1], total[:, 1:]], dim=1)

        return output

    handles = [part.mlp_norm.register_forward_hook(remember(i)) for i, part in enumerate(layers)]
    handles += [part.mlp.register_forward_hook(replace(i)) for i, part in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
