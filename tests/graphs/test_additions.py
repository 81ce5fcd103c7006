import pyarrow as pa
import pytest

from graphs import GraphError, GraphStore


def supernode(graph_id, name="Texas", node=1):
    return pa.Table.from_pylist([{"graph_id": graph_id, "supernode": name, "node": node}])


@pytest.fixture
def store(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    for prompt in ("one", "two"):
        store.save(make_graph("tfl", [(0, 1, 1.0), (1, 2, 1.0)], info=make_info(prompt)))
    return store


def one(store):
    return store.resolve("one")


def test_what_is_added_to_a_graph_is_a_table_and_stays_with_it(store, make_graph, make_info):
    store.save_rows("supernodes", one(store), supernode(one(store), "old"))
    store.save_rows("supernodes", one(store), supernode(one(store)))
    expected = [{"graph_id": one(store), "supernode": "Texas", "node": 1}]
    assert store.sql("FROM supernodes").to_pylist() == expected
    store.compact()
    store.save_rows("supernodes", store.resolve("two"), supernode(store.resolve("two")))
    assert store.sql("FROM supernodes WHERE graph_id = $g", g=one(store)).to_pylist() == expected
    assert store.sql("SELECT count(*) AS n FROM supernodes").to_pylist() == [{"n": 2}]
    store.delete(one(store))
    assert store.sql("SELECT graph_id FROM supernodes").to_pylist() == [{"graph_id": store.resolve("two")}]


def test_no_rows_take_the_earlier_ones_away(store):
    store.save_rows("supernodes", one(store), supernode(one(store)))
    store.save_rows("supernodes", one(store), supernode(one(store)).slice(0, 0))
    assert store.sql("FROM supernodes").num_rows == 0


def test_interventions_and_validations_have_their_tables(store):
    rows = store.sql("SELECT $g AS graph_id, * EXCLUDE graph_id FROM interventions", g=one(store))
    store.save_rows("interventions", one(store), rows)
    row = {"graph_id": one(store), "validation": "ablate", "source": 0, "target": 1, "predicted": 1.0, "measured": 0.9}
    store.save_rows("validations", one(store), pa.Table.from_pylist([row | {"is_control": False}]))
    assert store.sql("SELECT measured FROM validations").to_pylist() == [{"measured": 0.9}]


def test_what_does_not_fit_is_refused(store):
    graph_id = one(store)
    for table, rows, message in (
        ("nodes", supernode(graph_id), "table nodes is not added to graphs"),
        ("supernodes", supernode(graph_id).drop_columns("node"), "do not fit table supernodes"),
        ("supernodes", supernode("another"), f"rows of another were given as those of {graph_id}"),
    ):
        with pytest.raises(GraphError, match=message):
            store.save_rows(table, graph_id, rows)
    with pytest.raises(GraphError, match="there is no graph 'missing'"):
        store.save_rows("supernodes", "missing", supernode("missing"))
    with pytest.raises(GraphError, match="is no graph id"):
        store.save_rows("supernodes", "../one", supernode("../one"))


def test_a_damaged_addition_is_left_out(store):
    store.save_rows("supernodes", one(store), supernode(one(store)))
    (store.folder / "graphs" / one(store) / "supernodes.parquet").write_bytes(b"PAR1")
    assert store.sql("FROM supernodes").num_rows == 0
    assert len(store.list()) == 2


def test_queries_are_saved_by_name(store):
    store.save_query("all", "FROM graphs")
    store.save_query("all", "FROM nodes  ")
    store.save_query("Edges-2", "FROM edges")
    assert store.saved_queries() == {"Edges-2": "FROM edges\n", "all": "FROM nodes\n"}
    assert store.saved_query("all") == "FROM nodes\n"
    with pytest.raises(GraphError, match=r"there is no readable query 'some' in .*; saved are Edges-2, all"):
        store.saved_query("some")


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x", "a" * 65, "a\0", "a b", "ü"])
def test_what_is_no_name_of_a_query_never_becomes_a_path(store, name):
    for use in (store.saved_query, lambda name: store.save_query(name, "SELECT 1")):
        with pytest.raises(GraphError, match="is no name for a query"):
            use(name)
    assert not (store.folder / "queries").exists()
