"""Prompts become tokens and words; models and transcoders that do not fit are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from graphs import GraphStore
from tests.tracer.conftest import CASES, tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer import lab
from tracer.choose import one_token
from tracer.errors import TraceError
from tracer.memory import explaining_lack_of_memory
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, TranscoderConfig, load_on_demand, save


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


def test_a_transcoder_of_another_model_of_the_same_size_is_doubted(tmp_path):
    """The graph is exact, as any is; that it is nearly all errors is told."""
    model, transcoder = lab.folder() / "model", lab.folder() / "transcoder"
    own = ReplacementModel.load(model, transcoder)
    assert trace("calc: 36+59=", own).doubt == ""
    torch.manual_seed(0)
    other = ReplacementModel.of(LlamaForCausalLM(own.model.config), own.tokenizer, own.transcoder)
    done = trace("calc: 36+59=", other)
    assert done.doubt.startswith("the transcoder of lab explains nothing of what most MLPs of")
    assert "use one that was trained on this model, or correct its hooks" in done.doubt
    assert done.graph.info.conservation_error < 1e-4
    assert done.graph.info.replacement_score < 0.5


def test_the_error_that_is_doubted_is_the_median_over_layers_and_positions(local):
    written = local.constant.clone()
    for source in range(local.n_layers):
        here = local.features.layer == source
        rows = local.decoders[source][local.features.row[here]] * local.features.activation[here, None, None]
        for k in range(rows.shape[1]):
            written[source + k].index_add_(0, local.features.position[here], rows[:, k])
    relative = local.error.square().sum(-1) / (local.error + written).square().sum(-1)
    assert local.relative_error == pytest.approx(float(relative[:, 1:].median()), rel=1e-4)


def test_a_truncated_model_file_is_refused(tmp_path):
    shutil.copytree(CASES / "llama-clt-jumprelu" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TraceError, match=r"cannot be loaded \(.*\); give a local directory or a Hub id"):
        ReplacementModel.load(tmp_path / "model", CASES / "llama-clt-jumprelu" / "transcoder")


def test_a_model_is_loaded_while_another_error_is_handled():
    case = CASES / "llama-clt-jumprelu"
    try:
        raise OSError("no such file")
    except OSError:
        assert ReplacementModel.load(case / "model", case / "transcoder").transcoder.config.n_layers == 4


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


def test_a_models_revision_is_the_same_with_another_version_of_transformers(monkeypatch):
    case = CASES / "llama-clt-jumprelu"
    here = ReplacementModel.load(case / "model", case / "transcoder").origin
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.999.0")
    later = ReplacementModel.load(case / "model", case / "transcoder")
    assert later.model.config.to_dict()["transformers_version"] == "5.999.0"
    assert later.origin.model_revision == here.model_revision


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


def test_dropout_of_a_model_in_training_mode_does_not_change_the_graph():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=42, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    replacement = ReplacementModel.of(model, tiny_tokenizer(), tiny_transcoder(1))
    first, second = (trace("w3 w1 w4 w1 w5", replacement).graph for _ in range(2))
    assert (first.weight == second.weight).all()


def test_a_model_that_hides_its_attention_patterns_is_made_to_show_them():
    model = tiny_llama(0)
    expected = trace("w3 w1 w4", ReplacementModel.of(model, tiny_tokenizer(), tiny_transcoder(1))).graph
    model.set_attn_implementation("sdpa")
    found = trace("w3 w1 w4", ReplacementModel.of(model, tiny_tokenizer(), tiny_transcoder(1))).graph
    assert (found.weight == expected.weight).all()


def test_graphs_of_objects_with_other_weights_do_not_replace_each_other(tmp_path):
    store = GraphStore(tmp_path / "store")

    def saved(model, transcoder) -> str:
        return store.save(trace("w3 w1 w4", ReplacementModel.of(model, tiny_tokenizer(), transcoder)).graph)

    first = saved(tiny_llama(0), tiny_transcoder(1))
    assert saved(tiny_llama(0), tiny_transcoder(1)) == first
    others = {saved(tiny_llama(2), tiny_transcoder(1)), saved(tiny_llama(0), tiny_transcoder(3))}
    assert len(others | {first}) == 3
    assert len(store.ids()) == 3


def test_a_models_revision_changes_with_weights_that_torch_saved(tmp_path):
    case = CASES / "llama-clt-jumprelu"
    shutil.copytree(case / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    revisions = []
    for scale in (1.0, 2.0):
        name = "model.layers.1.self_attn.v_proj.weight"
        torch.save(weights | {name: weights[name] * scale}, tmp_path / "model" / "pytorch_model.bin")
        revisions.append(ReplacementModel.load(tmp_path / "model", case / "transcoder").origin.model_revision)
    assert revisions[0] != revisions[1]


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    case = CASES / "llama-clt-jumprelu"
    shutil.copytree(case / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.0.self_attn.v_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TraceError, match=r"lacks the weights model\.layers\.0\.self_attn\.v_proj\.weight; copy or"):
        ReplacementModel.load(tmp_path / "model", case / "transcoder")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer .* cannot be loaded"),
        (lambda folder: edit(folder, hidden_size=48), "the model .* cannot be loaded"),
        (lambda folder: edit(folder, model_type="nonsense"), "the model .* cannot be loaded"),
    ],
    ids=["no tokenizer", "another width", "an unknown type"],
)
def test_a_damaged_model_folder_is_told_in_one_line(tmp_path, change, told):
    case = CASES / "llama-clt-jumprelu"
    shutil.copytree(case / "model", tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(TraceError, match=told) as caught:
        ReplacementModel.load(tmp_path / "model", case / "transcoder")
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_tokenizer_may_come_from_elsewhere(tmp_path):
    case = CASES / "llama-clt-jumprelu"
    shutil.copytree(case / "model", tmp_path / "model")
    tiny_tokenizer(20).save_pretrained(tmp_path / "words")
    replacement = ReplacementModel.load(tmp_path / "model", case / "transcoder", tokenizer=tmp_path / "words")
    assert replacement.tokenize("w3 w19 w20").token_ids == (1, 5, 21, 0)


# tokens, as circuit-tracer has them


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    prompt = ReplacementModel.of(tiny_llama(0), tokenizer, tiny_transcoder(1)).tokenize(text)
    return prompt.token_ids, prompt.words


def test_a_beginning_that_the_text_has_is_not_doubled():
    assert tokens_of(tiny_tokenizer(), "<bos> w3") == ((1, 5), ("", "w3"))


def test_an_end_that_the_tokenizer_appends_is_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "w39"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A w39", special_tokens=[("<bos>", 1), ("w39", 41)]
    )
    assert tokens_of(tokenizer, "w3") == ((1, 5), ("", "w3"))


def test_without_a_beginning_padding_or_an_end_is_put_first():
    tokenizer = tiny_tokenizer(bos=None)
    tokenizer.add_special_tokens({"eos_token": "w39"})
    assert tokens_of(tokenizer, "w3") == ((41, 5), ("", "w3"))
    tokenizer.add_special_tokens({"pad_token": "w38"})
    assert tokens_of(tokenizer, "w3") == ((40, 5), ("", "w3"))


def test_an_unknown_first_word_is_no_beginning():
    assert tokens_of(tiny_tokenizer(), "strange w3") == ((1, 0, 5), ("", "strange", "w3"))


def test_a_target_that_the_tokenizer_does_not_know_is_refused(replacement):
    with pytest.raises(TraceError, match="target 'Paris' is no token of this model, which reads it as '<unk>'"):
        one_token(replacement, "Paris")


def test_a_tokenizer_of_another_model_is_refused():
    replacement = ReplacementModel.of(tiny_llama(0), tiny_tokenizer(60), tiny_transcoder(1))
    with pytest.raises(TraceError, match="the tokenizer gives 'w50' number 52, and the model knows 42 tokens; use"):
        replacement.tokenize("w3 w50")


def test_a_prompt_without_tokens_is_refused():
    tokenizer = tiny_tokenizer(bos=None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w3", "")
    with pytest.raises(TraceError, match="the prompt 'w3' has no tokens; give text that the tokenizer knows"):
        ReplacementModel.of(tiny_llama(0), tokenizer, tiny_transcoder(1)).tokenize("w3")


def test_characters_that_the_tokenizer_drops_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("☂", "")
    replacement = ReplacementModel.of(tiny_llama(0), tokenizer, tiny_transcoder(1))
    with pytest.raises(TraceError, match="the tokenizer has no token for '☂', character 4 of the prompt; leave it out"):
        replacement.tokenize("w3 ☂ w4")
    assert replacement.tokenize(" w3  w4\n").words == replacement.tokenize("w3 w4").words


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_model_too_large_for_the_memory_is_told_in_one_line():
    case = CASES / "llama-clt-jumprelu"
    code = (
        "import resource, sys\n"
        "from tracer.errors import TraceError\n"
        "from tracer.replacement import ReplacementModel\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))\n"
        "try: ReplacementModel.load(*sys.argv[1:])\n"
        "except TraceError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(case / "model"), str(case / "transcoder")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert result.stdout.startswith("memory ran out; load the weights in half precision"), result.stderr


def test_transcoders_are_told_apart_by_decoders_that_stay_in_their_files(tmp_path):
    store, folders = GraphStore(tmp_path / "store"), [tmp_path / "first", tmp_path / "second"]
    for scale, folder in zip((1.0, 2.0), folders, strict=True):
        transcoder = tiny_transcoder(1)
        transcoder.W_dec[2].data *= scale
        save(transcoder, folder)
        replacement = ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), load_on_demand(folder))
        store.save(trace("w3 w1 w4", replacement).graph)
    assert len(store.ids()) == 2
