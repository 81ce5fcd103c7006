"""Clusters of directions: where the features of a transcoder start."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ROUNDS = 8


def spherical_clusters(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "cluster d_model"], Int[Tensor, " token"]]:
    """Unit centres of `n` clusters of unit vectors, and the cluster of each (spherical k-means, k-means++ start)."""
    centres = _spread(directions, n, generator)
    for _ in range(ROUNDS):
        member = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, member, directions)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, functional.normalize(sums, dim=1), centres)
    return centres, (directions @ centres.T).argmax(1)


def _spread(
    directions: Float[Tensor, "token d_model"], n: int, generator: torch.Generator
) -> Float[Tensor, "cluster d_model"]:
    """Vectors drawn one by one, each with a chance that grows with its squared distance from those drawn before."""
    centres = directions.new_zeros(n, directions.shape[1])
    distance = torch.ones(len(directions))
    for number in range(n):
        drawn = int(torch.multinomial(distance + 1e-9, 1, generator=generator))
        centres[number] = directions[drawn]
        distance = torch.minimum(distance, (1 - directions @ directions[drawn]).clamp(min=0))
    return centres
