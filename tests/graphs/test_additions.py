from datetime import UTC, datetime

import pyarrow as pa
import pytest

from graphs import GraphError, GraphStore


def validation(graph_id, name="ablate"):
    row = {"graph_id": graph_id, "validation": name, "source": 0, "target": 1, "predicted": 1.0, "measured": 0.9}
    return pa.Table.from_pylist([row | {"is_control": False}])


@pytest.fixture
def store(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    for prompt in ("one", "two"):
        store.save(make_graph("tfl", [(0, 1, 1.0), (1, 2, 1.0)], info=make_info(prompt)))
    return store


def one(store):
    return store.resolve("one")


def test_what_is_added_to_a_graph_is_a_table_and_stays_with_it(store):
    store.save_rows("validations", one(store), validation(one(store), "old"))
    store.save_rows("validations", one(store), validation(one(store)))
    expected = validation(one(store)).to_pylist()
    assert store.sql("FROM validations").to_pylist() == expected
    store.compact()
    store.save_rows("validations", store.resolve("two"), validation(store.resolve("two")))
    assert store.sql("FROM validations WHERE graph_id = $g", g=one(store)).to_pylist() == expected
    assert store.sql("SELECT count(*) AS n FROM validations").to_pylist() == [{"n": 2}]
    store.delete(one(store))
    assert store.sql("SELECT graph_id FROM validations").to_pylist() == [{"graph_id": store.resolve("two")}]


def test_no_rows_take_the_earlier_ones_away(store):
    store.save_rows("validations", one(store), validation(one(store)))
    store.save_rows("validations", one(store), validation(one(store)).slice(0, 0))
    assert store.sql("FROM validations").num_rows == 0


def test_interventions_have_their_table(store):
    row = {"graph_id": one(store), "intervention": 1, "node": 1, "layer": 0, "position": 0, "feature": 3}
    row |= {"operation": "scale", "value": 2.0, "created_at": datetime(2025, 1, 2, tzinfo=UTC)}
    store.save_rows("interventions", one(store), pa.Table.from_pylist([row]))
    assert store.sql("FROM interventions").to_pylist() == [row]


def test_what_does_not_fit_is_refused(store, tmp_path):
    graph_id = one(store)
    for table, rows, message in (
        ("nodes", validation(graph_id), "table nodes is not added to graphs"),
        ("supernodes", validation(graph_id), "supernodes is not added to graphs; expected interventions, validations"),
        ("validations", validation(graph_id).drop_columns("source"), "do not fit table validations"),
        ("validations", validation("another"), f"rows of another were given as those of {graph_id}"),
    ):
        with pytest.raises(GraphError, match=message):
            store.save_rows(table, graph_id, rows)
    with pytest.raises(GraphError, match="there is no graph 'missing'"):
        store.save_rows("validations", "missing", validation("missing"))
    with pytest.raises(GraphError, match="is no graph id"):
        store.save_rows("validations", "../one", validation("../one"))
    with pytest.raises(GraphError, match="there is no graph 'missing'"):
        GraphStore(tmp_path / "nowhere").save_rows("validations", "missing", validation("missing"))
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_addition_is_left_out(store):
    store.save_rows("validations", one(store), validation(one(store)))
    (store.folder / "graphs" / one(store) / "validations.parquet").write_bytes(b"PAR1")
    assert store.sql("FROM validations").num_rows == 0
    assert len(store.list()) == 2


def test_queries_are_saved_by_name(store):
    store.save_query("all", "FROM graphs")
    store.save_query("all", "FROM nodes  ")
    store.save_query("Edges-2", "FROM edges")
    saved = {name: store.saved_query(name) for name in store.saved_query_names()}
    assert saved == {"Edges-2": "FROM edges\n", "all": "FROM nodes\n"}
    assert store.saved_query("all") == "FROM nodes\n"
    with pytest.raises(GraphError, match=r"there is no readable query 'some' in .*; saved are Edges-2, all"):
        store.saved_query("some")
    store.delete_saved(queries=["all"])
    assert store.saved_query_names() == ["Edges-2"]
    with pytest.raises(GraphError, match=r"there is no query 'all' in .*; saved are Edges-2\.$"):
        store.delete_saved(queries=["Edges-2", "all"])
    with pytest.raises(GraphError, match="is no name for a query"):
        store.delete_saved(queries=["../store"])
    assert store.saved_query_names() == ["Edges-2"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x", "a" * 65, "a\0", "a b", "ü"])
def test_what_is_no_name_of_a_query_never_becomes_a_path(store, name):
    for use in (store.saved_query, lambda name: store.save_query(name, "SELECT 1")):
        with pytest.raises(GraphError, match="is no name for a query"):
            use(name)
    assert not (store.folder / "queries").exists()
