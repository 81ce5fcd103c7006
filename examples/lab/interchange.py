"""Interchange training: what one MLP writes at a city's last token is made to decide which place the answer is about.

In place of what it wrote for the question's city stands what it wrote for a donor's; the answer must follow (Geiger et
al., "Inducing Causal Structure for Interpretable Neural Networks", 2022). So it is known where the lab model keeps the
place, and a tracer can be held to it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from examples.lab.measure import Lab, place_facts
from examples.lab.swaps import first_token, pad, subject_end
from examples.lab.world import Question
from transcoders.activations import recording
from transcoders.families import dissect

DECIDING_LAYER = 2
"""The layer whose MLP writes the place that later layers read."""


@dataclass(frozen=True)
class Pool:
    """Two-hop training questions about one kind of place."""

    questions: list[Question]
    tokens: Int[Tensor, "question position"]
    length: Int[Tensor, " question"]
    city: Int[Tensor, " question"]
    """Position of the city's last token."""
    of_place: dict[str, list[int]]
    asked: frozenset[tuple[str, str]]
    """(city, relation) of every question: only these are ever given as a donor's answer."""
    wanted: dict[tuple[str, str], int]
    """First token of the value of every (place, relation)."""


@dataclass(frozen=True)
class Interchanges:
    """Questions with donors, and with the donors' twins: other questions about the same places."""

    tokens: Int[Tensor, "pair position"]
    last: Int[Tensor, " pair"]
    city: Int[Tensor, " pair"]
    donor_tokens: Int[Tensor, "donor position"]
    """The donors, then their twins."""
    donor_city: Int[Tensor, " donor"]
    wanted: Int[Tensor, " pair"]
    """First token of the donor place's value of the asked relation."""


def training_pool(lab: Lab, family: str) -> Pool:
    """The training questions of a two-hop family."""
    asked = [q for q in lab.questions if q.family == family and q.split == "train"]
    tokens, length = pad(lab.tokenizer, [q.prompt for q in asked])
    of_place: dict[str, list[int]] = {}
    for number, question in enumerate(asked):
        of_place.setdefault(question.bridge, []).append(number)
    values = {key: first_token(lab.tokenizer, value) for key, value in place_facts(lab.world).items()}
    return Pool(
        asked, tokens, length, torch.tensor([subject_end(lab.tokenizer, q) for q in asked]), of_place,
        frozenset((q.subject, q.relation) for q in asked), values,
    )  # fmt: skip


def sample_interchanges(pool: Pool, n: int, random: np.random.Generator) -> Interchanges:
    """Pairs of questions about two places; what is wanted is never an answer that training holds out."""
    ours: list[int] = []
    donors: list[int] = []
    twins: list[int] = []
    wanted: list[int] = []
    while len(ours) < n:
        i, j = random.integers(len(pool.questions), size=2)
        question, donor = pool.questions[i], pool.questions[j]
        if question.bridge == donor.bridge or (donor.subject, question.relation) not in pool.asked:
            continue
        same_place = pool.of_place[donor.bridge]
        ours.append(int(i))
        donors.append(int(j))
        twins.append(same_place[random.integers(len(same_place))])
        wanted.append(pool.wanted[donor.bridge, question.relation])
    rows, others = torch.tensor(ours), torch.tensor(donors + twins)
    return Interchanges(
        pool.tokens[rows, : int(pool.length[rows].max())], pool.length[rows] - 1, pool.city[rows],
        pool.tokens[others, : int(pool.length[others].max())], pool.city[others], torch.tensor(wanted),
    )  # fmt: skip


def interchange_loss(model: LlamaForCausalLM, pairs: Interchanges) -> tuple[Tensor, Tensor]:
    """Cross entropy of the donors' answers (nats), and how far two cities of one place differ from there on.

    The difference is that of what MLPs read and write from the deciding layer on, as a share of its squared norms.
    """
    layers = dissect(model).layers
    later = range(DECIDING_LAYER, len(layers))
    modules = {f"read {i}": norm for i in later if (norm := layers[i].mlp_norm) is not None}
    modules |= {f"write {i}": layers[i].mlp for i in later}
    with recording(modules) as seen:
        model.model(pairs.donor_tokens)
    at_city = {
        name: output[torch.arange(len(pairs.donor_city)), pairs.donor_city] for name, (_, output) in seen.items()
    }
    difference = torch.stack([_share_of_difference(*values.chunk(2)) for values in at_city.values()]).sum() / len(later)
    donated = at_city[f"write {DECIDING_LAYER}"][: len(pairs.tokens)]
    here = torch.arange(pairs.tokens.shape[1]) == pairs.city[:, None]

    def swap(module: torch.nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return torch.where(here[..., None], donated[:, None], output)

    handle = layers[DECIDING_LAYER].mlp.register_forward_hook(swap)
    try:
        hidden = model.model(pairs.tokens).last_hidden_state
    finally:
        handle.remove()
    last = hidden[torch.arange(len(pairs.last)), pairs.last]
    return functional.cross_entropy(model.lm_head(last), pairs.wanted), difference


def _share_of_difference(one: Float[Tensor, "pair d_model"], other: Float[Tensor, "pair d_model"]) -> Tensor:
    return ((one - other).square().sum(-1) / (one.square().sum(-1) + other.square().sum(-1))).mean()
