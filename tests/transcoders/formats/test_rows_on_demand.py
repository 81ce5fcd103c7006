"""Every published layout on demand: decoder rows are those that `load` reads, and so is what is traced with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from graphs import NodeKind
from tests.tracer.conftest import tiny_tokenizer
from tests.transcoders.formats import test_clt_forge as clt_forge
from tests.transcoders.formats import test_crosslayer_transcoder as crosslayer_transcoder
from tests.transcoders.formats import test_gemma_scope as gemma_scope
from tests.transcoders.formats import test_language_model_saes as language_model_saes
from tests.transcoders.formats import test_sparsify as sparsify
from tests.transcoders.formats.readings import normal
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, load, load_on_demand, open_stored

D_MODEL = 6
"""Of all that the readers' tests write."""


def write_clt_forge(folder: Path) -> None:
    save_file(clt_forge.tensors(), folder / "clt_weights.safetensors")
    clt_forge.write_config(folder)


def write_sharded_clt_forge(folder: Path) -> None:
    clt_forge.write_shards(folder, clt_forge.tensors(), [4, 2, 3])
    clt_forge.write_config(folder)


def write_low_rank_clt_forge(folder: Path) -> None:
    random, whole = normal(4), clt_forge.tensors()
    del whole["W_dec"]
    whole |= {"W_dec_base": random(3, 9, D_MODEL), "lora_A": random(3, 9, 2), "lora_B": random(3, 2, D_MODEL)}
    save_file(whole, folder / "clt_weights.safetensors")
    clt_forge.write_config(folder, decoder_type="lora", decoder_rank=2)


def write_language_model_saes(folder: Path) -> None:
    save_file(language_model_saes.tensors(), folder / "sae_weights.safetensors")
    language_model_saes.write_config(folder)


def write_language_model_saes_with_torch(folder: Path) -> None:
    torch.save({"sae": language_model_saes.tensors("topk")}, folder / "sae_weights.pt")
    language_model_saes.write_config(folder, act_fn="topk")


def write_crosslayer_transcoder(folder: Path) -> None:
    save_file(crosslayer_transcoder.tensors("JumpReLU", "Dimensionwise"), folder / "checkpoint.safetensors")
    crosslayer_transcoder.write_config(folder, "JumpReLU", "Dimensionwise")


def write_lightning_checkpoint(folder: Path) -> None:
    model = {f"model.{name}": value for name, value in crosslayer_transcoder.tensors("PerLayerTopK").items()}
    torch.save({"state_dict": model}, folder / "clt.ckpt")
    crosslayer_transcoder.write_config(folder, "PerLayerTopK", k=2)


LAYOUTS: dict[str, Any] = {
    "Gemma Scope, npz": gemma_scope.write_first,
    "Gemma Scope, compressed npz": lambda folder: gemma_scope.write_first(folder, save=np.savez_compressed),
    "Gemma Scope 2, per layer": lambda folder: gemma_scope.write_second(folder, affine=True),
    "Gemma Scope 2, cross-layer": lambda folder: gemma_scope.write_cross_layer(folder, affine=True),
    "CLT-Forge": write_clt_forge,
    "CLT-Forge, shards": write_sharded_clt_forge,
    "CLT-Forge, low rank": write_low_rank_clt_forge,
    "Language-Model-SAEs": write_language_model_saes,
    "Language-Model-SAEs, by torch": write_language_model_saes_with_torch,
    "crosslayer-transcoder": write_crosslayer_transcoder,
    "crosslayer-transcoder, by Lightning": write_lightning_checkpoint,
    "sparsify": lambda folder: sparsify.write_per_layer(folder, skip=True),
} | {
    f"clt-training, {variant}": lambda folder, variant=variant: sparsify.write_cross_layer(folder, variant)
    for variant in sparsify.COALESCE
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    LAYOUTS[request.param](tmp_path)
    return tmp_path


def test_rows_of_any_features_are_those_of_the_whole_transcoder(folder):
    whole, stored = load(folder), load_on_demand(folder)
    n_features = whole.config.n_features
    generator = torch.Generator().manual_seed(3)
    for layer, decoder in enumerate(whole.W_dec):
        assert len(decoder.flatten(1).unique(dim=0)) == n_features  # or a wrong row would not show
        for wanted in (
            torch.randperm(n_features, generator=generator)[:4], torch.tensor([n_features - 1]),
            torch.randint(n_features, (20,), generator=generator), torch.arange(n_features), torch.tensor([]).long(),
        ):  # fmt: skip
            rows = stored.decoder_rows(layer, wanted)
            assert rows.shape == (len(wanted), *decoder.shape[1:])
            torch.testing.assert_close(rows, decoder[wanted], atol=1e-6, rtol=1e-6)
            used, place = stored.decoders_with(layer, wanted.unique())
            torch.testing.assert_close(used[place], decoder[wanted.unique()], atol=1e-6, rtol=1e-6)


def test_a_trace_is_the_same_in_memory_and_on_demand(folder):
    expected, found = (traced(read(folder)) for read in (load, load_on_demand))
    assert open_stored(folder).layout.split(",")[0] != "circuit-tracer"
    assert (expected.kind == NodeKind.FEATURE).sum() > 10
    for column in ("kind", "layer", "position", "feature", "source", "target"):
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column), err_msg=column)
    largest = float(np.abs(expected.weight).max())
    np.testing.assert_allclose(found.weight, expected.weight, rtol=0, atol=1e-5 * largest)


def traced(transcoder: CrossLayerTranscoder):
    """The whole graph of a prompt, with a Llama as wide as the readers' transcoders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=42, hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    replacement = ReplacementModel.of(LlamaForCausalLM(config), tiny_tokenizer(), transcoder)
    return trace("w3 w1 w4 w1 w5", replacement, TraceConfig(target=("w3", "w7"), coverage=1.0, prune=False)).graph
