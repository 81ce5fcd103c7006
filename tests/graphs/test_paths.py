import numpy as np
import pytest

from graphs import GraphError, NodeKind, Path, logit_weights, node_influence, path_length_distribution, strongest_paths


def all_paths(graph, share, node, target, allowed):
    """Every path from the node to the target, by walking them all."""
    if node == target:
        return [(1.0, (target,))]
    found = []
    for edge in np.flatnonzero(graph.source == node):
        after = int(graph.target[edge])
        if after == target or (after < target and allowed[after]):
            found += [(share[edge] * w, (node, *rest)) for w, rest in all_paths(graph, share, after, target, allowed)]
    return found


def shares(graph):
    kept = np.bincount(graph.target, np.abs(graph.weight), graph.n_nodes)
    whole = np.where(np.isnan(graph.input_size), kept, graph.input_size)
    return np.abs(graph.weight) / whole[graph.target]


def test_a_path_is_as_strong_as_its_part_of_all_that_was_put_in_not_only_of_what_was_kept(make_graph):
    edges = [(0, 1, 1.0), (0, 2, -4.0), (1, 3, 3.0), (2, 3, -1.0)]
    kept = make_graph("tffl", edges, input_size=[np.nan, 2.0, 4.0, 6.0])
    assert strongest_paths(kept, [0], 3) == [Path(0.25, (0, 1, 3)), Path(1 / 6, (0, 2, 3))]
    partly_known = make_graph("tffl", edges, input_size=[np.nan, 2.0, np.nan, np.nan])
    assert strongest_paths(partly_known, [0], 3) == [Path(0.375, (0, 1, 3)), Path(0.25, (0, 2, 3))]


def test_paths_are_ordered_by_the_product_of_their_shares(make_graph):
    graph = make_graph("tffl", [(0, 1, 1.0), (0, 2, -4.0), (1, 3, 3.0), (2, 3, -1.0)])
    assert strongest_paths(graph, [0], 3) == [Path(0.75, (0, 1, 3)), Path(0.25, (0, 2, 3))]
    assert strongest_paths(graph, [0], 3, k=1) == [Path(0.75, (0, 1, 3))]


def test_a_direct_edge_is_a_path(make_graph):
    graph = make_graph("ttl", [(0, 2, 1.0), (1, 2, 1.0)])
    assert strongest_paths(graph, [1], 2) == [Path(0.5, (1, 2))]


def test_paths_from_several_sources_compete(make_graph):
    graph = make_graph("ttl", [(0, 2, 1.0), (1, 2, 3.0)])
    assert strongest_paths(graph, [0, 1, 1], 2) == [Path(0.75, (1, 2)), Path(0.25, (0, 2))]


def test_forbidden_nodes_may_be_ends_but_not_between(make_graph):
    graph = make_graph("teffl", [(1, 2, 1.0), (0, 2, 1.0), (2, 4, 1.0), (0, 3, 1.0), (3, 4, 3.0)])
    not_three = np.array([True, False, True, False, False])
    assert strongest_paths(graph, [0], 4, through=not_three) == [Path(0.125, (0, 2, 4))]
    assert strongest_paths(graph, [1], 4, through=not_three) == [Path(0.125, (1, 2, 4))]
    assert strongest_paths(graph, [3], 4, through=not_three) == [Path(0.75, (3, 4))]


def test_there_may_be_no_path(make_graph):
    graph = make_graph("ttfl", [(0, 2, 1.0), (2, 3, 1.0), (1, 3, 0.0)])
    assert strongest_paths(graph, [1], 3) == []
    assert strongest_paths(graph, [], 3) == []
    assert strongest_paths(graph, [3], 0) == []
    assert strongest_paths(graph, [3], 3) == []


@pytest.mark.parametrize(("sources", "target", "k"), [([4], 3, 1), ([0], -1, 1), ([0], 3, 0)])
def test_nodes_that_do_not_exist_are_refused(make_graph, sources, target, k):
    with pytest.raises(GraphError):
        strongest_paths(make_graph("ttfl", []), sources, target, k=k)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("errors_allowed", [True, False])
def test_the_k_strongest_are_those_among_all_paths(random_graph, seed, errors_allowed):
    graph = random_graph(seed, density=0.6)
    allowed = np.full(graph.n_nodes, errors_allowed) | (graph.kind != NodeKind.ERROR)
    sources = np.flatnonzero(graph.kind == NodeKind.TOKEN)[:3].tolist()
    target = graph.n_nodes - 1
    share = shares(graph)
    every = [path for node in sources for path in all_paths(graph, share, node, target, allowed)]
    every = sorted(every, reverse=True)

    found = strongest_paths(graph, sources, target, k=12, through=allowed)
    assert [path.weight for path in found] == pytest.approx([weight for weight, _ in every[:12]])
    assert {path.nodes for path in found[:11]} <= {nodes for _, nodes in every}
    assert len({path.nodes for path in found}) == min(12, len(every))


def test_all_paths_from_all_leaves_together_are_the_whole_input(make_graph):
    edges = [(0, 2, 1.0), (1, 2, -2.0), (0, 3, 1.0), (2, 3, 5.0), (2, 4, 1.0), (3, 4, 1.0)]
    paths = strongest_paths(make_graph("teffl", edges), [0, 1], 4, k=100)
    assert sum(path.weight for path in paths) == pytest.approx(1.0)


def test_path_lengths_of_a_graph_worked_out_by_hand(make_graph):
    graph = make_graph("tffl", [(0, 1, 3.0), (0, 2, 1.0), (1, 2, -3.0), (1, 3, -1.0), (2, 3, 3.0)])
    assert path_length_distribution(graph) == pytest.approx([0.0, 0.0, 1 / 4 + 3 / 16, 9 / 16])


def test_path_lengths_add_up_to_the_influence_of_tokens(random_graph):
    graph = random_graph(5)
    influence = node_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    assert path_length_distribution(graph).sum() == pytest.approx(influence[graph.kind == NodeKind.TOKEN].sum())
