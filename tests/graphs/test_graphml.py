"""GraphML and networkx: every column of nodes and edges is there, and what has no value is not."""

import builtins

import networkx
import numpy as np
import pytest

from graphs import GraphError
from graphs.graph import NODE_COLUMNS, NodeKind
from graphs.graphml import to_networkx, write_graphml


def as_attributes(graph):
    """What the columns say, node by node, without -1, NaN and ""."""
    found = []
    for node in range(graph.n_nodes):
        row = {name: getattr(graph, name)[node] for name in NODE_COLUMNS}
        row["kind"] = NodeKind(row["kind"]).text
        keep = {name: value for name, value in row.items() if value == value and value != ""}
        found.append({name: value for name, value in keep.items() if name == "layer" or value != -1})
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_file_read_by_networkx_has_all_nodes_edges_and_attributes(tmp_path, random_graph, seed):
    graph = random_graph(seed)
    write_graphml(graph, tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int)
    assert [dict(row) for _, row in read.nodes(data=True)] == as_attributes(graph)
    edges = {(source, target): row["weight"] for source, target, row in read.edges(data=True)}
    assert edges == dict(
        zip(zip(graph.source.tolist(), graph.target.tolist(), strict=True), graph.weight.tolist(), strict=True)
    )
    assert read.graph["prompt"] == "the capital of Texas is"


def test_the_networkx_graph_is_that_of_the_file(tmp_path, random_graph):
    graph = random_graph(3)
    write_graphml(graph, tmp_path / "graph.graphml")
    read, made = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int), to_networkx(graph)
    assert dict(made.nodes(data=True)) == dict(read.nodes(data=True))
    assert set(made.edges) == set(read.edges)
    assert made.number_of_edges() == graph.n_edges


def test_hostile_texts_make_a_valid_file(tmp_path, make_graph, make_info):
    label = np.array(["<b>&\"'", "a\0b\ud800", "日本\u202e]]>"], object)
    graph = make_graph("tfl", [(0, 1, 1.0)], info=make_info("x\r\ny"), label=label)
    write_graphml(graph, tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int)
    assert [row["label"] for _, row in read.nodes(data=True)] == ["<b>&\"'", "a\\x00b\\ud800", "日本\u202e]]>"]
    assert read.graph["prompt"] == "x\r\ny"


def test_a_missing_networkx_is_told(random_graph, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "networkx":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GraphError, match="pip install networkx, or export to GraphML"):
        to_networkx(random_graph(0))
