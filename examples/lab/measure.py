"""Every number on the lab's card, measured from the files that ship."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.lab.examples import Batch, repeated_sequences
from examples.lab.language_model import accuracy, answered, whole_word_tokens
from examples.lab.swaps import (
    Pairs,
    active_at_cities,
    feature_swap,
    make_pairs,
    mean_residual_swap,
    mean_residuals,
    pad,
    residual_swap,
    subject_end,
)
from examples.lab.world import COUNTRY_RELATIONS, STATE_RELATIONS, Question, World
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, evaluate
from transcoders.activations import mlp_activations
from transcoders.features import collect_firing
from transcoders.labels import f1_table, situations_of
from transcoders.loss import relative_error

SPLITS = ("train", "held out", "new city")
N_PAIRS = 300
N_REPEATED = 1000
FEATURE_F1 = 0.9


@dataclass(frozen=True)
class Lab:
    """The model, its transcoder and the world they were made for."""

    world: World
    questions: list[Question]
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def load_model(folder: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The lab's language model from its directory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def place_facts(world: World) -> dict[tuple[str, str], str]:
    """Value of every (place, relation)."""
    facts = {(place["name"], relation): place[relation] for place in world.states for relation in STATE_RELATIONS}
    return facts | {(p["name"], relation): p[relation] for p in world.countries for relation in COUNTRY_RELATIONS}


def measure_accuracy(lab: Lab) -> dict[str, dict[str, float]]:
    """Share of questions answered right, by family and split."""
    result: dict[str, dict[str, float]] = {}
    for family in dict.fromkeys(q.family for q in lab.questions):
        result[family] = {}
        for split in SPLITS:
            asked = [q for q in lab.questions if (q.family, q.split) == (family, split)]
            if asked:
                result[family][split] = accuracy(lab.model, lab.tokenizer, asked)
    return result | {"induction": {"held out": answered(lab.model, _repeated(lab, N_REPEATED))}}


def subject_last(lab: Lab, family: str, splits: tuple[str, ...] = ("held out",)) -> list[Question]:
    """Two-hop questions in the phrasing that names the relation before the city."""
    return [
        q for q in lab.questions if q.family == family and q.split in splits and q.prompt.endswith(f"{q.subject} is")
    ]


def swap_pairs(lab: Lab, family: str) -> Pairs:
    """Held-out two-hop questions with donors."""
    return make_pairs(subject_last(lab, family), place_facts(lab.world), lab.tokenizer, N_PAIRS, seed=1)


def measure_residual_swaps(lab: Lab) -> dict[str, dict[str, list[float]]]:
    """Per family the share of answers that follow the donor's residual stream, after each layer."""
    result = {}
    for family in ("two-hop state", "two-hop country"):
        pairs = swap_pairs(lab, family)
        means = mean_residuals(lab.model, lab.tokenizer, subject_last(lab, family, ("train", "held out")))
        layers = range(lab.model.config.num_hidden_layers)
        result[family] = {
            "donor city": [residual_swap(lab.model, pairs, layer) for layer in layers],
            "mean of the donor place's cities": [
                mean_residual_swap(lab.model, pairs, layer, means) for layer in layers
            ],
        }
    return result


def measure_transcoder(lab: Lab, transcoder: CrossLayerTranscoder, most: int = 400) -> dict:
    """Fidelity on at most so many prompts of each family and split, and on all that are held out.

    Families that hold none out are measured on prompts of training, and cities new to two-hop questions apart.
    """
    random = np.random.default_rng(2)
    rows, errors = [], {"subject": [], "last": [], "other": []}
    for prompts in _prompts_to_measure(lab, random, most):
        report = evaluate(lab.model, transcoder, prompts.tokens, prompts.keep, prompts.last)
        rows.append(
            {
                "family": prompts.family, "split": prompts.split, "prompts": len(prompts.tokens),
                "tokens": int(prompts.keep.sum()), "top1_match": report.top1_match, "kl": report.kl,
                "relative_error": report.relative_error, "l0": report.l0,
            }
        )  # fmt: skip
        if prompts.split == "held out":
            for kind, values in _errors_by_position(lab, transcoder, prompts).items():
                errors[kind] += values
    held_out = [row for row in rows if row["split"] == "held out"]
    return {
        "top1_match": _mean(held_out, "top1_match", "prompts"),
        "relative_error": _mean(held_out, "relative_error", "tokens"),
        "relative_error_by_position": {kind: float(np.mean(values)) for kind, values in errors.items()},
        "l0": _mean(held_out, "l0", "tokens"),
        "families": rows,
    }


@dataclass(frozen=True)
class _Prompts:
    """Right-padded prompts of one family and split."""

    family: str
    split: str
    tokens: Int[Tensor, "prompt position"]
    keep: Bool[Tensor, "prompt position"]
    """Tokens of the prompts, less the one that begins each."""
    last: Int[Tensor, " prompt"]
    subject: Int[Tensor, " prompt"]
    """Position of the subject's last token; -1 where there is none."""


def _prompts_to_measure(lab: Lab, random: np.random.Generator, most: int) -> Iterator[_Prompts]:
    for family in dict.fromkeys(q.family for q in lab.questions):
        by_split = {split: [q for q in lab.questions if (q.family, q.split) == (family, split)] for split in SPLITS}
        unseen = [split for split in SPLITS if split != "train" and by_split[split]]
        for split in unseen or ["train"]:
            pool = by_split[split]
            chosen = [pool[i] for i in random.permutation(len(pool))[:most]]
            tokens, lengths = pad(lab.tokenizer, [q.prompt for q in chosen])
            subject = torch.tensor([subject_end(lab.tokenizer, q) for q in chosen])
            yield _Prompts(family, split, tokens, _real(tokens, lengths), lengths - 1, subject)
    repeated = _repeated(lab, most)
    last = repeated.length - 2  # whose next token is the last of the sequence
    yield _Prompts(
        "induction", "held out", repeated.tokens, _real(repeated.tokens, last + 1), last, torch.full_like(last, -1)
    )


def _repeated(lab: Lab, n: int) -> Batch:
    """Random sequences, each given twice; others than in training, which draws them anew for every step."""
    return repeated_sequences(whole_word_tokens(lab.tokenizer), n, np.random.default_rng(6))


def _real(tokens: Int[Tensor, "prompt position"], lengths: Int[Tensor, " prompt"]) -> Bool[Tensor, "prompt position"]:
    """Neither padding nor the token that begins each prompt."""
    place = torch.arange(tokens.shape[1])
    return (place < lengths[:, None]) & (place > 0)


def _mean(rows: list[dict], name: str, weight: str) -> float:
    return sum(row[name] * row[weight] for row in rows) / sum(row[weight] for row in rows)


def measure_dead(lab: Lab, transcoder: CrossLayerTranscoder) -> float:
    """Share of features that fire on no token of any question."""
    tokens, lengths = pad(lab.tokenizer, [q.prompt for q in lab.questions])
    keep = _real(tokens, lengths)
    active = torch.zeros(transcoder.config.n_layers, transcoder.config.n_features, dtype=torch.bool)
    for rows in torch.arange(len(tokens)).split(1024):
        inputs, _ = mlp_activations(lab.model, tokens[rows], keep[rows], transcoder.config.reads)
        active |= (transcoder.encode(inputs) > 0).any(1)
    return float((~active).double().mean())


def measure_place_features(lab: Lab, transcoder: CrossLayerTranscoder, last_layer: int) -> dict[str, dict]:
    """Per family: share of places with a feature of F1 ≥ 0.9 at the city's last token, and what swapping them does.

    The features are chosen on training questions, and both are measured on others of the same family.
    """
    numbers = {}
    for family in ("two-hop state", "two-hop country"):
        chosen_on, chosen_places = place_f1(lab, transcoder, subject_last(lab, family, ("train",)))
        found = {place: chosen_on[: last_layer + 1, :, i] >= FEATURE_F1 for i, place in enumerate(chosen_places)}
        seen_on, places = place_f1(lab, transcoder, subject_last(lab, family, ("held out", "new city")))
        best = np.array([(seen_on[: last_layer + 1, :, i] * found[place]).max() for i, place in enumerate(places)])
        pairs = swap_pairs(lab, family)
        shape = (len(pairs.place), transcoder.config.n_layers, transcoder.config.n_features)
        leave, enter = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (ours, theirs) in enumerate(zip(pairs.place, pairs.donor_place, strict=True)):
            leave[row, : last_layer + 1] = torch.tensor(found[ours])
            enter[row, : last_layer + 1] = torch.tensor(found[theirs])
        at_random = _random_features(lab, transcoder, pairs, last_layer, leave, enter)
        numbers[family] = {
            "places": len(places), "places_with_feature": float((best >= FEATURE_F1).mean()),
            "mean_best_f1": float(best.mean()), "features_per_place": float(np.mean([f.sum() for f in found.values()])),
            "swap": feature_swap(lab.model, transcoder, pairs, last_layer, leave, enter),
            "random_swap": feature_swap(lab.model, transcoder, pairs, last_layer, *at_random),
            "pairs": len(pairs.place), "last_layer": last_layer,
        }  # fmt: skip
    return numbers


def place_f1(lab: Lab, transcoder: CrossLayerTranscoder, asked: list[Question]) -> tuple[np.ndarray, list[str]]:
    """F1 (layer, feature, place) of every feature as a detector of the place at the city's last token."""
    tokens, _ = pad(lab.tokenizer, [q.prompt for q in asked])
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[torch.arange(len(asked)), [subject_end(lab.tokenizer, q) for q in asked]] = True
    firing = collect_firing(lab.model, transcoder, tokens, keep)
    situations = situations_of([[("place", q.bridge)] for q in asked], ("place",))
    return np.stack([f1_table(matrix, situations.holds) for matrix in firing.activation]), list(situations.names)


def measure_graphs(lab: Lab, replacement: ReplacementModel, n: int = 100) -> dict:
    """Mean scores of whole graphs of held-out two-hop and addition prompts, `n` of each."""
    random = np.random.default_rng(3)
    result = {}
    for name, families in (("two-hop", ("two-hop state", "two-hop country")), ("addition", ("addition",))):
        pool = [q for q in lab.questions if q.family in families and q.split == "held out"]
        infos = [
            trace(pool[i].prompt, replacement, TraceConfig()).graph.info for i in random.permutation(len(pool))[:n]
        ]
        result[name] = {
            "graphs": len(infos),
            "replacement": float(np.mean([info.replacement_score or 0.0 for info in infos])),
            "completeness": float(np.mean([info.completeness_score or 0.0 for info in infos])),
            "active_features": float(np.mean([info.n_active_features for info in infos])),
            "largest_conservation_error": max(info.conservation_error for info in infos),
        }
    return result


def _errors_by_position(lab: Lab, transcoder: CrossLayerTranscoder, prompts: _Prompts) -> dict[str, list[float]]:
    inputs, outputs = mlp_activations(lab.model, prompts.tokens, prompts.keep, transcoder.config.reads)
    with torch.no_grad():
        error = relative_error(transcoder.decode(transcoder.encode(inputs)), outputs).mean(0)
    kind, row = torch.zeros_like(prompts.tokens), torch.arange(len(prompts.tokens))
    kind[row, prompts.last] = 1
    with_subject = prompts.subject >= 0
    kind[row[with_subject], prompts.subject[with_subject]] = 2
    kinds = kind[prompts.keep]
    return {name: error[kinds == i].tolist() for i, name in enumerate(("other", "last", "subject"))}


def _random_features(
    lab: Lab, transcoder: CrossLayerTranscoder, pairs: Pairs, last_layer: int, leave: torch.Tensor, enter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As many random active features of the same layers as the place features that are active."""
    generator = torch.Generator().manual_seed(4)
    result = []
    for active, chosen in zip(active_at_cities(lab.model, transcoder, pairs), (leave, enter), strict=True):
        active = active.clone()
        active[:, last_layer + 1 :] = False
        count = (active & chosen).flatten(1).sum(1)
        lottery = torch.rand(active.shape, generator=generator) * (active & ~chosen)
        rank = lottery.flatten(1).argsort(descending=True).argsort().view(active.shape)
        result.append((rank < count[:, None, None]) & active & ~chosen)
    return result[0], result[1]
