from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from graphs import GraphError, NodeKind, keep_largest, logit_weights, prune, score, subgraph


def dense_influence(matrix, weights):
    share = np.abs(matrix) / np.maximum(np.abs(matrix).sum(axis=1, keepdims=True), 1e-300)
    return share, weights @ (np.linalg.inv(np.eye(len(matrix)) - share) - np.eye(len(matrix)))


def dense_keep(scores, threshold):
    total, cut = scores.sum(), None
    held = 0.0
    for value in sorted(scores.ravel().tolist(), reverse=True):
        held, cut = held + value, value
        if held / total >= threshold:
            break
    return scores >= cut


def dense_prune(graph, matrix, node_threshold, edge_threshold):
    """Node mask and edge mask [target, source], on the full matrix and with an explicit inverse."""
    weights = logit_weights(graph)
    always = np.isin(graph.kind, (NodeKind.TOKEN, NodeKind.LOGIT))
    nodes = dense_keep(dense_influence(matrix, weights)[1], node_threshold) | always
    share, influence = dense_influence(matrix * nodes[:, None] * nodes, weights)
    edges = dense_keep(share * (influence + weights)[:, None], edge_threshold)
    while True:
        before = nodes.copy()
        nodes &= edges.any(axis=0) | always
        nodes &= edges.any(axis=1) | (graph.kind != NodeKind.FEATURE)
        edges &= nodes[:, None] & nodes
        if np.array_equal(before, nodes):
            return nodes, edges


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 0.5)])
def test_pruning_keeps_what_the_dense_definition_keeps(random_graph, dense, seed, thresholds):
    graph = random_graph(seed, n_layers=4, n_features=8)
    pruned = prune(graph, node_threshold=thresholds[0], edge_threshold=thresholds[1])
    nodes, edges = dense_prune(graph, dense(graph), *thresholds)
    received = np.bincount(graph.target, np.abs(graph.weight), graph.n_nodes)
    known = np.where(np.isnan(graph.input_size) & (received > 0), received, graph.input_size)[nodes]
    np.testing.assert_allclose(pruned.input_size, known, rtol=1e-14)  # sums in another order
    given = ~np.isnan(graph.input_size[nodes])
    np.testing.assert_array_equal(pruned.input_size[given], known[given])
    expected = subgraph(graph, nodes, np.flatnonzero(edges[graph.target, graph.source]))
    assert pruned == replace(expected, info=pruned.info, input_size=pruned.input_size)
    assert pruned.n_nodes < graph.n_nodes


def test_pruning_a_graph_worked_out_by_hand(make_graph):
    # influence: features 0.6, 0.3, 0.1; the token 1
    graph = make_graph("tfffl", [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (1, 4, 6.0), (2, 4, -3.0), (3, 4, 1.0)])
    pruned = prune(graph, node_threshold=0.9, edge_threshold=0.9)
    assert pruned.feature.tolist() == [-1, 1, 2, -1]
    assert pruned.weight.tolist() == [1.0, 1.0, 6.0, -3.0]


def test_the_node_that_crosses_the_threshold_and_its_equals_stay(make_graph):
    graph = make_graph("tfffl", [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (1, 4, 2.0), (2, 4, 1.0), (3, 4, 1.0)])
    # influence: token 1, features 1/2, 1/4, 1/4 of 2 in all
    assert prune(graph, node_threshold=0.75, edge_threshold=1.0).feature.tolist() == [-1, 1, -1]
    assert prune(graph, node_threshold=0.76, edge_threshold=1.0).feature.tolist() == [-1, 1, 2, 3, -1]


def test_thresholds_of_one_drop_only_what_has_no_influence(make_graph):
    # 1e-20 of the input is beyond what a running sum can see
    edges = [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (1, 4, 1.0), (2, 4, 1e-20), (3, 4, 0.0)]
    pruned = prune(make_graph("tfffl", edges), node_threshold=1.0, edge_threshold=1.0)
    assert pruned.feature.tolist() == [-1, 1, 2, -1]
    assert pruned.n_edges == 4


def test_a_threshold_of_one_keeps_every_score_above_zero():
    scores = np.array([1.0, 1e-300, 0.0, 3e-17])
    assert keep_largest(scores, 1.0).tolist() == [True, True, False, True]
    assert keep_largest(scores, 0.5).tolist() == [True, False, False, False]
    assert keep_largest(np.zeros(2), 0.5).tolist() == [False, False]
    assert keep_largest(np.zeros(0), 0.5).tolist() == []


def test_more_nodes_stay_at_a_higher_threshold(random_graph):
    influence = np.random.default_rng(0).pareto(1.0, size=300)
    kept = [keep_largest(influence, threshold) for threshold in np.linspace(0.05, 1.0, 20)]
    for fewer, more in pairwise(kept):
        assert np.all(more | ~fewer)


def test_tokens_and_logits_stay_even_without_influence(make_graph):
    pruned = prune(make_graph("ttfll", [(0, 2, 1.0), (2, 3, 1.0)]))
    assert [NodeKind(kind).text for kind in pruned.kind] == ["token", "token", "feature", "logit", "logit"]


def test_what_is_left_hanging_goes_until_nothing_changes(make_graph):
    # feature 3 is fed by feature 2 alone, which nothing feeds: a bias makes it active
    graph = make_graph("tffffl", [(2, 3, 1.0), (3, 5, 1.0), (0, 1, 1.0), (1, 5, 1.0)])
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert pruned.feature.tolist() == [-1, 1, -1]


def test_pruning_records_the_scores_before_and_after_and_keeps_the_influence_columns(random_graph):
    graph = random_graph(4)
    pruned = prune(graph)
    whole = score(graph)
    assert pruned.info.replacement_score == pytest.approx(whole.replacement, abs=1e-12)
    assert pruned.info.completeness_score == pytest.approx(whole.completeness, abs=1e-12)
    assert 0 < pruned.info.pruned_replacement_score < whole.replacement
    assert 0 < pruned.info.pruned_completeness_score < 1
    assert set(pruned.influence[pruned.kind != NodeKind.LOGIT]) <= set(graph.influence)
    assert pruned.info.prompt == graph.info.prompt


def test_removing_nothing_changes_no_score(make_graph):
    graph = make_graph("tefl", [(0, 2, 3.0), (1, 2, -1.0), (2, 3, 1.0), (1, 3, 1.0)])
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert pruned == replace(graph, info=pruned.info, input_size=np.array([np.nan, np.nan, 4.0, 2.0]))
    assert pruned.info.pruned_replacement_score == pruned.info.replacement_score == 0.375
    assert pruned.info.pruned_completeness_score == pruned.info.completeness_score


@pytest.mark.parametrize("thresholds", [{"node_threshold": 0.0}, {"edge_threshold": 1.5}, {"node_threshold": np.nan}])
def test_thresholds_that_are_no_shares_are_refused(make_graph, thresholds):
    with pytest.raises(GraphError, match="give a share of the influence above 0 and at most 1"):
        prune(make_graph("tl", [(0, 1, 1.0)]), **thresholds)
