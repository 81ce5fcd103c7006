"""Laws of the rows: same logits, conservation, derivatives, invariance, exact influence, honest bounds."""

import dataclasses

import numpy as np
import pytest
import torch

from graphs import NodeKind, node_influence, score
from graphs.graph import logit_weights
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.oracle import dense
from tracer.attribution import attribute
from tracer.errors import TraceError
from tracer.local import linear_logits
from tracer.replacement import ReplacementModel
from tracer.rows import attribution_rows
from tracer.sources import Sources
from tracer.targets import difference_target, join, token_targets, top_tokens
from transcoders import CrossLayerTranscoder, TranscoderConfig


def targets_of(local):
    ids, _ = top_tokens(local)
    return token_targets(local, tuple(ids), tuple(map(str, ids)))


def widened(local):
    """The same frozen model in float64, so that laws hold to rounding."""

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, CrossLayerTranscoder):
            return value.double()
        if isinstance(value, tuple):
            return tuple(map(wide, value)) if not hasattr(value, "_fields") else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: wide(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value

    return wide(local)


def test_the_linear_model_gives_the_models_own_logits(local):
    torch.testing.assert_close(linear_logits(local), local.logits, atol=2e-5, rtol=1e-5)


def test_incoming_edges_and_bias_add_up_to_the_pre_activation(local):
    graph = attribute(local, targets_of(local), coverage=1.0)
    total = np.bincount(graph.target, graph.weight, minlength=graph.n_nodes) + graph.bias
    has_row = ~np.isnan(graph.bias)
    assert has_row.sum() == graph.info.n_active_features + (graph.kind == NodeKind.LOGIT).sum()
    assert total[has_row] == pytest.approx(graph.pre_activation[has_row], abs=1e-4)
    assert graph.info.conservation_error < 1e-5


def test_conservation_holds_to_rounding_in_float64(local):
    wide = widened(local)
    rows = attribution_rows(wide, targets_of(wide), coverage=1.0)
    # pre-activations come from the model's own float32 norms, hence not 1e-15
    assert rows.conservation_error < 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_does_not_change_rows(local, batch_size):
    expected = attribution_rows(local, targets_of(local), coverage=1.0)
    rows = attribution_rows(local, targets_of(local), coverage=1.0, batch_size=batch_size)
    assert torch.equal(rows.target, expected.target)
    assert torch.equal(rows.source, expected.source)
    torch.testing.assert_close(rows.effect, expected.effect, atol=1e-5, rtol=1e-5)


def test_influence_from_the_rows_is_that_of_the_finished_graph(local):
    graph = attribute(local, targets_of(local), coverage=1.0)
    expected = node_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    known = graph.kind != NodeKind.LOGIT
    assert graph.influence[known] == pytest.approx(expected[known], abs=1e-9)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_no_influence_is_understated_by_more_than_was_skipped(local, coverage):
    targets = targets_of(local)
    whole = attribution_rows(local, targets, coverage=1.0)
    part = attribution_rows(local, targets, coverage=coverage)
    assert whole.skipped_influence == 0
    assert whole.coverage == 1
    assert len(part.target) < len(whole.target)
    missing = whole.influence - part.influence
    assert missing.min() > -1e-6
    assert missing.max() <= part.skipped_influence + 1e-6
    assert part.coverage >= coverage - 1e-9


def test_a_limit_on_features_is_kept_and_the_coverage_it_gave_reported(local):
    rows = attribution_rows(local, targets_of(local), coverage=1.0, max_features=5)
    assert len(rows.target) == 5 + len(targets_of(local).names)
    assert rows.coverage < 1


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_of_each_row_the_largest_inputs_are_kept_and_the_others_are_its_remainder(local, share):
    targets = targets_of(local)
    whole, part = (attribution_rows(local, targets, coverage=1.0, row_share=value) for value in (1.0, share))
    assert (whole.row_share, part.row_share) == (1, share)
    assert whole.remainder.abs().max() == 0
    assert len(part.effect) < len(whole.effect)
    sources = Sources(local)
    every, kept = dense(whole, sources), dense(part, sources)
    for row, some in zip(every, kept, strict=True):
        size, wanted = row.abs(), share * row.abs().sum()
        assert torch.equal(some[some != 0], row[some != 0])
        assert some.abs().sum() >= wanted * (1 - 1e-5)
        smallest = size[some != 0].min()
        assert size[some == 0].max() <= smallest
        assert some.abs().sum() - smallest < wanted * (1 + 1e-5)
    torch.testing.assert_close(part.remainder, (every - kept).sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.sum(1) + part.bias, every.sum(1) + whole.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.influence, whole.influence)


def test_a_graph_says_what_its_rows_leave_out(local):
    graph = attribute(local, targets_of(local), coverage=1.0, row_share=0.9)
    total = np.bincount(graph.target, graph.weight, minlength=graph.n_nodes) + graph.bias
    has_row = ~np.isnan(graph.bias)
    assert total[has_row] == pytest.approx(graph.pre_activation[has_row], abs=1e-4)
    assert np.abs(graph.remainder[has_row]).max() > 0
    assert np.isnan(graph.remainder[~has_row]).all()
    assert graph.info.row_share == 0.9


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_a_row_that_is_none_is_refused(local, share):
    with pytest.raises(TraceError, match=f"row_share is {share}; expected a share above 0 and up to 1"):
        attribution_rows(local, targets_of(local), row_share=share)


def test_a_target_without_any_input_has_no_edges():
    """Two tokens of one unembedding vector: the model cannot tell them apart."""
    model = tiny_llama(3)
    model.lm_head.weight.data[7] = model.lm_head.weight.data[5]
    replacement = ReplacementModel.of(model, tiny_tokenizer(), tiny_transcoder(0))
    local = replacement.localize(replacement.tokenize("w3 w1 w4"))
    targets = join(difference_target(local, 5, 7, "nothing"), token_targets(local, (5,), ("a",)))
    graph = attribute(local, targets, coverage=1.0)
    nothing, _ = np.flatnonzero(graph.kind == NodeKind.LOGIT)
    assert graph.token[nothing] == "nothing"
    assert nothing not in graph.target
    assert graph.bias[nothing] == 0


def test_a_difference_is_the_difference_of_two_rows(local):
    both = attribution_rows(local, token_targets(local, (5, 9), ("a", "b")), coverage=1.0)
    one = attribution_rows(local, difference_target(local, 5, 9, "a − b"), coverage=1.0)
    one, both = (dense(rows, Sources(local)) for rows in (one, both))
    torch.testing.assert_close(one[-1], both[-2] - both[-1], atol=1e-5, rtol=1e-5)


def test_a_transcoder_that_equals_the_mlps_leaves_no_error():
    """A ReLU MLP without gate, written as a transcoder whose decoders reach their own layer only (law 8)."""
    model = tiny_llama(3, n_layers=2, biases=False)
    transcoder = CrossLayerTranscoder(TranscoderConfig(2, 16, 24, "relu"))
    for layer, block in enumerate(model.model.layers):
        up, down = block.mlp.up_proj.weight, block.mlp.down_proj.weight
        block.mlp.forward = lambda x, up=up, down=down: (x @ up.T).relu() @ down.T
        transcoder.W_enc.data[layer] = up
        transcoder.W_dec[layer].data[:, 0] = down.T
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder.requires_grad_(False))
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5"))
    assert local.error.abs().max() < 1e-5
    exact = dataclasses.replace(local, error=torch.zeros_like(local.error))
    scores = score(attribute(exact, targets_of(local), coverage=1.0))
    assert scores.replacement == 1
    assert scores.completeness == pytest.approx(1)


def test_broken_weights_fail_loudly(replacement):
    replacement.transcoder.W_dec[0].data[:] = float("nan")
    with pytest.raises(TraceError, match="NaN or infinite values on this prompt; its weights are damaged"):
        replacement.localize(replacement.tokenize("w3 w1 w4"))


def with_other_values(local):
    return {"features": dataclasses.replace(local.features, pre_activation=1.01 * local.features.pre_activation)}


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (with_other_values, "conservation"),
        (lambda local: {"logits": local.logits + torch.linspace(0, 1, 42)}, "logits"),
        (lambda local: {"constant": local.constant + 0.1}, "logits"),
        (lambda local: {"embedding": 1.01 * local.embedding}, "logits"),
    ],
)
def test_numbers_that_do_not_add_up_fail_the_check(replacement, damage, check):
    local = replacement.localize(replacement.tokenize("w3 w1 w4"))
    broken = dataclasses.replace(local, **damage(local))
    with pytest.raises(TraceError, match=f"the {check} check failed"):
        attribution_rows(broken, targets_of(local), coverage=1.0)


def test_rows_that_are_not_finite_fail_the_check(replacement):
    local = replacement.localize(replacement.tokenize("w3 w1 w4"))
    broken = dataclasses.replace(local, error=torch.full_like(local.error, float("nan")))
    with pytest.raises(TraceError, match="check failed"):
        attribution_rows(broken, targets_of(broken), coverage=1.0)
