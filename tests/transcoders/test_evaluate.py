"""Relative error weighs tokens alike; a perfect transcoder replaces the MLPs without a trace."""

import pytest
import torch

from tests.tracer.conftest import tiny_llama
from transcoders import TranscoderConfig, TranscoderError, evaluate
from transcoders.activations import mlp_activations, replaced_mlps
from transcoders.families import dissect
from transcoders.loss import relative_error
from transcoders.model import CrossLayerTranscoder


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(2, 42, (32, 8), generator=generator)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        keep[:, 0] = False
        yield tokens, keep


def test_relative_error_weighs_every_token_alike():
    output = torch.tensor([[[100.0, 0.0], [1.0, 0.0]]])
    assert relative_error(0.9 * output, output)[0].tolist() == pytest.approx([0.01, 0.01])
    assert relative_error(torch.zeros_like(output), output, floor=1.0)[0, 1] == pytest.approx(1 / (1 + 10001 / 2))


def test_a_transcoder_that_equals_the_mlps_replaces_them():
    model = tiny_llama(3, n_layers=2, biases=False).requires_grad_(False)
    transcoder = CrossLayerTranscoder(TranscoderConfig(2, 16, 24, "relu")).requires_grad_(False)
    for layer, block in enumerate(model.model.layers):
        up, down = block.mlp.up_proj.weight, block.mlp.down_proj.weight
        block.mlp.forward = lambda x, up=up, down=down: (x @ up.T).relu() @ down.T
        transcoder.W_enc[layer] = up
        transcoder.W_dec[layer][:, 0] = down.T
    tokens, keep = next(batches(1))
    with replaced_mlps(model, transcoder):
        replaced = model(tokens).logits
    torch.testing.assert_close(replaced, model(tokens).logits, atol=1e-5, rtol=1e-5)
    report = evaluate(model, transcoder, tokens, keep, torch.full((32,), 7))
    assert report.top1_match == 1
    assert report.kl == pytest.approx(0, abs=1e-6)
    assert report.relative_error == pytest.approx(0, abs=1e-6)


def test_activations_are_what_the_mlps_read_and_wrote():
    model = tiny_llama(0)
    tokens, keep = next(batches(2))
    inputs, outputs = mlp_activations(model, tokens, keep, "mlp.hook_in")
    assert inputs.shape == (3, 32 * 7, 16)
    for layer, part in enumerate(dissect(model).layers):
        torch.testing.assert_close(part.mlp(inputs[layer]), outputs[layer])


def test_an_unknown_family_is_refused_with_the_known_ones():
    model = tiny_llama(0)
    model.config.model_type = "mystery"
    with pytest.raises(TranscoderError, match=r"'mystery' cannot be traced yet; known types: llama"):
        dissect(model)
