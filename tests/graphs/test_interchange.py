"""Graph JSON out and in: nothing is lost, files of circuit-tracer are read, and bad ones are told in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphs import GraphError, NodeKind
from graphs.annotations import Annotations, Supernode
from graphs.interchange import from_json, to_json, validate_json, write_json
from graphs.interchange_metadata import words_of
from graphs.interchange_nodes import pair, unpair

THEIRS = Path(__file__).parents[1] / "data" / "circuit-tracer"
ADDED = Annotations((Supernode("say “Austin”", (6, 8)), Supernode("<b>", (7,))), (6, 9), {"clickedId": "", "x": [1]})


def refusal(source, name="broken.json"):
    """The one line with which a file is refused."""
    with pytest.raises(GraphError) as error:
        validate_json(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def document(random_graph):
    """A graph as another program would write it: without what only we know."""
    found = to_json(random_graph(0))
    del found["metadata"]["clt_tracer"]
    for node in found["nodes"]:
        del node["clt_tracer"]
    return found


# both ways


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_comes_back_as_it_was_from_a_file_and_from_an_object(tmp_path, random_graph, seed):
    graph = random_graph(seed)
    write_json(graph, tmp_path / "graph.json", ADDED)
    for source in (tmp_path / "graph.json", to_json(graph, ADDED)):
        found = from_json(source)
        assert found.graph == graph
        assert (found.annotations.supernodes, found.annotations.pinned) == (ADDED.supernodes, ADDED.pinned)
        assert found.annotations.view["x"] == [1]
        assert found.deviations == ()
        assert validate_json(source) == graph


def test_the_file_and_the_object_say_the_same(tmp_path, random_graph):
    write_json(random_graph(1), tmp_path / "graph.json", ADDED)
    assert json.loads((tmp_path / "graph.json").read_text("utf-8")) == to_json(random_graph(1), ADDED)


def test_targets_that_are_no_tokens_and_single_precision_come_back(make_graph, make_info):
    graph = make_graph(
        "tfll",
        [(0, 1, 0.1), (1, 2, 0.2), (1, 3, 0.3)],
        weight=np.float32([0.1, 0.2, 0.3]),
        layer=[-1, 0, 3, 2],
        feature=[-1, 1, -1, 9],
        token_id=[0, -1, -1, -1],
        token=np.array(["the", "the", "Austin − Dallas", "feature 2/9 at of"], object),
        probability=[np.nan, np.nan, 1.0, np.nan],
        label=np.array(["", "a city", "", "the asked feature"], object),
        info=make_info(config='{"prune": true, "node_threshold": 0.5, "edge_threshold": 0.75, "max_logits": 3}'),
    )
    document = to_json(graph)
    found = from_json(document).graph
    assert found == graph
    assert found.weight.dtype == np.float32
    assert document["metadata"]["node_threshold"] == 0.5
    assert document["metadata"]["pruning_settings"] == {"node_threshold": 0.5, "edge_threshold": 0.75}
    assert document["metadata"]["generation_settings"] == {"max_n_logits": 3}
    assert [node["feature"] for node in document["nodes"][2:]] == [1_000_000_000, 1_000_000_001]


def test_ids_are_those_of_circuit_tracer_and_errors_have_their_own(make_graph, make_info):
    info = make_info("a b c d", n_layers=7)
    graph = make_graph("tfel", [(0, 1, 1.0)], info=info, layer=[-1, 0, 5, 7], position=[0, 3, 3, 3],
                       feature=[-1, 5, -1, -1], token_id=[4, -1, -1, 9])  # fmt: skip
    nodes = to_json(graph)["nodes"]
    assert [node["node_id"] for node in nodes] == ["E_4_0", "0_5_3", "5_-1_3", "8_9_3"]
    assert [node["jsNodeId"] for node in nodes] == ["E_4-0", "0_5-0", "5_-1_3-0", "L_9-3"]
    assert [node["feature"] for node in nodes] == [0, 20, -1, 9]
    assert [node["layer"] for node in nodes] == ["E", "0", "5", "8"]
    assert nodes[3]["clerp"] == 'Output "d" (p=1.000)'


def test_features_are_paired_as_in_schema_version_1():
    assert pair(3, 4021) == 8102321
    assert all(unpair(pair(layer, feature)) == (layer, feature) for layer in range(9) for feature in range(50))


# files of circuit-tracer


def test_a_graph_of_circuit_tracer_keeps_its_nodes_links_and_thresholds():
    document = json.loads((THEIRS / "pruned.json").read_text())
    found = from_json(THEIRS / "pruned.json")
    graph = found.graph
    assert (graph.n_nodes, graph.n_edges) == (len(document["nodes"]), len(document["links"])) == (40, 244)
    assert graph.info.n_layers == 4
    assert graph.info.token_ids == (1, 31, 15, 28, 19, 43, 45, 31, 47)
    assert graph.info.words == ("", "w28", "w12", "w25", "w16", "w40", "w42", "w28", "w44")
    assert json.loads(graph.info.config)["imported"]["node_threshold"] == 0.8
    assert (graph.info.model, graph.info.transcoder) == ("tests/llama-clt-jumprelu",) * 2
    activations = sorted(node["activation"] for node in document["nodes"] if node["activation"] is not None)
    assert sorted(graph.activation[graph.kind == NodeKind.FEATURE]) == activations
    assert sorted(graph.weight.tolist()) == sorted(link["weight"] for link in document["links"])
    assert np.nansum(graph.probability) == pytest.approx(sum(node["token_prob"] for node in document["nodes"]))
    assert (graph.cumulative_influence[graph.kind == NodeKind.FEATURE] <= 1).all()


def test_a_feature_and_an_error_with_one_id_are_told_apart(random_graph):
    """circuit-tracer's own matrix says whose the links of '0_1_1' and '0_2_1' are."""
    from safetensors.numpy import load_file

    graph = from_json(THEIRS / "whole.json").graph
    case = load_file(THEIRS.parent / "llama-clt-jumprelu" / "expected.safetensors")
    active, matrix = case["active_features"].tolist(), case["adjacency"]
    n_tokens = len(graph.info.tokens)
    keys = [(NodeKind.FEATURE, *key) for key in active]
    keys += [(NodeKind.ERROR, layer, position, -1) for layer in range(4) for position in range(n_tokens)]
    theirs = {key: place for place, key in enumerate(keys)}
    place = [
        theirs.get(key, -1)
        for key in zip(
            *(getattr(graph, name).tolist() for name in ("kind", "layer", "position", "feature")), strict=True
        )
    ]
    known = [
        (place[target], place[source], weight)
        for source, target, weight in zip(graph.source, graph.target, graph.weight.tolist(), strict=True)
        if place[target] >= 0 and place[source] >= 0
    ]
    assert (
        sum(
            place[node] in (theirs[NodeKind.ERROR, 1, 1, -1], theirs[NodeKind.FEATURE, 0, 1, 1])
            for node in graph.source
        )
        > 9
    )
    target, source, weight = np.array(known).T
    assert matrix[target.astype(int), source.astype(int)] == pytest.approx(weight, abs=1e-5)
    assert "node_id is that of a feature and of an error" in from_json(THEIRS / "whole.json").deviations[1]


def test_older_errors_are_read_by_their_type_and_layer(document):
    ids = {node["node_id"]: node for node in document["nodes"]}
    old, error = next(
        (old, node)
        for node in document["nodes"]
        if node["feature_type"] == "mlp reconstruction error"
        and (old := f"0_{node['layer']}_{node['ctx_idx']}") not in ids
    )
    for link in document["links"]:
        link["source"] = old if link["source"] == error["node_id"] else link["source"]
    expected = from_json(to_json(from_json(document | {"links": []}).graph))
    error["node_id"] = old
    graph = from_json(document).graph
    assert graph.kind.tolist() == expected.graph.kind.tolist()
    node = int(np.flatnonzero((graph.kind == NodeKind.ERROR) & (graph.position == error["ctx_idx"])
                              & (graph.layer == int(error["layer"])))[0])  # fmt: skip
    assert (graph.source == node).sum() == sum(link["source"] == old for link in document["links"])


def test_an_ambiguous_link_is_refused():
    """Nothing stands between the feature and the error in the list of nodes, and one link leads to a later layer."""
    document = json.loads((THEIRS / "whole.json").read_text())
    chosen = ("0_2_1", next(node["node_id"] for node in document["nodes"] if node["layer"] == "4"
                            or node["feature_type"] == "logit"))  # fmt: skip
    document["nodes"] = [node for node in document["nodes"] if node["node_id"] in chosen]
    document["links"] = [{"source": chosen[0], "target": chosen[1], "weight": 1.0}]
    assert "nothing tells whose link it is" in refusal(document)


def test_what_a_viewer_saved_as_text_is_read(document):
    first, second, third = (node["node_id"] for node in document["nodes"][6:9])
    document["qParams"] = {"pinnedIds": f"{first},{second}", "supernodes": json.dumps([["pair", second, third]]),
                           "clerps": json.dumps([[first, "mine"]]), "linkType": "both"}  # fmt: skip
    found = from_json(document)
    assert found.annotations.pinned == (6, 7)
    assert found.annotations.supernodes == (Supernode("pair", (7, 8)),)
    assert found.graph.label[6] == "mine"
    assert refusal(document) == "qParams: pinnedIds is a text; expected a list of texts. (1 more)"


def test_features_without_a_number_in_their_id_are_read_from_every_numbering(document):
    feature = next(node for node in document["nodes"] if node["layer"] == "1" and node["feature"] >= 0)
    place, number = document["nodes"].index(feature), int(feature["node_id"].split("_")[1])
    document["links"] = []
    feature["node_id"] = "custom"
    for given in (pair(1, number), 10**5 + number):
        feature["feature"] = given
        assert from_json(document).graph.feature[place] == number


def test_links_may_stand_before_the_nodes(tmp_path, document):
    (tmp_path / "turned.json").write_text(json.dumps(dict(reversed(document.items()))))
    assert from_json(tmp_path / "turned.json").graph.n_edges == len(document["links"])


def test_words_are_those_of_the_prompt_around_each_token():
    tokens = ["<bos>", "The", " cap", "ital", " of", " Dallas", ",", " ", "�", " is"]
    assert words_of("The capital of Dallas,  é is", tokens) == (
        "", "The", "capital", "capital", "of", "Dallas", ",", "", "", "is",
    )  # fmt: skip


# what is refused


def test_every_schema_rule_is_told_with_its_place(document):
    def broken(path, value):
        copy = json.loads(json.dumps(document))
        place = copy
        for step in path[:-1]:
            place = place[step]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return refusal(copy)

    feature = document["nodes"].index(next(node for node in document["nodes"] if node["layer"] == "1"))
    name = document["nodes"][feature]["node_id"]
    assert broken(("metadata",), None) == "the object has no metadata; it is no graph in circuit-tracer's format."
    assert broken(("metadata", "slug"), 3) == "metadata: slug is 3; expected a text."
    assert broken(("metadata", "scan"), None) == "metadata has no scan; expected a text."
    assert (
        broken(("metadata", "prompt_tokens"), ["a", 1])
        == "metadata: prompt_tokens is a list; expected a list of texts."
    )
    assert "node_threshold is true; expected a finite number" in broken(("metadata", "node_threshold"), True)
    assert "batch_size is 1.5; expected a whole number" in broken(
        ("metadata", "generation_settings"), {"batch_size": 1.5}
    )
    assert broken(("qParams",), []) == "qParams is a list; expected an object."
    assert broken(("qParams", "linkType"), 1) == "qParams: linkType is 1; expected a text."
    assert broken(("nodes",), {}) == "nodes is no list; expected a list of objects."
    assert broken(("nodes", feature), "x") == f"node {feature} is 'x'; expected an object."
    assert broken(("nodes", feature, "clerp"), None) == f"node '{name}' has no clerp; expected a text."
    assert (
        broken(("nodes", feature, "feature"), "7") == f"node '{name}': feature is '7'; expected a whole number or null."
    )
    assert broken(("nodes", feature, "layer"), "x").startswith(f"node '{name}': layer is 'x'; expected a number")
    assert broken(("links", 3, "weight"), "1").endswith(": weight is '1'; expected a finite number.")
    assert broken(("links", 3, "weight"), None).endswith(" has no weight; expected a finite number.")


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer", 10**12), ("feature", 2**63), ("token_id", 2**31), ("token_id", -2), ("input_size", -5)],
)
def test_our_own_numbers_are_checked_too(document, field, value):
    document["nodes"][8].setdefault("clt_tracer", {})[field] = value
    assert f"{field} is {value}" in refusal(document)


def test_a_number_of_layers_that_cannot_be_is_refused(random_graph):
    document = to_json(random_graph(0))
    document["metadata"]["clt_tracer"]["n_layers"] = 10**30
    assert "n_layers is a huge number; expected 0 to 10000" in refusal(document)


def test_what_the_schema_lets_pass_is_refused_too(document):
    def broken(change):
        copy = json.loads(json.dumps(document))
        change(copy)
        return refusal(copy)

    nodes, links = document["nodes"], document["links"]
    ends = f"link 2 ('{links[2]['source']}' → '{links[2]['target']}')"

    def set_node(place, **changes):
        return lambda copy: copy["nodes"][place].update(changes)

    assert broken(lambda d: d["nodes"].append(nodes[8])) == (
        f"node '{nodes[8]['node_id']}': node_id is given twice; every node needs its own."
    )
    assert broken(lambda d: d["links"][2].update(source="9_9_9")) == (
        f"link 2 ('9_9_9' → '{links[2]['target']}'): source '9_9_9' is the id of no node; add the node."
    )
    assert (
        broken(lambda d: d["links"][2].update(weight=float("nan")))
        == f"{ends}: weight is NaN; expected a finite number."
    )
    assert broken(lambda d: d["links"][2].update(weight=10**400)) == (
        f"{ends}: weight is a huge number; expected a finite number."
    )
    assert "feature_type 'lorsa' is not read; expected 'embedding'" in broken(set_node(8, feature_type="lorsa"))
    error = {"ctx_idx": 5, "node_id": "x", "feature": None, "feature_type": "mlp reconstruction error"}
    assert "ctx_idx is 5; the prompt has positions 0 … 4" in broken(
        lambda d: (set_node(8, **error)(d), d["links"].clear())
    )
    assert "ctx_idx is -1; expected a number from 0" in broken(set_node(8, ctx_idx=-1))
    assert "token_prob is -0.5; expected a probability" in broken(set_node(-1, token_prob=-0.5))
    assert "expected 14, layer and feature paired" in broken(set_node(7, feature=10**6))
    assert "clerp has no 'Output" in broken(set_node(-1, clerp="Austin"))
    assert "the layers of logits are 3 and 4; expected one for all" in broken(set_node(-1, layer="3"))
    assert "does not lead to a later layer; expected no cycles" in broken(
        lambda d: d["links"].append({"source": links[2]["target"], "target": links[2]["source"], "weight": 1})
    )
    assert "is given twice; add the weights" in broken(lambda d: d["links"].append(links[2]))
    for key in ("pinnedIds", "supernodes"):
        value = ["nobody"] if key == "pinnedIds" else [["group", "nobody"]]
        assert "names 'nobody', which is the id of no node" in broken(
            lambda d, k=key, v=value: d["qParams"].update({k: v})
        )
    twice = [["a", nodes[6]["node_id"]], ["b", nodes[6]["node_id"]]]
    assert broken(lambda d: d["qParams"].update(supernodes=twice)) == (
        "node 6 is in two supernodes; a node belongs to one."
    )
    assert "supernodes is a list; expected a list of lists" in broken(
        lambda d: d["qParams"].update(supernodes=[["x", 1]])
    )


@pytest.mark.parametrize("slug", ["a/b", "..\\x", "a\0b", "", "ü", "x" * 201, "a b"])
def test_hostile_slugs_are_refused(document, slug):
    document["metadata"]["slug"] = slug
    assert "metadata: slug is" in refusal(document)


@pytest.mark.parametrize("name", ["a\0", "../x", "<img src=x>", "é", "x" * 65, "\ud800"])
def test_hostile_node_ids_are_refused(document, name):
    document["nodes"][7]["node_id"] = name
    assert "node_id" in refusal(document)


def test_a_scan_with_a_slash_is_read_but_not_valid_for_an_upload(document):
    document["metadata"]["scan"] = "mntss/clt-gemma"
    assert from_json(document).graph.info.transcoder == "mntss/clt-gemma"
    assert "scan is 'mntss/clt-gemma'; an upload needs" in refusal(document)
    document["metadata"]["scan"] = "a\nb"
    with pytest.raises(GraphError, match="expected the name of a model or transcoder"):
        from_json(document)


def test_texts_of_any_letters_come_back_and_lone_surrogates_are_refused(document):
    document["metadata"]["prompt_tokens"][1] = "\0\u202e日本'; DROP TABLE nodes; --"
    assert from_json(document).graph.info.tokens[1] == "\0\u202e日本'; DROP TABLE nodes; --"
    document["nodes"][7]["clerp"] = "\ud800"
    assert "expected a text" in refusal(document)


def test_a_graph_without_places_is_exported_otherwise(make_graph):
    graph = make_graph("tl", [])
    with pytest.raises(GraphError, match="export to GraphML instead"):
        to_json(replace(graph, position=np.array([-1, -1])))
