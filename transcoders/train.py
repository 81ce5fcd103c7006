"""Train a cross-layer transcoder on the MLP inputs and outputs of a language model."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.clusters import spherical_clusters
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.loss import error_scale, relative_error
from transcoders.model import CrossLayerTranscoder

ActivationBatch = tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]
"""What every MLP reads and writes at some tokens."""
SCARCELY = 0.1
"""Features that are pulled up are to fire with this share of a typical activation."""
MARGIN = 0.5
"""At the start a feature fires where the cosine with its cluster's centre is above this."""


def ignore(step: int, error: float, transcoder: CrossLayerTranscoder) -> None:
    """A step callback that does nothing."""


class Learner:
    """A training run's state: the weights, the optimiser, and for how many steps each feature has been silent."""

    def __init__(self, transcoder: CrossLayerTranscoder, config: TrainConfig) -> None:
        self.transcoder = transcoder
        self.config = config
        self._optimizer = torch.optim.Adam(transcoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
        self._step = 0
        self._silent = torch.zeros(transcoder.threshold.shape, dtype=torch.int64)

    def loss(
        self, inputs: Float[Tensor, "layer token d_model"], outputs: Float[Tensor, "layer token d_model"]
    ) -> tuple[Tensor, Tensor]:
        """What to minimise, and the mean relative error in it."""
        transcoder, config = self.transcoder, self.config
        pre_activation = transcoder.pre_activations(inputs)
        activations = transcoder.activate(pre_activation)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.bfloat16):
            reconstruction = transcoder.decode(activations)
        error = relative_error(reconstruction, outputs, config.error_floor).mean()
        loss = error
        dead = self._silent >= config.dead_after
        if dead.any():
            # Dead features are asked to explain what the living leave (as AuxK, with every dead feature).
            some = slice(None, None, config.dead_tokens)
            revived = _written_by_dead(transcoder, pre_activation[:, some], dead)
            rest = (outputs - reconstruction).detach()[:, some]
            loss = loss + config.dead_weight * relative_error(revived, rest, config.error_floor).mean()
        if config.fewest:
            loss = loss + config.fewest_weight * _short_of(pre_activation, activations, config.fewest)
        self._silent = torch.where((activations > 0).any(1), 0, self._silent + 1)
        # Kept from the inputs: they are not to change so that less is written, only so that more is explained.
        alone = transcoder.encode(inputs.detach()) if inputs.requires_grad else activations
        return loss + config.written_weight * _written(transcoder, alone, outputs.detach(), config.error_floor), error

    def step(self) -> None:
        """Follow the gradients that `loss` left in the transcoder."""
        self._step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(self._step, self.config.steps)
        torch.nn.utils.clip_grad_norm_(self.transcoder.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


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
    learner = Learner(transcoder, config)
    for step, (inputs, outputs) in zip(range(1, config.steps + 1), batches, strict=False):
        if step == 1:
            start_from(transcoder, inputs, outputs, config)
        loss, error = learner.loss(inputs, outputs)
        loss.backward()
        learner.step()
        on_step(step, float(error.detach()), transcoder)
    return transcoder.eval().requires_grad_(False)


@torch.no_grad()
def start_from(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    outputs: Float[Tensor, "layer token d_model"],
    config: TrainConfig,
) -> None:
    """Let every feature start as a cluster of MLP inputs: it fires near the centre and writes the mean MLP output.

    The decoders of each layer are then scaled to the least relative error.
    """
    generator = torch.Generator().manual_seed(config.seed)
    centre = inputs.mean(1)
    transcoder.b_dec.copy_(outputs.mean(1))
    rest = outputs - transcoder.b_dec[:, None]
    n_features = transcoder.config.n_features
    for layer in range(transcoder.config.n_layers):
        read = inputs[layer] - centre[layer]
        size = read.norm(dim=-1).clamp(min=1e-6)
        directions, member = spherical_clusters(read / size[:, None], n_features, generator)
        count = torch.bincount(member, minlength=n_features).clamp(min=1)
        typical = torch.zeros(n_features).index_add_(0, member, size) / count
        written = torch.zeros_like(directions).index_add_(0, member, rest[layer]) / count[:, None]
        transcoder.W_enc[layer] = directions
        transcoder.b_enc[layer] = -directions @ centre[layer] - MARGIN * typical
        transcoder.W_dec[layer][:, 0] = written / ((1 - MARGIN) * typical).clamp(min=1e-6)[:, None]
    reconstruction = transcoder.decode(transcoder.encode(inputs)) - transcoder.b_dec[:, None]
    weight = 1 / error_scale(outputs, config.error_floor)[..., None]
    scale = (weight * reconstruction * rest).sum((1, 2))
    scale /= (weight * reconstruction.square()).sum((1, 2)).clamp(min=1e-12)
    for decoder, factor in zip(transcoder.W_dec, scale, strict=True):
        decoder *= factor


def learning_rate_factor(step: int, steps: int) -> float:
    """A short warm-up, then linearly to nothing."""
    return min(1.0, step / 50) * (1 - (step - 1) / steps)


def _short_of(
    pre_activation: Float[Tensor, "layer token feature"],
    activations: Float[Tensor, "layer token feature"],
    fewest: tuple[int, ...],
) -> Tensor:
    """How far the features that ought to fire are from it, as a share of a typical activation of their layer."""
    with torch.no_grad():
        firing = activations > 0
        typical = (activations.sum((1, 2)) / firing.sum((1, 2)).clamp(min=1))[:, None, None]
        wanted = torch.arange(max(fewest)) < torch.tensor(fewest)[:, None, None]
    nearest = pre_activation.topk(max(fewest), dim=-1).values
    short = (SCARCELY * typical - nearest).relu() / typical.clamp(min=1e-6)
    return (short * wanted).sum() / (wanted.sum() * activations.shape[1])


def _written(
    transcoder: CrossLayerTranscoder,
    activations: Float[Tensor, "layer token feature"],
    outputs: Float[Tensor, "layer token d_model"],
    floor: float,
) -> Tensor:
    """Sum over features of the norm of what each writes, as a share of the MLP output's norm: a mean over outputs."""
    size = error_scale(outputs, floor).sqrt()
    total = torch.zeros(())
    for source, (active, decoder) in enumerate(zip(activations.unbind(), transcoder.W_dec, strict=True)):
        norms = active @ decoder.norm(dim=-1)
        total = total + (norms / size[source:].T).sum(1).mean() / len(outputs)
    return total


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
