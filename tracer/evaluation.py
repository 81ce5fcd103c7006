"""Judge a transcoder by the model it stands in for: errors, answers with layers replaced, scores of traced prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.config import TraceConfig
from tracer.material import Material
from tracer.memory import explaining_lack_of_memory
from tracer.pipeline import trace
from tracer.precision import computing_in
from tracer.replacement import ReplacementModel
from transcoders import load, load_on_demand
from transcoders.comparison import Comparison, by_norm, by_position, compare, one_by_one
from transcoders.memory import free_memory
from transcoders.passages import passages_of_prompts
from transcoders.reconstruction import (
    Errors,
    answer_norms,
    decoder_norms,
    densities,
    density_histogram,
    errors,
    errors_by_norm,
    errors_by_position,
    reconstruct,
)

TAKE_LESS = "take shorter sequences (--context) or prompts, or load the model in half precision (--dtype bfloat16)"


@dataclass(frozen=True)
class Asked:
    """A prompt, the model's answer, and the answer with all MLPs replaced."""

    prompt: str
    answer: str
    probability: float
    replaced_answer: str
    kl: float
    """Nats."""


@dataclass(frozen=True)
class Traced:
    """A prompt and the scores of its whole graph."""

    asked: Asked
    replacement: float
    completeness: float
    active_features: int


@dataclass(frozen=True)
class Evaluation:
    """All that `trace evaluate` reports."""

    replacement: ReplacementModel
    material: Material
    overall: Errors
    by_norm: list[Errors]
    by_position: list[Errors]
    last: Errors | None
    """At the tokens after which answers are read, where those are not all."""
    histogram: Int[Tensor, "layer bin"]
    decoder_norms: Float[Tensor, "layer layer"]
    alone: list[Comparison]
    """With each layer replaced alone."""
    up_to: list[Comparison]
    """With all layers replaced up to each one."""
    answers_by_norm: list[Comparison]
    """With all layers replaced."""
    answers_by_position: list[Comparison]
    graphs: list[Traced]
    seconds: float

    @property
    def all_replaced(self) -> Comparison:
        """With all layers replaced."""
        return self.up_to[-1]


def ready_to_evaluate(replacement: ReplacementModel, source: str | Path) -> ReplacementModel:
    """The same with the transcoder as wide as sums are and, where it fits, in memory: most decoder rows are needed."""
    config, device = replacement.transcoder.config, replacement.transcoder.W_enc.device
    dtype = torch.promote_types(replacement.transcoder.W_enc.dtype, torch.float32)
    rows = config.n_features * sum(config.reach(layer) for layer in range(config.n_layers))
    fits = 2 * rows * config.d_model * dtype.itemsize < free_memory(device)
    return replace(replacement, transcoder=(load if fits else load_on_demand)(source, device=device, dtype=dtype))


@explaining_lack_of_memory(TAKE_LESS)
def evaluate(
    replacement: ReplacementModel,
    material: Material,
    *,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Measure everything; `on_progress` gets what is being done, how much of it is done and how much there is."""
    start = time.perf_counter()
    model, transcoder = replacement.model, replacement.transcoder
    each, growing = one_by_one(transcoder.config.n_layers)
    with computing_in(model, torch.promote_types(model.dtype, torch.float32)):  # as in a trace
        seen = reconstruct(
            model, transcoder, material.passages, on_progress=lambda n, total: on_progress("reconstructing", n, total)
        )
        answers, compared = compare(
            model, transcoder, material.passages, [*each, *growing[1:]],
            on_progress=lambda n, total: on_progress("replacing layers", n, total),
        )  # fmt: skip
        asked = ask(replacement, material.traced)
    alone, up_to = compared[: len(each)], [compared[0], *compared[len(each) :]]
    graphs = []
    for n, one in enumerate(asked):
        on_progress("tracing", n, len(asked))
        info = trace(one.prompt, replacement, TraceConfig(prune=False)).graph.info
        graphs.append(
            Traced(one, info.replacement_score or 0.0, info.completeness_score or 0.0, info.n_active_features)
        )
    return Evaluation(
        replacement, material, errors(seen), errors_by_norm(seen), errors_by_position(seen),
        errors(seen, seen.readout[None]) if material.reads_last else None, density_histogram(densities(seen)),
        decoder_norms(transcoder), alone, up_to, by_norm(answer_norms(seen), up_to[-1]),
        by_position(answers, up_to[-1]), graphs, time.perf_counter() - start,
    )  # fmt: skip


def ask(replacement: ReplacementModel, prompts: Sequence[str]) -> list[Asked]:
    """Answer each prompt by the model as it is, and with all MLPs replaced."""
    if not prompts:
        return []
    passages = passages_of_prompts([replacement.tokenize(prompt).token_ids for prompt in prompts])
    layers = tuple(range(replacement.transcoder.config.n_layers))
    own, [replaced] = compare(replacement.model, replacement.transcoder, passages, [layers])
    text = replacement.token_text
    return [
        Asked(prompt, text(int(token)), float(probability), text(int(other)), float(kl))
        for prompt, token, probability, other, kl in zip(
            prompts, own.token, own.probability, replaced.token, replaced.kl, strict=True
        )
    ]
