"""Activation functions of transcoders: pre-activations in, feature activations out."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre_activation: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
    """The positive part."""
    return pre_activation.relu()


def jump_relu(
    pre_activation: Float[Tensor, "*batch feature"], threshold: Float[Tensor, "*#batch feature"]
) -> Float[Tensor, "*batch feature"]:
    """The pre-activation where it exceeds the feature's threshold, else 0: z · 1[z > θ]."""
    return pre_activation * (pre_activation > threshold)


def top_k(pre_activation: Float[Tensor, "*batch feature"], k: int) -> Float[Tensor, "*batch feature"]:
    """The positive ones among the k largest of each layer and position, else 0."""
    kth = pre_activation.topk(k, dim=-1).values[..., -1:]
    return pre_activation.relu() * (pre_activation >= kth)


def jump_relu_trained(
    pre_activation: Float[Tensor, "*batch feature"], threshold: Float[Tensor, " feature"], bandwidth: float
) -> Float[Tensor, "*batch feature"]:
    """JumpReLU whose threshold gets a gradient from pre-activations near it (Rajamanoharan et al., 2024)."""
    return _JumpReLU.apply(pre_activation, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    """The step at the threshold has no derivative; a rectangle of width `bandwidth` stands in for it."""

    @staticmethod
    def forward(ctx: Any, pre_activation: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_activation, threshold)
        ctx.bandwidth = bandwidth
        return pre_activation * (pre_activation > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_activation, threshold = ctx.saved_tensors
        [gradient] = gradients
        near = (pre_activation - threshold).abs() < ctx.bandwidth / 2
        lost = -(threshold / ctx.bandwidth) * (gradient * near).sum(tuple(range(gradient.ndim - 1)))
        return gradient * (pre_activation > threshold), lost.to(threshold.dtype), None
