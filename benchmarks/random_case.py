"""Write a random model and a random cross-layer transcoder with a chosen share of active features, for benchmarks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transcoders.activations import mlp_activations

SPECIAL = ("<unk>", "<bos>", "<eos>")
CALIBRATED_ON = 512
"""Tokens from which the share of active features is set."""


@dataclass(frozen=True)
class Case:
    """Shape of one benchmark."""

    family: str = "llama"
    n_layers: int = 8
    d_model: int = 256
    n_features: int = 2048
    n_tokens: int = 24
    l0: int = 36
    """Active features per layer and position, on average."""
    n_heads: int = 8
    n_key_value_heads: int = 4
    d_head: int | None = None
    """By default the heads share the width."""
    d_mlp: int = 512
    n_words: int = 1003
    dtype: str = "float32"
    """Of the weights in the files."""
    seed: int = 0


LLAMA_1B = Case(
    n_layers=16, d_model=2048, n_features=16_384, l0=50, n_heads=32, n_key_value_heads=8, d_mlp=8192, n_words=128_256
)
GEMMA_2B = Case(
    family="gemma2", n_layers=26, d_model=2304, n_features=16_384, l0=50, n_heads=8, n_key_value_heads=4, d_head=256,
    d_mlp=9216, n_words=256_000,
)  # fmt: skip
"""Llama-3.2-1B's and Gemma-2-2B's shapes, with as many features a layer as the smallest transcoders for them."""


@torch.no_grad()
def write_case(case: Case, folder: Path) -> None:
    """Write model/, transcoder/ (circuit-tracer's layout) and prompt.json."""
    torch.manual_seed(case.seed)
    config = CONFIG_MAPPING[case.family](
        hidden_size=case.d_model, intermediate_size=case.d_mlp, num_hidden_layers=case.n_layers,
        num_attention_heads=case.n_heads, num_key_value_heads=case.n_key_value_heads,
        head_dim=case.d_head or case.d_model // case.n_heads, vocab_size=case.n_words,
        max_position_embeddings=max(64, case.n_tokens), bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.5 if "embed" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(folder / "model")
    _tokenizer(case.n_words).save_pretrained(folder / "model")
    settings = folder / "model" / "tokenizer_config.json"
    # the name by which transformers 4, which the peer needs, knows it too
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    _write_transcoder(case, model, _tokens(case)[:CALIBRATED_ON], folder / "transcoder")
    write_prompt(case, folder)


def write_prompt(case: Case, folder: Path) -> None:
    """Write prompt.json: other prompts of a case are the beginnings of its longest."""
    words = " ".join(f"w{i - len(SPECIAL)}" for i in _tokens(case)[1:].tolist())
    (folder / "prompt.json").write_text(json.dumps({"prompt": words, "case": asdict(case)}))


def _tokens(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(len(SPECIAL), case.n_words, (case.n_tokens,), generator=generator)
    tokens[0] = 1
    return tokens


def _write_transcoder(case: Case, model: PreTrainedModel, tokens: torch.Tensor, folder: Path) -> None:
    generator = torch.Generator().manual_seed(case.seed + 1)
    keep = torch.ones(1, len(tokens), dtype=torch.bool)
    keep[0, 0] = False
    inputs, outputs = (part.float() for part in mlp_activations(model, tokens[None], keep, "mlp.hook_in"))
    dtype = getattr(torch, case.dtype)
    folder.mkdir()
    for layer in range(case.n_layers):
        W_enc = (torch.randn(case.n_features, case.d_model, generator=generator) * case.d_model**-0.5).to(dtype)
        pre_activation = (inputs[layer] @ W_enc.float().T).flatten()
        bias = pre_activation.kthvalue(round(len(pre_activation) * (1 - case.l0 / case.n_features))).values
        W_dec = torch.randn(case.n_features, case.n_layers - layer, case.d_model, generator=generator)
        W_dec *= outputs[layer].std() / (case.l0 * case.n_layers) ** 0.5
        save_file(
            {
                f"W_enc_{layer}": W_enc, f"b_enc_{layer}": (-bias).expand(case.n_features).clone(),
                f"b_dec_{layer}": outputs[layer].mean(0),
            },
            folder / f"W_enc_{layer}.safetensors",
        )  # fmt: skip
        save_file({f"W_dec_{layer}": W_dec.to(dtype)}, folder / f"W_dec_{layer}.safetensors")
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nmodel_name: model\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\nscan: benchmark\n"
    )


def _tokenizer(n_words: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [*SPECIAL, *(f"w{i}" for i in range(n_words - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
