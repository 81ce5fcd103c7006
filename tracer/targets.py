"""What to explain: the top logits, named tokens, or the difference of two."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.errors import TraceError
from tracer.replacement import LocalReplacementModel


@dataclass(frozen=True)
class Targets:
    """Directions at the final norm's output at the last position, and what they stand for."""

    names: tuple[str, ...]
    token_ids: tuple[int, ...]
    """−1 for a direction that is no single token."""
    direction: Float[Tensor, "target d_model"]
    weight: Float[Tensor, " target"]
    """How much each counts in the influence: the token's probability, or 1 for a difference."""
    value: Float[Tensor, " target"]
    """What the row of this target must sum to: the logit less the mean logit, or the difference of two logits."""
    bias: Float[Tensor, " target"]
    """The part of `value` that comes from the unembedding's own bias."""


def top_targets(
    local: LocalReplacementModel, names: dict[int, str], *, max_logits: int = 10, logit_mass: float = 0.95
) -> Targets:
    """The most probable tokens until their probabilities reach `logit_mass`, at most `max_logits`."""
    ids, _ = top_tokens(local, max_logits=max_logits, logit_mass=logit_mass)
    return token_targets(local, tuple(ids), tuple(names[i] for i in ids))


def top_tokens(
    local: LocalReplacementModel, *, max_logits: int = 10, logit_mass: float = 0.95
) -> tuple[list[int], list[float]]:
    """Ids and probabilities of the most probable next tokens."""
    probability = local.logits[-1].softmax(-1)
    top = probability.topk(min(max_logits, len(probability)))
    n = int((top.values.cumsum(0) < logit_mass).sum()) + 1
    return top.indices[:n].tolist(), top.values[:n].tolist()


def token_targets(local: LocalReplacementModel, token_ids: tuple[int, ...], names: tuple[str, ...]) -> Targets:
    """Named tokens, each weighted by its probability and taken relative to the mean logit."""
    chosen = list(token_ids)
    logits = local.uncapped_logits[-1]
    unembedding, bias = local.unembedding, local.unembedding_bias
    return Targets(
        names, token_ids,
        unembedding[chosen] - unembedding.mean(0),
        local.logits[-1].softmax(-1)[chosen],
        logits[chosen] - logits.mean(),
        bias[chosen] - bias.mean(),
    )  # fmt: skip


def difference_target(local: LocalReplacementModel, plus: int, minus: int, name: str) -> Targets:
    """The logit of one token less that of another."""
    if plus == minus:
        raise TraceError("target and target_minus are the same token; name two different ones.")
    logits = local.uncapped_logits[-1]
    return Targets(
        (name,), (-1,),
        (local.unembedding[plus] - local.unembedding[minus])[None],
        torch.ones(1, dtype=logits.dtype, device=logits.device),
        (logits[plus] - logits[minus])[None],
        (local.unembedding_bias[plus] - local.unembedding_bias[minus])[None],
    )  # fmt: skip
