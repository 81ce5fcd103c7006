"""Prompts and models at the edge of what there is, from `trace` to what is saved and told: correct graphs."""

import json

import pytest

from graphs import GraphStore, NodeKind
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer.commands import show_graph
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel

VOCABULARY = 42


def replacement_of(n_layers: int = 3, *, threshold: float | None = None, bos: int | None = 1) -> ReplacementModel:
    transcoder = tiny_transcoder(1, n_layers=n_layers)
    if threshold is not None:
        transcoder.threshold[:] = threshold
    return ReplacementModel.of(tiny_llama(0, n_layers=n_layers), tiny_tokenizer(bos=bos), transcoder)


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize(
    ("text", "model", "settings", "token_ids", "kinds"),
    [
        ("w3", {"bos": None}, {}, (5,), {"token"}),
        ("w3", {}, {}, (1, 5), {"token", "feature", "error"}),
        ("w3 w1", {"bos": 0}, {}, (0, 5, 3), {"token", "feature", "error"}),
        ("w3 w1 w4", {"bos": None}, {}, (5, 3, 6), {"token", "feature", "error"}),
        ("w3 w1 w4", {"n_layers": 1}, {}, (1, 5, 3, 6), {"token", "feature", "error"}),
        ("w3", {"n_layers": 1, "bos": None}, {}, (5,), {"token"}),
        ("w3 w1 w4", {"threshold": 1e6}, {}, (1, 5, 3, 6), {"token", "error"}),
        ("w3 w1", {}, {"max_logits": 10_000, "logit_mass": 1.0}, (1, 5, 3), {"token", "feature", "error"}),
        ("w3 w1", {}, {"max_features": 10_000, "batch_size": 10_000}, (1, 5, 3), {"token", "feature", "error"}),
    ],
    ids=[
        "one token", "one word", "BOS is 0", "no BOS", "one layer", "one layer and one token", "no active feature",
        "all logits", "more features than there are",
    ],
)  # fmt: skip
def test_the_graph_is_whole_is_saved_and_can_be_shown(tmp_path, text, model, settings, token_ids, kinds, prune):
    done = trace(text, replacement_of(**model), TraceConfig(prune=prune, coverage=1.0, **settings))
    graph, info = done.graph, done.graph.info
    assert info.token_ids == token_ids
    assert max(info.conservation_error, info.logits_error) < 1e-5
    assert {NodeKind(kind).text for kind in graph.kind[graph.source]} == kinds
    asked = int((graph.kind == NodeKind.LOGIT).sum())
    assert asked == VOCABULARY if settings.get("max_logits") else asked <= 10
    assert 1 <= len(done.predictions) <= 5
    scores = (info.replacement_score, info.completeness_score)
    assert all(score is not None and 0 <= score <= 1 for score in scores)
    store = GraphStore(tmp_path / "store")
    graph_id = store.save(graph)
    assert store.load(graph_id) == graph
    assert f"Prompt   {text}" in show_graph(store, graph_id, as_json=False)
    shown = json.loads(show_graph(store, graph_id, as_json=True))
    assert (shown["prompt"], len(shown["targets"])) == (text, asked)
