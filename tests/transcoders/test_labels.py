"""Labels name the situation that predicts a feature's firing, and say how well."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from transcoders.labels import Label, f1_table, label_by_firing, situations_of, strongest

TAGS = [
    [("about", "Texas"), ("token", "las")],
    [("about", "Texas"), ("token", "ton")],
    [("about", "Ohio"), ("token", "las")],
    [("about", "Ohio"), ("token", "ton")],
    [("about", "Utah"), ("token", "ton")],
]


KINDS = ("about", "relation", "token", "text")


def fires(*rows):
    return csr_array(np.array(rows, dtype=float))


def named(*rows, tags=TAGS, weight=None, **settings) -> list[tuple[str, float, float] | None]:
    """Per feature the label, its precision and its recall; every site counts 1 if nothing else is said."""
    weight = np.ones(len(tags)) if weight is None else np.array(weight, dtype=float)
    labels = label_by_firing(fires(*rows), situations_of(tags, KINDS), weight, **settings)
    return [label and (label.text, round(label.precision, 3), round(label.recall, 3)) for label in labels]


def test_a_feature_is_named_after_what_it_fires_on():
    assert named([2, 1, 0, 0, 0], [1, 0, 1, 0, 0]) == [("Texas", 1, 1), ("las", 1, 1)]


def test_situations_stand_in_the_order_of_their_kinds():
    assert situations_of(TAGS[::-1], ("token", "about")).names == ("ton", "las", "Utah", "Ohio", "Texas")


def test_a_feature_of_two_places_is_named_after_both():
    assert named([1, 1, 1, 1, 0]) == [("Texas / Ohio", 1, 1)]


def test_the_earlier_kind_wins_where_two_do_nearly_as_well():
    tags = [[("about", "Texas"), ("token", "las")]] * 300 + [[("token", "las")]]
    assert named([1] * 301, tags=tags) == [("Texas", 0.997, 1)]


def test_precision_is_of_activation_and_recall_of_sites():
    assert named([8, 0, 2, 0, 0], tags=[[("about", "x")], [("about", "x")], [], [], []]) == [("x", 0.8, 0.5)]


def test_sites_count_by_their_weight_in_precision_and_in_recall():
    assert named([1, 0, 1], tags=[[("about", "x")], [("about", "x")], []], weight=[9, 1, 3]) == [("x", 0.75, 0.9)]


def test_precision_is_of_the_whole_activation_and_what_covers_less_than_most_of_it_is_no_name():
    """As feature 0/938 of the lab: it always fires after "Rhode", and as much elsewhere."""
    tags = [[("token", "after Rhode")], [("token", "after Rhode")], [], []]
    assert named([1, 1, 1, 1], [3, 3, 2, 2], tags=tags) == [None, ("after Rhode", 0.6, 1)]


def test_a_feature_that_fires_at_two_kinds_of_place_is_named_after_both():
    tags = [[("token", "after Rhode")], [("token", "after Rhode")], [("text", "French")], [("text", "French")], []]
    assert named([1, 1, 1, 1, 0], tags=tags) == [("after Rhode / French", 1, 1)]


def test_what_two_parts_of_a_label_share_counts_once():
    tags = [[("about", "Mary")], [("about", "Mary"), ("token", "and")], [("token", "and")], []]
    assert named([1, 1, 1, 1], tags=tags) == [("Mary / and", 0.75, 1)]


def test_a_part_that_adds_little_is_left_out():
    assert named([1] * 10, tags=[[("about", "Texas")]] * 9 + [[("about", "Ohio")]]) == [("Texas", 0.9, 1)]


NARROW = [[("relation", "capital"), ("token", "is")]] * 100 + [[("token", "is")]] * 300 + [[]] * 5


def at(n_capitals, n_others, n_untold):
    """A feature that fires on so many of NARROW's sites."""
    parts = [(n_capitals, 100), (n_others, 300), (n_untold, 5)]
    return [fires for n, size in parts for fires in [1] * n + [0] * (size - n)]


def test_a_feature_that_fires_seldom_but_on_one_thing_only_is_named_after_it():
    assert named(at(15, 0, 0), at(14, 0, 1), tags=NARROW) == [("capital", 1, 0.15), ("capital", 0.933, 0.14)]


def test_a_feature_that_fires_seldom_on_two_things_is_named_after_both():
    tags = [[("relation", "capital")]] * 100 + [[("about", "Texas")]] * 200
    assert named([1] * 15 + [0] * 85 + [1] * 20 + [0] * 180, tags=tags) == [("Texas / capital", 1, 0.117)]


def test_a_narrow_feature_is_named_after_the_first_kind_that_nine_tenths_of_it_fall_in():
    assert named(at(14, 1, 0), tags=NARROW) == [("capital", 0.933, 0.14)]
    assert named(at(8, 8, 0), at(12, 0, 3), tags=NARROW) == [("is", 1, 0.04), None]


def test_how_much_of_a_narrow_feature_its_name_holds_for_may_be_asked():
    assert named(at(15, 0, 3), tags=NARROW) == [None]
    assert named(at(15, 0, 3), tags=NARROW, pure=0.8) == [("capital", 0.833, 0.15)]


def test_a_part_that_adds_little_is_joined_where_it_makes_a_narrow_name_good_enough():
    tags = [[("relation", "capital")]] * 100 + [[("about", "Texas")]] * 20 + [[]] * 5
    assert named([1] * 17 + [0] * 83 + [1] + [0] * 19 + [1] * 3 + [0] * 2, tags=tags) == [None]
    assert named([1] * 17 + [0] * 83 + [1] + [0] * 19 + [1] * 2 + [0] * 3, tags=tags) == [
        ("capital / Texas", 0.9, 0.15)
    ]


def test_firing_on_few_sites_or_on_hardly_any_of_a_situations_gives_no_name():
    assert named(at(10, 0, 0), at(9, 0, 0), tags=NARROW) == [("capital", 1, 0.1), None]
    many = [[("relation", "capital")]] * 1000
    assert named([1] * 20 + [0] * 980, [1] * 19 + [0] * 981, tags=many) == [("capital", 1, 0.02), None]


def test_of_a_feature_only_its_strong_firing_is_left_and_of_one_that_seldom_fires_strongly_nothing():
    often, seldom = [8] * 9 + [4, 3.9, 0], [8] * 8 + [4, 3.9, 3.9, 0]
    left = strongest(fires(often, [0] * 12, seldom))
    np.testing.assert_array_equal(left.toarray(), [[8] * 9 + [4, 0, 0], [0] * 12, [0] * 12])


def test_a_feature_without_a_rule_for_its_firing_may_have_one_for_its_strong_firing():
    tags = [[("about", "Texas")]] * 20 + [[]] * 80
    firing = fires([8] * 20 + [3] * 80)
    situations, weight = situations_of(tags, KINDS), np.ones(100)
    assert label_by_firing(firing, situations, weight) == [None]
    assert label_by_firing(strongest(firing), situations, weight) == [Label("Texas", 1.0, 1.0)]


def test_no_situation_no_name():
    assert named([0, 0, 0, 0, 0], [1, 1, 1, 1, 1], tags=[[], [], [], [], [("about", "x")]]) == [None, None]


def test_f1_of_detectors_by_counts():
    table = f1_table(fires([1, 3, 0, 0, 0], [1, 1, 1, 1, 1]), situations_of(TAGS, KINDS).holds)
    assert table[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5, 0.4])
    assert table[1, 0] == pytest.approx(4 / 7)
