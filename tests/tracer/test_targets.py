"""Every kind of target: its edges are derivatives, nothing comes from later places, and bad ones are refused."""

import dataclasses

import numpy as np
import pytest
import torch

from graphs import GraphStore, NodeKind, prune, strongest_paths
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.families import tiny_model
from tests.tracer.oracle import dense, jacobian
from tests.tracer.test_families import HOOKS, random_transcoder
from tracer.attribution import attribute
from tracer.config import TraceConfig
from tracer.errors import TraceError
from tracer.local import LocalReplacementModel
from tracer.pipeline import prepare, trace, trace_prepared
from tracer.replacement import ReplacementModel
from tracer.rows import attribution_rows
from tracer.sources import Sources
from tracer.targets import (
    Targets,
    difference_target,
    direction_target,
    feature_target,
    find_position,
    join,
    token_targets,
    top_targets,
)

MIDDLE = 3


def an_active_feature(local: LocalReplacementModel, layer: int, position: int) -> int:
    features = local.features
    return int(features.feature[(features.layer == layer) & (features.position == position)][0])


def of_every_kind(local: LocalReplacementModel) -> dict[str, Targets]:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(7))
    return {
        "top": top_targets(local, str, max_logits=3, logit_mass=1.0),
        "top in the middle": top_targets(local, str, max_logits=2, position=MIDDLE),
        "tokens": token_targets(local, (5, 9), ("a", "b")),
        "difference": difference_target(local, 5, 9, "a − b"),
        "difference in the middle": difference_target(local, 5, 9, "a − b", position=MIDDLE),
        "direction": direction_target(local, vector, "probe"),
        "direction in the middle": direction_target(local, vector, "probe", position=MIDDLE),
        "feature": feature_target(local, 2, an_active_feature(local, 2, 6)),
        "feature in the middle": feature_target(local, 1, an_active_feature(local, 1, MIDDLE), position=MIDDLE),
        "feature of the first layer": feature_target(local, 0, an_active_feature(local, 0, 2), position=2),
    }


# How close the real model comes in float64: Transformers computes RMSNorm in float32.
PRECISION = {"gpt2": 1e-12, "gpt_neox, parallel": 1e-12, "llama": 1e-6, "gemma2": 1e-6}


@pytest.fixture(
    scope="module", params=[(name, hooks) for name in PRECISION for hooks in HOOKS], ids=lambda p: f"{p[0]}, {p[1][0]}"
)
def wide(request: pytest.FixtureRequest) -> tuple[ReplacementModel, LocalReplacementModel, float]:
    """A random model and transcoder in float64, and a prompt of seven tokens."""
    name, hooks = request.param
    model, transcoder = tiny_model(name).double(), random_transcoder(*hooks).double()
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder)
    return replacement, replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9")), PRECISION[name]


@pytest.fixture(scope="module")
def frozen(wide) -> tuple[LocalReplacementModel, Targets, torch.Tensor, torch.Tensor, float]:
    """All kinds of target at once, and what autograd says of them and of all features."""
    replacement, local, precision = wide
    kinds = of_every_kind(local)
    targets = join(*(kinds[name] for name in kinds if name != "tokens"))  # 5 and 9 may be among the top
    return local, targets, *jacobian(replacement, local, targets), precision


def test_edges_of_every_kind_are_what_autograd_finds_in_the_real_model(frozen):
    local, targets, values, expected, precision = frozen
    rows = attribution_rows(local, targets, coverage=1.0)
    torch.testing.assert_close(
        dense(rows, Sources(local)), expected[rows.target], atol=precision * float(expected.abs().max()), rtol=0
    )
    pre_activation = torch.cat([local.features.pre_activation, targets.value - targets.bias])
    torch.testing.assert_close(values, pre_activation, atol=precision * float(values.abs().max()), rtol=0)
    assert rows.conservation_error < precision


def test_nothing_comes_from_later_positions_or_from_the_features_own_layer(frozen):
    local, targets, *_ = frozen
    graph = attribute(local, targets, coverage=1.0)
    ends = graph.kind[graph.target] == NodeKind.LOGIT
    source, target = graph.source[ends], graph.target[ends]
    assert len(set(target.tolist())) == len(targets.names)
    assert (graph.position[source] <= graph.position[target]).all()
    assert (graph.layer[source] < graph.layer[target]).all()


def test_several_at_once_have_the_rows_they_have_alone(frozen):
    local, targets, *_ = frozen
    together = attribution_rows(local, targets, coverage=1.0, batch_size=2)
    n_active = len(local.features.layer)
    sources = Sources(local)
    by_number = dict(zip(together.target.tolist(), dense(together, sources), strict=True))
    for number, name in enumerate(targets.names):
        columns = {
            field.name: getattr(targets, field.name)[number : number + 1] for field in dataclasses.fields(targets)
        }
        alone = attribution_rows(local, Targets(**columns), coverage=0.5, max_features=1)
        row = dense(alone, sources)[alone.target == n_active][0]
        torch.testing.assert_close(row, by_number[n_active + number], atol=1e-12, rtol=0, msg=name)


def test_the_row_of_a_feature_target_is_that_of_the_feature(local):
    feature = an_active_feature(local, 2, MIDDLE)
    targets = feature_target(local, 2, feature, position=MIDDLE)
    both = join(targets, token_targets(local, (5,), ("a",)))
    rows = attribution_rows(local, both, coverage=1.0)
    features = local.features
    [own] = ((features.layer == 2) & (features.position == MIDDLE) & (features.feature == feature)).nonzero()[:, 0]
    as_feature, as_target = (int((rows.target == number).nonzero()) for number in (own, len(features.layer)))
    effect = dense(rows, Sources(local))
    torch.testing.assert_close(effect[as_feature], effect[as_target])
    assert float(rows.bias[as_feature]) == pytest.approx(float(rows.bias[as_target]))


def test_a_feature_target_is_a_node_of_its_own_where_the_feature_is(local, tmp_path):
    feature = an_active_feature(local, 1, MIDDLE)
    targets = join(feature_target(local, 1, feature, position="w4"), difference_target(local, 5, 9, "a − b"))
    graph = attribute(local, targets, coverage=1.0, labels={(1, feature): "Texas"})
    first, second = (graph.kind == NodeKind.LOGIT).nonzero()[0].tolist()
    assert (graph.layer[first], graph.position[first], graph.feature[first]) == (1, 3, feature)
    assert (graph.token[first], graph.label[first]) == (f"feature 1/{feature} at w4", "Texas")
    assert (graph.layer[second], graph.position[second], graph.feature[second]) == (3, 6, -1)
    assert graph.probability[[first, second]].tolist() == [1, 1]
    assert graph.token_id[[first, second]].tolist() == [-1, -1]
    assert not (graph.source == first).any(), "what is explained has no effects of its own"
    pruned = prune(graph)
    assert (pruned.kind == NodeKind.LOGIT).sum() == 2
    store = GraphStore(tmp_path)
    assert store.load(store.save(pruned)) == pruned


def test_a_feature_alone_is_explained_by_paths_that_end_at_it(local):
    graph = prune(attribute(local, feature_target(local, 2, an_active_feature(local, 2, MIDDLE), position=MIDDLE)))
    [target] = (graph.kind == NodeKind.LOGIT).nonzero()[0]
    assert graph.layer.max() == 2
    assert graph.position[graph.kind == NodeKind.FEATURE].max() <= MIDDLE
    words = (graph.kind == NodeKind.TOKEN).nonzero()[0]
    assert strongest_paths(graph, words.tolist(), int(target))


def test_tokens_weigh_their_probability_and_all_else_one(local):
    kinds = of_every_kind_at_the_end(local)
    probability = local.logits[-1].softmax(-1)
    assert join(*kinds).weight.tolist() == pytest.approx([float(probability[5]), 1, 1, 1])


def of_every_kind_at_the_end(local: LocalReplacementModel) -> tuple[Targets, ...]:
    return (
        token_targets(local, (5,), ("a",)), difference_target(local, 5, 9, "a − b"),
        direction_target(local, torch.ones(16), "ones"), feature_target(local, 0, an_active_feature(local, 0, 6)),
    )  # fmt: skip


def test_two_differences_and_two_directions_are_different_targets(local):
    targets = join(
        difference_target(local, 5, 9, "a − b"), difference_target(local, 9, 5, "b − a"),
        direction_target(local, torch.ones(16), "x"), direction_target(local, torch.ones(16), "y"),
    )  # fmt: skip
    graph = attribute(local, targets)
    assert graph.token[graph.kind == NodeKind.LOGIT].tolist() == ["a − b", "b − a", "x", "y"]


def test_a_direction_is_worth_what_the_model_gives_it(local):
    logit = direction_target(local, local.unembedding[5] - local.unembedding[9], "a − b")
    assert float(logit.value[0]) == pytest.approx(float(difference_target(local, 5, 9, "a − b").value[0]), abs=1e-5)


def test_sources_prepared_once_serve_every_target_of_the_prompt(replacement, local):
    sources = Sources(local)
    for targets in of_every_kind_at_the_end(local):
        prepared = attribution_rows(local, targets, sources=sources)
        anew = attribution_rows(local, targets)
        assert torch.equal(prepared.source, anew.source)
        assert torch.equal(prepared.effect, anew.effect)
        assert attribute(local, targets, sources=sources).info.logits_error == prepared.logits_error
    other = replacement.localize(replacement.tokenize("w3 w1"))
    with pytest.raises(TraceError, match="those of another prompt"):
        attribution_rows(other, token_targets(other, (5,), ("a",)), sources=sources)


def test_a_prompt_prepared_once_is_traced_for_many_questions(replacement):
    prepared = prepare("w3 w1 w4 w1 w5 w9", replacement)
    for config in (TraceConfig(), TraceConfig(target=("w7", "w2"), position=3), TraceConfig(prune=False)):
        once = trace_prepared(prepared, replacement, config, tags=(("a", "b"),)).graph
        anew = trace("w3 w1 w4 w1 w5 w9", replacement, config, tags=(("a", "b"),)).graph
        assert np.array_equal(once.weight, anew.weight) and np.array_equal(once.source, anew.source)
        assert once.token.tolist() == anew.token.tolist()
        unlike = {"created_at": anew.info.created_at, "seconds": 0.0, "peak_memory_mb": 0.0}
        assert dataclasses.replace(once.info, **unlike) == dataclasses.replace(anew.info, **unlike)
    other = ReplacementModel.of(tiny_llama(1), tiny_tokenizer(), tiny_transcoder(1))
    with pytest.raises(TraceError, match="the prompt was prepared with another model or transcoder"):
        trace_prepared(prepared, other)


def test_positions_count_from_either_end_or_are_words(local):
    prompt = local.prompt
    assert [find_position(prompt, at) for at in (0, 6, -1, -7, "w4", "w9")] == [0, 6, 6, 0, 3, 6]


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (7, r"position 7 is not in the prompt; it has 7 tokens: 0 … 6, or -7 … -1 from the end"),
        (-8, "position -8 is not in the prompt"),
        ("w40", "position 'w40' is no word of the prompt; give a number, or one of: w3, w1, w4, w5, w9"),
        ("", "position '' is no word of the prompt"),
        ("w1", "the word 'w1' is at positions 2, 4; give one of these"),
    ],
)
def test_an_unknown_position_is_refused(local, position, message):
    with pytest.raises(TraceError, match=message):
        top_targets(local, str, position=position)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.full((16,), float("nan")), "'probe' holds NaN or infinite values"),
        (torch.full((16,), float("inf")), "'probe' holds NaN or infinite values"),
        (torch.zeros(16), "'probe' holds only zeros"),
        (torch.ones(12), r"'probe' has shape \(12,\); expected \(16,\)"),
        (torch.ones(1, 16), r"'probe' has shape \(1, 16\); expected \(16,\)"),
    ],
)
def test_a_direction_that_cannot_be_read_is_refused(local, direction, message):
    with pytest.raises(TraceError, match=message):
        direction_target(local, direction, "probe")


def test_a_feature_that_is_not_active_is_refused_with_where_it_is(local):
    features = local.features
    here = features.feature[(features.layer == 1) & (features.position == 6)].tolist()
    elsewhere = next(f for f in features.feature[features.layer == 1].tolist() if f not in here)
    where = features.position[(features.layer == 1) & (features.feature == elsewhere)].tolist()
    with pytest.raises(TraceError, match=rf"not active at position 6 \('w9'\), it is active at {where[0]}.*name one"):
        feature_target(local, 1, elsewhere)
    never = next(f for f in range(20) if f not in features.feature[features.layer == 1].tolist())
    with pytest.raises(TraceError, match="nor anywhere here; name another feature"):
        feature_target(local, 1, never)


@pytest.mark.parametrize(
    ("layer", "feature", "message"),
    [(3, 0, "no layer 3; its layers are 0 … 2"), (0, 20, "no feature 20; its features are 0 … 19")],
)
def test_a_feature_that_does_not_exist_is_refused(local, layer, feature, message):
    with pytest.raises(TraceError, match=message):
        feature_target(local, layer, feature)


@pytest.mark.parametrize("token_id", [-1, 42])
def test_a_token_that_does_not_exist_is_refused(local, token_id):
    with pytest.raises(TraceError, match=r"not in the vocabulary; the model's tokens are 0 … 41"):
        token_targets(local, (token_id,), ("?",))


def test_a_target_given_twice_or_none_is_refused(local):
    one = token_targets(local, (5,), ("a",))
    with pytest.raises(TraceError, match="'a' at position 6 is given twice"):
        join(one, one)
    with pytest.raises(TraceError, match="no target was given"):
        join()
    with pytest.raises(TraceError, match="from itself"):
        difference_target(local, 5, 5, "a − a")


def test_a_token_without_probability_is_refused(local):
    logits = local.logits.clone()
    logits[-1, 5] = -1e6
    with pytest.raises(TraceError, match="'a' has probability 0"):
        token_targets(dataclasses.replace(local, logits=logits), (5,), ("a",))


def test_more_logits_than_the_vocabulary_has_are_all_of_it(local):
    targets = top_targets(local, str, max_logits=10_000, logit_mass=1.0)
    assert sorted(targets.token_ids) == list(range(42))
    graph = attribute(local, targets, batch_size=5)
    assert (graph.kind == NodeKind.LOGIT).sum() == 42
    assert graph.probability[graph.kind == NodeKind.LOGIT].sum() == pytest.approx(1)


def localized(text: str, *, n_layers: int = 3, threshold: float | None = None, **tokenizer) -> LocalReplacementModel:
    transcoder = tiny_transcoder(1, n_layers=n_layers)
    if threshold is not None:
        transcoder.threshold.data[:] = threshold
    model = tiny_llama(0, n_layers=n_layers)
    replacement = ReplacementModel.of(model, tiny_tokenizer(**tokenizer), transcoder)
    return replacement.localize(replacement.tokenize(text))


def explained(local: LocalReplacementModel):
    """The graph of the top logits; both laws are checked as it is made."""
    graph = attribute(local, top_targets(local, str), coverage=1.0)
    assert graph.info.conservation_error < 1e-5
    pruned = prune(graph)
    assert (pruned.kind == NodeKind.TOKEN).sum() == local.n_positions
    return graph


def test_a_prompt_of_one_token_is_explained_by_it_alone():
    local = localized("w3", bos=None)
    assert local.prompt.token_ids == (5,)
    graph = explained(local)
    assert set(graph.kind.tolist()) == {NodeKind.TOKEN, NodeKind.LOGIT}
    assert graph.n_edges == (graph.kind == NodeKind.LOGIT).sum()
    assert prune(graph).info.replacement_score == 1


def test_the_first_position_is_explained_by_its_token_alone(local):
    graph = attribute(local, top_targets(local, str, position=0), coverage=1.0)
    assert set(graph.source[graph.kind[graph.target] == NodeKind.LOGIT].tolist()) == {0}


def test_a_beginning_of_sequence_token_may_have_number_0():
    local = localized("w3 w1", bos=0)
    assert local.prompt.token_ids == (0, 5, 3)
    assert local.prompt.words == ("", "w3", "w1")
    explained(local)


def test_a_model_without_beginning_of_sequence_token_starts_at_the_first_word():
    local = localized("w3 w1 w4", bos=None)
    assert local.prompt.token_ids == (5, 3, 6)
    graph = explained(local)
    assert graph.position[graph.kind == NodeKind.FEATURE].min() == 1


def test_a_model_of_one_layer_is_traced():
    local = localized("w3 w1 w4", n_layers=1)
    graph = explained(local)
    assert set(graph.layer.tolist()) == {-1, 0, 1}
    graph = attribute(local, feature_target(local, 0, an_active_feature(local, 0, 3)))
    assert set(graph.kind[graph.source].tolist()) == {NodeKind.TOKEN}


def test_without_any_active_feature_errors_and_tokens_explain_all():
    local = localized("w3 w1 w4", threshold=1e6)
    assert len(local.features.layer) == 0
    graph = explained(local)
    assert graph.info.n_active_features == 0
    assert set(graph.kind.tolist()) == {NodeKind.TOKEN, NodeKind.ERROR, NodeKind.LOGIT}
    with pytest.raises(TraceError, match="nor anywhere here"):
        feature_target(local, 0, 0)


def test_without_active_features_at_the_last_position_the_others_are_there():
    local = localized("w3 w1 w4")
    keep = local.features.position < 3
    features = dataclasses.replace(
        local.features, **{f.name: getattr(local.features, f.name)[keep] for f in dataclasses.fields(local.features)}
    )
    activation = torch.zeros(3, 4, 20)
    activation[features.layer, features.position, features.feature] = features.activation
    whole = torch.zeros(3, 4, 20)
    whole[local.features.layer, local.features.position, local.features.feature] = local.features.activation
    lost = local.transcoder.decode(whole) - local.transcoder.decode(activation)
    graph = explained(dataclasses.replace(local, features=features, error=local.error + lost))
    assert graph.position[graph.kind == NodeKind.FEATURE].max() == 2
