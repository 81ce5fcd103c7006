import numpy as np
import pytest

from graphs import (
    GraphError,
    NodeKind,
    Scores,
    completeness_counting_leaves,
    cumulative_share,
    edge_influence,
    logit_weights,
    node_influence,
    score,
    score_from,
)


def influence_of(graph):
    return node_influence(graph.source, graph.target, graph.weight, logit_weights(graph))


def dense_influence(matrix, weights):
    """w·((I - A)⁻¹ - I) of the row-normalised |A|, rows being targets."""
    strength = np.abs(matrix)
    share = strength / np.maximum(strength.sum(axis=1, keepdims=True), 1e-300)
    identity = np.eye(len(matrix))
    return share, weights @ (np.linalg.inv(identity - share) - identity)


def test_influence_of_a_chain_is_undiminished():
    influence = node_influence(
        source=np.array([0, 1]),
        target=np.array([1, 2]),
        weight=np.array([-3.0, 0.5]),
        logit_weight=np.array([0.0, 0.0, 1.0]),
    )
    assert influence == pytest.approx([1.0, 1.0, 0.0])


def test_a_target_passes_influence_back_in_proportion_to_absolute_weight(make_graph):
    #      0 ── 3 ──▶ 1 ── -1 ──▶ 3       shares: 0→1 is 1, 0→2 is 1/4, 1→2 is 3/4, 1→3 is 1/4, 2→3 is 3/4
    graph = make_graph("tffl", [(0, 1, 3.0), (0, 2, 1.0), (1, 2, -3.0), (1, 3, -1.0), (2, 3, 3.0)])
    assert influence_of(graph) == pytest.approx([1.0, 1 / 4 + 3 / 4 * 3 / 4, 3 / 4, 0.0])


def test_influence_is_weighted_by_the_logits_probabilities(make_graph):
    graph = make_graph("ttll", [(0, 2, 1.0), (1, 3, -5.0)], probability=[np.nan, np.nan, 0.6, 0.3])
    assert influence_of(graph) == pytest.approx([0.6, 0.3, 0.0, 0.0])


@pytest.mark.parametrize("seed", range(8))
def test_influence_is_that_of_the_dense_inverse(random_graph, dense, seed):
    graph = random_graph(seed, n_layers=5, n_features=6)
    share, expected = dense_influence(dense(graph), logit_weights(graph))
    assert influence_of(graph) == pytest.approx(expected, abs=1e-12)

    through_edges = edge_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    dense_edges = share * (expected + logit_weights(graph))[:, None]
    assert through_edges == pytest.approx(dense_edges[graph.target, graph.source], abs=1e-12)


def test_what_enters_a_node_through_edges_is_what_leaves_it(random_graph):
    graph = random_graph(1)
    flow = edge_influence(graph.source, graph.target, graph.weight, logit_weights(graph))
    assert np.bincount(graph.source, flow, graph.n_nodes) == pytest.approx(influence_of(graph))


def test_single_precision_weights_lose_nothing_in_the_sums(make_graph):
    graph = make_graph("ttl", [(0, 2, 1.0), (1, 2, 1e-12)], weight=np.float32([1.0, 1e-12]))
    assert influence_of(graph)[1] == pytest.approx(1e-12, rel=1e-6)


def test_targets_with_zero_inputs_pass_nothing_back(make_graph):
    graph = make_graph("tfl", [(0, 1, 0.0), (1, 2, 2.0)])
    assert influence_of(graph) == pytest.approx([0.0, 1.0, 0.0])


def test_a_graph_without_edges_has_no_influence(make_graph):
    assert influence_of(make_graph("tl", [])).tolist() == [0.0, 0.0]


def test_a_cycle_is_refused_instead_of_running_for_ever():
    with pytest.raises(GraphError, match="1 of 2 edges run backward"):
        node_influence(np.array([0, 1]), np.array([1, 0]), np.array([1.0, 1.0]), np.array([0.0, 1.0]))


def test_cumulative_share_counts_nodes_at_least_as_influential():
    assert cumulative_share(np.array([1.0, 4.0, 3.0, 2.0])) == pytest.approx([1.0, 0.4, 0.7, 0.9])


def test_equal_nodes_share_one_cumulative_share():
    assert cumulative_share(np.array([2.0, 5.0, 2.0, 1.0])).tolist() == pytest.approx([0.9, 0.5, 0.9, 1.0])


def test_nodes_without_influence_come_last_and_logits_not_at_all():
    share = cumulative_share(np.array([0.0, 3.0, np.nan, 1.0]))
    assert share[[0, 1, 3]].tolist() == [1.0, 0.75, 1.0]
    assert np.isnan(share[2])
    assert cumulative_share(np.zeros(2)).tolist() == [1.0, 1.0]
    assert cumulative_share(np.zeros(0)).tolist() == []


def test_scores_of_a_graph_worked_out_by_hand(make_graph):
    #   token 0 ─ 3 ─▶ feature 1 ─ 1 ─▶ logit 3 ◀─ 1 ─ error 2;  error 4 is not there
    graph = make_graph("tefl", [(0, 2, 3.0), (1, 2, -1.0), (2, 3, 1.0), (1, 3, 1.0)])
    # influence: feature 1/2, token 3/8, error 1/2 + 1/8
    scores = score(graph)
    assert scores.replacement == pytest.approx(3 / 8)
    # the logit (1) has half of its input from the error, the feature (1/2) a quarter
    assert scores.completeness == pytest.approx((1 * 1 / 2 + 1 / 2 * 3 / 4) / 1.5)
    # token (3/8) and error (5/8) count as explained
    assert completeness_counting_leaves(graph) == pytest.approx((0.5 + 0.375 + 0.375 + 0.625) / 2.5)


def test_a_removed_feature_counts_as_an_error(make_graph):
    graph = make_graph("tffl", [(0, 1, 1.0), (0, 2, 1.0), (1, 3, 1.0), (2, 3, 3.0)])
    assert score(graph) == Scores(1.0, 1.0)
    part = score(graph, np.array([True, True, False, True]))
    assert (part.replacement, part.completeness) == pytest.approx((0.25, (1 * 0.25 + 0.25) / 1.25))


def test_a_removed_features_edges_are_added_to_the_error_beside_it_before_taking_absolute_values(make_graph):
    # feature 2 and the error 1 of the same place cancel, so nothing is left unexplained
    edges = [(0, 2, 1.0), (0, 3, 1.0), (1, 3, -2.0), (2, 3, 2.0)]
    graph = make_graph("tefl", edges)
    assert score(graph, np.array([True, True, False, True])) == Scores(1.0, 1.0)
    elsewhere = make_graph("tefl", edges, position=[0, 1, 0, 0])
    assert score(elsewhere, np.array([True, True, False, True])).replacement == pytest.approx(1 / 5)


def test_removed_features_of_one_place_share_one_new_error(make_graph):
    graph = make_graph("tffl", [(0, 3, 1.0), (1, 3, 2.0), (2, 3, -2.0)])
    assert score(graph, np.array([True, False, False, True])) == Scores(1.0, 1.0)


def test_errors_count_whether_kept_or_not(random_graph):
    graph = random_graph(2)
    assert score(graph, graph.kind != NodeKind.ERROR) == score(graph, np.ones(graph.n_nodes, bool))


def test_tokens_and_logits_count_as_kept(random_graph):
    graph = random_graph(3)
    features = (graph.kind == NodeKind.FEATURE) & (graph.layer == 1)
    ends = (graph.kind == NodeKind.TOKEN) | (graph.kind == NodeKind.LOGIT)
    assert score(graph, features) == score(graph, features | ends)


def test_without_influence_both_scores_are_zero(make_graph):
    assert score(make_graph("tefl", [])) == Scores(0.0, 0.0)
    assert completeness_counting_leaves(make_graph("te", [])) == 0.0


def test_a_graph_that_only_tokens_feed_is_replaced_entirely(make_graph):
    assert score(make_graph("tefl", [(0, 2, 1.0), (2, 3, 1.0)])) == Scores(1.0, 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_any_part_lie_between_zero_and_one(random_graph, seed):
    graph = random_graph(seed)
    whole = score(graph)
    everything = score(graph, np.ones(graph.n_nodes, bool))
    assert (everything.replacement, everything.completeness) == pytest.approx((whole.replacement, whole.completeness))
    random = np.random.default_rng(seed)
    for share in (0.0, 0.3, 0.7):
        part = score(graph, random.random(graph.n_nodes) < share)
        assert 0 <= part.replacement <= 1
        assert 0 <= part.completeness <= 1
    assert score(graph).completeness <= completeness_counting_leaves(graph) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_score_of_a_part_is_that_of_the_dense_definition(random_graph, dense, seed):
    graph = random_graph(seed)
    kept = (np.random.default_rng(seed).random(graph.n_nodes) < 0.5) | (graph.kind != NodeKind.FEATURE)
    matrix = dense(graph)
    places = sorted({(int(a), int(b)) for a, b in zip(graph.layer, graph.position, strict=True)})
    big = np.zeros((graph.n_nodes + len(places),) * 2)
    for node in np.flatnonzero(kept):
        column = node
        if graph.kind[node] == NodeKind.ERROR:
            column = graph.n_nodes + places.index((graph.layer[node], graph.position[node]))
        big[: graph.n_nodes, column] += matrix[:, node]
    for node in np.flatnonzero(~kept):
        big[: graph.n_nodes, graph.n_nodes + places.index((graph.layer[node], graph.position[node]))] += matrix[:, node]
    big[: graph.n_nodes][~kept] = 0
    weights = np.pad(logit_weights(graph), (0, len(places)))
    share, influence = dense_influence(big, weights)
    tokens = influence[: graph.n_nodes][graph.kind == NodeKind.TOKEN].sum()
    error_share = share[:, graph.n_nodes :].sum(axis=1)
    reach = (influence + weights) * (share.sum(axis=1) > 0)

    scores = score(graph, kept)
    assert scores.replacement == pytest.approx(tokens / (tokens + influence[graph.n_nodes :].sum()))
    assert scores.completeness == pytest.approx((reach * (1 - error_share)).sum() / reach.sum())


@pytest.mark.parametrize("seed", range(4))
def test_scores_from_known_influence_are_those_from_the_edges(random_graph, seed):
    graph = random_graph(seed)
    known = score_from(graph, np.nan_to_num(graph.influence))
    assert known.replacement == pytest.approx(score(graph).replacement, abs=1e-12)
    assert known.completeness == pytest.approx(score(graph).completeness, abs=1e-12)


def test_a_target_whose_edges_are_all_zero_has_no_inputs(make_graph):
    edges = [(0, 2, 0.0), (1, 3, 1.0), (2, 3, 1.0)]
    graph = make_graph("tefl", edges, influence=[0.0, 0.5, 0.5, np.nan])
    assert score_from(graph, np.nan_to_num(graph.influence)) == score(graph) == Scores(0.0, 0.5)
