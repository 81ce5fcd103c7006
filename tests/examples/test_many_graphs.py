"""The page on many graphs can be written again from the model that is shipped."""

from examples.many_graphs import EVERY_STATE, compare, page, trace_states
from graphs import GraphStore


def test_the_phrasings_of_a_question_share_the_state_and_the_states_share_the_question(tmp_path):
    store = GraphStore(tmp_path)
    asked = trace_states(store, ("Texas", "California", "Ohio"))
    compare(store, asked)
    rows = store.sql(EVERY_STATE).to_pylist()
    assert [row["state"] for row in rows] == ["california", "ohio", "texas"]
    assert all(row["of_their_influence"] >= 0.5 for row in rows)
    in_all = (
        "SELECT count(*) AS n FROM comparison_nodes WHERE comparison = 'capitals' AND kind = 'feature' AND share = 1"
    )
    assert store.sql(in_all).to_pylist()[0]["n"] >= 1
    text = page(store, asked)
    assert "| Texas | Dallas | Austin | Austin |" in text
    assert "{" not in text.replace("${", "")
