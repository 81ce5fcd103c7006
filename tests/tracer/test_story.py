"""The story is about the targets that weigh most, and names them so that nobody mistakes one for another."""

import pytest
import torch

from graphs import NodeKind
from tests.graphs.conftest import _make_info
from tests.tracer.test_targets import an_active_feature
from tracer.attribution import attribute
from tracer.story import _ordinal, feature_paths, place_text, routes, target_name, target_record, told_targets
from tracer.targets import difference_target, direction_target, feature_target, join, token_targets


@pytest.fixture
def graph(local):
    """A token of little weight, and four targets of weight 1."""
    feature = an_active_feature(local, 2, 3)
    targets = join(
        token_targets(local, (5,), ("a",)),
        feature_target(local, 2, feature, position=3),
        difference_target(local, 5, 9, "a − b", position=3),
        direction_target(local, torch.ones(16), "ones"),
        direction_target(local, torch.arange(16), "steps"),
    )
    assert targets.weight[0] < 0.1
    return attribute(local, targets, labels={(2, feature): "Texas"})


def test_at_most_three_targets_of_much_weight_are_told(graph):
    told = told_targets(graph)
    assert len(told) == 3
    assert graph.probability[told].tolist() == [1, 1, 1]


def test_words_that_a_prompt_has_twice_are_numbered():
    info = _make_info(
        "Mary and Mary that that and", tokens=("<bos>", " Mary", " and", " M", "##ary", " that", " that", " and"),
        words=("", "Mary", "and", "Mary", "Mary", "that", "that", "and"), token_ids=(0, 1, 2, 3, 4, 5, 5, 2),
    )  # fmt: skip
    told = ["<bos>", "Mary", "and", "Mary (2nd)", "Mary (2nd)", "that", "that (2nd)", "and (2nd)"]
    assert [place_text(info, place) for place in range(8)] == told
    assert [_ordinal(n) for n in (3, 4, 11, 12, 21, 102, 111)] == [
        "3rd",
        "4th",
        "11th",
        "12th",
        "21st",
        "102nd",
        "111th",
    ]


def test_every_route_ends_at_its_target(graph):
    for target in told_targets(graph):
        assert all(path.nodes[-1] == target for path in feature_paths(graph, target, 5))
        assert all(route.steps[-1] == target_name(graph, target) for route in routes(graph, target, 5))


def test_names_say_where_and_what(graph):
    targets = (graph.kind == NodeKind.LOGIT).nonzero()[0].tolist()
    number = int(graph.feature[targets[0]])
    assert [target_name(graph, node) for node in targets] == [
        f"feature 2/{number} at w4 [Texas]", "a − b after w4", "a", "ones", "steps"
    ]  # fmt: skip


def test_targets_are_told_as_data(graph):
    records = [target_record(graph, node) for node in (graph.kind == NodeKind.LOGIT).nonzero()[0].tolist()]
    assert [(one["token_id"], one["layer"], one["position"]) for one in records] == [
        (None, 2, 3), (None, 3, 3), (5, 3, 6), (None, 3, 6), (None, 3, 6)
    ]  # fmt: skip
    assert [one["feature"] is None for one in records] == [False, True, True, True, True]
