"""Clusters of directions: where the features of a transcoder start."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ROUNDS = 8


def spherical_clusters(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator, *, at_once: int = 1
) -> tuple[Float[Tensor, "cluster d_model"], Int[Tensor, " token"]]:
    """Unit centres of `n` clusters of unit vectors, and the cluster of each (spherical k-means, k-means++ start).

    Centres drawn at once may lie close to each other; drawing them one by one takes `n` passes over the vectors.
    """
    centres = _spread(directions, n, generator, at_once)
    for _ in range(ROUNDS):
        member = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, member, directions)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, functional.normalize(sums, dim=1), centres)
    return centres, (directions @ centres.T).argmax(1)


def _spread(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator, at_once: int
) -> Float[Tensor, "cluster d_model"]:
    """Vectors drawn with a chance that grows with the squared distance from those drawn before."""
    centres = directions.new_zeros(n, directions.shape[1])
    distance = directions.new_ones(len(directions))
    for first in range(0, n, at_once):
        last = min(first + at_once, n)
        drawn = torch.multinomial(distance.cpu() + 1e-9, last - first, generator=generator).to(directions.device)
        centres[first:last] = directions[drawn]
        nearest = (directions @ directions[drawn].T).amax(1)
        distance = torch.minimum(distance, (1 - nearest).clamp(min=0))
    return centres
