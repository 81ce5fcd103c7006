"""The same graph as circuit-tracer 0.5.0 computed for the case in tests/data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from graphs import NodeKind, completeness_counting_leaves, prune, score
from tests.tracer.conftest import CASES
from tracer.attribution import attribute
from tracer.replacement import ReplacementModel
from tracer.targets import token_targets, top_tokens


@pytest.fixture(scope="module", params=["llama-clt-jumprelu", "gpt2-clt-relu", "qwen3-plt-relu", "gemma2-plt-skip"])
def case(request: pytest.FixtureRequest) -> Path:
    return CASES / request.param


@pytest.fixture(scope="module")
def expected(case):
    return load_file(case / "expected.safetensors")


@pytest.fixture(scope="module")
def record(case):
    return json.loads((case / "case.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def local(case, record):
    replacement = ReplacementModel.load(case / "model", case / "transcoder")
    return replacement.localize(replacement.tokenize(record["prompt"]))


@pytest.fixture(scope="module")
def graph(local, record):
    settings = record["attribution"]
    ids, _ = top_tokens(local, max_logits=settings["max_n_logits"], logit_mass=settings["desired_logit_prob"])
    return attribute(local, token_targets(local, tuple(ids), tuple(map(str, ids))), coverage=1.0)


@pytest.fixture(scope="module")
def numbering(graph, expected):
    """Our node numbers in the order features | errors (layer-major) | tokens | logits; −1 where we have none."""
    n_layers, n_positions, _ = expected["error_vectors"].shape
    index = {
        (int(k), int(a), int(p), int(f), int(t)): i
        for i, (k, a, p, f, t) in enumerate(
            zip(graph.kind, graph.layer, graph.position, graph.feature, graph.token_id, strict=True)
        )
    }
    tokens = expected["input_tokens"].tolist()
    keys = [(NodeKind.FEATURE, a, p, f, -1) for a, p, f in expected["active_features"].tolist()]
    keys += [(NodeKind.ERROR, a, p, -1, -1) for a in range(n_layers) for p in range(n_positions)]
    keys += [(NodeKind.TOKEN, -1, p, -1, t) for p, t in enumerate(tokens)]
    keys += [(NodeKind.LOGIT, n_layers, n_positions - 1, -1, t) for t in expected["logit_token_ids"].tolist()]
    return np.array([index.get(key, -1) for key in keys])


def dense(graph, numbering):
    matrix = np.zeros((graph.n_nodes + 1, graph.n_nodes + 1))  # the last row and column stand for nodes we lack
    matrix[graph.target, graph.source] = graph.weight
    return matrix[np.ix_(numbering, numbering)]


def test_active_features_and_tokens_are_the_same(local, expected):
    features = local.features
    ours = torch.stack([features.layer, features.position, features.feature], dim=1)
    assert torch.equal(ours, expected["active_features"])
    assert local.prompt.token_ids == tuple(expected["input_tokens"].tolist())
    torch.testing.assert_close(features.activation, expected["activation_values"], atol=1e-5, rtol=1e-5)


def test_explained_logits_are_the_same(graph, expected):
    logits = graph.kind == NodeKind.LOGIT
    assert graph.token_id[logits].tolist() == expected["logit_token_ids"].tolist()
    assert graph.probability[logits] == pytest.approx(expected["logit_probabilities"].numpy(), abs=1e-6)


def test_edges_agree_to_a_ten_thousandth_of_the_largest(graph, numbering, expected):
    theirs = expected["adjacency"].numpy()
    assert np.abs(dense(graph, numbering) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_influence_is_the_same(graph, numbering, expected):
    ours = np.append(np.nan_to_num(graph.influence), 0.0)[numbering]
    assert ours == pytest.approx(expected["node_influence"].numpy(), abs=1e-5)


def test_pruning_keeps_the_same_nodes_and_edges(graph, numbering, expected, record):
    settings = record["pruning"]
    pruned = prune(graph, node_threshold=settings["node_threshold"], edge_threshold=settings["edge_threshold"])
    assert pruned.n_nodes == record["counts"]["kept_nodes"]
    assert pruned.n_edges == record["counts"]["kept_edges"]
    ours = set(zip(pruned.kind.tolist(), pruned.layer.tolist(), pruned.position.tolist(), pruned.feature.tolist(),
                   pruned.token_id.tolist(), strict=True))  # fmt: skip
    kept = numbering[expected["node_mask"].numpy()]
    theirs = {
        (int(graph.kind[i]), int(graph.layer[i]), int(graph.position[i]), int(graph.feature[i]), int(graph.token_id[i]))
        for i in kept
    }
    assert ours == theirs


def test_scores_are_the_same_when_leaves_are_counted_as_the_peer_counts_them(graph, record):
    assert score(graph).replacement == pytest.approx(record["scores"]["replacement"], abs=1e-4)
    assert completeness_counting_leaves(graph) == pytest.approx(record["scores"]["completeness"], abs=1e-4)
    assert score(graph).completeness < record["scores"]["completeness"]
