"""The page on many graphs can be written again from the model that is shipped, and shows what it claims."""

import pytest

from examples.many_graphs import CONCERNS, EVERY_STATE, compare, open_lab, page, trace_other_questions, trace_states
from graphs import GraphStore


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The lab with all questions about three states, and the graphs about their capitals."""
    opened = open_lab(GraphStore(tmp_path_factory.mktemp("store")))
    asked = trace_states(opened, ("Texas", "California", "Ohio"))
    trace_other_questions(opened, ("Texas", "California", "Ohio"))
    compare(opened.store, asked)
    return opened, asked


@pytest.mark.slow
def test_the_phrasings_of_a_question_share_the_state(traced):
    rows = traced[0].store.sql(EVERY_STATE).to_pylist()
    assert [row["state"] for row in rows] == ["california", "ohio", "texas"]
    assert all(row["of_their_influence"] >= 0.5 for row in rows)


def test_what_the_states_share_concerns_capitals_and_nothing_else_of_the_same_states(traced):
    rows = traced[0].store.sql(CONCERNS, token="is").to_pylist()
    assert {(row["layer"], row["feature"]) for row in rows} == {(0, 573)}
    found = {row["asked"]: (row["with_this_feature"], row["graphs"]) for row in rows}
    assert found.pop("capital of a city's state") == (6, 6)
    assert found.pop("capital of a city's country") == (0, 6)
    by_name, of = found.pop("capital of a state by name")
    assert (by_name < of, of) == (True, 6)
    others = ("abbreviation", "bird", "flower", "nickname", "region", "statehood", "tree")
    assert found == {f"{other} of a city's state": (0, 6) for other in others}
    assert all(row["with_one_named_as_the_place"] == 6 for row in rows if "state" in row["asked"])


@pytest.mark.slow
def test_the_page_shows_answers_counts_and_what_no_threshold_decides(traced):
    text = page(*traced)
    assert "| Texas | Dallas | Austin | Austin |" in text
    assert "is in 6 of 6 graphs about the capital of a city's state, and in 0 of 42" in " ".join(text.split())
    assert "Pruned   1 graphs at 20 pairs of thresholds each" in text
    assert "Pruned   6 graphs at 20 pairs of thresholds each" in text
    assert "All six are answered “Austin”" in text
    assert "Note " not in text  # the graphs were whole
    assert "{" not in text.replace("${", "")
