"""What to explain: logits, differences of two, any direction at the model's output, and features, at any position."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.errors import TraceError
from tracer.local import LocalReplacementModel, Prompt
from tracer.replacement import WORD


@dataclass(frozen=True)
class Targets:
    """Directions, where each is read, and what they stand for.

    A target is read at the final norm's output; one that is a feature at what the encoder of its layer reads.
    """

    names: tuple[str, ...]
    token_ids: tuple[int, ...]
    """−1 for a target that is no single token."""
    layers: tuple[int, ...]
    """Of a feature its layer; n_layers for what is read at the final norm's output."""
    positions: tuple[int, ...]
    features: tuple[int, ...]
    """Number within the layer; −1 for a target that is no feature."""
    direction: Float[Tensor, "target d_model"]
    weight: Float[Tensor, " target"]
    """How much each counts in the influence: the token's probability, or 1 for a target that is no token."""
    value: Float[Tensor, " target"]
    """What a row and its bias must sum to: a logit less the mean logit, a difference, or a feature's pre-activation."""
    bias: Float[Tensor, " target"]
    """The part of `value` that comes from the reader's own bias: the unembedding's or the encoder's."""

    def __post_init__(self) -> None:
        if not self.names:
            raise TraceError("no target was given; name at least one.")
        places = zip(self.layers, self.positions, self.features, self.token_ids, self.names, strict=True)
        seen = set()
        for place in places:
            if place in seen:
                raise TraceError(
                    f"the target {place[-1]!r} at position {place[1]} is given twice; give each target once, and "
                    "different directions different names."
                )
            seen.add(place)
        if not bool((self.weight > 0).any()):
            raise TraceError(
                f"the target {self.names[0]!r} has probability 0, so that nothing would be followed; explain its "
                "difference from another token instead."
            )


def top_targets(
    local: LocalReplacementModel,
    token_text: Callable[[int], str],
    *,
    max_logits: int = 10,
    logit_mass: float = 0.95,
    position: int | str = -1,
) -> Targets:
    """The most probable tokens until their probabilities reach `logit_mass`, at most `max_logits`."""
    ids, _ = top_tokens(local, max_logits=max_logits, logit_mass=logit_mass, position=position)
    return token_targets(local, tuple(ids), tuple(token_text(i) for i in ids), position=position)


def top_tokens(
    local: LocalReplacementModel, *, max_logits: int = 10, logit_mass: float = 0.95, position: int | str = -1
) -> tuple[list[int], list[float]]:
    """Ids and probabilities of the tokens most probable after a position."""
    probability = local.logits[find_position(local.prompt, position)].softmax(-1)
    top = probability.topk(min(max_logits, len(probability)))
    n = int((top.values.cumsum(0) < logit_mass).sum()) + 1
    return top.indices[:n].tolist(), top.values[:n].tolist()


def token_targets(
    local: LocalReplacementModel, token_ids: tuple[int, ...], names: tuple[str, ...], *, position: int | str = -1
) -> Targets:
    """Named tokens, each weighted by its probability and taken relative to the mean logit."""
    at, chosen = find_position(local.prompt, position), _in_vocabulary(local, token_ids)
    logits, unembedding, bias = local.uncapped_logits[at], local.unembedding, local.unembedding_bias
    return _at_the_output(
        local, at, names, token_ids,
        unembedding[chosen].to(bias) - unembedding.mean(0, dtype=bias.dtype),
        local.logits[at].softmax(-1)[chosen],
        logits[chosen] - logits.mean(),
        bias[chosen] - bias.mean(),
    )  # fmt: skip


def difference_target(
    local: LocalReplacementModel, plus: int, minus: int, name: str, *, position: int | str = -1
) -> Targets:
    """The logit of one token less that of another."""
    if plus == minus:
        raise TraceError(f"the difference {name!r} is that of a token from itself; name two different ones.")
    at, _ = find_position(local.prompt, position), _in_vocabulary(local, (plus, minus))
    logits, unembedding, bias = local.uncapped_logits[at], local.unembedding, local.unembedding_bias
    return _at_the_output(
        local, at, (name,), (-1,),
        (unembedding[plus].to(bias) - unembedding[minus].to(bias))[None],
        logits.new_ones(1),
        (logits[plus] - logits[minus])[None],
        (bias[plus] - bias[minus])[None],
    )  # fmt: skip


def direction_target(
    local: LocalReplacementModel, direction: Tensor, name: str, *, position: int | str = -1
) -> Targets:
    """Any direction at the final norm's output, as a probe reads it."""
    at, output = find_position(local.prompt, position), local.output
    if direction.shape != output.shape[1:]:
        raise TraceError(
            f"the direction {name!r} has shape {tuple(direction.shape)}; expected ({output.shape[1]},), one number per "
            "dimension of the model's residual stream."
        )
    wide = direction.to(output)
    if not wide.isfinite().all() or not wide.any():
        what = "only zeros" if wide.isfinite().all() else "NaN or infinite values"
        raise TraceError(f"the direction {name!r} holds {what}; give finite numbers that are not all 0.")
    value = (output[at] @ wide)[None]
    return _at_the_output(local, at, (name,), (-1,), wide[None], torch.ones_like(value), value, torch.zeros_like(value))


@torch.no_grad()
def feature_target(local: LocalReplacementModel, layer: int, feature: int, *, position: int | str = -1) -> Targets:
    """The pre-activation of a feature that is active at the position."""
    prompt, active, transcoder = local.prompt, local.features, local.transcoder
    at = find_position(prompt, position)
    for what, number, count in (
        ("layer", layer, transcoder.config.n_layers), ("feature", feature, transcoder.config.n_features)
    ):  # fmt: skip
        if not 0 <= number < count:
            raise TraceError(
                f"feature {layer}/{feature}: the transcoder has no {what} {number}; its {what}s are 0 … {count - 1}."
            )
    everywhere = ((active.layer == layer) & (active.feature == feature)).nonzero()[:, 0]
    here = everywhere[active.position[everywhere] == at]
    word = prompt.words[at] or prompt.tokens[at].strip()
    if not len(here):
        places = ", ".join(map(str, active.position[everywhere].tolist()))
        where = f"it is active at {places}; name one of these" if places else "nor anywhere here; name another feature"
        raise TraceError(f"feature {layer}/{feature} is not active at position {at} ({word!r}), {where}.")
    dtype = local.error.dtype
    return Targets(
        (f"feature {layer}/{feature} at {word}",), (-1,), (layer,), (at,), (feature,),
        transcoder.W_enc[layer][[feature]].to(dtype),
        local.error.new_ones(1),
        active.pre_activation[here].to(dtype),
        transcoder.b_enc[layer][[feature]].to(dtype),
    )  # fmt: skip


def join(*targets: Targets) -> Targets:
    """Several targets, of any kinds, explained by one graph."""
    if not targets:
        raise TraceError("no target was given; name at least one.")
    columns: dict[str, Any] = {}
    for field in fields(Targets):
        parts = [getattr(one, field.name) for one in targets]
        columns[field.name] = torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(chain.from_iterable(parts))
    return Targets(**columns)


def find_position(prompt: Prompt, position: int | str) -> int:
    """A place in the prompt from 0; given so, from the end (−1 is the last), or as a word that occurs once.

    A word of several tokens is read in full only at its last.
    """
    n = len(prompt.tokens)
    if isinstance(position, int):
        if not -n <= position < n:
            raise TraceError(
                f"position {position} is not in the prompt; it has {n} tokens: 0 … {n - 1}, or -{n} … -1 from the end."
            )
        return position % n
    found = [at for at, word in enumerate(prompt.words) if word and word == position]
    if not found:
        words = ", ".join(dict.fromkeys(filter(None, prompt.words)))
        raise TraceError(f"position {position!r} is no word of the prompt; give a number, or one of: {words}.")
    if WORD.findall(prompt.text).count(position) > 1:
        raise TraceError(f"the word {position!r} is at positions {', '.join(map(str, found))}; give one of these.")
    return found[-1]


def _at_the_output(
    local: LocalReplacementModel, at: int, names: tuple[str, ...], token_ids: tuple[int, ...], *columns: Tensor
) -> Targets:
    n = len(names)
    return Targets(names, token_ids, (local.n_layers,) * n, (at,) * n, (-1,) * n, *columns)


def _in_vocabulary(local: LocalReplacementModel, token_ids: tuple[int, ...]) -> list[int]:
    n = len(local.unembedding)
    for token_id in token_ids:
        if not 0 <= token_id < n:
            raise TraceError(f"token {token_id} is not in the vocabulary; the model's tokens are 0 … {n - 1}.")
    return list(token_ids)
