"""Thresholds silence weak firings and leave strong ones as they are."""

import pytest
import torch

from transcoders import TranscoderConfig
from transcoders.model import CrossLayerTranscoder
from transcoders.thresholds import set_thresholds


def test_a_feature_is_silent_below_a_share_of_its_largest_activation():
    transcoder = CrossLayerTranscoder(TranscoderConfig(1, 2, 2, "topk", k=2)).requires_grad_(False)
    transcoder.W_enc[0] = torch.eye(2)
    inputs = torch.tensor([[[10.0, 0.0], [4.0, 1.0], [2.0, 3.0]]])
    set_thresholds(transcoder, inputs, [0.3])
    assert transcoder.config.activation == "jumprelu"
    assert transcoder.threshold[0].tolist() == pytest.approx([3.0, 0.9])
    assert transcoder.encode(inputs).tolist() == [[[10.0, 0.0], [4.0, 1.0], [0.0, 3.0]]]


def test_without_a_share_every_positive_pre_activation_fires():
    transcoder = CrossLayerTranscoder(TranscoderConfig(2, 4, 8, "topk", k=3))
    transcoder.initialise(torch.Generator().manual_seed(0))
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    set_thresholds(transcoder, inputs, [0.0, 0.0])
    assert torch.equal(transcoder.encode(inputs), transcoder.pre_activations(inputs).relu())
