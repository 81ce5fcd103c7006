"""Reconstruction errors: pure functions."""

from jaxtyping import Float
from torch import Tensor


def relative_error(
    reconstruction: Float[Tensor, "layer position d_model"],
    output: Float[Tensor, "layer position d_model"],
    floor: float = 0.0,
) -> Float[Tensor, "layer position"]:
    """Squared error of each layer and position as a share of that MLP output's own squared norm.

    Plain squared error is ruled by attention sinks, whose outputs are hundreds of times larger than those that
    decide the answer. `floor` is a share of the layer's mean squared norm, added to the denominator.
    """
    return (reconstruction - output).pow(2).sum(-1) / error_scale(output, floor)


def error_scale(output: Float[Tensor, "layer position d_model"], floor: float) -> Float[Tensor, "layer position"]:
    """What a squared error is divided by: the output's own squared norm and `floor` times the layer's mean of it."""
    size = output.pow(2).sum(-1)
    return size + floor * size.mean(1, keepdim=True)
