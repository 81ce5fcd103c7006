"""Features that never fire start anew, as clusters of what is explained worst."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders import CrossLayerTranscoder
from transcoders.loss import relative_error
from transcoders.start import start_layer

LAYERS = (0, 3, 4, 5)
"""Where places are recognised features stay silent: new ones would share a place with the feature that has it."""
WORST = 0.25
"""Share of the sites, by error, that new features are made of."""
SAMPLE = 20_000
"""Of those, for each layer."""
FIRING = 1.5
"""New features of a layer that fire on such a site, on average."""
AT_ONCE = 8192


@torch.no_grad()
def revive(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer site d_model"],
    outputs: Float[Tensor, "layer site d_model"],
    error_floor: float,
    generator: torch.Generator,
) -> None:
    """Replace the features that fire on none of the sites, in place; they write to their own layer at first."""
    alive = torch.zeros_like(transcoder.threshold, dtype=torch.bool)
    errors, rests = [], []
    for read, written in zip(inputs.split(AT_ONCE, dim=1), outputs.split(AT_ONCE, dim=1), strict=True):
        activations = transcoder.encode(read)
        alive |= (activations > 0).any(1)
        reconstruction = transcoder.decode(activations)
        errors.append(relative_error(reconstruction, written, error_floor))
        rests.append(written - reconstruction)
    error, rest = torch.cat(errors, 1), torch.cat(rests, 1)
    for layer in LAYERS:
        [silent] = (~alive[layer]).nonzero(as_tuple=True)
        if len(silent) < 2:
            continue
        worst = error[layer].topk(round(WORST * error.shape[1])).indices
        worst = worst[torch.randperm(len(worst), generator=generator)[:SAMPLE]]
        read = inputs[layer, worst]
        start = start_layer(read, rest[layer, worst], len(silent), 2, error_floor, generator)
        transcoder.W_enc[layer][silent] = start.W_enc
        transcoder.b_enc[layer][silent] = start.b_enc
        transcoder.W_dec[layer][silent] = 0
        transcoder.W_dec[layer][silent, 0] = start.W_dec
        pre_activation = read @ start.W_enc.T + start.b_enc
        share = 1 - min(1.0, FIRING / len(silent))
        transcoder.threshold[layer][silent] = pre_activation.quantile(share, dim=0).clamp(min=0)
