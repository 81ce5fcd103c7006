"""Train the lab's transcoder, and take the inventory of its features."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from examples.lab.examples import Batch, encode, new_prefixes, repeated_sequences, select
from examples.lab.language_model import ANSWER_SHARES, sample_batches, training_families, whole_word_tokens
from examples.lab.learner import ActivationBatch, Learner, LearnerConfig
from examples.lab.measure import Lab
from examples.lab.revival import revive
from examples.lab.situations import KINDS, tags_of
from examples.lab.swaps import pad
from examples.lab.world import Question
from graphs.schema import tables
from transcoders import CrossLayerTranscoder, TranscoderConfig
from transcoders.activations import mlp_activations, replaced_mlps
from transcoders.features import collect_firing, feature_records, promoted_tokens
from transcoders.labels import NEARLY_PURE, Label, label_by_firing, situations_of, strongest

N_FEATURES = 1024
K = 16
SITES_PER_STEP = 1024
FEWEST = (3, 3, 3, 12, 12, 12)
"""Few where places are recognised, or a place is spread over features of single cities."""
JOINT = LearnerConfig(learning_rate=3e-3, fewest=FEWEST, dead_weight=0.05, bfloat16=True)
"""Beside the language model; `steps` follows from the language model's."""
FINISH = LearnerConfig(steps=600, learning_rate=1e-3, fewest=FEWEST, bfloat16=True)
FINISH_SHARES = ANSWER_SHARES | {"two-hop state": 64, "two-hop country": 64, "three-hop": 32}
"""Sequences of each family in a step of it: of two hops more, few of which the replacement model got wrong."""
ANSWER_WEIGHT = 0.5
"""Weight of the replacement model's answers beside the relative error."""
MOST = 0.5
"""A feature that fires on this share of the tokens is one of most tokens."""
DISTINCT = 1.5
"""What a feature promotes names it if it is raised by so much more than anything is lowered; else it is noise."""
N_REPEATED = 8000
"""Random sequences given twice, among the training prompts."""


@dataclass(frozen=True)
class Sites:
    """One site for every distinct prefix of the training prompts: the same prefix gives the same activations."""

    inputs: Float[Tensor, "layer site d_model"]
    outputs: Float[Tensor, "layer site d_model"]
    occurrences: Int[Tensor, " site"]
    """In how many prompts the prefix occurs."""


@dataclass(frozen=True)
class AnswerPlan:
    """Which of the replacement model's answers count, and how much."""

    families: dict[str, Batch]
    shares: dict[str, int]
    """Sequences of each family in a step."""
    weight: float
    """Of their divergence beside the relative error."""


def new_transcoder(lab: Lab) -> CrossLayerTranscoder:
    """A transcoder of the lab model's shape, not trained yet."""
    shape = TranscoderConfig(
        n_layers=lab.model.config.num_hidden_layers, d_model=lab.model.config.hidden_size, n_features=N_FEATURES,
        activation="topk", k=K, reads="mlp.hook_in", writes="hook_mlp_out", model_name="lab",
    )  # fmt: skip
    return CrossLayerTranscoder(shape)


def finish_transcoder(lab: Lab, transcoder: CrossLayerTranscoder, config: LearnerConfig) -> CrossLayerTranscoder:
    """Train on alone, the language model at rest: all sites, and the answers of the replacement model."""
    sites = collect_sites(lab, config.seed)
    revive(
        transcoder, sites.inputs, sites.outputs, config.error_floor, torch.Generator().manual_seed(config.seed)
    )  # fmt: skip
    families = training_families(lab.questions, lab.tokenizer)
    return learn(lab, transcoder, sites, AnswerPlan(families, FINISH_SHARES, ANSWER_WEIGHT), config)


def learn(
    lab: Lab, transcoder: CrossLayerTranscoder, sites: Sites, answers: AnswerPlan, config: LearnerConfig
) -> CrossLayerTranscoder:
    """Train what requires gradients, the language model at rest: on all sites, and the replacement model's answers."""
    start = time.time()
    random = np.random.default_rng(config.seed + 11)
    learner = Learner(transcoder, config)
    whole_words = whole_word_tokens(lab.tokenizer)
    batches = site_batches(sites, config.seed)
    for step in range(1, config.steps + 1):
        loss, error = learner.loss(*next(batches))
        asked = sample_batches(answers.families, answers.shares, whole_words, random)
        divergence = _answer_divergence(lab, transcoder, asked)
        (loss + answers.weight * divergence).backward()
        learner.step()
        if step % 100 == 0 or step == 1:
            print(
                f"step {step}  {time.time() - start:.0f} s  relative error {float(error.detach()):.4f}  "
                f"KL of the answers {float(divergence.detach()):.4f} nats", flush=True,
            )  # fmt: skip
    return transcoder.eval().requires_grad_(False)


def _answer_divergence(lab: Lab, transcoder: CrossLayerTranscoder, batches: list[Batch]) -> Tensor:
    """Mean KL divergence from the model to the replacement model where an answer is predicted, in nats.

    Reconstruction alone leaves out what little of an MLP's output decides an answer (Braun et al., "Identifying
    Functionally Important Features with End-to-End Sparse Dictionary Learning", 2024).
    """
    total = torch.tensor(0.0)
    for batch in batches:
        with torch.no_grad():
            own = lab.model(batch.tokens).logits[batch.predicts].log_softmax(-1)
        with replaced_mlps(lab.model, transcoder):
            other = lab.model(batch.tokens).logits[batch.predicts].log_softmax(-1)
        total = total + functional.kl_div(other, own, log_target=True, reduction="sum")
    return total / sum(int(batch.predicts.sum()) for batch in batches)


def collect_sites(lab: Lab, seed: int) -> Sites:
    """Activations at all distinct prefixes of the training questions and of repeated random sequences."""
    asked = encode([q for q in lab.questions if q.split == "train"], lab.tokenizer)
    random = np.random.default_rng(seed + 1)
    repeated = repeated_sequences(whole_word_tokens(lab.tokenizer), N_REPEATED, random)
    counts: Counter[tuple[int, ...]] = Counter()
    parts = []
    for batch in (asked, repeated):
        for rows in batch.length.argsort(stable=True).split(2048):
            part = select(batch, rows)
            keep = new_prefixes(part, counts)
            parts.append(mlp_activations(lab.model, part.tokens, keep, "mlp.hook_in"))
    inputs, outputs = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return Sites(inputs, outputs, torch.tensor([*counts.values()]))


def site_batches(sites: Sites, seed: int) -> Iterator[ActivationBatch]:
    """The activations at chosen sites, batch by batch."""
    for chosen in chosen_sites(sites, seed):
        yield sites.inputs[:, chosen], sites.outputs[:, chosen]


def chosen_sites(sites: Sites, seed: int) -> Iterator[Int[Tensor, " chosen"]]:
    """Random sites, those of frequent prefixes oftener: by the root, so that rare ones are not forgotten."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.multinomial(site_weights(sites), SITES_PER_STEP, replacement=True, generator=generator)


def site_weights(sites: Sites) -> Float[Tensor, " site"]:
    """What each site counts."""
    return sites.occurrences.double().sqrt()


def inventory(lab: Lab, transcoder: CrossLayerTranscoder, name: str) -> pa.Table:
    """The `features` table: examples, promoted tokens, density, and labels from the world's own situations."""
    chosen = inventory_questions(lab)
    tokens, lengths = pad(lab.tokenizer, [q.prompt for q in chosen])
    place = torch.arange(tokens.shape[1])
    firing = collect_firing(lab.model, transcoder, tokens, (place < lengths[:, None]) & (place > 0))
    prompts = [token_texts(lab, ids[:n].tolist()) for ids, n in zip(tokens, lengths, strict=True)]
    vocabulary = token_texts(lab, list(range(len(lab.tokenizer))))
    tags = [tags_of(question, lab.tokenizer) for question in chosen]
    situations = situations_of([tags[p][i] for p, i in zip(firing.prompt, firing.position, strict=True)], KINDS)
    weight = _equal_families([chosen[prompt].family for prompt in firing.prompt])
    records = []
    for layer in range(transcoder.config.n_layers):
        promoted = promoted_tokens(lab.model, transcoder, layer)
        rows = feature_records(firing, layer, prompts, promoted, vocabulary)
        fires = firing.activation[layer]
        of_all = label_by_firing(fires, situations, weight)
        of_strongest = label_by_firing(strongest(fires), situations, weight, pure=NEARLY_PURE)
        share = (fires > 0) @ weight / weight.sum()
        for row, label, strong_label, n in zip(rows, of_all, of_strongest, share.tolist(), strict=True):
            records.append(row | {"transcoder": name} | _label_columns(row, label, strong_label, n))
    return pa.Table.from_pylist(records, schema=tables()["features"])


def inventory_questions(lab: Lab, most: int = 2500) -> list[Question]:
    """The questions on which the inventory is taken: of each family at most so many, at random."""
    random = np.random.default_rng(5)
    chosen: list[Question] = []
    for family in dict.fromkeys(q.family for q in lab.questions):
        pool = [q for q in lab.questions if q.family == family]
        chosen += [pool[i] for i in random.permutation(len(pool))[:most]]
    return chosen


def token_texts(lab: Lab, ids: list[int]) -> list[str]:
    """Tokens as text, one by one."""
    return [str(token) for token in lab.tokenizer.convert_ids_to_tokens(ids)]


def _equal_families(families: list[str]) -> Float[np.ndarray, " site"]:
    """What each token counts, so that every family counts the same however many questions it has."""
    _, index, size = np.unique(families, return_inverse=True, return_counts=True)
    return 1 / size[index]


def _label_columns(row: dict, label: Label | None, strong_label: Label | None, share: float) -> dict:
    """What the feature fires on; or what it fires on strongly; or that it fires on most tokens; or what it promotes."""
    if label is not None:
        return _labelled(label.text, "fires on", label)
    if strong_label is not None:
        return _labelled(f"strongest: {strong_label.text}", "fires strongly on", strong_label)
    if share >= MOST:
        return _labelled("most tokens", "fires on", Label("most tokens", 1.0, share))
    if row["max_activation"] > 0 and row["top_logits"][0]["value"] >= DISTINCT * -row["bottom_logits"][0]["value"]:
        return _labelled("→ " + ", ".join(entry["token"] for entry in row["top_logits"][:2]), "promotes", None)
    return _labelled(None, None, None)


def _labelled(text: str | None, source: str | None, label: Label | None) -> dict:
    precision, recall = (label.precision, label.recall) if label else (None, None)
    return {"label": text, "label_source": source, "label_precision": precision, "label_recall": recall}
