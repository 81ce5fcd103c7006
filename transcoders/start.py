"""Where training starts: every feature is a cluster of what an MLP reads, and writes what the MLP writes there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from transcoders.activation import top_k
from transcoders.loss import error_scale

MARGIN = 0.5
"""At the start a feature fires where the cosine with its cluster's centre is above this."""
ROUNDS = 8
BLOCK_BYTES = 1 << 28
"""Memory for numbers of every token and feature, which are made for some tokens at a time."""
COPIES = 5
"""Arrays of float32 numbers for every feature that a block's tokens need at once."""


@dataclass(frozen=True)
class LayerStart:
    """First weights of one layer; its features write to their own layer only."""

    W_enc: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]


def go_on() -> None:
    """What is called between blocks, where nobody wants to end it."""


@torch.no_grad()
def start_layer(
    inputs: Float[Tensor, "token d_model"],
    outputs: Float[Tensor, "token d_model"],
    n_features: int,
    k: int,
    error_floor: float,
    generator: torch.Generator,
    *,
    at_once: int = 1,
    on_block: Callable[[], None] = go_on,
) -> LayerStart:
    """Let features fire near the centres of clusters and write the mean MLP output there, scaled to the least error.

    `at_once` centres are drawn at a time (see `spherical_clusters`); at most k features fire on a token. `on_block`
    is called often, and may raise. Beside the activations, a copy of both and some blocks of them are held.
    """
    centre, b_dec = inputs.mean(0), outputs.mean(0)
    read = inputs - centre
    size = read.norm(dim=-1).clamp(min=1e-6)
    directions, member = spherical_clusters(
        read.div_(size[:, None]), n_features, generator, at_once=at_once, on_block=on_block
    )
    del read
    count = torch.bincount(member, minlength=n_features).clamp(min=1)
    typical = torch.zeros_like(directions[:, 0]).index_add_(0, member, size) / count
    b_enc = -directions @ centre - MARGIN * typical
    rest = outputs - b_dec
    written = torch.zeros_like(directions).index_add_(0, member, rest) / count[:, None]
    W_dec = written / ((1 - MARGIN) * typical).clamp(min=1e-6)[:, None]
    weight = 1 / error_scale(outputs[None], error_floor)[0, :, None]
    along = square = outputs.new_zeros(())
    for block in blocks(len(inputs), n_features):
        on_block()
        reconstruction = top_k(inputs[block] @ directions.T + b_enc, k) @ W_dec
        along = along + (weight[block] * reconstruction * rest[block]).sum()
        square = square + (weight[block] * reconstruction.square()).sum()
    return LayerStart(directions, b_enc, W_dec * (along / square.clamp(min=1e-12)), b_dec)


def spherical_clusters(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator, *, at_once: int = 1,
    on_block: Callable[[], None] = go_on,
) -> tuple[Float[Tensor, "cluster d_model"], Int[Tensor, " token"]]:  # fmt: skip
    """Unit centres of `n` clusters of unit vectors, and the cluster of each (spherical k-means, k-means++ start).

    Centres drawn at once may lie close to each other; drawing them one by one takes `n` passes over the vectors.
    """
    centres = _spread(directions, n, generator, at_once, on_block)
    for _ in range(ROUNDS):
        _, member = _nearest(directions, centres, on_block)
        sums = torch.zeros_like(centres).index_add_(0, member, directions)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    return centres, _nearest(directions, centres, on_block)[1]


def _spread(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator, at_once: int,
    on_block: Callable[[], None],
) -> Float[Tensor, "cluster d_model"]:  # fmt: skip
    """Vectors drawn with a chance that grows with the squared distance from those drawn before."""
    centres = directions.new_zeros(n, directions.shape[1])
    distance = directions.new_ones(len(directions))
    for first in range(0, n, at_once):
        last = min(first + at_once, n)
        drawn = torch.multinomial(distance.cpu() + 1e-9, last - first, generator=generator).to(directions.device)
        centres[first:last] = directions[drawn]
        cosine, _ = _nearest(directions, directions[drawn], on_block)
        distance = torch.minimum(distance, (1 - cosine).clamp(min=0))
    return centres


def _nearest(
    directions: Float[Tensor, "token d_model"], centres: Float[Tensor, "cluster d_model"], on_block: Callable[[], None]
) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:  # fmt: skip
    """The cosine with each vector's nearest centre, and that centre's number."""
    cosine = directions.new_zeros(len(directions))
    member = torch.zeros_like(cosine, dtype=torch.int64)
    for block in blocks(len(directions), len(centres)):
        on_block()
        cosine[block], member[block] = (directions[block] @ centres.T).max(1)
    return cosine, member


def blocks(n_tokens: int, n_features: int) -> Iterator[slice]:
    """The tokens in parts whose arrays of a number for each token and feature stay within `BLOCK_BYTES`."""
    length = max(1, BLOCK_BYTES // (4 * COPIES * n_features))
    for first in range(0, n_tokens, length):
        yield slice(first, min(first + length, n_tokens))
