"""The lab's own way of training a transcoder beside its language model: what both of them minimise together."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders import CrossLayerTranscoder
from transcoders.loss import relative_error
from transcoders.start import start_layer

ActivationBatch = tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]
"""What every MLP reads and writes at some tokens."""
SCARCELY = 0.1
"""Features that are pulled up are to fire with this share of a typical activation."""


@dataclass(frozen=True)
class LearnerConfig:
    """How the transcoder learns."""

    steps: int = 2500
    learning_rate: float = 2e-3
    error_floor: float = 0.02
    """Added to each token's squared norm, as a share of the layer's mean, before the error is divided by it."""
    dead_after: int = 60
    """A feature that did not fire for this many steps counts as dead and is pulled back."""
    dead_weight: float = 0.03
    """Weight of the error that dead features are asked to explain."""
    dead_tokens: int = 4
    """Dead features are trained on every so many tokens: they are rarely worth the full cost."""
    fewest: tuple[int, ...] = ()
    """Per layer, so many features are to fire on a token at least: those nearest to firing are pulled up."""
    fewest_weight: float = 0.05
    bfloat16: bool = False
    """Multiply by the decoders in bfloat16; weights, optimiser and sums stay float32."""
    seed: int = 0


class Learner:
    """A training run's state: the weights, the optimiser, and for how many steps each feature has been silent."""

    def __init__(self, transcoder: CrossLayerTranscoder, config: LearnerConfig) -> None:
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
        if config.dead_weight and dead.any():
            # Dead features are asked to explain what the living leave (as AuxK, with every dead feature).
            some = slice(None, None, config.dead_tokens)
            revived = _written_by_dead(transcoder, pre_activation[:, some], dead)
            rest = (outputs - reconstruction).detach()[:, some]
            loss = loss + config.dead_weight * relative_error(revived, rest, config.error_floor).mean()
        if config.fewest:
            loss = loss + config.fewest_weight * _short_of(pre_activation, activations, config.fewest)
        self._silent = torch.where((activations > 0).any(1), 0, self._silent + 1)
        return loss, error

    def step(self) -> None:
        """Follow the gradients that `loss` left in the transcoder."""
        self._step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(self._step, self.config.steps)
        torch.nn.utils.clip_grad_norm_(self.transcoder.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


@torch.no_grad()
def start_from(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    outputs: Float[Tensor, "layer token d_model"],
    config: LearnerConfig,
) -> None:
    """Let every feature start as a cluster of MLP inputs."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = transcoder.config
    for layer in range(shape.n_layers):
        start = start_layer(inputs[layer], outputs[layer], shape.n_features, shape.k, config.error_floor, generator)
        transcoder.W_enc[layer] = start.W_enc
        transcoder.b_enc[layer] = start.b_enc
        transcoder.b_dec[layer] = start.b_dec
        transcoder.W_dec[layer][:, 0] = start.W_dec


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
