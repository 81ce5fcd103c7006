"""Silent features start anew where the error is largest; the others, and two layers, stay as they are."""

import torch

from examples.lab.revival import LAYERS, revive
from transcoders import CrossLayerTranscoder, TranscoderConfig
from transcoders.loss import relative_error

FLOOR = 0.02


def test_silent_features_explain_what_was_explained_worst_and_others_stay():
    generator = torch.Generator().manual_seed(0)
    transcoder = CrossLayerTranscoder(TranscoderConfig(6, 16, 64, "jumprelu"))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        transcoder.threshold[:, 32:] = 1e9
    inputs = torch.randn(6, 2000, 16, generator=generator)
    outputs = torch.randn(6, 40, 16, generator=generator)[:, torch.arange(2000) % 40]  # to be known by the input
    inputs = inputs * 0.1 + torch.randn(6, 40, 16, generator=generator)[:, torch.arange(2000) % 40]
    before = {name: tensor.clone() for name, tensor in transcoder.state_dict().items()}
    error = relative_error(transcoder.decode(transcoder.encode(inputs)), outputs, FLOOR)
    worst = error.topk(500, dim=1).indices
    revive(transcoder, inputs, outputs, FLOOR, generator)
    activations = transcoder.encode(inputs)
    again = relative_error(transcoder.decode(activations), outputs, FLOOR)
    for layer in range(6):
        alive = before["threshold"][layer] < 1e9
        for name in ("W_enc", "b_enc", "threshold"):
            tensor = transcoder.state_dict()[name]
            assert torch.equal(tensor[layer][alive], before[name][layer][alive])
            assert torch.equal(tensor[layer], before[name][layer]) == (layer not in LAYERS)
        fires = (activations[layer] > 0).any(0)
        assert bool(fires[~alive].any()) == (layer in LAYERS)
        if layer in LAYERS:
            assert float(fires[~alive].float().mean()) > 0.9
            halved = again[layer, worst[layer]] < 0.5 * error[layer, worst[layer]]
            assert float(halved.float().mean()) > 0.1
            assert bool((transcoder.W_dec[layer][~alive, 1:] == 0).all())
