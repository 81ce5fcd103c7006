"""The sparse operations of `kernels.Kernels` in Triton, for GPUs: no atomics, so sums are the same every time.

Programs run column block by column block: the slice of all rows that one block reads stays in the level-2 cache.
"""
# Triton makes constants of plain numbers itself.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

COLUMNS = 512
"""Numbers of a row that one program reads; of 16,384 rows in bfloat16 they fill a third of an H200's level-2 cache."""
ROWS = 8
"""Rows that one program has on the way at once."""
SCAN = 1024
"""Pre-activations that one program compares at once."""


def find_above(
    pre_activation: Float[Tensor, "token feature"], threshold: float | Float[Tensor, "*#feature"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Token, feature and value of what exceeds its threshold, token by token."""
    n_tokens, n_features = pre_activation.shape
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, device=pre_activation.device)
    threshold = threshold.expand(n_features)
    start = torch.zeros(n_tokens + 1, dtype=torch.int64, device=pre_activation.device)
    shared = (pre_activation, threshold, start, n_features, pre_activation.stride(0), threshold.stride(0))
    if n_tokens:
        _count_above[(n_tokens,)](*shared, SCAN=SCAN)
    start = start.cumsum(0)
    n_pairs = int(start[-1])  # the one wait: arrays need their size
    token, feature = torch.empty(2, n_pairs, dtype=torch.int64, device=pre_activation.device)
    value = pre_activation.new_empty(n_pairs)
    if n_pairs:
        _write_above[(n_tokens,)](*shared[:2], start, *shared[3:], token, feature, value, SCAN=SCAN)
    return token, feature, value


def sum_rows(
    value: Float[Tensor, " pair"],
    index: Int[Tensor, " pair"],
    start: Int[Tensor, " segment_and_end"],
    table: Float[Tensor, "row width"],
    dtype: torch.dtype,
) -> Float[Tensor, "segment width"]:
    """For each segment of consecutive pairs the sum of value · table[index]; 0 where a segment is empty."""
    table = _with_dense_rows(table)
    n_segments, width = len(start) - 1, table.shape[1]
    total = torch.empty(n_segments, width, dtype=dtype, device=table.device)
    if total.numel():
        grid = (n_segments, triton.cdiv(width, COLUMNS))
        _sum_rows[grid](
            value, index, start, table, total, width, table.stride(0),
            SUM=_sum_type(table), ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return total


def dot_rows(
    left: Float[Tensor, "segment width"],
    start: Int[Tensor, " segment_and_end"],
    index: Int[Tensor, " pair"],
    right: Float[Tensor, "row width"],
) -> Float[Tensor, " pair"]:
    """For each pair left[its segment] · right[index]."""
    left, right = _with_dense_rows(left), _with_dense_rows(right)
    n_blocks = triton.cdiv(left.shape[1], COLUMNS)
    dtype = torch.promote_types(right.dtype, torch.float32)
    parts = torch.empty(n_blocks, len(index), dtype=dtype, device=left.device)
    if parts.numel():
        _dot_rows[(len(left), n_blocks)](
            left, start, index, right, parts, left.shape[1], len(index), left.stride(0), right.stride(0),
            SUM=_sum_type(right), ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return parts.sum(0)


@triton.jit
def _count_above(pre_activation, threshold, start, n_features, token_stride, threshold_stride, SCAN: tl.constexpr):
    """Number of features of one token above their thresholds, to where its successor's place is made from."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.full((SCAN,), 0, tl.int32)
    for first in range(0, n_features, SCAN):
        feature = first + tl.arange(0, SCAN)
        there = feature < n_features
        z = tl.load(pre_activation + token * token_stride + feature, mask=there, other=0)
        count += ((z > tl.load(threshold + feature * threshold_stride, mask=there, other=0)) & there).to(tl.int32)
    tl.store(start + token + 1, tl.sum(count, 0).to(tl.int64))


@triton.jit
def _write_above(
    pre_activation, threshold, start, n_features, token_stride, threshold_stride, tokens, features, values,
    SCAN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(start + token)
    for first in range(0, n_features, SCAN):
        feature = first + tl.arange(0, SCAN)
        there = feature < n_features
        z = tl.load(pre_activation + token * token_stride + feature, mask=there, other=0)
        above = (z > tl.load(threshold + feature * threshold_stride, mask=there, other=0)) & there
        rank = tl.cumsum(above.to(tl.int32), 0)
        mine = place + rank - 1
        tl.store(tokens + mine, token, mask=above)
        tl.store(features + mine, feature.to(tl.int64), mask=above)
        tl.store(values + mine, z, mask=above)
        place += tl.max(rank, 0)


@triton.jit
def _sum_rows(
    value, index, start, table, total, width, table_stride,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of columns of one segment's sum."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    end = tl.load(start + segment + 1)
    # one sum for each row on the way, added up at the end: no exchange between threads in the loop
    sums = tl.full((ROWS, COLUMNS), 0, SUM)
    for first in range(tl.load(start + segment), end, ROWS):
        pair = first + tl.arange(0, ROWS)
        there = pair < end
        row = tl.load(index + pair, mask=there, other=0)
        weight = tl.load(value + pair, mask=there, other=0).to(SUM)
        place = row[:, None] * table_stride + column[None, :]
        sums += weight[:, None] * tl.load(table + place, mask=there[:, None] & inside[None, :], other=0).to(SUM)
    tl.store(total + segment * width + column, tl.sum(sums, 0).to(total.dtype.element_ty), mask=inside)


@triton.jit
def _dot_rows(
    left, start, index, right, parts, width, n_pairs, left_stride, right_stride,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of columns' share in the products of one segment's pairs."""
    segment = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    own = tl.load(left + segment * left_stride + column, mask=inside, other=0).to(SUM)
    end = tl.load(start + segment + 1)
    for first in range(tl.load(start + segment), end, ROWS):
        pair = first + tl.arange(0, ROWS)
        there = pair < end
        row = tl.load(index + pair, mask=there, other=0)
        place = row[:, None] * right_stride + column[None, :]
        other = tl.load(right + place, mask=there[:, None] & inside[None, :], other=0).to(SUM)
        tl.store(parts + block * n_pairs + pair, tl.sum(own[None, :] * other, 1), mask=there)


def _sum_type(table: Tensor) -> tl.dtype:
    return tl.float64 if table.dtype == torch.float64 else tl.float32


def _with_dense_rows(table: Tensor) -> Tensor:
    """Rows may lie apart, so that a slice of a wider array needs no copy; the numbers of a row may not."""
    return table if table.stride(1) == 1 else table.contiguous()
