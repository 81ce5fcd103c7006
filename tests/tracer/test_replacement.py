"""Prompts become tokens and words; models and transcoders that do not fit are refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tracer.conftest import CASES, tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer.choose import one_token
from tracer.errors import TraceError
from tracer.memory import explaining_lack_of_memory
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, TranscoderConfig


def test_words_are_those_of_the_prompt(replacement):
    prompt = replacement.tokenize("w3 w10")
    assert prompt.tokens == ("<bos>", "w3", "w10")
    assert prompt.words == ("", "w3", "w10")
    assert prompt.token_ids == (1, 5, 12)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(replacement, text):
    with pytest.raises(TraceError, match="the prompt is empty"):
        replacement.tokenize(text)


def test_a_prompt_longer_than_the_context_is_refused(replacement):
    with pytest.raises(TraceError, match="the prompt has 41 tokens, the model reads at most 32"):
        replacement.tokenize("w1 " * 40)


def test_a_transcoder_of_another_depth_is_refused():
    with pytest.raises(TraceError, match="layers 2, the model 3"):
        ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), tiny_transcoder(0, n_layers=2))


def test_a_transcoder_of_another_width_is_refused():
    other = CrossLayerTranscoder(TranscoderConfig(3, 8, 20, "relu"))
    with pytest.raises(TraceError, match="width 8, the model 16; it was trained on another model"):
        ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), other)


def test_a_truncated_model_file_is_refused(tmp_path):
    shutil.copytree(CASES / "llama-clt-jumprelu" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TraceError, match=r"cannot be loaded \(.*\); give a local directory or a Hub id"):
        ReplacementModel.load(tmp_path / "model", CASES / "llama-clt-jumprelu" / "transcoder")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_model_weights_are_refused(value):
    model = tiny_llama(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    replacement = ReplacementModel.of(model, tiny_tokenizer(), tiny_transcoder(1))
    with pytest.raises(TraceError, match="the model gives NaN or infinite values on this prompt"):
        trace("w3 w1 w4", replacement)


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "b_dec", "W_dec"])
def test_damaged_transcoder_weights_are_refused(part):
    transcoder = tiny_transcoder(1)
    weights = transcoder.W_dec[1] if part == "W_dec" else getattr(transcoder, part)
    weights.fill_(float("nan"))
    with pytest.raises(TraceError, match="the transcoder gives NaN or infinite values on this prompt"):
        trace("w3 w1 w4", ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), transcoder))


def test_a_lack_of_memory_is_explained():
    with pytest.raises(TraceError, match="memory ran out; attribute fewer features"), explaining_lack_of_memory():
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="size"), explaining_lack_of_memory():
        torch.ones(2) + torch.ones(3)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"has no config\.json"):
        ReplacementModel.load(tmp_path, CASES / "llama-clt-jumprelu" / "transcoder")


def test_a_target_must_be_one_token(replacement):
    assert one_token(replacement, "w3") == 5
    with pytest.raises(TraceError, match="is 2 tokens"):
        one_token(replacement, "w3 w4")


def test_a_trace_records_what_it_did(replacement):
    done = trace("w3 w1 w4 w1 w5", replacement)
    info = done.graph.info
    assert info.prompt == "w3 w1 w4 w1 w5"
    assert info.coverage >= 0.99
    assert done.graph.n_nodes <= done.n_nodes
    assert 0 < info.seconds < 60
    assert done.predictions[0].probability == max(p.probability for p in done.predictions)
    assert '"node_threshold": 0.8' in info.config


def test_a_models_revision_changes_with_its_weights_and_not_with_its_folder(tmp_path):
    case = CASES / "llama-clt-jumprelu"
    shutil.copytree(case / "model", tmp_path / "moved")
    here = ReplacementModel.load(case / "model", case / "transcoder").origin
    moved = ReplacementModel.load(tmp_path / "moved", case / "transcoder").origin
    assert moved.model_revision == here.model_revision
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    changed = ReplacementModel.load(tmp_path / "moved", case / "transcoder").origin
    assert changed.model_revision != here.model_revision
