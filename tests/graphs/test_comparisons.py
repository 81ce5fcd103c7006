"""Comparisons in the store: tables that answer SQL, replaced whole, and left out where they are damaged."""

from datetime import UTC, datetime

import pytest

from graphs import GraphError, GraphStore
from graphs.annotations import Annotations, Supernode
from graphs.comparisons import Comparison
from graphs.merge import merge_graphs


def about(name="pair", kind="diff", ids=("a", "b")):
    return Comparison(name, kind, ids, "diff", datetime(2025, 1, 2, tzinfo=UTC))


@pytest.fixture
def store(tmp_path):
    return GraphStore(tmp_path / "store")


def test_a_comparison_is_found_in_sql(store, random_graph):
    merged = merge_graphs([random_graph(0), random_graph(1)])
    store.save_comparison(about(), merged)
    [row] = store.sql("FROM comparisons").to_pylist()
    assert (row["comparison"], row["kind"], row["graph_ids"], row["n_graphs"]) == ("pair", "diff", ["a", "b"], 2)
    assert row["node_overlap"] == merged.node_overlap
    nodes = store.sql("FROM comparison_nodes ORDER BY node").to_pylist()
    assert [one["n_graphs"] for one in nodes] == merged.count.tolist()
    assert [one["in_a"] for one in nodes] == merged.in_first.tolist()
    [counted] = store.sql("SELECT count(*) AS n, sum(weight_a) AS a FROM comparison_edges").to_pylist()
    assert counted["n"] == len(merged.source)
    assert counted["a"] == pytest.approx(random_graph(0).weight.sum())


def test_a_merge_has_no_first_and_second_graph(store, random_graph):
    store.save_comparison(about(kind="merge"), merge_graphs([random_graph(0), random_graph(1)]))
    query = "SELECT count(in_a) + count(activation_a) + count(influence_b) AS n FROM comparison_nodes"
    assert store.sql(query).to_pylist() == [{"n": 0}]


def test_saving_again_replaces_and_a_damaged_comparison_is_left_out(store, random_graph):
    small, large = (
        merge_graphs([random_graph(0), random_graph(0)]),
        merge_graphs([random_graph(0), random_graph(1), random_graph(2)]),
    )
    store.save_comparison(about(), small)
    store.save_comparison(about("other"), small)
    store.save_comparison(about(), large)
    count = "SELECT comparison, count(*) AS n FROM comparison_nodes GROUP BY ALL ORDER BY ALL"
    both = [{"comparison": "other", "n": len(small.kind)}, {"comparison": "pair", "n": len(large.kind)}]
    assert store.sql(count).to_pylist() == both
    for path in (store.folder / "comparisons").glob("pair.*.nodes.parquet"):
        path.write_bytes(b"broken")
    assert store.sql(count).to_pylist() == both[:1]


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "a\0", ".x", "x" * 65])
def test_what_is_no_name_never_becomes_a_path(store, random_graph, name):
    with pytest.raises(GraphError, match="is no name; it has up to 64"):
        store.save_comparison(about(name), merge_graphs([random_graph(0), random_graph(0)]))
    assert not (store.folder / "comparisons").exists()


def test_a_deleted_comparison_leaves_nothing(store, random_graph):
    for name in ("pair", "other"):
        store.save_comparison(about(name), merge_graphs([random_graph(0), random_graph(1)]))
    store.delete_saved(["pair"])
    for table in ("comparisons", "comparison_nodes", "comparison_edges"):
        assert store.sql(f"SELECT DISTINCT comparison FROM {table}").to_pylist() == [{"comparison": "other"}]
    assert not list((store.folder / "comparisons").glob("pair*"))
    with pytest.raises(GraphError, match=r"there is no comparison 'pair' in .*; there are other\.$"):
        store.delete_saved(["other", "pair"])
    assert store.sql("SELECT comparison FROM comparisons").to_pylist() == [{"comparison": "other"}]
    with pytest.raises(GraphError, match="is no name"):
        store.delete_saved(["../store"])


# what people add to a graph


def test_supernodes_are_a_table_and_go_with_their_graph(store, random_graph):
    added = Annotations((Supernode("Texas", (6, 7)), Supernode("say “Austin”", (9,))), (6,), {"linkType": "both"})
    graph_id = store.save(random_graph(0), added)
    assert store.annotations(graph_id) == added
    assert store.sql("SELECT supernode, node FROM supernodes ORDER BY node").to_pylist() == [
        {"supernode": "Texas", "node": 6}, {"supernode": "Texas", "node": 7}, {"supernode": "say “Austin”", "node": 9},
    ]  # fmt: skip
    store.save(random_graph(0))
    assert store.annotations(graph_id) == added
    store.annotate(graph_id, Annotations())
    assert store.sql("FROM supernodes").num_rows == 0
    store.annotate(graph_id, added)
    store.delete(graph_id)
    assert list((store.folder / "annotations").iterdir()) == []


DAMAGED = ('{"supernodes": 3, "pinned": [], "view": {}}', '{"supernodes": [["x", [-1]]], "pinned": [], "view": {}}')


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, *DAMAGED])
def test_damaged_annotations_are_told_and_left_out_of_sql(store, random_graph, text):
    graph_id = store.save(random_graph(0), Annotations((Supernode("x", (6,)),)))
    (store.folder / "annotations" / f"{graph_id}.json").write_text(text)
    with pytest.raises(GraphError) as error:
        store.annotations(graph_id)
    assert "\n" not in str(error.value)
    assert store.sql("FROM supernodes").num_rows == 0
    assert store.sql("SELECT count(*) AS n FROM graphs").to_pylist() == [{"n": 1}]


def test_a_node_belongs_to_one_supernode():
    with pytest.raises(GraphError, match="node 6 is in two supernodes"):
        Annotations((Supernode("x", (6,)), Supernode("y", (7, 6))))
