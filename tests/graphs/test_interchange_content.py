"""An imported graph is known by its content, and what its file says of itself goes into its export again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphs import GraphError, GraphStore
from graphs.interchange import from_json, to_json, validate_json, write_json
from graphs.interchange_content import content_digest
from graphs.names import graph_id_of

THEIRS = Path(__file__).parents[1] / "data" / "circuit-tracer"


@pytest.fixture
def pruned():
    """A file of circuit-tracer."""
    return json.loads((THEIRS / "pruned.json").read_text())


def id_of(document):
    return graph_id_of(from_json(document).graph.info)


def node_of(document, feature_type):
    return next(node for node in document["nodes"] if node["feature_type"] == feature_type)


def test_the_same_file_has_the_same_id_whenever_it_is_read(pruned):
    assert id_of(pruned) == id_of(THEIRS / "pruned.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["links"].pop(),
        lambda document: document["links"][0].update(weight=document["links"][0]["weight"] * (1 + 1e-15)),
        lambda document: node_of(document, "cross layer transcoder").update(activation=0.5),
        lambda document: node_of(document, "cross layer transcoder").update(clerp="a city"),
        lambda document: node_of(document, "logit").update(token_prob=0.25),
    ],
    ids=["link", "last digit of a weight", "activation", "label", "probability"],
)
def test_other_content_under_the_same_metadata_has_another_id(pruned, change):
    before = id_of(pruned)
    change(pruned)
    assert id_of(pruned) != before


@pytest.mark.parametrize("seed", range(3))
def test_content_is_the_same_after_a_file_and_after_a_store(tmp_path, random_graph, seed):
    graph = random_graph(seed)
    single = replace(graph, weight=graph.weight.astype(np.float32))
    for one in (graph, single):
        write_json(one, tmp_path / "graph.json")
        store = GraphStore(tmp_path / "store")
        graph_id = store.save(one)
        assert content_digest(from_json(tmp_path / "graph.json").graph) == content_digest(one)
        assert content_digest(store.load(graph_id)) == content_digest(one)
        store.compact()
        assert content_digest(store.load(graph_id)) == content_digest(one)
    assert content_digest(single) != content_digest(graph)


def test_whole_weights_that_were_doubles_come_back_with_the_same_content(make_graph):
    graph = make_graph("tfl", [(0, 1, 1.0), (1, 2, -0.0)])
    found = from_json(to_json(graph)).graph
    assert (graph.weight.dtype, found.weight.dtype) == (np.float64, np.float32)
    assert content_digest(found) == content_digest(graph)


def test_what_a_file_says_of_itself_is_exported_again(pruned):
    said = {
        "node_threshold": 0.75,
        "pruning_settings": {"node_threshold": 0.75, "edge_threshold": 0.9},
        "generation_settings": {"max_n_logits": 7, "batch_size": 3},
        "feature_details": {"neuronpedia_source_set": "gemmascope-transcoder-16k"},
    }
    pruned["metadata"] |= said | {
        "info": {"description": "two hops", "creator_name": "somebody", "generator": {"a": 1}}
    }
    graph = from_json(pruned).graph
    again = to_json(graph, slug="x")["metadata"]
    assert {name: again[name] for name in said} == said
    assert (again["info"]["description"], again["info"]["creator_name"]) == ("two hops", "somebody")
    assert again["info"]["generator"]["name"] == "clt-tracer"
    assert again["slug"] == "x"
    assert from_json(to_json(graph)).graph == graph


def test_what_is_no_field_of_the_format_is_not_exported_again(make_graph, make_info):
    config = json.dumps(
        {"imported": {"node_threshold": "\ud800", "info": ["x"], "feature_details": {"evil": "\ud800"}}}
    )
    metadata = to_json(make_graph("tl", [(0, 1, 1.0)], info=make_info(config=config)))["metadata"]
    assert "node_threshold" not in metadata
    assert metadata["feature_details"] == {}
    assert metadata["info"].keys() == {"generator", "create_time_ms"}


@pytest.mark.parametrize("value", [1e300, 1.01, -0.25])
@pytest.mark.parametrize("feature_type", ["logit", "cross layer transcoder"])
def test_what_is_no_probability_is_refused(pruned, feature_type, value):
    node = node_of(pruned, feature_type)
    node["token_prob"] = value
    with pytest.raises(GraphError) as error:
        from_json(pruned)
    expected = f"node '{node['node_id']}': token_prob is {json.dumps(value)}; expected a probability, 0 to 1."
    assert str(error.value) == expected


def test_a_probability_above_one_in_the_text_of_a_logit_is_refused(pruned):
    node = node_of(pruned, "logit")
    node |= {"token_prob": None, "clerp": 'Output "x" (p=7)'}
    with pytest.raises(GraphError, match=r"token_prob is 7\.0; expected a probability"):
        from_json(pruned)


@pytest.mark.parametrize("value", [1.5, -0.25, 1e300])
def test_an_influence_that_is_no_share_is_told_and_computed_anew(pruned, value):
    pruned["metadata"]["scan"] = "tiny"
    assert validate_json(pruned).n_nodes == 40
    node = node_of(pruned, "cross layer transcoder")
    node["influence"] = value
    [said] = from_json(pruned).deviations
    assert said == (
        f"node '{node['node_id']}': influence is {json.dumps(value)}; expected the share of all influence held by "
        "nodes at least as influential, 0 to 1."
    )
    with pytest.raises(GraphError, match="influence is"):
        validate_json(pruned)
    assert np.nanmax(from_json(pruned).graph.cumulative_influence) == pytest.approx(1.0)
    assert np.nanmin(from_json(pruned).graph.cumulative_influence) >= 0


def test_a_share_that_rounding_lifted_above_one_is_let_pass(pruned):
    pruned["metadata"]["scan"] = "tiny"
    node_of(pruned, "cross layer transcoder")["influence"] = 1.0000004
    assert validate_json(pruned).n_nodes == 40
