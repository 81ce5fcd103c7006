"""What a model says with some of its MLPs replaced, against what it says itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transcoders.activations import replaced_mlps
from transcoders.metrics import NORMS, POSITIONS, bucket
from transcoders.model import CrossLayerTranscoder
from transcoders.passages import Passages, batches
from transcoders.reconstruction import NUMBERS_AT_ONCE


@dataclass(frozen=True)
class Answers:
    """The model's own first choice wherever answers are read, sequence by sequence."""

    token: Int[Tensor, " readout"]
    probability: Float[Tensor, " readout"]
    position: Int[Tensor, " readout"]


@dataclass(frozen=True)
class Comparison:
    """The answers with the MLPs of some layers replaced, next to the model's own."""

    layers: tuple[int, ...]
    token: Int[Tensor, " readout"]
    """The first choice."""
    matches: Bool[Tensor, " readout"]
    """Whether it is the model's."""
    kl: Float[Tensor, " readout"]
    """KL divergence from the model, in nats."""

    @property
    def top1_match(self) -> float:
        """Share of answers with the model's first choice."""
        return float(self.matches.double().mean())

    @property
    def mean_kl(self) -> float:
        """Nats."""
        return float(self.kl.double().mean())


def one_by_one(n_layers: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Each layer alone; and the first, the first two, … all layers."""
    return [(layer,) for layer in range(n_layers)], [tuple(range(layer + 1)) for layer in range(n_layers)]


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    transcoder: CrossLayerTranscoder,
    passages: Passages,
    subsets: Sequence[tuple[int, ...]],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Answers, list[Comparison]]:
    """Replace the MLPs of each subset of the layers; `on_progress` gets forward passes done and their number."""
    # Both words times tokens and features times tokens are held at once.
    at_once = NUMBERS_AT_ONCE // max(model.config.get_text_config().vocab_size, transcoder.config.n_features)
    parts = list(batches(passages, at_once))
    own: list[tuple[Tensor, Tensor]] = []
    others: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in subsets]
    for number, part in enumerate(parts):
        tokens, readout = part.tokens.to(model.device), part.readout.to(model.device)
        said = _log_probabilities(model, tokens, readout)
        first = said.max(-1)
        own.append((first.indices.cpu(), first.values.exp().cpu()))
        for i, layers in enumerate(subsets):
            with replaced_mlps(model, transcoder, layers=layers):
                other = _log_probabilities(model, tokens, readout)
            choice = other.argmax(-1)
            kl = (said.exp() * (said - other)).sum(-1)
            others[i].append((choice.cpu(), (choice == first.indices).cpu(), kl.cpu()))
            on_progress(number * len(subsets) + i + 1, len(parts) * len(subsets))
    token, probability = (torch.cat([part[i] for part in own]) for i in range(2))
    position = torch.arange(passages.tokens.shape[1]).expand_as(passages.tokens)[passages.readout]
    compared = [
        Comparison(tuple(layers), *(torch.cat([part[i] for part in found]) for i in range(3)))
        for layers, found in zip(subsets, others, strict=True)
    ]
    return Answers(token, probability, position), compared


def by_position(answers: Answers, compared: Comparison) -> list[Comparison]:
    """The same answers parted by position: one for each bucket of `POSITIONS`."""
    return _parted(compared, answers.position, POSITIONS)


def by_norm(norm: Float[Tensor, " readout"], compared: Comparison) -> list[Comparison]:
    """The same answers parted by the size of what the MLPs write there: one for each bucket of `NORMS`."""
    return _parted(compared, norm, NORMS)


def _parted(compared: Comparison, values: Tensor, bounds: tuple[float, ...]) -> list[Comparison]:
    where = bucket(values, bounds)
    return [
        Comparison(compared.layers, compared.token[where == i], compared.matches[where == i], compared.kl[where == i])
        for i in range(len(bounds) + 1)
    ]


def _log_probabilities(
    model: PreTrainedModel, tokens: Int[Tensor, "sequence position"], readout: Bool[Tensor, "sequence position"]
) -> Float[Tensor, "readout vocab"]:
    logits = model(tokens, use_cache=False).logits[readout]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
