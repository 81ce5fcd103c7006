"""The last part of the lab transcoder's training: decoders solved, and learnt on questions about invented names."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.lab.decoders import DECODERS, LAYERS, finish_decoders, solved_decoders
from examples.lab.invented import invented
from tracer import lab as bundled
from transcoders import CrossLayerTranscoder, TranscoderConfig, load
from transcoders.loss import relative_error

FLOOR = 0.02


@pytest.fixture
def made() -> tuple[CrossLayerTranscoder, torch.Tensor]:
    """A random transcoder of three layers, and inputs of every one."""
    generator = torch.Generator().manual_seed(0)
    transcoder = CrossLayerTranscoder(TranscoderConfig(3, 8, 12, "relu"))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return transcoder.requires_grad_(False), torch.randn(3, 4000, 8, generator=generator)


def test_decoders_that_explain_everything_are_found_again(made, monkeypatch):
    monkeypatch.setattr("examples.lab.decoders.RIDGE", 0.0)
    transcoder, inputs = made
    outputs = transcoder.decode(transcoder.encode(inputs))
    before = [decoder.clone() for decoder in transcoder.W_dec]
    for layer in (0, 2):
        transcoder.W_dec[layer].add_(0.5)
    solved = solved_decoders(transcoder, inputs, outputs, torch.ones(4000), (0, 2), FLOOR)
    assert list(solved) == [0, 2]
    for layer, decoder in solved.items():
        torch.testing.assert_close(decoder, before[layer], atol=1e-3, rtol=1e-3)


def test_no_step_in_any_direction_leaves_less_error_where_sites_count_by_their_weight(made, monkeypatch):
    monkeypatch.setattr("examples.lab.decoders.RIDGE", 0.0)
    transcoder, inputs = made
    generator = torch.Generator().manual_seed(1)
    outputs, weight = torch.randn(3, 4000, 8, generator=generator), torch.rand(4000, generator=generator)
    solved = solved_decoders(transcoder, inputs, outputs, weight, (0, 1, 2), FLOOR)

    def error_after(share: float) -> float:
        for layer, decoder in solved.items():
            step = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(2))
            transcoder.W_dec[layer].copy_(decoder + share * step)
        error = relative_error(transcoder.decode(transcoder.encode(inputs)), outputs, FLOOR)
        return float((error.double() * weight).sum())

    least = error_after(0.0)
    assert all(error_after(share) > least for share in (0.01, -0.01, 0.1, -0.1))


@pytest.mark.parametrize("family", ["two-hop state", "three-hop"])
def test_names_are_invented_from_pieces_of_names_and_nobody_has_them(lab, family):
    asked = [question for question in lab.questions if question.family == family]
    made = invented(asked, lab.tokenizer, 300, np.random.default_rng(0))
    known = {question.subject for question in asked}
    pieces = {piece for name in known for piece in lab.tokenizer.tokenize(name)}
    assert len({question.subject for question in made}) > 250
    for question in made:
        assert question.subject not in known
        assert question.subject in question.prompt
        assert set(lab.tokenizer.tokenize(question.subject)) <= pieces
    assert {question.answer for question in made} <= {question.answer for question in asked}


@pytest.mark.slow
def test_features_fire_as_before_and_the_other_decoders_stay(lab, monkeypatch):
    monkeypatch.setattr("examples.lab.transcoder.N_REPEATED", 400)
    few = replace(lab, questions=lab.questions[::41])
    before = load(bundled.folder() / "transcoder").float()
    after = finish_decoders(few, load(bundled.folder() / "transcoder").float(), replace(DECODERS, steps=2))
    for name in ("W_enc", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    changed = [not torch.equal(one, other) for one, other in zip(after.W_dec, before.W_dec, strict=True)]
    assert changed == [layer in LAYERS for layer in range(6)]
