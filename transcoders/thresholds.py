"""From TopK to JumpReLU: a threshold for every feature."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.model import CrossLayerTranscoder


@torch.no_grad()
def with_thresholds(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    shares: Sequence[float],
) -> CrossLayerTranscoder:
    """The same weights as JumpReLU: features are silent below a share of their largest activation.

    `shares` has one number per layer. Weak firings are most of what makes a feature fire at things it is not about.
    """
    result = CrossLayerTranscoder(replace(transcoder.config, activation="jumprelu", k=0))
    result.load_state_dict(transcoder.state_dict())
    for layer, (read, share) in enumerate(zip(inputs, shares, strict=True)):
        result.threshold[layer] = share * transcoder.encode_layer(layer, read).max(0).values
    return result
