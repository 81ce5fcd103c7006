"""The lab's learner explains a tiny model, the same way every time."""

import pytest
import torch

from examples.lab.learner import Learner, LearnerConfig, start_from
from tests.tracer.conftest import tiny_llama
from tests.transcoders.test_evaluate import batches
from transcoders import CrossLayerTranscoder, TranscoderConfig
from transcoders.activations import mlp_activations


def learned(seed):
    model = tiny_llama(0).requires_grad_(False)
    transcoder = CrossLayerTranscoder(TranscoderConfig(3, 16, 64, "topk", k=8))
    config = LearnerConfig(steps=400, dead_after=20, fewest=(2, 2, 2))
    learner, errors = Learner(transcoder, config), []
    for step, (tokens, keep) in zip(range(400), batches(seed), strict=False):
        inputs, outputs = mlp_activations(model, tokens, keep, "mlp.hook_in")
        if step == 0:
            start_from(transcoder, inputs, outputs, config)
        loss, error = learner.loss(inputs, outputs)
        loss.backward()
        learner.step()
        errors.append(float(error.detach()))
    return transcoder, errors


@pytest.mark.slow
def test_learning_lowers_the_error_and_is_repeatable():
    first, errors = learned(0)
    second, again = learned(0)
    assert errors == again
    assert errors[0] < 0.4  # clusters of real activations, not noise
    assert errors[-1] < 0.5 * errors[0]
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
