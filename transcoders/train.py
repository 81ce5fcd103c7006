"""Train a cross-layer transcoder on the MLP inputs and outputs of a language model."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.loss import error_scale, relative_error
from transcoders.model import CrossLayerTranscoder

ActivationBatch = tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]
"""What every MLP reads and writes at some tokens."""


def ignore(step: int, error: float, transcoder: CrossLayerTranscoder) -> None:
    """A step callback that does nothing."""


def train(
    batches: Iterable[ActivationBatch],
    shape: TranscoderConfig,
    config: TrainConfig,
    *,
    on_step: Callable[[int, float, CrossLayerTranscoder], None] = ignore,
) -> CrossLayerTranscoder:
    """Train on a stream of activations: relative error, k features per layer and token, dead ones pulled back.

    The features of `shape` must be "topk": nothing else in the loss keeps their number down.
    """
    transcoder = CrossLayerTranscoder(shape)
    transcoder.initialise(torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
    silent = torch.zeros(shape.n_layers, shape.n_features, dtype=torch.int64)
    for step, (inputs, outputs) in zip(range(1, config.steps + 1), batches, strict=False):
        if step == 1:
            start_from(transcoder, inputs, outputs, config.error_floor)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config.steps)
        error, fired = _learn(transcoder, inputs, outputs, silent >= config.dead_after, config)
        silent = torch.where(fired, 0, silent + 1)
        torch.nn.utils.clip_grad_norm_(transcoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, error, transcoder)
    return transcoder.eval().requires_grad_(False)


@torch.no_grad()
def start_from(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    outputs: Float[Tensor, "layer token d_model"],
    floor: float,
) -> None:
    """Let every feature start as a prototype: it reads one token's centred MLP input and writes its MLP output.

    The k active ones then start as a mean over similar tokens, scaled per layer to the least relative error.
    """
    centre = inputs.mean(1)
    transcoder.b_dec.copy_(outputs.mean(1))
    rest = outputs - transcoder.b_dec[:, None]
    n_features = min(transcoder.config.n_features, inputs.shape[1])
    for layer in range(transcoder.config.n_layers):
        read = inputs[layer, :n_features] - centre[layer]
        size = read.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        transcoder.W_enc[layer, :n_features] = read / size
        transcoder.b_enc[layer] = -transcoder.W_enc[layer] @ centre[layer]
        transcoder.W_dec[layer][:n_features, 0] = rest[layer, :n_features] / size
    written = transcoder.decode(transcoder.encode(inputs)) - transcoder.b_dec[:, None]
    weight = 1 / error_scale(outputs, floor)[..., None]
    scale = (weight * written * rest).sum((1, 2)) / (weight * written.square()).sum((1, 2)).clamp(min=1e-12)
    for decoder, factor in zip(transcoder.W_dec, scale, strict=True):
        decoder *= factor


def learning_rate_factor(step: int, steps: int) -> float:
    """A short warm-up, then flat, then linearly to nothing over the last half."""
    return min(1.0, step / 50, 2 * (1 - (step - 1) / steps))


def _learn(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    outputs: Float[Tensor, "layer token d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
) -> tuple[float, Bool[Tensor, "layer feature"]]:
    """Gradients of one step; returns the mean relative error and which features fired."""
    pre_activation = transcoder.pre_activations(inputs)
    activations = transcoder.activate(pre_activation)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.bfloat16):
        reconstruction = transcoder.decode(activations)
    error = relative_error(reconstruction, outputs, config.error_floor).mean()
    loss = error
    if dead.any():
        # Dead features are asked to explain what the living leave (as AuxK, with every dead feature).
        some = slice(None, None, config.dead_tokens)
        revived = _written_by_dead(transcoder, pre_activation[:, some], dead)
        rest = (outputs - reconstruction).detach()[:, some]
        loss = loss + config.dead_weight * relative_error(revived, rest, config.error_floor).mean()
    loss.backward()
    return float(error.detach()), (activations > 0).any(1)


def _written_by_dead(
    transcoder: CrossLayerTranscoder,
    pre_activation: Float[Tensor, "layer token feature"],
    dead: Bool[Tensor, "layer feature"],
) -> Float[Tensor, "layer token d_model"]:
    """What the dead features would write if all of them fired, made smaller by the root of their number."""
    n_layers, n_tokens, _ = pre_activation.shape
    written = list(pre_activation.new_zeros(n_layers, n_tokens, transcoder.config.d_model))
    for source, decoder in enumerate(transcoder.W_dec):
        [chosen] = dead[source].nonzero(as_tuple=True)
        if len(chosen) == 0:
            continue
        activations = pre_activation[source][:, chosen].relu() / len(chosen) ** 0.5
        for k, write in enumerate((activations @ decoder[chosen].flatten(1)).split(transcoder.config.d_model, dim=-1)):
            written[source + k] = written[source + k] + write
    return torch.stack(written)
