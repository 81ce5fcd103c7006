"""Tiny real models built in memory: a random Llama and a random transcoder for it."""

import io
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tracer.cli import main
from tracer.local import LocalReplacementModel
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, TranscoderConfig

CASES = Path(__file__).parents[1] / "data"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Exit status, stdout and stderr of `trace …` in this process, in a folder and with this on stdin."""

    def run(*arguments: str, inside: Path = tmp_path, given: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(inside)
        monkeypatch.setattr(sys, "argv", ["trace", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def tiny_tokenizer(n_words: int = 40, *, bos: int | None = 1) -> PreTrainedTokenizerFast:
    """Whole words; the beginning-of-sequence token has number `bos`, or is lacking."""
    vocabulary = {"<unk>": 1 if bos == 0 else 0, "<bos>": 0 if bos == 0 else 1}
    vocabulary |= {f"w{i}": i + 2 for i in range(n_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is None:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def tiny_llama(seed: int, *, n_layers: int = 3, biases: bool = True, n_kv_heads: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=42, hidden_size=16, intermediate_size=24, num_hidden_layers=n_layers, num_attention_heads=2,
        num_key_value_heads=n_kv_heads, max_position_embeddings=32, attention_bias=biases, mlp_bias=biases,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.25)
    return model


def tiny_transcoder(
    seed: int, *, n_layers: int = 3, reads: str = "mlp.hook_in", n_features: int = 20
) -> CrossLayerTranscoder:
    generator = torch.Generator().manual_seed(seed)
    transcoder = CrossLayerTranscoder(TranscoderConfig(n_layers, 16, n_features, "jumprelu", reads=reads))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        transcoder.threshold.copy_(torch.rand(transcoder.threshold.shape, generator=generator) * 0.3)
    return transcoder.eval().requires_grad_(False)


@pytest.fixture(params=["hook_resid_mid", "mlp.hook_in"])
def replacement(request: pytest.FixtureRequest) -> ReplacementModel:
    """A random Llama with biases and grouped heads, and a random JumpReLU transcoder."""
    return ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), tiny_transcoder(1, reads=request.param))


@pytest.fixture
def local(replacement: ReplacementModel) -> LocalReplacementModel:
    return replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5 w9"))
