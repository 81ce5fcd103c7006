import numpy as np
import pytest

from graphs import GraphStore, NodeKind
from graphs.reach import reach


def test_reach_worked_out_by_hand(make_graph):
    # token 0 → feature 2 → logit 4; token 1 → error 3 → logit 4; feature 2 → logit 5, which weighs less
    graph = make_graph(
        "ttfell", [(0, 2, 1.0), (1, 3, 1.0), (2, 4, 1.0), (3, 4, 1.0), (1, 5, 1.0)],
        probability=[np.nan] * 4 + [0.7, 0.2],
    )  # fmt: skip
    found = reach(graph)
    assert found.reached_from.to_pylist() == [[0], [1], [0], [], [0], [1]]
    assert found.reaches_answer.tolist() == [True, False, True, True, True, False]


def test_a_graph_without_nodes_or_logits_reaches_nothing(make_graph, make_info):
    assert reach(make_graph("", [], info=make_info(""))).reached_from.to_pylist() == []
    found = reach(make_graph("tf", [(0, 1, 1.0)]))
    assert found.reaches_answer.tolist() == [False, False]
    assert found.reached_from.to_pylist() == [[0], [0]]


@pytest.mark.parametrize("seed", range(4))
def test_a_node_is_reached_where_powers_of_the_adjacency_matrix_say_so(random_graph, dense, seed):
    graph = random_graph(seed, n_layers=5, density=0.15, prompt="one two three four five six seven eight nine ten")
    step = (dense(graph) != 0) & (graph.kind != NodeKind.ERROR)[None, :] & (graph.kind != NodeKind.ERROR)[:, None]
    paths = np.eye(graph.n_nodes, dtype=bool)  # [target, source]
    for _ in range(graph.n_nodes):
        paths = paths | (step.astype(float) @ paths > 0)
    starts = np.flatnonzero(graph.kind == NodeKind.TOKEN)
    answer = int(np.nanargmax(graph.probability))
    # an error is the first node of a path at most
    from_errors = (dense(graph) != 0).T @ paths[answer].astype(float) > 0
    found = reach(graph)
    for node in range(graph.n_nodes):
        expected = [] if graph.kind[node] == NodeKind.ERROR else graph.position[starts[paths[node, starts]]].tolist()
        assert found.reached_from[node].as_py() == expected
    assert found.reaches_answer.tolist() == (paths[answer] | from_errors).tolist()


def test_the_columns_of_a_saved_graph_are_these(tmp_path, random_graph):
    store, graph = GraphStore(tmp_path), random_graph(0)
    store.save(graph)
    table = store.sql("SELECT reached_from, reaches_answer FROM nodes ORDER BY node")
    assert table["reached_from"].to_pylist() == reach(graph).reached_from.to_pylist()
    assert table["reaches_answer"].to_pylist() == reach(graph).reaches_answer.tolist()
