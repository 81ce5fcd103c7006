"""Half-precision weights are traced exactly: as the model that has these very weights, computed in full precision."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.tracer.conftest import tiny_tokenizer
from tests.tracer.families import CONFIGS, tiny_model
from tests.tracer.test_families import random_transcoder
from tracer.precision import computing_in
from tracer.replacement import ReplacementModel
from tracer.rows import attribution_rows
from tracer.targets import top_targets

HALF = (torch.bfloat16, torch.float16)


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained` loads it: weights in half precision, rotary frequencies not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


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
    transcoder = random_transcoder("hook_resid_mid", "hook_mlp_out", skip=skip)
    for matrix in (transcoder.W_enc, *transcoder.W_dec, *([transcoder.W_skip] if skip else [])):
        matrix.data = matrix.data.bfloat16()
    replacement = ReplacementModel.of(rounded(tiny_model(name), torch.bfloat16), tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9 w2"))
    rows = attribution_rows(local, top_targets(local, str), coverage=1.0)
    assert rows.effect.dtype == torch.float32
    assert rows.conservation_error < 2e-5
    assert rows.logits_error < 1e-5
