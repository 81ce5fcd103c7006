import numpy as np
import pytest

from graphs import GraphError, GraphStore, NodeKind, strongest_paths
from graphs.schema import description, tables
from graphs.statements import macro_description, macros, view_columns, views


@pytest.fixture(scope="module")
def store(tmp_path_factory, random_graph):
    """Three graphs that no test changes."""
    store = GraphStore(tmp_path_factory.mktemp("database") / "store")
    for seed in range(3):
        store.save(random_graph(seed))
    return store


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what may be asked


def test_counts_in_sql_are_counts_in_numpy(store):
    graphs = {stored.graph_id: store.load(stored.graph_id) for stored in store.list()}
    rows = store.sql("SELECT graph_id, kind, count(*) AS n FROM nodes GROUP BY ALL").to_pylist()
    assert {(row["graph_id"], row["kind"]): row["n"] for row in rows} == {
        (graph_id, kind.text): int((graph.kind == kind).sum())
        for graph_id, graph in graphs.items()
        for kind in NodeKind
    }
    rows = store.sql("SELECT graph_id, count(*) AS n, sum(weight) AS total FROM edges GROUP BY 1").to_pylist()
    assert {row["graph_id"]: row["n"] for row in rows} == {name: graph.n_edges for name, graph in graphs.items()}
    for row in rows:
        assert row["total"] == pytest.approx(graphs[row["graph_id"]].weight.sum())
    assert store.sql("SELECT sum(n_nodes) AS n FROM graphs")["n"].to_pylist() == [
        sum(graph.n_nodes for graph in graphs.values())
    ]


def test_columns_without_meaning_are_null(store):
    answer = store.sql(
        """SELECT kind, count(feature) AS feature, count(probability) AS probability, count(influence) AS influence,
           count(token_id) AS token_id FROM nodes GROUP BY kind"""
    )
    rows = {row.pop("kind"): row for row in answer.to_pylist()}
    assert rows["logit"] == {"feature": 0, "probability": 9, "influence": 0, "token_id": 9}
    assert rows["feature"] == {"feature": 36, "probability": 0, "influence": 36, "token_id": 0}
    assert rows["token"] == {"feature": 0, "probability": 0, "influence": 15, "token_id": 15}
    assert rows["error"]["feature"] == rows["error"]["token_id"] == 0
    assert store.sql("SELECT count(*) AS n FROM nodes WHERE label = ''").to_pylist() == [{"n": 0}]


def test_parameters_are_values_and_never_sql(store):
    answer = store.sql("SELECT $text AS text, $number + 1 AS number", text="'; DROP TABLE nodes; --", number=2)
    assert answer.to_pylist() == [{"text": "'; DROP TABLE nodes; --", "number": 3}]
    answer = store.sql("SELECT count(*) AS n FROM nodes WHERE list_contains($kinds, kind)", kinds=["token", "logit"])
    assert answer.to_pylist() == [{"n": 24}]
    assert store.sql("SELECT $query AS query, $self AS self", query=1, self=2).to_pylist() == [{"query": 1, "self": 2}]


@pytest.mark.parametrize("parameters", [{}, {"a": 1, "b": 2}, {"b": 1}])
def test_parameters_must_be_those_of_the_query(store, parameters):
    with pytest.raises(GraphError, match="parameter"):
        store.sql("SELECT $a", **parameters)


def test_a_slider_is_one_condition(store):
    answer = store.sql(
        "SELECT count(*) AS n FROM nodes WHERE cumulative_influence <= 0.5 OR kind IN ('token', 'logit')"
    )
    expected = 0
    for stored in store.list():
        graph = store.load(stored.graph_id)
        expected += int(np.sum((graph.cumulative_influence <= 0.5) | np.isin(graph.kind, [0, 3])))
    assert answer["n"].to_pylist() == [expected]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        " select 1 ; ",
        "-- a comment\nSELECT 1",
        "FROM graphs",
        "TABLE graphs",
        "VALUES (1)",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "DESCRIBE nodes",
        "DESCRIBE SELECT * FROM in_edges('x', 1)",
        "SHOW TABLES",
        "SUMMARIZE edges",
        "EXPLAIN SELECT * FROM nodes",
        "/* why */ explain FROM nodes",
        "PIVOT nodes ON kind IN ('token', 'feature') USING count(*) GROUP BY graph_id",
        "SELECT ';' AS semicolon",
        "SELECT created_at, created_at + INTERVAL 1 DAY FROM graphs",
    ],
)
def test_everything_that_only_reads_is_answered(store, query):
    assert store.sql(query).num_columns > 0


def test_tables_without_rows_are_there_with_their_columns(store):
    for name in ("features", "supernodes", "interventions", "validations"):
        answer = store.sql(f"FROM {name}")
        assert answer.num_rows == 0
        assert answer.column_names == tables()[name].names


def test_times_are_in_utc(store):
    answer = store.sql("SELECT created_at, created_at::VARCHAR AS text FROM graphs LIMIT 1").to_pylist()
    assert answer[0]["text"] == "2025-01-02 03:04:05.678901+00"
    assert answer[0]["created_at"].isoformat() == "2025-01-02T03:04:05.678901+00:00"


def test_tables_columns_and_macros_are_described_in_sql(store):
    rows = store.sql("SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal").to_pylist()
    found = {(row["table_name"], row["column_name"]): row["comment"] for row in rows}
    columns = {name: list(table) for name, table in tables().items()} | {name: view_columns(name) for name in views()}
    assert found == {(name, field.name): description(field) for name, fields in columns.items() for field in fields}
    rows = store.sql("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").to_pylist()
    assert {row["view_name"]: row["comment"] for row in rows} == {
        **{name: description(table) for name, table in tables().items()},
        **{name: macro_description(sql) for name, sql in views().items()},
    }
    rows = store.sql("SELECT function_name AS name, comment FROM duckdb_functions() WHERE NOT internal").to_pylist()
    assert {row["name"]: row["comment"] for row in rows} == {n: macro_description(sql) for n, sql in macros().items()}


# what is refused: {file} is a file of the store that queries read, {new} one that does not exist

REFUSED = [
    "",
    ";",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW nodes",
    "SELEC 1",
    "SELECT nothing FROM nodes",
    "SELECT 1 FROM missing",
    "SELECT 'open",
    "\ud800",
    "COPY nodes TO '{new}'",
    "COPY (SELECT 1) TO '{file}' (USE_TMP_FILE false, FORMAT parquet)",
    "COPY nodes FROM '{file}'",
    "WITH x AS (COPY (SELECT 1 AS a) TO '{file}' (USE_TMP_FILE false, FORMAT parquet)) SELECT 1",
    "WITH x AS (COPY (SELECT 1 AS a) TO '{new}') SELECT 1",
    "SELECT * FROM query('WITH x AS (COPY (SELECT 1 AS a) TO ''{new}'') SELECT 1')",
    "SELECT * FROM query('COPY (SELECT 1 AS a) TO ''{new}''')",
    "EXPLAIN COPY nodes TO '{new}'",
    "EXPLAIN ANALYZE COPY nodes TO '{new}'",
    "EXPLAIN ANALYZE SELECT 1",
    "EXPLAIN /* */ ANALYZE COPY nodes TO '{new}'",
    "EXPLAIN (ANALYZE) COPY nodes TO '{new}'",
    "ATTACH '{new}' AS other",
    "ATTACH '{file}' AS other",
    "DETACH memory",
    "EXPORT DATABASE '{new}'",
    "IMPORT DATABASE '{new}'",
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_json('{file}')",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM parquet_metadata('{file}')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{folder}/../secret.parquet'",
    "SELECT * FROM read_text('{folder}/../secret.parquet')",
    "SELECT * FROM 'https://example.com/x.parquet'",
    "SELECT getenv('HOME')",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET threads = 1",
    "RESET ALL",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CHECKPOINT",
    "BEGIN",
    "ROLLBACK",
    "USE memory",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "DROP VIEW nodes",
    "ALTER VIEW nodes RENAME TO x",
    "COMMENT ON VIEW nodes IS 'x'",
    "INSERT INTO nodes (node) VALUES (1)",
    "UPDATE nodes SET node = 1",
    "DELETE FROM nodes",
    "MERGE INTO nodes USING edges ON node = source WHEN MATCHED THEN DELETE",
    "TRUNCATE nodes",
    "WITH x AS (INSERT INTO nodes (node) VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM nodes RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE nodes SET node = 1 RETURNING *) SELECT * FROM x",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "VACUUM",
    "PIVOT nodes ON kind",
    "SELECT * FROM store",
    "SELECT * FROM contents",
]


@pytest.mark.parametrize("query", REFUSED)
def test_everything_else_is_refused_in_one_line_and_changes_no_file(store, query):
    root = store.folder.parent
    file = next(store.folder.rglob("nodes-*"))
    (root / "secret.parquet").write_bytes(file.read_bytes())
    before = contents(root)
    places = {"{file}": str(file), "{new}": str(root / "new"), "{folder}": str(store.folder)}
    for name, place in places.items():
        query = query.replace(name, place)
    with pytest.raises(GraphError) as error:
        store.sql(query)
    assert str(error.value)
    assert "\n" not in str(error.value)
    assert contents(root) == before


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the query is empty; give one SELECT"),
        ("SELECT 1; SELECT 2", "the query has 2 statements"),
        ("DELETE FROM nodes", "DELETE statements are not allowed, the store is only read"),
        ("PIVOT nodes ON kind", "a PIVOT without its values"),
        ("EXPLAIN ANALYZE SELECT 1", "only plain EXPLAIN is allowed"),
        ("SELECT nod FROM nodes", 'Referenced column "nod" not found'),
        ("SELECT * FROM read_csv('/etc/passwd')", "file system operations are disabled"),
    ],
)
def test_refusals_say_why(store, query, message):
    with pytest.raises(GraphError, match=message):
        store.sql(query)


def test_the_lock_is_on(store):
    answer = store.sql(
        """SELECT name, value FROM duckdb_settings() WHERE name IN ('enable_external_access', 'lock_configuration',
           'autoload_known_extensions', 'autoinstall_known_extensions', 'python_enable_replacements', 'temp_directory',
           'allowed_paths', 'allowed_directories')"""
    )
    assert {row["name"]: row["value"] for row in answer.to_pylist()} == {
        "enable_external_access": "false",
        "lock_configuration": "true",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "python_enable_replacements": "false",
        "temp_directory": "",
        "allowed_paths": "[]",
        "allowed_directories": "[]",
    }


def test_parameters_that_are_no_text_are_refused(store):
    with pytest.raises(GraphError):
        store.sql("SELECT $a", a="\ud800")


# macros


def word_graph(make_graph, make_info, prompt="Dallas is in", **columns):
    """Dallas ─▶ Texas ─▶ say Austin ─▶ Austin, and a stronger way through an error node."""
    edges = [(0, 1, 1.0), (0, 2, 8.0), (1, 3, -3.0), (2, 3, 1.0), (3, 4, 2.0), (0, 4, 1.0), (2, 4, 5.0), (0, 5, 1.0)]
    columns = {
        "position": [0, 1, 1, 2, 2, 2],
        "layer": [-1, 0, 0, 1, 3, 3],
        "word": np.array(["Dallas", "is", "is", "in", "Austin", "Paris"], dtype=object),
        "token": np.array([" Dal", " is", " is", " in", " Austin", " Paris"], dtype=object),
        "label": np.array(["", "Texas", "", "", "", ""], dtype=object),
        "probability": [np.nan] * 4 + [0.7, 0.2],
    } | columns
    return make_graph("tfefll", edges, info=make_info(prompt), **columns)


def test_the_strongest_path_of_a_graph_worked_out_by_hand(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    graph_id = store.save(word_graph(make_graph, make_info))
    [row] = store.sql("FROM strongest_path('Dallas')").to_pylist()
    # 1 · 3/4 · 2/8 beats the direct edge's 1/8; the way through the error does not count
    assert row == {
        "graph_id": graph_id,
        "prompt": "Dallas is in",
        "answer": " Austin",
        "strength": pytest.approx(3 / 16),
        "path": "Dallas → Texas (L0 is) → L1/f3 (in) → Austin",
        "nodes": [0, 1, 3, 4],
    }
    assert store.sql("FROM strongest_path(' Dal')").to_pylist() == [row]
    assert store.sql("FROM strongest_path('Austin')").num_rows == 0
    assert store.sql("FROM strongest_path($word)", word="Dallas").to_pylist() == [row]


def test_the_strongest_circuit_leaves_out_the_direct_edge_only(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    store.save(make_graph("tfl", [(0, 1, 1.0), (0, 2, 9.0), (1, 2, 1.0)], info=make_info("Dallas")))
    store.save(make_graph("tl", [(0, 1, 1.0)], info=make_info("Dallas was")))
    columns = "SELECT strength, nodes FROM"
    assert store.sql(f"{columns} strongest_path('Dallas')").to_pylist() == [
        {"strength": 1.0, "nodes": [0, 1]}, {"strength": pytest.approx(0.9), "nodes": [0, 2]},
    ]  # fmt: skip
    assert store.sql(f"{columns} strongest_circuit('Dallas')").to_pylist() == [
        {"strength": pytest.approx(0.1), "nodes": [0, 1, 2]}, {"strength": 0.0, "nodes": None},
    ]  # fmt: skip


def test_strongest_paths_come_from_every_graph_with_the_word_strongest_first(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    ids = [
        store.save(word_graph(make_graph, make_info)),
        store.save(word_graph(make_graph, make_info, "Dallas was in", weight=[1.0, 8, -3, 1, 92, 1, 5, 1])),
        store.save(make_graph("tl", [], info=make_info("Dallas"))),
        store.save(make_graph("tl", [(0, 1, 1.0)], info=make_info("Paris"))),
    ]
    rows = store.sql("FROM strongest_path('Dallas')").to_pylist()
    assert [row["graph_id"] for row in rows] == [ids[1], ids[0], ids[2]]
    assert [row["strength"] for row in rows] == pytest.approx([3 / 4 * 92 / 98, 3 / 16, 0.0])
    assert (rows[2]["path"], rows[2]["nodes"]) == (None, None)


def test_paths_between_nodes_may_start_at_an_error_but_not_pass_one(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    graph_id = store.save(word_graph(make_graph, make_info))
    [row] = store.sql("FROM paths_between($graph, 2, 4)", graph=graph_id).to_pylist()
    assert (row["strength"], row["nodes"]) == (pytest.approx(5 / 8), [2, 4])
    assert row["path"] == "error (L0 is) → Austin"
    [row] = store.sql("FROM paths_between($graph, 0, 3)", graph=graph_id).to_pylist()
    assert (row["strength"], row["nodes"], row["answer"]) == (pytest.approx(3 / 4), [0, 1, 3], " Austin")
    [row] = store.sql("FROM paths_between($graph, 4, 5)", graph=graph_id).to_pylist()
    assert (row["strength"], row["nodes"]) == (0.0, None)
    assert store.sql("FROM paths_between('unknown', 0, 1)").num_rows == 0


@pytest.mark.parametrize("seed", range(4))
def test_paths_in_sql_are_paths_in_python(tmp_path, random_graph, seed):
    store = GraphStore(tmp_path)
    graphs = [random_graph(10 * seed + i, n_layers=6, n_features=6, density=0.7) for i in range(5)]
    by_id = {store.save(graph): graph for graph in graphs}

    def strongest(graph, sources, target):
        return strongest_paths(graph, sources, target, k=1, through=graph.kind != NodeKind.ERROR)

    rows = store.sql("FROM strongest_path('Texas')").to_pylist()
    assert {row["graph_id"] for row in rows} == set(by_id)
    for row in rows:
        graph = by_id[row["graph_id"]]
        words = np.flatnonzero((graph.kind == NodeKind.TOKEN) & (graph.word == "Texas")).tolist()
        answer = int(np.nanargmax(graph.probability))
        [path] = strongest(graph, words, answer) or [None]
        assert row["answer"] == graph.token[answer]
        if path is None:
            assert (row["strength"], row["nodes"]) == (0.0, None)
        else:
            assert (row["strength"], tuple(row["nodes"])) == (pytest.approx(path.weight), path.nodes)

    graph_id, graph = next(iter(by_id.items()))
    for source, target in np.random.default_rng(seed).integers(graph.n_nodes, size=(6, 2)).tolist():
        [row] = store.sql("FROM paths_between($g, $s, $t)", g=graph_id, s=source, t=target).to_pylist()
        found = strongest(graph, [source], target)
        assert row["strength"] == pytest.approx(found[0].weight if found else 0.0)
        assert row["nodes"] == (list(found[0].nodes) if found else None)


def test_edges_of_a_node_come_with_their_shares_and_other_ends(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    graph_id = store.save(word_graph(make_graph, make_info))
    store.save(word_graph(make_graph, make_info, "another graph with"))
    rows = store.sql("FROM in_edges($graph, 3)", graph=graph_id).to_pylist()
    assert [(row["source"], row["target"], row["weight"], row["share"]) for row in rows] == [
        (1, 3, -3.0, 0.75),
        (2, 3, 1.0, 0.25),
    ]
    assert [(row["kind"], row["layer"], row["label"]) for row in rows] == [("feature", 0, "Texas"), ("error", 0, None)]
    rows = store.sql("FROM out_edges($graph, 0)", graph=graph_id).to_pylist()
    assert [(row["target"], row["share"]) for row in rows] == [(1, 1.0), (2, 1.0), (5, 1.0), (4, 0.125)]
    assert [row["kind"] for row in rows] == ["feature", "error", "logit", "logit"]


def test_shares_into_a_target_add_up_to_the_part_of_its_input_that_is_edges(store):
    graph_id = store.list()[0].graph_id
    graph = store.load(graph_id)
    target = int(graph.target[-1])
    answer = store.sql("SELECT sum(share) AS total, count(*) AS n FROM in_edges($g, $t)", g=graph_id, t=target)
    assert answer.to_pylist() == [{"total": pytest.approx(0.8), "n": int((graph.target == target).sum())}]
