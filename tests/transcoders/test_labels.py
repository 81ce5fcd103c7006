"""Labels name the situation that predicts a feature's firing, and say how well."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from transcoders.labels import Label, f1_table, label_by_firing, situations_of

TAGS = [
    [("about", "Texas"), ("token", "las")],
    [("about", "Texas"), ("token", "ton")],
    [("about", "Ohio"), ("token", "las")],
    [("about", "Ohio"), ("token", "ton")],
    [("about", "Utah"), ("token", "ton")],
]


def fires(*rows):
    return csr_array(np.array(rows, dtype=float))


def test_a_feature_is_named_after_what_it_fires_on():
    labels = label_by_firing(fires([2, 1, 0, 0, 0], [1, 0, 1, 0, 0]), situations_of(TAGS))
    assert labels == [Label("Texas", 1.0, 1.0), Label("las", 1.0, 1.0)]


def test_a_feature_of_two_places_is_named_after_both():
    (label,) = label_by_firing(fires([1, 1, 1, 1, 0]), situations_of(TAGS))
    assert label == Label("Texas / Ohio", 1.0, 1.0)


def test_precision_is_weighted_by_activation_and_recall_counts_sites():
    (label,) = label_by_firing(fires([8, 0, 2, 0, 0]), situations_of([[("a", "x")], [("a", "x")], [], [], []]))
    assert label is not None
    assert (label.text, label.precision, label.recall) == ("x", pytest.approx(0.8), pytest.approx(0.5))


def test_no_situation_no_name():
    assert label_by_firing(fires([0, 0, 0, 0, 0], [1, 1, 1, 1, 1]), situations_of([[], [], [], [], [("a", "x")]])) == [
        None,
        None,
    ]


def test_f1_of_detectors_by_counts():
    table = f1_table(fires([1, 3, 0, 0, 0], [1, 1, 1, 1, 1]), situations_of(TAGS).holds)
    assert table[0].tolist() == pytest.approx([1.0, 0.5, 0.4, 0.0, 0.0])
    assert table[1, 0] == pytest.approx(4 / 7)
