"""Activation functions of transcoders: pre-activations in, feature activations out."""

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
