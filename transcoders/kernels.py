"""Sparse encode and decode: work for the features that fire, not for all of them.

Everything rests on three operations, written twice: in torch (`kernels_torch`) and in Triton for CUDA
(`kernels_triton`). A pair is one feature that fires on one token.
"""

# `once_differentiable` hides the names of what it wraps.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoders import kernels_torch

BREAK_EVEN = {"cpu": 0.12, "cuda": 0.01}
"""Where a larger share of features fires on a token, dense products take less time, by kind of device.

The CPU's is measured (docs/benchmarks.md), forward and backward together: 0.2 for rows of 1,024 numbers, 0.12 for
3,072. That of CUDA is an estimate from an H200's matrix rate and bandwidth, not measured.
"""
Threshold = float | Float[Tensor, ""] | Float[Tensor, " feature"]


class Selection(NamedTuple):
    """The features of one layer that fire, token by token."""

    token: Int[Tensor, " pair"]
    """In ascending order."""
    feature: Int[Tensor, " pair"]
    value: Float[Tensor, " pair"]
    """The feature's activation at the token; differentiable."""


@runtime_checkable
class Kernels(Protocol):
    """The three operations; rows of half precision are summed in float32."""

    def find_above(
        self, pre_activation: Float[Tensor, "token feature"], threshold: Threshold
    ) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Token, feature and value of what exceeds its threshold, token by token."""
        ...

    def sum_rows(
        self,
        value: Float[Tensor, " pair"],
        index: Int[Tensor, " pair"],
        start: Int[Tensor, " segment_and_end"],
        table: Float[Tensor, "row width"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "segment width"]:
        """For each segment of consecutive pairs the sum of value · table[index]; 0 where a segment is empty."""
        ...

    def dot_rows(
        self,
        left: Float[Tensor, "segment width"],
        start: Int[Tensor, " segment_and_end"],
        index: Int[Tensor, " pair"],
        right: Float[Tensor, "row width"],
    ) -> Float[Tensor, " pair"]:
        """For each pair left[its segment] · right[index]."""
        ...


def select_above(
    pre_activation: Float[Tensor, "token feature"], threshold: Threshold, *, kernels: Kernels | None = None
) -> Selection:
    """What exceeds its threshold. On CUDA the host waits once, for the number of pairs."""
    kernels = kernels or kernels_for(pre_activation)
    token, feature, _ = kernels.find_above(pre_activation.detach(), threshold)
    return Selection(token, feature, _Pick.apply(pre_activation, token, feature))


def select_top(pre_activation: Float[Tensor, "token feature"], k: int) -> Selection:
    """The k largest of each token, those below 0 with activation 0: always k pairs a token, so nothing waits."""
    token, feature, _ = _find_top(pre_activation.detach(), k)
    return Selection(token, feature, _Pick.apply(pre_activation, token, feature).relu())


def sparse_encode(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    threshold: Threshold,
    *,
    kernels: Kernels | None = None,
) -> Selection:
    """The features of a layer whose pre-activation exceeds its threshold, which gets no gradient here.

    Pre-activations have the precision of the inputs and are not kept; the gradient comes from the pairs alone.
    """
    kernels = kernels or kernels_for(inputs)
    return _encode(inputs, W_enc, b_enc, lambda z: kernels.find_above(z, threshold), kernels)


def encode(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    threshold: Threshold,
) -> Selection:
    """As `sparse_encode`, but the gradient by dense products where so many features fire that these take less time.

    Of half-precision inputs these are rounded to half precision, as any dense product of them is.
    """
    kernels = kernels_for(inputs)
    return _encode(inputs, W_enc, b_enc, lambda z: kernels.find_above(z, threshold), kernels, may_be_dense=True)


def sparse_encode_top(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    k: int,
    *,
    kernels: Kernels | None = None,
) -> Selection:
    """The k features of a layer with the largest pre-activations on each token, as `select_top`."""
    kernels = kernels or kernels_for(inputs)
    token, feature, value = _encode(inputs, W_enc, b_enc, lambda z: _find_top(z, k), kernels)
    return Selection(token, feature, value.relu())


def gather_decode(
    value: Float[Tensor, " pair"],
    token: Int[Tensor, " pair"],
    feature: Int[Tensor, " pair"],
    decoder: Float[Tensor, "feature width"],
    n_tokens: int,
    *,
    kernels: Kernels | None = None,
) -> Float[Tensor, "token width"]:
    """What the features write at each token: the sum of value · decoder[feature] over its pairs.

    The width is all layers the features write to, d_model after d_model, so that one gather of a row serves them all.
    Of half-precision decoders the sum is float32; their gradient is summed from rows rounded to their precision.
    """
    return _Decode.apply(value, token, feature, decoder, n_tokens, kernels or kernels_for(decoder))


def decode(
    selection: Selection, decoder: Float[Tensor, "feature width"], n_tokens: int
) -> Float[Tensor, "token width"]:
    """As `gather_decode`, but by a dense product where so many features fire that it takes less time."""
    token, feature, value = selection
    if _is_dense(value, n_tokens, decoder):
        return decode_densely(selection, decoder, n_tokens)
    return gather_decode(value, token, feature, decoder, n_tokens)


def decode_densely(
    selection: Selection, decoder: Float[Tensor, "feature width"], n_tokens: int
) -> Float[Tensor, "token width"]:
    """As `gather_decode`, by one product with all of the decoder."""
    token, feature, value = selection
    activations = decoder.new_zeros(n_tokens, len(decoder)).index_put((token, feature), value.to(decoder.dtype))
    return (activations @ decoder).to(sum_dtype(decoder))


def take(values: Float[Tensor, " feature"], feature: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """One number for each pair, that of its feature; gradients are summed in order, without atomics."""
    return _Take.apply(values, feature)


def n_largest(values: Float[Tensor, " value"], n: int) -> Float[Tensor, " some"]:
    """The n largest numbers, or all if they are fewer, in any order."""
    if n >= len(values):
        return values
    if values.device.type == "cpu":  # numpy finds them in a third of torch's time or less
        return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[-n:])
    return values.topk(n, sorted=False).values


def kernels_for(tensor: Tensor) -> Kernels:
    """Triton for CUDA tensors where it is installed, torch for all others."""
    if tensor.is_cuda and find_spec("triton"):
        from transcoders import kernels_triton  # only here: most machines have neither a GPU nor Triton

        return kernels_triton
    return kernels_torch


def sum_dtype(rows: Tensor) -> torch.dtype:
    """The precision in which rows are summed."""
    return torch.promote_types(rows.dtype, torch.float32)


class _Pick(torch.autograd.Function):
    """Some entries, none twice; torch's own indexing would sort them again to add up their gradients."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(row, column)
        ctx.shape = table.shape
        return table[row, column]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.new_zeros(ctx.shape).index_put_(ctx.saved_tensors, gradient), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        ctx.n_features = len(values)
        return values[feature]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [feature] = ctx.saved_tensors
        order, start = _by_feature(feature, ctx.n_features)
        total = torch.segment_reduce(gradient[order].to(sum_dtype(gradient)), "sum", offsets=start)
        return total.to(gradient.dtype), None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, W_enc: Tensor, b_enc: Tensor, find: Callable, kernels: Kernels, may_be_dense: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre_activation = torch.addmm(b_enc.to(inputs.dtype), inputs, W_enc.to(inputs.dtype).T)
        token, feature, value = find(pre_activation)
        ctx.save_for_backward(inputs, W_enc, b_enc, token, feature)
        ctx.kernels, ctx.may_be_dense = kernels, may_be_dense
        ctx.mark_non_differentiable(token, feature)
        return token, feature, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor, _feature: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, W_enc, b_enc, token, feature = ctx.saved_tensors
        if ctx.may_be_dense and _is_dense(gradient, len(inputs), W_enc):
            wide = inputs.new_zeros(len(inputs), len(W_enc)).index_put_((token, feature), gradient.to(inputs.dtype))
            to_inputs = wide @ W_enc.to(inputs.dtype) if ctx.needs_input_grad[0] else None
            to_bias = wide.sum(0, dtype=sum_dtype(wide)).to(b_enc.dtype)
            return to_inputs, (wide.T @ inputs).to(W_enc.dtype), to_bias, None, None, None
        to_inputs = to_weights = to_bias = None
        if ctx.needs_input_grad[0]:
            start = _starts(token, len(inputs))
            to_inputs = ctx.kernels.sum_rows(gradient, feature, start, W_enc.to(inputs.dtype), inputs.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            order, start = _by_feature(feature, len(W_enc))
            gradient = gradient[order]
            to_weights = ctx.kernels.sum_rows(gradient, token[order], start, inputs, W_enc.dtype)
            to_bias = torch.segment_reduce(gradient.to(sum_dtype(gradient)), "sum", offsets=start).to(b_enc.dtype)
        return to_inputs, to_weights, to_bias, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, token: Tensor, feature: Tensor, decoder: Tensor, n_tokens: int, kernels: Kernels
    ) -> Tensor:
        start = _starts(token, n_tokens)
        ctx.save_for_backward(value, token, feature, decoder, start)
        ctx.kernels = kernels
        return kernels.sum_rows(value, feature, start, decoder, sum_dtype(decoder))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, token, feature, decoder, start = ctx.saved_tensors
        gradient = gradient.to(decoder.dtype)  # half the traffic for half-precision rows, as in a dense product
        to_value = to_decoder = None
        if ctx.needs_input_grad[0]:
            to_value = ctx.kernels.dot_rows(gradient, start, feature, decoder).to(value.dtype)
        if ctx.needs_input_grad[3]:
            order, start = _by_feature(feature, len(decoder))
            to_decoder = ctx.kernels.sum_rows(value[order], token[order], start, gradient, decoder.dtype)
        return to_value, None, None, to_decoder, None, None


def _encode(
    inputs: Tensor, W_enc: Tensor, b_enc: Tensor, find: Callable, kernels: Kernels, *, may_be_dense: bool = False
) -> Selection:
    return Selection(*_Encode.apply(inputs, W_enc, b_enc, find, kernels, may_be_dense))


def _find_top(pre_activation: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    value, feature = pre_activation.topk(k, sorted=False)
    token = torch.arange(len(feature), device=feature.device).repeat_interleave(k)
    return token, feature.flatten(), value.flatten()


def _is_dense(pairs: Tensor, n_tokens: int, table: Float[Tensor, "feature width"]) -> bool:
    """Whether so many features fire that products with all of them take less time."""
    return len(pairs) > BREAK_EVEN.get(table.device.type, BREAK_EVEN["cpu"]) * n_tokens * len(table)


def _by_feature(feature: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """The order of pairs by feature, then token, and where each feature's begin: sums need no atomics."""
    ordered, order = torch.sort(feature.int(), stable=True)
    return order, _starts(ordered, n_features)


def _starts(ordered: Tensor, n_segments: int) -> Tensor:
    """Where the pairs of each segment begin, and where the last end."""
    return torch.searchsorted(ordered, torch.arange(n_segments + 1, dtype=ordered.dtype, device=ordered.device))
