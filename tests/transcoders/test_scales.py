"""Scales: what is saved reads activations as they come, and sinks decide how errors are weighed."""

from dataclasses import replace

import pytest
import torch

from tests.transcoders.planted import PlantedStream, planted_activations, planted_transcoder
from tests.transcoders.test_train import assert_same
from transcoders import TrainConfig, TranscoderConfig, load
from transcoders.checkpoint import as_stored, in_memory
from transcoders.model import CrossLayerTranscoder
from transcoders.parallel import Place
from transcoders.scales import Scales, folded, measure_scales
from transcoders.train import Reporting, learn

SCALES = Scales(
    torch.tensor([0.3, 5.0, 1.7], dtype=torch.float64), torch.tensor([40.0, 0.02, 1.3], dtype=torch.float64),
    torch.ones(3), torch.ones(3), False,
)  # fmt: skip


def random_transcoder(*, cross_layer, skip):
    """In float64."""
    config = TranscoderConfig(3, 8, 20, "jumprelu", cross_layer=cross_layer, skip=skip)
    transcoder = CrossLayerTranscoder(config).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in transcoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    transcoder.threshold.copy_(torch.rand(3, 20, generator=generator, dtype=torch.float64) * 3)
    return transcoder


@pytest.mark.parametrize(("cross_layer", "skip"), [(True, True), (True, False), (False, True)])
def test_a_folded_transcoder_writes_of_raw_activations_what_the_trained_one_wrote_of_scaled_ones(cross_layer, skip):
    trained = random_transcoder(cross_layer=cross_layer, skip=skip)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(3, 50, 8, generator=generator, dtype=torch.float64) / SCALES.inputs[:, None, None]
    scaled = raw * SCALES.inputs[:, None, None]
    expected = trained(scaled) / SCALES.outputs[:, None, None]
    fires = trained.encode(scaled)
    assert 0.05 < float((fires > 0).double().mean()) < 0.4
    assert bool((trained.pre_activations(scaled) > 0)[fires == 0].any())  # kept silent by a threshold
    transcoder = in_memory(folded(as_stored(trained), SCALES), dtype=torch.float64)
    torch.testing.assert_close(transcoder.encode(raw), fires, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(transcoder(raw), expected, atol=1e-12 * float(expected.abs().max()), rtol=1e-12)


def learnt(folder, *, has_sinks, balanced):
    folder.mkdir()
    planted = planted_transcoder(2, 8, 16)
    inputs, outputs, _ = planted_activations(planted, 512, 3, torch.Generator().manual_seed(0))
    scales = replace(measure_scales(inputs, outputs), has_sinks=has_sinks)
    config = TrainConfig(
        n_features=16, k=3, tokens=5 * 128, batch_tokens=128, buffer_tokens=256, balanced=balanced, warm_up=1
    )
    seen = inputs, outputs, torch.ones(512, dtype=torch.int64)
    learn({0: PlantedStream(planted, scales, 3, seed=1)}, scales, seen, TranscoderConfig(2, 8, 16, "relu"), config,
          folder, place=Place(), reporting=Reporting())  # fmt: skip
    return load(folder / "transcoder")


def test_errors_are_balanced_by_default_where_there_are_sinks_and_only_there(tmp_path):
    balanced, plain = (learnt(tmp_path / str(b), has_sinks=False, balanced=b) for b in (True, False))
    assert float((balanced.W_enc - plain.W_enc).abs().max()) > 1e-4
    assert_same(learnt(tmp_path / "sinks", has_sinks=True, balanced=None), balanced)
    assert_same(learnt(tmp_path / "none", has_sinks=False, balanced=None), plain)


def test_what_was_asked_for_is_done_whatever_the_sinks(tmp_path):
    for balanced in (True, False):
        with_sinks, without = (
            learnt(tmp_path / f"{balanced}-{has_sinks}", has_sinks=has_sinks, balanced=balanced)
            for has_sinks in (True, False)
        )
        assert_same(with_sinks, without)
