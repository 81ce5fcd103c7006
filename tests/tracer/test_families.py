"""Every model family: the laws hold, and edges are the derivatives that autograd finds in the real model."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from graphs import NodeKind, prune, score, with_unscaled_tokens
from graphs.graph import logit_weights
from tests.containers import in_container_with
from tests.tracer.conftest import tiny_tokenizer
from tests.tracer.families import CONFIGS, LAYER_NORMS, NOT_IN_FLOAT64, tiny_model, with_wide_norms
from tests.tracer.oracle import dense, jacobian
from tracer.attribution import attribute
from tracer.local import LocalReplacementModel, linear_logits
from tracer.replacement import ReplacementModel
from tracer.rows import Rows, attribution_rows
from tracer.sources import Sources
from tracer.targets import (
    Targets,
    difference_target,
    direction_target,
    feature_target,
    join,
    token_targets,
    top_targets,
    top_tokens,
)
from transcoders import CrossLayerTranscoder, TranscoderConfig, TranscoderError
from transcoders.activations import mlp_activations, recording
from transcoders.families import FAMILIES, dissect

HOOKS = [("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")]
N_LAYERS, D_MODEL, N_FEATURES = 3, 16, 20


def random_transcoder(reads: str, writes: str, *, cross_layer: bool = True, skip: bool = False) -> CrossLayerTranscoder:
    generator = torch.Generator().manual_seed(1)
    config = TranscoderConfig(
        N_LAYERS, D_MODEL, N_FEATURES, "jumprelu", reads=reads, writes=writes, cross_layer=cross_layer, skip=skip
    )
    transcoder = CrossLayerTranscoder(config)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        transcoder.threshold.copy_(torch.rand(transcoder.threshold.shape, generator=generator) * 0.3)
    return transcoder.eval().requires_grad_(False)


BEFORE_GAIN = ("ln2.hook_normalized", "hook_mlp_out")
WITH_NORM = ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox, parallel"]
KINDS = [{"cross_layer": True, "skip": False}, {"cross_layer": False, "skip": True}]


CASES = [(name, hooks, kind) for name in CONFIGS for hooks, kind in zip(HOOKS, KINDS, strict=True)]
CASES += [
    (name, hooks, kind)
    for name in ("gemma2", "gpt_neox, parallel")
    for hooks, kind in zip(HOOKS, KINDS[::-1], strict=True)
]
CASES += [(name, BEFORE_GAIN, kind) for name, kind in zip(WITH_NORM, KINDS * 4, strict=True)]


@dataclass(frozen=True)
class Traced:
    """A prompt of one model, with targets of every kind and all rows."""

    replacement: ReplacementModel
    local: LocalReplacementModel
    targets: Targets
    rows: Rows
    precision: float
    """How exact all must be, as a share of the largest value."""


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}, {p[1][0]}, {'skip' if p[2]['skip'] else 'plain'}")
def traced(request: pytest.FixtureRequest) -> Traced:
    """In float64 from end to end, but for the one model that does not run in it."""
    name, hooks, kind = request.param
    if name in NOT_IN_FLOAT64:
        return trace(tiny_model(name), random_transcoder(*hooks, **kind), 1e-5)
    return trace(with_wide_norms(tiny_model(name).double()), random_transcoder(*hooks, **kind).double(), 1e-12)


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name not in NOT_IN_FLOAT64])
def as_published(request: pytest.FixtureRequest) -> Traced:
    """In float64 as transformers computes it."""
    precision = 1e-12 if request.param in LAYER_NORMS else 1e-6
    return trace(tiny_model(request.param).double(), random_transcoder(*HOOKS[0]).double(), precision)


@pytest.fixture(scope="module", params=list(CONFIGS))
def in_float32(request: pytest.FixtureRequest) -> Traced:
    return trace(tiny_model(request.param), random_transcoder(*HOOKS[1]), 1e-5)


def trace(model: PreTrainedModel, transcoder: CrossLayerTranscoder, precision: float) -> Traced:
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9 w2"))
    middle, active = 3, local.features
    here = (active.layer == 1) & (active.position == middle)
    targets = join(
        top_targets(local, str, max_logits=3),
        difference_target(local, 5, 9, "a − b", position=middle),
        direction_target(local, torch.linspace(-1, 1, D_MODEL), "probe", position=middle),
        feature_target(local, 1, int(active.feature[here][0]), position=middle),
    )
    return Traced(replacement, local, targets, attribution_rows(local, targets, coverage=1.0), precision)


def test_the_laws_hold_and_edges_are_what_autograd_finds_in_float64(traced):
    check(traced)


def test_the_laws_hold_and_edges_are_what_autograd_finds_with_the_norms_that_transformers_computes(as_published):
    check(as_published)


def test_the_laws_hold_and_edges_are_what_autograd_finds_in_float32(in_float32):
    check(in_float32)


def check(traced: Traced) -> None:
    """Laws 1 and 2, and every edge against the Jacobian, whose own derivatives are zero."""
    local, targets, rows, precision = traced.local, traced.targets, traced.rows, traced.precision
    assert local.error.dtype == traced.replacement.model.dtype
    assert len(rows.target) == len(local.features.layer) + len(targets.names)
    assert_close(linear_logits(local), local.logits, precision)
    assert rows.logits_error < precision
    assert rows.conservation_error < precision
    values, expected = jacobian(traced.replacement, local, targets)
    assert_close(dense(rows, Sources(local)), expected[rows.target], precision)
    assert_close(values, torch.cat([local.features.pre_activation, targets.value - targets.bias]), precision)


def assert_close(found: torch.Tensor, expected: torch.Tensor, precision: float) -> None:
    torch.testing.assert_close(found, expected, atol=precision * float(expected.abs().max()), rtol=0)


def test_influence_is_that_of_all_paths_through_the_dense_matrix(traced):
    """Law 4: w·((I − A)⁻¹ − I) of the row-normalised |A|."""
    graph = attribute(traced.local, traced.targets, coverage=1.0)
    strength = np.zeros((graph.n_nodes, graph.n_nodes))
    strength[graph.target, graph.source] = np.abs(graph.weight)
    share = strength / np.maximum(strength.sum(axis=1, keepdims=True), 1e-300)
    identity, weight = np.eye(graph.n_nodes), logit_weights(graph)
    expected = weight @ (np.linalg.inv(identity - share) - identity)
    is_source = graph.kind != NodeKind.LOGIT
    assert graph.influence[is_source] == pytest.approx(expected[is_source], abs=1e-6)
    # a path ends only at what has no input: tokens and errors
    ends = np.isin(graph.kind, (NodeKind.TOKEN, NodeKind.ERROR))
    assert graph.influence[ends].sum() == pytest.approx(weight.sum(), abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_transcoder_that_equals_the_mlps_explains_everything(name):
    """Law 8: a ReLU MLP in the place of the family's own, and the same weights as a per-layer transcoder."""
    transcoder = random_transcoder("mlp.hook_in", "mlp.hook_out", cross_layer=False)
    transcoder.threshold.zero_()
    model, precision = tiny_model(name), 1e-5
    if name not in NOT_IN_FLOAT64:
        model, transcoder, precision = with_wide_norms(model.double()), transcoder.double(), 1e-12
    for layer, parts in enumerate(dissect(model).layers):
        parts.mlp.register_forward_hook(relu_mlp(transcoder, layer))
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9 w2"))
    assert len(local.features.layer) > 50
    assert float(local.error.abs().max()) < precision
    graph = attribute(local, top_targets(local, str), coverage=1.0)
    assert graph.influence[graph.kind == NodeKind.ERROR].sum() < 100 * precision
    assert np.abs(graph.weight[graph.kind[graph.source] == NodeKind.ERROR]).max(initial=0) < 100 * precision
    scores = score(graph)
    assert (scores.replacement, scores.completeness) == pytest.approx((1, 1), abs=100 * precision)
    assert prune(graph).info.replacement_score == pytest.approx(1, abs=100 * precision)


def relu_mlp(transcoder: CrossLayerTranscoder, layer: int):
    """A hook that gives an MLP the outputs of a plain one with the transcoder's weights."""
    encoder, decoder = transcoder.W_enc[layer], transcoder.W_dec[layer][:, 0]

    def replace(module: torch.nn.Module, arguments: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        hidden = (arguments[0] @ encoder.T + transcoder.b_enc[layer]).relu()
        written = hidden @ decoder + transcoder.b_dec[layer]
        return (written, *output[1:]) if isinstance(output, tuple) else written

    return replace


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_rows_do_not_depend_on_the_batch_size(traced, batch_size):
    again = attribution_rows(traced.local, traced.targets, coverage=1.0, batch_size=batch_size)
    assert torch.equal(again.target, traced.rows.target)
    assert torch.equal(again.source, traced.rows.source)
    assert_close(again.effect, traced.rows.effect, traced.precision)
    assert_close(again.bias, traced.rows.bias, traced.precision)


def test_what_is_not_held_but_made_on_the_way_gives_the_same_rows(traced, monkeypatch):
    """As on a prompt whose attention patterns and write vectors would not fit into memory."""
    monkeypatch.setattr("tracer.local.PATTERNS", 0)
    monkeypatch.setattr("tracer.sources.WRITES", 0)
    monkeypatch.setattr("tracer.sources.CHUNK", 2000)
    again = traced.replacement.localize(traced.local.prompt)
    assert not any(isinstance(layer.held, torch.Tensor) for layer in again.attention)
    rows = attribution_rows(again, traced.targets, coverage=1.0)
    assert torch.equal(rows.source, traced.rows.source)
    assert_close(rows.effect, traced.rows.effect, traced.precision)
    assert rows.logits_error < traced.precision


def test_patterns_of_the_lowest_layers_are_held_where_not_all_fit(tmp_path, monkeypatch):
    in_container_with(1 << 20, tmp_path, monkeypatch)
    replacement = ReplacementModel.of(tiny_model("llama").double(), tiny_tokenizer(), random_transcoder(*HOOKS[0]))
    prompt = replacement.tokenize("w3 w1 w4 w1 w5")
    whole = replacement.localize(prompt)
    pattern = whole.attention[0].pattern.nbytes
    monkeypatch.setattr("tracer.local.PATTERNS", 1.5 * pattern / (1 << 20))
    some = replacement.localize(prompt)
    assert [isinstance(layer.held, torch.Tensor) for layer in some.attention] == [True, *[False] * (some.n_layers - 1)]
    for one, other in zip(some.attention, whole.attention, strict=True):
        torch.testing.assert_close(one.pattern, other.pattern)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_norm_that_adds_nothing_to_the_mean_square_is_traced(name):
    check(trace(tiny_model(name, rms_norm_eps=0.0).double(), random_transcoder(*HOOKS[0]).double(), 1e-6))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_a_model_that_reads_later_positions_is_refused(name):
    model = tiny_model(name, use_bidirectional_attention=True)
    with pytest.raises(TranscoderError, match=f"this {name} model has use_bidirectional_attention on, and what reads"):
        ReplacementModel.of(model, tiny_tokenizer(), random_transcoder(*HOOKS[0]))


def test_float64_is_refused_where_attention_is_float32_by_a_flag():
    model, transcoder = tiny_model("gpt2, upcast").double(), random_transcoder(*HOOKS[0]).double()
    with pytest.raises(
        TranscoderError, match=r"has reorder_and_upcast_attn on, .* use float32, bfloat16 or float16\.$"
    ):
        ReplacementModel.of(model, tiny_tokenizer(), transcoder)


def test_a_model_that_transformers_cannot_run_without_named_outputs_is_refused():
    model = tiny_model("llama", return_dict=False)
    with pytest.raises(
        TranscoderError, match="has return_dict off, with which transformers cannot run it; set it to true"
    ):
        ReplacementModel.of(model, tiny_tokenizer(), random_transcoder(*HOOKS[0]))


def test_the_peers_gemma_3_is_ours_with_token_edges_too_small_by_the_embedding_scale():
    """Its token vector is the row of the embedding matrix; what enters the residual stream is √16 times that."""
    model = tiny_model("gemma3_text")
    transcoder = random_transcoder("hook_resid_mid", "hook_mlp_out")
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1"))
    rows = dissect(model).embedding.weight[list(local.prompt.token_ids)]
    torch.testing.assert_close(local.embedding, rows * 4)
    ids, _ = top_tokens(local, max_logits=3)
    targets = token_targets(local, tuple(ids), tuple(map(str, ids)))
    graph = attribute(local, targets, coverage=1.0)
    rest = local.embedding - rows.detach()  # left to no node, so that the laws still hold
    halves = dataclasses.replace(local, embedding=rows.detach(), position_embedding=rest)
    unscaled = attribute(halves, targets, coverage=1.0)
    variant = with_unscaled_tokens(graph, D_MODEL)
    assert variant.weight == pytest.approx(unscaled.weight, abs=1e-6)
    from_tokens = graph.kind[graph.source] == NodeKind.TOKEN
    assert variant.weight[from_tokens] == pytest.approx(graph.weight[from_tokens] / 4)
    assert (variant.weight[~from_tokens] == graph.weight[~from_tokens]).all()
    is_token = graph.kind == NodeKind.TOKEN
    assert variant.influence[is_token].sum() < graph.influence[is_token].sum()


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma2", 1.0)])
def test_a_norm_is_read_before_its_gain_also_where_the_gain_is_zero(name, offset):
    model = tiny_model(name)
    [norm] = [parts.mlp_norm for parts in dissect(model).layers[1:2]]
    with torch.no_grad():
        norm.weight[:4] = -offset
    tokens = torch.tensor([[1, 5, 7, 3]])
    with recording({"norm": norm}) as seen:
        model(tokens)
    x, gained = (tensor[0].detach().numpy() for tensor in seen["norm"])
    normalised = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(gained[:, :4]).max() == 0
    np.testing.assert_allclose(normalised * (norm.weight.detach().numpy() + offset), gained, atol=1e-5)
    read, _ = mlp_activations(model, tokens, torch.ones(1, 4, dtype=torch.bool), "ln2.hook_normalized")
    np.testing.assert_allclose(read[1], normalised, atol=1e-5)


def test_of_a_layer_norm_the_whole_output_is_read():
    model = tiny_model("gpt2")
    tokens, keep = torch.tensor([[1, 5, 7, 3]]), torch.ones(1, 4, dtype=torch.bool)
    before_gain, _ = mlp_activations(model, tokens, keep, "ln2.hook_normalized")
    after, _ = mlp_activations(model, tokens, keep, "mlp.hook_in")
    assert torch.equal(before_gain, after)


def test_a_model_without_a_norm_before_its_mlps_has_no_output_of_it():
    with pytest.raises(TranscoderError, match=r"reads ln2\.hook_normalized, but this model has no norm before"):
        ReplacementModel.of(tiny_model("olmo2"), tiny_tokenizer(), random_transcoder(*BEFORE_GAIN))


def test_every_family_of_the_table_is_tested():
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)


def test_an_unknown_family_is_refused_with_the_list():
    config = OPTConfig(
        vocab_size=42, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    with pytest.raises(TranscoderError, match=r"type 'opt' cannot be traced yet; known types: llama, .*families\.py"):
        ReplacementModel.of(OPTForCausalLM(config), tiny_tokenizer(), random_transcoder(*HOOKS[0]))
