"""The sparse operations of `kernels.Kernels` in plain torch: what was fastest on CPUs (docs/benchmarks.md)."""

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def find_above(
    pre_activation: Float[Tensor, "token feature"], threshold: float | Float[Tensor, "*#feature"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Token, feature and value of what exceeds its threshold, token by token."""
    above = (pre_activation > threshold).flatten()
    # numpy finds them in a fifth of torch's time
    place = torch.from_numpy(np.flatnonzero(above.numpy())) if above.device.type == "cpu" else above.nonzero()[:, 0]
    token = place // pre_activation.shape[1]
    return token, place - token * pre_activation.shape[1], pre_activation.flatten()[place]


def sum_rows(
    value: Float[Tensor, " pair"],
    index: Int[Tensor, " pair"],
    start: Int[Tensor, " segment_and_end"],
    table: Float[Tensor, "row width"],
    dtype: torch.dtype,
) -> Float[Tensor, "segment width"]:
    """For each segment of consecutive pairs the sum of value · table[index]; 0 where a segment is empty."""
    table = _widened(table)
    total = embedding_bag(
        index, table, start, mode="sum", per_sample_weights=value.to(table.dtype), include_last_offset=True
    )
    return total.to(dtype)


def dot_rows(
    left: Float[Tensor, "segment width"],
    start: Int[Tensor, " segment_and_end"],
    index: Int[Tensor, " pair"],
    right: Float[Tensor, "row width"],
) -> Float[Tensor, " pair"]:
    """For each pair left[its segment] · right[index]."""
    left, right = _widened(left), _widened(right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse matrices in rows are in beta
        wanted = torch.sparse_csr_tensor(
            start, index, left.new_zeros(len(index)), (len(left), len(right)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(wanted, left, right.T, beta=0).values()


def _widened(table: Tensor) -> Tensor:
    """Half-precision rows as float32, in which they are summed."""
    return table.to(torch.promote_types(table.dtype, torch.float32))
