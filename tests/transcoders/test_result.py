"""What a training run saves is what its last checkpoint holds, in the units of the model's own activations."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tracer.conftest import tiny_llama
from tests.transcoders.test_train import SMALL, trained
from transcoders import TranscoderError, load
from transcoders.checkpoint import save_whole
from transcoders.model import CrossLayerTranscoder
from transcoders.progress import COMMON, latest, read_features, read_tensors
from transcoders.result import result_of
from transcoders.scales import scales_of
from transcoders.train import shape_of

FEW = replace(SMALL, tokens=3 * 256, skip=True)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "topk", "relu"])
def test_what_is_saved_computes_what_the_checkpoint_learnt(tmp_path, activation):
    saved = trained(tmp_path, replace(FEW, activation=activation))
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    tensors = read_features(checkpoint, range(48)) | read_tensors(checkpoint / COMMON)
    scales = scales_of(tensors)
    learnt = CrossLayerTranscoder(replace(saved.config))
    with torch.no_grad():
        for name, weight in learnt.named_parameters():
            weight.copy_(tensors[f"weight:{name}"])
        if activation == "jumprelu":
            learnt.threshold.copy_(tensors["weight:threshold"])
        if activation == "batchtopk":
            norms = torch.stack([decoder.flatten(1).norm(dim=1) for decoder in learnt.W_dec])
            learnt.threshold.copy_(tensors["threshold"] / norms)
    inputs = torch.randn(saved.config.n_layers, 20, saved.config.d_model, generator=torch.Generator().manual_seed(1))
    expected = learnt(inputs * scales.inputs[:, None, None]) / scales.outputs[:, None, None]
    torch.testing.assert_close(saved(inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_moments_of_a_checkpoint_are_not_read_for_the_transcoder(tmp_path):
    saved = trained(tmp_path, FEW)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    [path] = checkpoint.glob("features-*.safetensors")
    tensors = load_file(path)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight:")}
    assert len(weights) < len(tensors) / 2
    save_file(weights, path)
    save_whole(result_of(tmp_path, shape_of(tiny_llama(0), FEW, ""), FEW), tmp_path / "again")
    for name, tensor in load(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name


def test_a_run_without_a_checkpoint_has_no_transcoder_yet(tmp_path):
    with pytest.raises(TranscoderError, match="has no checkpoint yet; train on"):
        result_of(tmp_path, shape_of(tiny_llama(0), FEW, ""), FEW)
