"""Models of other families than Llama are trained on: the loss falls, and what is saved is loaded and traced with."""

from dataclasses import replace

import pytest
import torch

from graphs import NodeKind
from tests.tracer.conftest import tiny_tokenizer
from tests.tracer.families import tiny_model
from tests.transcoders.test_train import SMALL, texts
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import load, train
from transcoders.activations import mlp_activations
from transcoders.corpus import tokens_corpus
from transcoders.train import Reporting

CONFIG = replace(SMALL, tokens=80 * 256, k_start=1.0, learning_rate=3e-3, warm_up=5)
PROMPT = "w3 w1 w4 w1 w5 w9 w2 w6"


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox, parallel"])
def test_a_transcoder_of_another_family_is_trained_and_traced_with(tmp_path, family):
    model, rows = tiny_model(family).requires_grad_(False), []
    train(
        model, tiny_tokenizer(), tokens_corpus(texts(), "texts"), CONFIG, tmp_path, model_name=family,
        reporting=Reporting(report_every=10, on_report=rows.append),
    )  # fmt: skip
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    transcoder = load(tmp_path / "transcoder")
    assert (transcoder.config.model_name, transcoder.config.n_layers, transcoder.config.d_model) == (family, 3, 16)
    replacement = ReplacementModel.of(model, tiny_tokenizer(), transcoder)
    tokens = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False  # of the first token nothing is learnt, and no feature is a node there
    inputs, outputs = mlp_activations(model, tokens, keep, "mlp.hook_in")
    error = (transcoder(inputs) - outputs).square().sum((1, 2)) / outputs.square().sum((1, 2))
    assert float(error.mean()) < 0.75 * rows[0]["nmse"]
    firing = transcoder.encode(inputs).count_nonzero()
    graph = trace(PROMPT, replacement, TraceConfig(coverage=1.0, prune=False)).graph
    assert (graph.kind == NodeKind.FEATURE).sum() == firing > 20
    assert graph.n_edges > firing
