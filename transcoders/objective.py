"""What one training step minimises: reconstruction, sparsity, and an errand for dead features."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.activation import jump_relu_trained
from transcoders.config import TrainConfig
from transcoders.kernels import Selection, decode, encode, n_largest, select_above, sparse_encode_top, take
from transcoders.model import CrossLayerTranscoder
from transcoders.parallel import Place, added_up, gathered, gathered_everywhere, summed
from transcoders.shuffle import Batch

FEWEST = 256
"""So many tokens of a step or more show its threshold: with 21 L0 had a standard deviation of .84, with 256 of .001."""
SAMPLE = 1 << 22
"""So many pre-activations show it where these are of more tokens."""
PENALISED = ("jumprelu", "relu")
"""Activations that are sparse by a penalty; the others are by their number."""


@dataclass(frozen=True)
class Weights:
    """What is trained by this process: its features' share of a transcoder, and JumpReLU's thresholds."""

    transcoder: CrossLayerTranscoder
    threshold: Float[Tensor, "layer feature"]

    def named(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        named = dict(self.transcoder.named_parameters())
        return named | ({"threshold": self.threshold} if self.threshold.requires_grad else {})


@dataclass(frozen=True)
class Sparsity:
    """How many features fire in this step, and what that costs."""

    k: float
    """Features per layer and token."""
    penalty: float
    """Weight of the tanh penalty."""


@dataclass(frozen=True)
class Typical:
    """What errors are compared with."""

    square: Float[Tensor, " layer"]
    """Mean squared norm of each layer's outputs, in the units of training."""
    balanced: bool
    """Whether each token's error counts as a share of that token's own squared norm, or of the mean one."""


@dataclass(frozen=True)
class Outcome:
    """One step's loss, and what there is to report of it; nothing here waits for the device."""

    loss: Tensor
    error: Float[Tensor, "layer token"]
    """Squared error of every layer and token."""
    size: Float[Tensor, "layer token"]
    """Squared norm of what there was to explain."""
    firing: Float[Tensor, "layer feature"]
    """Share of tokens on which each of this process's features fired."""
    l0: Float[Tensor, "layer token"]
    """How many of them fired on each token."""
    threshold: Tensor
    """The contribution above which features fired ("batchtopk")."""


def objective(
    weights: Weights, batch: Batch, config: TrainConfig, place: Place, sparsity: Sparsity, typical: Typical,
    dead: list[Tensor],
) -> Outcome:  # fmt: skip
    """The loss of one batch. `dead` lists each layer's dead features among those of this process."""
    transcoder = weights.transcoder
    n_layers, n_tokens, d_model = batch.inputs.shape
    norms = torch.stack([decoder.detach().flatten(1).float().norm(dim=1) for decoder in transcoder.W_dec])
    threshold = norms.new_zeros(())
    if config.activation == "batchtopk":
        threshold = batch_threshold(transcoder, batch.inputs, norms, sparsity.k, place)
    written = [transcoder.b_dec.new_zeros(n_tokens, d_model) for _ in range(n_layers)]
    penalty = batch.inputs.new_zeros(())
    firing, counts = [], batch.inputs.new_zeros(n_layers, n_tokens, dtype=torch.float32)
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=config.products == "bfloat16"):
        for source, decoder in enumerate(transcoder.W_dec):
            limit = threshold / norms[source].clamp(min=1e-12)
            pairs = _selected(weights, source, batch.inputs[source], config, limit, sparsity.k, place)
            if config.activation in PENALISED:
                length = take(decoder.flatten(1).norm(dim=1), pairs.feature)
                penalty = penalty + torch.tanh(config.tanh_scale * pairs.value * length).sum() / n_tokens
            fired = (pairs.value > 0).float()
            counts[source].index_add_(0, pairs.token.long(), fired)
            fires = torch.zeros_like(norms[source]).index_add_(0, pairs.feature.long(), fired)
            writes = decode(pairs, decoder.flatten(1), n_tokens)
            firing.append(fires / n_tokens)
            for k, write in enumerate(writes.split(d_model, dim=-1)):
                written[source + k] = written[source + k] + write
        part = torch.stack(written)
    reconstruction = summed(place, part.float()) + transcoder.b_dec[:, None] + transcoder.skip(batch.inputs)
    rest = batch.outputs.float() - reconstruction
    error, size = rest.square().sum(-1), batch.outputs.float().square().sum(-1)
    mean = typical.square[:, None]
    scale = size + config.error_floor * mean if typical.balanced else mean
    loss = (error / scale).mean()
    if config.activation in PENALISED:
        loss = loss + sparsity.penalty * summed(place, penalty) / (n_layers * config.k)
    if place.shards > 1 or any(len(features) for features in dead):  # the others' features may be dead
        errand = _errand(transcoder, batch, rest.detach(), scale, config.dead_tokens, dead, place)
        loss = loss + config.dead_weight * errand
    return Outcome(loss, error.detach(), size, torch.stack(firing), counts, threshold)


@torch.no_grad()
def batch_threshold(
    transcoder: CrossLayerTranscoder, inputs: Float[Tensor, "layer token d_model"],
    norms: Float[Tensor, "layer feature"], k: float, place: Place,
) -> Float[Tensor, ""]:  # fmt: skip
    """The contribution (activation · decoder norm) that k features per layer and token exceed on average.

    One threshold for all layers (BatchTopK, Bussmann et al., 2024), found on tokens from all over the step. What one
    layer makes of them is held at a time.
    """
    some = inputs[:, :: _every(inputs.shape[1] * place.data_parts, norms.numel() * place.shards)]
    n_layers, n_tokens, _ = some.shape
    wanted = min(round(k * n_layers * n_tokens * place.data_parts), norms.numel() * n_tokens * place.size)
    found = norms.new_zeros(0)
    for layer in range(n_layers):
        contributions = transcoder.pre_activations_of(layer, some[layer].float()).relu_() * norms[layer]
        found = torch.cat([found, n_largest(contributions.flatten(), wanted)])
    return n_largest(gathered_everywhere(place, n_largest(found, wanted)), wanted).min()


def _every(n_tokens: int, n_features: int) -> int:
    """One of so many tokens of a step shows what its threshold is.

    A power of two, as the tokens of a stream mostly are: then one process and many choose the same.
    """
    enough = max(FEWEST, SAMPLE // n_features)
    return 1 << (max(1, n_tokens // enough).bit_length() - 1)


def _selected(
    weights: Weights, layer: int, inputs: Float[Tensor, "token d_model"], config: TrainConfig,
    limit: Float[Tensor, " feature"], k: float, place: Place,
) -> Selection:  # fmt: skip
    """The pairs of a layer that the loss depends on; all others' activations are 0, and so are their gradients."""
    W_enc, b_enc = weights.transcoder.W_enc[layer], weights.transcoder.b_enc[layer]
    match config.activation:
        case "batchtopk":
            return encode(inputs, W_enc, b_enc, limit)
        case "relu":
            return encode(inputs, W_enc, b_enc, 0.0)
        case "jumprelu":
            return _near_thresholds(inputs, W_enc, b_enc, weights.threshold[layer], config.bandwidth)
        case _ if place.shards == 1:
            return sparse_encode_top(inputs, W_enc, b_enc, round(k))
    pre_activation = weights.transcoder.pre_activations_of(layer, inputs)
    own = pre_activation.detach().topk(min(round(k), pre_activation.shape[1]), dim=1).values
    kth = gathered(place, own).topk(round(k), dim=1).values[:, -1:]
    return select_above(torch.where(pre_activation >= kth, pre_activation, -1.0), 0.0)


def _near_thresholds(
    inputs: Float[Tensor, "token d_model"], W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"], threshold: Float[Tensor, " feature"], bandwidth: float,
) -> Selection:  # fmt: skip
    """What fires, and with activation 0 what is so little below its threshold that the threshold learns from it."""
    token, feature, value = encode(inputs, W_enc, b_enc, threshold.detach() - bandwidth / 2)
    return Selection(token, feature, jump_relu_trained(value[None], take(threshold, feature), bandwidth)[0])


def _errand(
    transcoder: CrossLayerTranscoder, batch: Batch, rest: Float[Tensor, "layer token d_model"],
    scale: Float[Tensor, "layer #token"], every: int, dead: list[Tensor], place: Place,
) -> Tensor:  # fmt: skip
    """Error of what the living leave, on some tokens, when all dead features explain it (AuxK); 0 if there are none.

    What they write is made smaller by the root of their number in the layer: all of them fire at once.
    """
    number = added_up(place, torch.stack([rest.new_full((), len(features)) for features in dead]))
    written = list(torch.zeros_like(rest[:, ::every]))
    for source, features in enumerate(dead):
        if len(features) == 0:
            continue
        read = batch.inputs[source, ::every].to(transcoder.W_enc.dtype)
        pre_activation = read @ transcoder.W_enc[source][features].T + transcoder.b_enc[source][features]
        activations = pre_activation.relu() / number[source].sqrt()
        decoder = transcoder.W_dec[source][features].flatten(1)
        for k, write in enumerate((activations @ decoder).split(rest.shape[-1], dim=-1)):
            written[source + k] = written[source + k] + write.float()
    left = (summed(place, torch.stack(written)) - rest[:, ::every]).square().sum(-1)
    return (left / (scale if scale.shape[1] == 1 else scale[:, ::every])).mean() * (number.sum() > 0)


def clip(place: Place, weights: dict[str, Tensor], largest: float) -> None:
    """Scale all gradients down to this norm together; the norm is that of the whole transcoder, not of one shard."""
    own = [w.grad for name, w in weights.items() if w.grad is not None and is_sharded(name)]
    shared = [w.grad for name, w in weights.items() if w.grad is not None and not is_sharded(name)]
    total = added_up(place, _squares(own, like=shared or own)) + _squares(shared, like=shared or own)
    factor = (largest / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in [*own, *shared]:
        gradient.mul_(factor)


def is_sharded(name: str) -> bool:
    """Whether a weight belongs to features, of which each process has its own."""
    return name not in ("b_dec", "W_skip")


def _squares(gradients: list[Tensor], like: list[Tensor]) -> Tensor:
    total = like[0].new_zeros((), dtype=torch.float32)
    for gradient in gradients:
        total = total + gradient.float().square().sum()
    return total


def sparsity_at(config: TrainConfig, step: int) -> Sparsity:
    """k comes down over the first steps, the penalty grows over all of them."""
    anneal = max(1, round(config.k_anneal * config.steps))
    left = max(0.0, 1 - step / anneal)
    k = min(config.k * (1 + (config.k_start - 1) * left), float(config.n_features))
    return Sparsity(k, config.sparsity * step / config.steps)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """A warm-up, a plateau, and a linear fall to nothing over the last steps."""
    rise = min(1.0, step / max(1, config.warm_up))
    fall = min(1.0, (config.steps - step + 1) / max(1.0, config.decay * config.steps))
    return config.learning_rate * rise * fall
