"""From TopK to JumpReLU: a threshold for every feature."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.model import CrossLayerTranscoder


@torch.no_grad()
def set_thresholds(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer token d_model"],
    shares: Sequence[float],
) -> None:
    """Make it JumpReLU, in place: features are silent below a share of their largest activation.

    `shares` has one number per layer. Weak firings are most of what makes a feature fire at things it is not about.
    """
    largest = transcoder.encode(inputs).max(1).values
    transcoder.threshold.copy_(largest * torch.tensor(shares)[:, None])
    transcoder.config = replace(transcoder.config, activation="jumprelu", k=0)
