from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import jaxtyping
import numpy as np
import pytest

from graphs import GraphError, NodeKind, logit_weights, subgraph


def test_a_graph_counts_its_nodes_and_edges(make_graph):
    graph = make_graph("tfl", [(0, 1, 2.0), (1, 2, -1.0)])
    assert (graph.n_nodes, graph.n_edges) == (3, 2)
    assert [NodeKind(kind).text for kind in graph.kind] == ["token", "feature", "logit"]


def test_a_graph_may_have_no_edges_and_no_nodes(make_graph):
    assert make_graph("tl", []).n_edges == 0
    assert make_graph("", []).n_nodes == 0


def test_columns_are_stored_in_their_types_and_cannot_be_written(make_graph):
    layer = np.array([-1, 0, 3], dtype=np.int64)
    graph = make_graph("tfl", [(0, 1, 2.0)], layer=layer)
    assert (graph.layer.dtype, graph.kind.dtype, graph.influence.dtype) == (np.int32, np.uint8, np.float64)
    with pytest.raises(ValueError, match="read-only"):
        graph.weight[0] = 1.0
    layer[0] = -1  # the caller's own array stays writeable


def test_single_precision_weights_stay_single(make_graph):
    assert make_graph("tl", [(0, 1, 2.0)]).weight.dtype == np.float64
    assert make_graph("tl", [(0, 1, 2.0)], weight=np.float32([2.0])).weight.dtype == np.float32


def test_graphs_are_equal_when_all_columns_are(make_graph):
    graph = make_graph("tfl", [(0, 1, 2.0)])
    assert graph == make_graph("tfl", [(0, 1, 2.0)])
    assert graph != make_graph("tfl", [(0, 1, 2.5)])
    assert graph != make_graph("tfl", [(0, 2, 2.0)])
    assert graph != make_graph("tfl", [(0, 1, 2.0)], label=np.array(["", "x", ""], dtype=object))
    assert graph != replace(graph, info=replace(graph.info, seconds=1.0))
    assert graph != "a graph"


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 1, 1.0), (1, 0, 1.0)], "1 of 2 edges run backward; sort nodes by layer so that every source precedes"),
        ([(1, 1, 1.0)], "1 of 1 edges run backward"),
        ([(0, 3, 1.0)], "an edge names a node that does not exist; sources and targets are 0 … 2"),
        ([(-1, 2, 1.0)], "an edge names a node that does not exist"),
        ([(0, 1, np.nan), (0, 2, np.inf)], "2 of 2 edge weights are NaN or infinite"),
        ([(0, 2, 1.0), (0, 1, 1.0), (0, 2, 1.0)], "edge 0 → 2 is given twice"),
    ],
)
def test_edges_that_break_the_law_are_refused(make_graph, edges, message):
    with pytest.raises(GraphError, match=message) as error:
        make_graph("tfl", edges)
    assert "\n" not in str(error.value)


@pytest.fixture
def shapes_unchecked():
    """The tests check shapes and types of every call, which would hide the checks that users meet."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer": [-1, 0]}, "column layer has 2 entries, but the graph has 3 nodes"),
        ({"weight": [1.0, 2.0]}, "column weight has 2 entries, but the graph has 1 edges"),
        ({"position": [0, 3, 0]}, "position 3 of a node is out of range; the graph's positions are -1 … 2"),
        ({"layer": [-1, 9, 3]}, "layer 9 of a node is out of range"),
        ({"layer": [-1, 0.5, 3]}, "column layer holds values that are no int32"),
        ({"feature": [-1, 2**40, -1]}, "column feature holds values that are no int32"),
        ({"kind": np.array([0, 1, 4], np.uint8)}, "kind 4 is unknown"),
        ({"probability": [0.5, np.nan, 0.5]}, "probability must be NaN for nodes other than logits"),
        ({"probability": [np.nan, np.nan, -0.5]}, "probability must be NaN for nodes other than logits"),
        ({"label": np.array(["", None, ""], dtype=object)}, "column label holds values that are no text"),
        ({"activation": np.zeros((3, 1))}, "column activation has shape \\(3, 1\\)"),
    ],
)
def test_malformed_columns_are_refused(make_graph, columns, message):
    with pytest.raises(GraphError, match=message):
        make_graph("tfl", [(0, 1, 1.0)], **columns)


def test_a_node_cannot_be_there_twice(make_graph):
    with pytest.raises(GraphError, match=r"two nodes are the same feature \(layer 0, position 0, feature 5"):
        make_graph("tffl", [], feature=[-1, 5, 5, -1])
    with pytest.raises(GraphError, match="two nodes are the same logit"):
        make_graph("tll", [], token_id=[0, 8, 8])
    make_graph("tffl", [], feature=[-1, 5, 5, -1], position=[0, 0, 1, 0])


def test_info_must_describe_every_position_and_name_a_time_zone(make_info):
    with pytest.raises(GraphError, match="tokens, token_ids and words have 2, 3 and 3 entries"):
        make_info("a b c", tokens=("a", "b"))
    with pytest.raises(GraphError, match="created_at has no time zone"):
        make_info(created_at=datetime(2025, 1, 1))


def test_created_at_is_kept_in_utc(make_info):
    east = datetime(2025, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert make_info(created_at=east).created_at.isoformat() == "2025-01-01T10:00:00+00:00"
    assert make_info(created_at=east).created_at.tzinfo is UTC


def test_a_subgraph_keeps_the_edges_between_its_nodes_and_renumbers_them(make_graph):
    graph = make_graph("tffel", [(0, 1, 1.0), (0, 2, 2.0), (1, 4, 3.0), (2, 4, 4.0), (3, 4, 5.0)])
    part = subgraph(graph, np.array([True, False, True, True, True]))
    assert part.feature.tolist() == [-1, 2, -1, -1]
    assert list(zip(part.source, part.target, part.weight, strict=True)) == [(0, 1, 2.0), (1, 3, 4.0), (2, 3, 5.0)]
    assert part.info == graph.info


def test_a_subgraph_can_drop_edges_too(make_graph):
    graph = make_graph("tfl", [(0, 1, 1.0), (0, 2, 2.0), (1, 2, 3.0)])
    part = subgraph(graph, np.ones(3, bool), np.array([0, 2]))
    assert part.weight.tolist() == [1.0, 3.0]


def test_what_lost_edges_brought_is_in_bias_and_remainder_so_that_they_still_add_up(make_graph):
    graph = make_graph(
        "tffl", [(0, 1, 1.0), (0, 2, 2.0), (0, 3, -4.0), (1, 3, 3.0), (2, 3, 0.5)],
        pre_activation=[np.nan, 1.5, 2.0, -0.25], bias=[np.nan, 0.5, 0.0, 0.25], remainder=[np.nan, 0.25, 0.0, 0.0],
        input_size=[np.nan, 1.25, 2.0, 7.5],
    )  # fmt: skip
    part = subgraph(graph, np.array([True, True, False, True]), np.array([0, 3]))
    assert part.weight.tolist() == [1.0, 3.0]
    np.testing.assert_array_equal(part.bias, [np.nan, 0.5, -3.25])
    np.testing.assert_array_equal(part.remainder, [np.nan, 0.25, -3.5])
    np.testing.assert_array_equal(part.input_size, [np.nan, 1.25, 7.5])
    brought = np.bincount(part.target, part.weight, part.n_nodes)
    np.testing.assert_array_equal((brought + part.bias)[1:], part.pre_activation[1:])


def test_all_of_a_graph_is_the_graph(random_graph):
    graph = random_graph(0)
    assert subgraph(graph, np.ones(graph.n_nodes, bool)) == graph


def test_logit_weights_are_probabilities_of_logits_and_zero_elsewhere(make_graph):
    graph = make_graph("tfll", [], probability=[np.nan, np.nan, 0.7, 0.2])
    assert logit_weights(graph).tolist() == [0.0, 0.0, 0.7, 0.2]
