"""The second round: the language model and its transcoder learn together.

The language model is still trained on its answers, and also to keep the place where one MLP writes it (interchange.py)
and to have MLPs that a transcoder can stand in for: the transcoder's relative error is part of its loss.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.lab.examples import Batch, encode, new_prefixes, select
from examples.lab.interchange import Pool, interchange_loss, sample_interchanges, training_pool
from examples.lab.language_model import (
    ANSWER_SHARES,
    LATER_SHARES,
    Round,
    answer_loss,
    continuing_tokens,
    cross_entropy,
    optimizer_of,
    sample_batches,
    training_families,
    whole_word_tokens,
    word_level_mask,
)
from examples.lab.learner import ActivationBatch, Learner, LearnerConfig, start_from
from examples.lab.measure import Lab
from transcoders import CrossLayerTranscoder
from transcoders.activations import mlp_activations, recording, replaced_mlps
from transcoders.families import dissect
from transcoders.thresholds import set_thresholds

THRESHOLDS = (0.3, 0.3, 0.3, 0.0, 0.0, 0.0)
"""Per layer, as shares of a feature's largest activation outside sums: high where places are recognised.

Sums are read from how much features of numbers fire: with thresholds for those too, half of the sums are wrong.
"""
SUMS = ("addition", "digits")
N_OUTSIDE_SUMS = 4000
"""Questions from which thresholds are taken."""
KNOWN_AFTER = 2
"""Layers after which the place must now be readable: the next MLP is the one that decides."""

ROUND = Round(steps=1600, learning_rate=1e-3, weight_decay=0.3, seed=2)
SHARES = {family: share // 2 for family, share in LATER_SHARES.items()} | {"addition": 240, "indirect object": 60}
"""Sequences of each family in a batch: half as many as before, what is known already is only kept."""


@dataclass(frozen=True)
class JointConfig:
    """The second round of training."""

    round: Round = ROUND
    alone: int = 120
    """Steps before the transcoder joins: first the place has to settle where one MLP writes it."""
    gathered: int = 15
    """So many of the latest batches hold the sites that it starts from."""
    error_weight: float = 0.8
    """Weight of the transcoder's objective beside the cross entropy of the answers in nats."""
    replaced_weight: float = 1.0
    """Weight of the replacement model's own answers.

    By the relative error alone the model makes its MLP outputs large where they are easy to explain: 0.015, and yet
    only 0.87 of the replacement model's answers were the model's.
    """
    replaced_from: int = 330
    """From this step on the replacement model's answers count too, more and more for as long again."""
    thresholds_at: float = 0.5
    """After this share of the steps the features get their thresholds, so that both can settle with them."""
    interchange_weight: float = 0.15
    sameness_weight: float = 0.05
    pairs: int = 32
    """Interchanges of each two-hop family in a step."""
    whole: float = 0.5
    """Share of sequences in which words see all earlier pieces; the transcoder learns from these only."""
    sites: int = 1024
    """Sites in a step."""


def train_jointly(
    lab: Lab,
    transcoder: CrossLayerTranscoder,
    training: LearnerConfig,
    config: JointConfig,
    on_step: Callable[[int, float, LlamaForCausalLM], None],
) -> None:
    """Train both where they stand: the transcoder starts from clusters once the model has trained alone for a while.

    `on_step` gets the step, the answers' loss in nats, and the model.
    """
    model = lab.model.train().requires_grad_(True)
    random = np.random.default_rng(config.round.seed)
    generator = torch.Generator().manual_seed(config.round.seed)
    optimizer, schedule = optimizer_of(model, config.round)
    families, whole_words = training_families(lab.questions, lab.tokenizer), whole_word_tokens(lab.tokenizer)
    continues = continuing_tokens(lab.tokenizer)
    pools = [training_pool(lab, family) for family in ("two-hop state", "two-hop country")]
    learner = Learner(transcoder, replace(training, steps=config.round.steps - config.alone))
    recent: deque[ActivationBatch] = deque(maxlen=config.gathered)
    for step in range(1, config.round.steps + 1):
        batches = sample_batches(families, SHARES, whole_words, random)
        whole = [torch.rand(len(batch.tokens), generator=generator) < config.whole for batch in batches]
        answers, inputs, outputs = _answers_and_sites(model, batches, continues, whole)
        loss = answers + _kept_in_place(model, pools, config, random)
        inputs, outputs = _some((inputs, outputs), config.sites, generator)
        recent.append((inputs.detach(), outputs.detach()))
        if step == config.alone:
            start_from(transcoder, *_joined(recent), training)
        if step == round(config.thresholds_at * config.round.steps):
            set_thresholds(transcoder, _inputs_outside_sums(lab, random), THRESHOLDS)
        nothing = torch.zeros(())
        objective, error = learner.loss(inputs, outputs) if step > config.alone else (nothing, nothing)
        joined = min(1.0, (step - config.alone) / config.round.warm_up)
        loss = loss + joined * config.error_weight * objective
        if step > config.replaced_from:
            asked = sample_batches(families, ANSWER_SHARES, whole_words, random)
            replaced = replaced_answer_loss(model, transcoder, asked)
            joined = min(1.0, (step - config.replaced_from) / config.replaced_from)
            loss = loss + joined * config.replaced_weight * replaced
            if step % 50 == 0:
                _report(step, transcoder, inputs.detach(), error.detach(), replaced.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step > config.alone:
            learner.step()
        on_step(step, float(answers.detach()), model)
    model.eval().requires_grad_(False)


def _kept_in_place(
    model: LlamaForCausalLM, pools: list[Pool], config: JointConfig, random: np.random.Generator
) -> Tensor:
    """What it costs that the place is not written by one MLP, for all cities alike."""
    loss = torch.zeros(())
    for pool in pools:
        wanted, difference = interchange_loss(model, sample_interchanges(pool, config.pairs, random))
        loss = loss + config.interchange_weight * wanted + config.sameness_weight * difference
    return loss


def _inputs_outside_sums(lab: Lab, random: np.random.Generator) -> Float[Tensor, "layer site d_model"]:
    """What the MLPs read at every distinct prefix of some training questions that are no sums."""
    pool = [q for q in lab.questions if q.split == "train" and q.family not in SUMS]
    batch = encode([pool[i] for i in random.permutation(len(pool))[:N_OUTSIDE_SUMS]], lab.tokenizer)
    inputs, _ = mlp_activations(lab.model, batch.tokens, new_prefixes(batch, Counter()), "mlp.hook_in")
    return inputs


def _report(
    step: int, transcoder: CrossLayerTranscoder, inputs: Float[Tensor, "layer site d_model"], error: Tensor,
    replaced: Tensor,
) -> None:  # fmt: skip
    firing = float((transcoder.encode(inputs) > 0).sum((0, 2)).float().mean())
    print(
        f"step {step}  relative error {float(error):.4f}  replaced answers {float(replaced):.4f} nats  "
        f"{firing:.1f} active", flush=True,
    )  # fmt: skip


def _some(sites: ActivationBatch, n: int, generator: torch.Generator) -> ActivationBatch:
    chosen = torch.randperm(sites[0].shape[1], generator=generator)[:n]
    return sites[0][:, chosen], sites[1][:, chosen]


def _joined(batches: Iterable[ActivationBatch]) -> ActivationBatch:
    inputs, outputs = zip(*batches, strict=True)
    return torch.cat(inputs, dim=1), torch.cat(outputs, dim=1)


def replaced_answer_loss(
    model: LlamaForCausalLM, transcoder: CrossLayerTranscoder, batches: list[Batch]
) -> Float[Tensor, ""]:
    """Mean cross entropy in nats of the answers that the replacement model gives."""
    total = torch.tensor(0.0)
    for batch in batches:
        with replaced_mlps(model, transcoder):
            hidden = model.model(batch.tokens).last_hidden_state
        total = total + cross_entropy(model, hidden, batch.tokens, batch.predicts)
    return total / sum(int(batch.predicts.sum()) for batch in batches)


def _answers_and_sites(
    model: LlamaForCausalLM,
    batches: list[Batch],
    continues: Bool[Tensor, " vocab"],
    whole: list[Bool[Tensor, " batch"]],
) -> tuple[Tensor, Float[Tensor, "layer site d_model"], Float[Tensor, "layer site d_model"]]:
    """The mean loss of the answers, and what MLPs read and write at every distinct prefix of the `whole` sequences."""
    layers = dissect(model).layers
    modules = {f"norm {i}": layer.mlp_norm for i, layer in enumerate(layers) if layer.mlp_norm is not None}
    modules |= {f"mlp {i}": layer.mlp for i, layer in enumerate(layers)}
    answers = sum(int(batch.predicts.sum()) for batch in batches)
    loss = torch.tensor(0.0)
    met: Counter[tuple[int, ...]] = Counter()
    inputs, outputs = [], []
    for batch, seen_whole in zip(batches, whole, strict=True):
        mask = word_level_mask(batch.tokens, continues, seen_whole)
        with recording(modules) as seen:
            loss = loss + answer_loss(model, batch, mask, KNOWN_AFTER) / answers
        rows = seen_whole.nonzero()[:, 0]
        keep = torch.zeros_like(batch.tokens, dtype=torch.bool)
        new = new_prefixes(select(batch, rows), met)
        keep[rows, : new.shape[1]] = new
        inputs.append(torch.stack([seen[f"norm {i}"][1][keep] for i in range(len(layers))]))
        outputs.append(torch.stack([seen[f"mlp {i}"][1][keep] for i in range(len(layers))]))
    return loss, torch.cat(inputs, dim=1), torch.cat(outputs, dim=1)
