"""Half-precision weights are traced exactly: as the model that has these very weights, computed in full precision."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from graphs import NodeKind
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.families import CONFIGS, NOT_IN_FLOAT64, tiny_model
from tests.tracer.oracle import dense
from tests.tracer.test_families import random_transcoder
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.precision import computing_in
from tracer.replacement import ReplacementModel
from tracer.rows import attribution_rows
from tracer.sources import Sources
from tracer.targets import token_targets, top_targets
from transcoders import CrossLayerTranscoder, save

HALF = (torch.bfloat16, torch.float16)


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained` loads it: weights in half precision, rotary frequencies not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def rounded_matrices(transcoder: CrossLayerTranscoder, dtype: torch.dtype) -> CrossLayerTranscoder:
    """As `transcoders.load` loads it: matrices in half precision, biases and thresholds not."""
    for matrix in (transcoder.W_enc, *transcoder.W_dec, transcoder.W_skip):
        if matrix is not None:
            matrix.data = matrix.data.to(dtype)
    return transcoder


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox, parallel", "gpt_oss", "olmo2"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_half_precision_model_computes_as_its_widened_copy(name, dtype):
    narrow = rounded(tiny_model(name), dtype)
    wide = tiny_model(name)
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    before = {key: value.clone() for key, value in narrow.state_dict().items()}
    tokens = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad(), computing_in(narrow, torch.float32):
        logits = narrow(tokens).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wide(tokens).logits, atol=1e-5, rtol=1e-5)
    assert {key: value.dtype for key, value in narrow.state_dict().items()} == dict.fromkeys(before, dtype)
    assert all(torch.equal(value, before[key]) for key, value in narrow.state_dict().items())


def test_weights_are_restored_when_the_model_fails():
    model = rounded(tiny_model("llama"), torch.bfloat16)
    with pytest.raises(IndexError), computing_in(model, torch.float32):
        model(torch.tensor([[1000]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_experts_that_know_no_float64_compute_in_it_inside_the_block_only():
    model = tiny_model("gpt_oss").double()
    tokens = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad(), computing_in(model, torch.float64):
        logits = model(tokens).logits
    assert model.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(logits.float(), tiny_model("gpt_oss")(tokens).logits, atol=1e-5, rtol=1e-5)
    assert logits.dtype == torch.float64


def test_a_model_that_is_wide_enough_is_left_alone():
    model = tiny_model("llama")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with computing_in(model, torch.float32):
        model(torch.tensor([[1, 2]]))
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_edges_of_half_precision_weights_add_up(name, skip):
    transcoder = rounded_matrices(random_transcoder("hook_resid_mid", "hook_mlp_out", skip=skip), torch.bfloat16)
    replacement = ReplacementModel.of(rounded(tiny_model(name), torch.bfloat16), tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9 w2"))
    rows = attribution_rows(local, top_targets(local, str), coverage=1.0)
    assert rows.effect.dtype == torch.float32
    assert rows.conservation_error < 2e-5
    assert rows.logits_error < 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_edges_of_half_precision_weights_are_those_of_the_same_weights_in_full_precision(name, dtype):
    model = rounded(tiny_model(name), dtype)
    transcoder = rounded_matrices(random_transcoder("mlp.hook_in", "mlp.hook_out"), dtype)
    wide = torch.float32 if name in NOT_IN_FLOAT64 else torch.float64
    copied: Any = deepcopy(model)
    found = []
    for network, coder in ((model, transcoder), (copied.to(wide), deepcopy(transcoder).to(wide))):
        replacement = ReplacementModel.of(network, tiny_tokenizer(), coder)
        local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9 w2"))
        rows = attribution_rows(local, token_targets(local, (5, 9), ("a", "b")), coverage=1.0)
        assert rows.conservation_error < 2e-5
        found.append((local.features.feature, rows.target, dense(rows, Sources(local))))
    for ours, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(ours, expected)
    assert (found[0][2].dtype, found[1][2].dtype) == (torch.float32, wide)
    largest = float(found[1][2].abs().max())
    torch.testing.assert_close(found[0][2].to(wide), found[1][2], atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_trace_of_half_precision_files_is_that_of_the_same_numbers_in_float32(tmp_path, dtype):
    rounded(tiny_llama(0), dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save(tiny_transcoder(1), tmp_path / "transcoder", dtype=dtype)
    graphs = []
    for asked in (dtype, torch.float32):
        replacement = ReplacementModel.load(tmp_path / "model", tmp_path / "transcoder", dtype=asked)
        assert {parameter.dtype for parameter in replacement.model.parameters()} == {asked}
        config = TraceConfig(target=("w3", "w7"), coverage=1.0, prune=False)
        graphs.append(trace("w3 w1 w4 w1 w5 w9", replacement, config).graph)
    half, full = graphs
    assert (half.kind == NodeKind.FEATURE).sum() > 50
    for column in ("kind", "layer", "position", "feature", "source", "target"):
        assert (getattr(half, column) == getattr(full, column)).all(), column
    assert half.weight == pytest.approx(full.weight, abs=1e-5 * float(abs(full.weight).max()))
    assert max(half.info.conservation_error, half.info.logits_error) < 1e-5
