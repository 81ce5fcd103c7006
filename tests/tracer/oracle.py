"""Direct effects by autograd through the real model: nothing of `tracer.linear` and `tracer.sweep` is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tracer.local import ActiveFeatures, LocalReplacementModel
from tracer.precision import computing_in
from tracer.replacement import ReplacementModel
from tracer.rows import Rows
from tracer.sources import Sources
from tracer.targets import Targets
from transcoders import CrossLayerTranscoder
from transcoders.activations import read_site, write_site
from transcoders.families import dissect


def jacobian(replacement: ReplacementModel, local: LocalReplacementModel, targets: Targets) -> tuple[Tensor, Tensor]:
    """Pre-activations of all active features, then the targets without their bias, and the derivatives of all.

    Sources are scaled by a strength of 1: columns are active features | errors (layer-major) | tokens.
    """
    n_sources = len(local.features.layer) + (local.n_layers + 1) * local.n_positions
    strength = torch.ones(n_sources, dtype=local.error.dtype, requires_grad=True)
    # computing_in, because a mixture of experts does not run in float64 by itself
    with computing_in(replacement.model, strength.dtype), _frozen(replacement, local, strength) as seen:
        replacement.model(torch.tensor([local.prompt.token_ids]), use_cache=False)
        features, transcoder = local.features, replacement.transcoder
        values = [
            seen[f"read {layer}"][position] @ transcoder.W_enc[layer][feature] + transcoder.b_enc[layer][feature]
            for layer, position, feature in zip(features.layer, features.position, features.feature, strict=True)
        ]
        for k, (layer, position) in enumerate(zip(targets.layers, targets.positions, strict=True)):
            is_output = layer == local.n_layers
            vector = targets.direction[k] if is_output else transcoder.W_enc[layer][targets.features[k]]
            values.append(seen["final" if is_output else f"read {layer}"][position] @ vector)
        each = torch.eye(len(values), dtype=strength.dtype)
        [rows] = torch.autograd.grad(torch.stack(values), strength, each, is_grads_batched=True, create_graph=True)
        curvature = (rows * rows.detach()).sum()
        if curvature.requires_grad:
            second = torch.autograd.grad(curvature, strength, allow_unused=True)[0]
            assert second is None or second.abs().max() == 0, "something non-linear was left unfrozen"
    return torch.stack(values).detach(), rows.detach()


def dense(rows: Rows, sources: Sources) -> Tensor:
    """Rows in the columns of `jacobian`."""
    n_layers, n_positions = sources.local.n_layers, sources.local.n_positions
    column = torch.empty(sources.n_sources, dtype=torch.int64)
    column[:n_positions] = sources.n_active + n_layers * n_positions + torch.arange(n_positions)
    is_error = torch.ones(sources.n_sources, dtype=torch.bool)
    is_error[:n_positions] = is_error[sources.number] = False
    column[sources.number] = torch.arange(sources.n_active)
    column[is_error] = (sources.n_active + sources.layer * n_positions + sources.position)[is_error]
    result = rows.effect.new_zeros(len(rows.target), sources.n_active + (n_layers + 1) * n_positions)
    row = torch.repeat_interleave(torch.arange(len(rows.target)), rows.start.diff())
    result[row, column[rows.source.long()]] = rows.effect
    return result


@contextmanager
def _frozen(replacement: ReplacementModel, local: LocalReplacementModel, strength: Tensor) -> Iterator[dict[str, Any]]:
    """The real model with norm denominators and attention patterns detached and MLP outputs made of scaled sources."""
    model, anatomy, n_active = replacement.model, dissect(replacement.model), len(local.features.layer)
    seen: dict[str, Any] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            handles.append(module.register_forward_hook(_detached_norm(anatomy.gain_offset)))
    tokens = strength[n_active + local.n_layers * local.n_positions :]
    handles.append(anatomy.embedding.register_forward_hook(lambda m, a, out: out * tokens[None, :, None]))
    handles += _replaced_mlps(replacement, local, strength, seen)

    def final(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen["final"] = output[0]

    handles.append(anatomy.final_norm.register_forward_hook(final))
    AttentionInterface.register("detached", _detached_attention)
    patterns = model(torch.tensor([local.prompt.token_ids]), output_attentions=True, use_cache=False).attentions
    for parts, pattern in zip(anatomy.layers, patterns, strict=True):
        parts.attention.frozen_pattern = pattern.detach()
    model.set_attn_implementation("detached")
    try:
        yield seen
    finally:
        model.set_attn_implementation("eager")
        for handle in handles:
            handle.remove()


def _replaced_mlps(
    replacement: ReplacementModel, local: LocalReplacementModel, strength: Tensor, seen: dict[str, Any]
) -> list[Any]:
    """Hooks that make every MLP output of scaled sources, and note what the transcoder reads."""
    anatomy, transcoder = dissect(replacement.model), replacement.transcoder
    features, n_active = local.features, len(local.features.layer)
    handles = []
    for layer, parts in enumerate(anatomy.layers):

        def read(module: nn.Module, arguments: tuple, layer: int = layer) -> None:
            x = arguments[0][0]
            if transcoder.config.reads == "ln2.hook_normalized" and module is not anatomy.layers[layer].mlp:
                x = x * _detached_scale(module, x)
            seen[f"read {layer}"] = x

        def write(module: nn.Module, arguments: tuple, output: Any, layer: int = layer) -> Any:
            first = n_active + layer * local.n_positions
            total = local.constant[layer] + local.error[layer] * strength[first : first + local.n_positions, None]
            if transcoder.W_skip is not None:
                total = total + seen[f"read {layer}"] @ transcoder.W_skip[layer]
            written = [j for j, source in enumerate(features.layer) if source in transcoder.config.sources(layer)]
            if written:
                vectors = torch.stack([_decoder_row(transcoder, features, j, layer) for j in written])
                scaled = vectors * (features.activation * strength[:n_active])[written, None]
                total = total.index_add(0, features.position[written], scaled)
            return (total[None], *output[1:]) if isinstance(output, tuple) else total[None]

        handles.append(read_site(parts, transcoder.config.reads).register_forward_pre_hook(read))
        handles.append(write_site(parts, transcoder.config.writes).register_forward_hook(write))
    return handles


def _decoder_row(transcoder: CrossLayerTranscoder, features: ActiveFeatures, number: int, layer: int) -> Tensor:
    """What one active feature writes at a layer, at an activation of 1."""
    source = int(features.layer[number])
    return transcoder.W_dec[source][features.feature[number], layer - source]


def _detached_norm(gain_offset: float):
    def norm(module: Any, arguments: tuple, output: Tensor) -> Tensor:
        x = arguments[0]
        centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        result = centred * _detached_scale(module, centred) * (module.weight + gain_offset)
        return result + module.bias if isinstance(module, nn.LayerNorm) else result

    return norm


def _detached_scale(module: Any, x: Tensor) -> Tensor:
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt().detach()


def _detached_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
    """Values moved by the pattern that the eager forward pass gave."""
    groups = module.frozen_pattern.shape[1] // value.shape[1]
    moved = module.frozen_pattern @ value.repeat_interleave(groups, dim=1)
    return moved.transpose(1, 2).contiguous(), None
