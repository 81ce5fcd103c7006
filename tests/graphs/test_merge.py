"""Several graphs as one: the union counts, averages and aligns as its parts say."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import GraphError, NodeKind, prune
from graphs.alignment import align
from graphs.merge import merge_graphs, threshold_grid


def rows(graph, places):
    """What a node is, told apart as the merge should."""
    return [
        (int(k), int(a), int(place), int(f), int(t), str(name) if t == -1 and k in (0, 3) else "")
        for k, a, place, f, t, name in zip(graph.kind, graph.layer, places[graph.position], graph.feature,
                                          graph.token_id, graph.token, strict=True)
    ]  # fmt: skip


def edges_by_name(graph, chosen=slice(None)):
    """The chosen edges, by what their ends are and not by their numbers."""
    key = rows(graph, np.arange(-1, 10)[1:])
    return {
        (key[source], key[target]) for source, target in zip(graph.source[chosen], graph.target[chosen], strict=True)
    }


def test_a_graph_merged_with_itself_is_itself(random_graph):
    graph = random_graph(0)
    merged = merge_graphs([graph, graph, graph])
    assert (merged.count == 3).all() and (merged.share == 1).all()
    assert len(merged.kind) == graph.n_nodes
    assert (merged.edge_share == 1).all()
    assert sorted(merged.weight.mean.tolist()) == pytest.approx(sorted(graph.weight.tolist()))
    assert np.nanmax(merged.weight.deviation) < 1e-12
    assert (merged.node_overlap, merged.edge_overlap) == (1.0, 1.0)
    assert (merged.source < merged.target).all()


@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 30), min_size=2, max_size=5))
def test_counts_and_means_are_those_of_a_dictionary(random_graph, seeds):
    graphs = [random_graph(seed) for seed in seeds]
    merged = merge_graphs(graphs, alignment="start")
    weights, nodes = {}, {}
    for graph in graphs:
        key = rows(graph, np.arange(9))
        for one in set(key):
            nodes[one] = nodes.get(one, 0) + 1
        for source, target, weight in zip(graph.source, graph.target, graph.weight.tolist(), strict=True):
            weights.setdefault((key[source], key[target]), []).append(weight)
    ours = rows(merged, np.arange(-1, 10)[1:])
    assert dict(zip(ours, merged.count.tolist(), strict=True)) == nodes
    assert len(merged.source) == len(weights)
    for edge in range(len(merged.source)):
        expected = weights[ours[merged.source[edge]], ours[merged.target[edge]]]
        assert merged.edge_count[edge] == len(expected)
        assert merged.weight.mean[edge] == pytest.approx(np.mean(expected))
        assert merged.weight.deviation[edge] == pytest.approx(np.std(expected), abs=1e-9)


def test_a_diff_has_the_values_of_both(make_graph):
    first = make_graph("tfl", [(0, 1, 1.0), (1, 2, 2.0)], influence=[0.5, 0.25, np.nan])
    second = make_graph("tfl", [(0, 1, 3.0), (0, 2, 4.0)], influence=[0.5, 0.75, np.nan])
    merged = merge_graphs([first, second])
    assert merged.kind.tolist() == [NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.LOGIT]
    assert list(zip(merged.source.tolist(), merged.target.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert merged.weight.first.tolist()[0] == 1.0
    assert np.isnan(merged.weight.first[1])
    assert merged.weight.second.tolist()[:2] == [3.0, 4.0]
    assert merged.edge_in_second.tolist() == [True, True, False]
    assert merged.influence.mean.tolist()[:2] == [0.5, 0.5]
    assert merged.influence.deviation.tolist()[:2] == [0.0, 0.25]
    assert np.isnan(merged.influence.mean[2])
    assert merged.edge_overlap == pytest.approx(1 / 3)


def test_without_places_a_feature_is_the_same_everywhere_and_its_edges_are_added(make_graph, make_info):
    info = make_info("a b")
    first = make_graph("tffl", [(0, 1, 1.0), (1, 3, 2.0), (2, 3, 3.0)], info=info, position=[0, 0, 1, 1],
                       feature=[-1, 5, 5, -1], activation=[np.nan, 1.0, 4.0, np.nan])  # fmt: skip
    second = make_graph("tfl", [(0, 1, 1.0)], info=info, position=[0, 1, 1], feature=[-1, 5, -1], token_id=[0, -1, 3],
                        activation=[np.nan, 2.0, np.nan])  # fmt: skip
    merged = merge_graphs([first, second], alignment="anywhere")
    assert merged.position.tolist() == [-1, -1, -1]
    assert merged.count.tolist() == [2, 2, 2]
    assert merged.weight.mean.tolist() == [1.0, 5.0]
    assert merged.edge_count.tolist() == [2, 1]
    assert merged.activation.first[1] == 4.0


def test_alignments_say_which_places_are_the_same():
    prompts = [["a", "Dallas", "is"], ["a", "San", "Jose", "is"], ["oh", "a", "Dallas", "is"]]
    assert [places.tolist() for places in align(prompts, "diff")] == [[1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 4]]
    assert [places.tolist() for places in align(prompts, "end")] == [[1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [places.tolist() for places in align(prompts, "start")] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [places.tolist() for places in align(prompts, "anywhere")] == [[-1] * 3, [-1] * 4, [-1] * 4]
    with pytest.raises(GraphError, match="alignment 'best' is unknown; expected one of diff, end, start, anywhere"):
        align(prompts, "best")


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(st.lists(st.sampled_from("abcd"), max_size=7), min_size=1, max_size=4))
def test_places_rise_along_every_prompt(prompts):
    for how in ("diff", "end", "start"):
        for places in align(prompts, how):
            assert (np.diff(places) > 0).all()
    again = align([prompts[0], *prompts], "diff")
    assert again[0].tolist() == again[1].tolist()


def test_the_grid_prunes_at_every_pair_of_thresholds(random_graph):
    graph = random_graph(1)
    grid = threshold_grid(graph, [0.5, 0.9], [0.9, 0.99])
    assert grid[2] == prune(graph, node_threshold=0.9, edge_threshold=0.9)
    merged = merge_graphs(grid)
    edges = [edges_by_name(one) for one in grid]
    assert len(set.intersection(*edges)) == 14
    assert edges_by_name(merged, merged.edge_count == 4) == set.intersection(*edges)
    assert edges_by_name(merged) == set.union(*edges)
    assert merged.n_graphs == 4


@pytest.mark.parametrize("other", [{"transcoder": "other-clt"}, {"transcoder_revision": "3"}])
def test_graphs_of_different_transcoders_are_refused(random_graph, other):
    first, second = random_graph(0), random_graph(1)
    second = replace(second, info=replace(second.info, **other))
    made_by = " ".join(({"transcoder": "tiny-clt", "transcoder_revision": "2"} | other).values())
    message = f"are of different transcoders (tiny-clt 2; {made_by}), whose features of equal numbers differ; "
    with pytest.raises(GraphError, match=re.escape(message)):
        merge_graphs([first, first, second])


def test_one_graph_is_nothing_to_compare(random_graph):
    with pytest.raises(GraphError, match="1 graphs were given; give two or more"):
        merge_graphs([random_graph(0)])
