"""Views and macros, in folders and in packs; each example of the documentation is run."""

import re
from datetime import UTC, datetime

import numpy as np
import pytest

from graphs import (
    Annotations,
    Comparison,
    GraphError,
    GraphStore,
    NodeKind,
    Supernode,
    merge_graphs,
    strongest_paths,
)
from graphs.reach import reach
from graphs.schema import table_examples, tables
from graphs.statements import macro_example, macros, views
from tests.graphs.conftest import drop_columns


@pytest.fixture(scope="module", params=["in folders", "in a pack"])
def store(request, tmp_path_factory, random_graph):
    """Four graphs that no test changes."""
    store = GraphStore(tmp_path_factory.mktemp("macros") / "store")
    for seed in range(4):
        store.save(random_graph(seed, n_layers=5, n_features=6, density=0.4, prompt=f"Dallas is in{' Texas' * seed}"))
    if request.param == "in a pack":
        store.compact()
    return store


@pytest.fixture(scope="module")
def graphs(store):
    return {stored.graph_id: store.load(stored.graph_id) for stored in store.list()}


@pytest.mark.parametrize("name", [*views(), *macros()])
def test_the_example_in_the_documentation_answers(store, graphs, name):
    graph_id, other, *_ = graphs
    sql = macro_example({**views(), **macros()}[name])
    edge = len(graphs[graph_id].source) // 2
    ends = int(graphs[graph_id].source[edge]), int(graphs[graph_id].target[edge])
    values = {"graph": graph_id, "other": other, "from": ends[0], "to": ends[1]}
    answer = store.sql(sql, **{found: values[found] for found in set(re.findall(r"\$(\w+)", sql))})
    assert answer.num_rows > 0
    assert name in sql


def test_every_table_has_an_example_that_answers(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    graph = make_graph("tffl", [(0, 1, 1.0), (1, 3, 2.0), (2, 3, 1.0)])
    graph_id = store.save(graph, Annotations((Supernode("both", (1, 2)),)))
    about = Comparison("itself", "diff", [graph_id, graph_id], "diff", datetime.now(UTC))
    store.save_comparison(about, merge_graphs([graph, graph]))
    assert list(table_examples()) == list(tables())
    filled = {"graphs", "nodes", "edges", "supernodes", "comparisons", "comparison_nodes", "comparison_edges"}
    for name, sql in table_examples().items():
        answer = store.sql(sql, **({"graph": graph_id} if "$graph" in sql else {}))
        assert (answer.num_rows > 0) == (name in filled), name
        assert f"FROM {name}" in sql


def test_tokens_and_logits_are_the_nodes_of_their_kinds(store, graphs):
    for view, kind in (("tokens", NodeKind.TOKEN), ("logits", NodeKind.LOGIT)):
        rows = store.sql(f"SELECT graph_id, node FROM {view} ORDER BY ALL").to_pylist()
        assert [(row["graph_id"], row["node"]) for row in rows] == [
            (graph_id, node) for graph_id in sorted(graphs) for node in np.flatnonzero(graphs[graph_id].kind == kind)
        ]


@pytest.mark.parametrize("k", [5])
def test_the_k_strongest_paths_in_sql_are_those_in_python(store, graphs, k):
    random, compared = np.random.default_rng(k), 0
    for graph_id, graph in graphs.items():
        for start, end in random.integers(graph.n_nodes, size=(4, 2)).tolist():
            rows = store.sql("FROM paths($g, $s, $t, $k)", g=graph_id, s=start, t=end, k=k).to_pylist()
            expected = strongest_paths(graph, [start], end, k=k, through=graph.kind != NodeKind.ERROR)
            assert [row["strength"] for row in rows] == pytest.approx([path.weight for path in expected])
            assert [tuple(row["nodes"]) for row in rows] == [path.nodes for path in expected]
            assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
            compared += len(rows)
    assert compared > 5


@pytest.mark.parametrize("macro", ["paths($g, 'Dallas', 'Austin', 3)", "paths_between($g, 'Dallas', 'Austin')"])
def test_words_in_place_of_nodes_are_refused(store, graphs, macro):
    with pytest.raises(GraphError, match=r"Could not convert string '(Dallas|Austin)' to INT32"):
        store.sql(f"FROM {macro}", g=next(iter(graphs)))


def test_inputs_and_outputs_have_their_older_names_too(store, graphs):
    graph_id, graph = next(iter(graphs.items()))
    node = int(graph.target[len(graph.target) // 2])
    for new, old in (("inputs_of", "in_edges"), ("outputs_of", "out_edges")):
        answer = store.sql(f"FROM {new}($g, $n)", g=graph_id, n=node)
        assert answer.num_rows > 0
        assert answer == store.sql(f"FROM {old}($g, $n)", g=graph_id, n=node)


def test_common_features_are_counted_as_in_numpy(store, graphs):
    counts: dict[tuple[int, int], set[str]] = {}
    for graph_id, graph in graphs.items():
        found = reach(graph)
        words = {int(p) for p in graph.position[(graph.kind == NodeKind.TOKEN) & np.isin(graph.word, ["in", "Texas"])]}
        for node in np.flatnonzero((graph.kind == NodeKind.FEATURE) & found.reaches_answer):
            if words & set(found.reached_from[int(node)].as_py()):
                counts.setdefault((int(graph.layer[node]), int(graph.feature[node])), set()).add(graph_id)
    rows = store.sql("FROM common_features(['in', 'Texas'], 1000)").to_pylist()
    assert {(row["layer"], row["feature"]): row["graphs"] for row in rows} == {
        key: len(having) for key, having in counts.items()
    }
    assert [row["share"] for row in rows] == [row["graphs"] / 4 for row in rows]
    assert [row["graphs"] for row in rows] == sorted((row["graphs"] for row in rows), reverse=True)
    first = store.sql("FROM common_features(['in', 'Texas'], 3)").to_pylist()
    assert first == rows[:3]
    assert store.sql("FROM common_features(['nobody says this'], 3)").num_rows == 0
    assert store.sql("FROM common_features(NULL, 1000)").num_rows >= len(rows)


def test_common_features_of_graphs_of_version_1_name_the_command_that_helps(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    store.save(random_graph(0))
    [path] = tmp_path.rglob("nodes-*")
    drop_columns(path, ["reached_from", "reaches_answer"])
    with pytest.raises(GraphError, match="was saved by version 1; run trace compact, then ask again"):
        store.sql("FROM common_features(NULL, 3)")
    store.compact()
    assert store.sql("FROM common_features(NULL, 3)").num_rows == 3


def test_features_of_two_transcoders_are_not_the_same(tmp_path, make_graph, make_info):
    """Equal numbers mean nothing across transcoders."""
    store = GraphStore(tmp_path)
    a, b = (
        store.save(make_graph("tfl", [(0, 1, 1.0), (1, 2, 1.0)], info=make_info(transcoder_revision=revision)))
        for revision in ("1", "2")
    )
    rows = store.sql("SELECT present, kind FROM diff($a, $b) ORDER BY ALL", a=a, b=b).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("both", "logit"), ("both", "token"), ("only a", "feature"), ("only b", "feature")
    ]  # fmt: skip
    found = store.sql("SELECT transcoder_revision, graphs FROM common_features(NULL, 9) ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in found] == [("1", 1), ("2", 1)]


def test_a_difference_has_every_node_of_both_graphs_once(store, graphs):
    (a, left), (b, right) = list(graphs.items())[:2]
    rows = store.sql("FROM diff($a, $b)", a=a, b=b).to_pylist()
    assert sorted(row["node_a"] for row in rows if row["node_a"] is not None) == list(range(left.n_nodes))
    assert sorted(row["node_b"] for row in rows if row["node_b"] is not None) == list(range(right.n_nodes))
    for row in rows:
        assert row["present"] == ("only a" if row["node_b"] is None else "only b" if row["node_a"] is None else "both")
        if row["present"] == "both":
            for name in ("layer", "feature"):
                assert getattr(left, name)[row["node_a"]] == getattr(right, name)[row["node_b"]]
            place = left.position[row["node_a"]] - len(left.info.tokens)
            assert place == right.position[row["node_b"]] - len(right.info.tokens) == row["place"]
    assert {row["present"] for row in rows} == {"only a", "only b", "both"}
    same = store.sql("SELECT present, count(*) AS n FROM diff($a, $a) GROUP BY 1", a=a).to_pylist()
    assert same == [{"present": "both", "n": left.n_nodes}]


def test_logits_of_equal_text_are_the_same_only_if_their_numbers_are(tmp_path, make_graph, make_info):
    """As two tokens of a vocabulary that print the same; a difference of tokens has a name and no number."""
    store = GraphStore(tmp_path)
    texts = np.array(["the", "the", "the"], object)
    a, b = (
        store.save(make_graph("lll", [], info=make_info(config=f'{{"n": {n}}}'), token=texts, token_id=numbers))
        for n, numbers in enumerate([[7, 8, -1], [8, 9, -1]])
    )
    query = "SELECT present, node_a, node_b FROM diff($a, $b) ORDER BY ALL"
    assert [tuple(row.values()) for row in store.sql(query, a=a, b=a).to_pylist()] == [
        ("both", 0, 0), ("both", 1, 1), ("both", 2, 2)
    ]  # fmt: skip
    assert [tuple(row.values()) for row in store.sql(query, a=a, b=b).to_pylist()] == [
        ("both", 1, 0), ("both", 2, 2), ("only a", 0, None), ("only b", None, 1)
    ]  # fmt: skip


def test_influence_is_shared_out_over_the_kinds_of_nodes(store, graphs):
    rows = store.sql("FROM influence_by_kind(NULL)").to_pylist()
    for row in rows:
        graph = graphs[row["graph_id"]]
        chosen = graph.kind == NodeKind[row["kind"].upper()]
        assert row["nodes"] == chosen.sum()
        assert row["influence"] == pytest.approx(graph.influence[chosen].sum())
        assert row["share"] == pytest.approx(graph.influence[chosen].sum() / np.nansum(graph.influence))
    one = next(iter(graphs))
    assert store.sql("FROM influence_by_kind($g)", g=one).to_pylist() == [row for row in rows if row["graph_id"] == one]


def test_a_node_in_words(store):
    text = "node_text('feature', 'x', ' in', NULL, 1, 3)"
    assert store.sql(f"SELECT {text} AS text").to_pylist() == [{"text": "L1/f3 (in)"}]
