"""Where training starts: every feature is a cluster of what an MLP reads, and writes what the MLP writes there."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.activation import top_k
from transcoders.clusters import spherical_clusters
from transcoders.loss import error_scale

MARGIN = 0.5
"""At the start a feature fires where the cosine with its cluster's centre is above this."""


@dataclass(frozen=True)
class LayerStart:
    """First weights of one layer; its features write to their own layer only."""

    W_enc: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]


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
) -> LayerStart:
    """Let features fire near the centres of clusters and write the mean MLP output there, scaled to the least error.

    `at_once` centres are drawn at a time (see `spherical_clusters`); at most k features fire on a token.
    """
    centre, b_dec = inputs.mean(0), outputs.mean(0)
    rest = outputs - b_dec
    read = inputs - centre
    size = read.norm(dim=-1).clamp(min=1e-6)
    directions, member = spherical_clusters(read / size[:, None], n_features, generator, at_once=at_once)
    count = torch.bincount(member, minlength=n_features).clamp(min=1)
    typical = torch.zeros_like(directions[:, 0]).index_add_(0, member, size) / count
    b_enc = -directions @ centre - MARGIN * typical
    written = torch.zeros_like(directions).index_add_(0, member, rest) / count[:, None]
    W_dec = written / ((1 - MARGIN) * typical).clamp(min=1e-6)[:, None]
    reconstruction = top_k(inputs @ directions.T + b_enc, k) @ W_dec
    weight = 1 / error_scale(outputs[None], error_floor)[0, :, None]
    scale = (weight * reconstruction * rest).sum() / (weight * reconstruction.square()).sum().clamp(min=1e-12)
    return LayerStart(directions, b_enc, W_dec * scale, b_dec)
