"""What DuckDB's own settings do not stop, each in a real worker: the list of what was found to work elsewhere."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from graphs import GraphError, GraphStore
from graphs.sandbox import query
from tests.waiting import wait_until

SECONDS = 60.0
"""Most of it goes into starting the worker, which takes long on a slow machine."""
MEMORY = 1 << 30
ENDLESS = "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"


@pytest.fixture(scope="module")
def store(tmp_path_factory, random_graph):
    """Graphs in a pack and in a folder of its own, that no test changes."""
    store = GraphStore(tmp_path_factory.mktemp("sandbox") / "store")
    for seed in range(2):
        store.save(random_graph(seed))
    store.compact()
    store.save(random_graph(2))
    return store


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ask(store, sql, parameters=None, **limits):
    return query(store, sql, parameters or {}, **({"seconds": SECONDS, "memory": MEMORY} | limits))


def test_an_answer_is_what_the_store_gives_itself(store):
    sql = "SELECT kind, count(*) AS n FROM nodes WHERE kind <> $kind AND layer < $layer GROUP BY kind ORDER BY kind"
    parameters = {"kind": "error", "layer": 2}
    answer = ask(store, sql, parameters)
    assert answer.table == store.sql(sql, **parameters)
    assert not answer.truncated


def test_rows_beyond_the_limit_are_left_out_and_that_is_said(store):
    answer = ask(store, "FROM edges", max_rows=7)
    assert (answer.table.num_rows, answer.truncated) == (7, True)
    assert ask(store, "FROM range(7)", max_rows=7).truncated is False


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT repeat('a', 2000) AS text",
        # small as DuckDB hands it over, large as text
        f"SELECT '{'a' * 500}'::ENUM('{'a' * 500}') FROM range(20)",
        f"SELECT 1 AS {'a' * 2000}",
    ],
    ids=["a text", "an enum", "a name"],
)
def test_an_answer_of_too_many_bytes_is_refused(store, sql):
    with pytest.raises(GraphError, match="bytes, more than 1000; ask for fewer"):
        ask(store, sql, max_bytes=1000)


def test_an_answer_of_too_many_values_is_refused(store):
    columns = ", ".join(["true"] * 400)
    with pytest.raises(GraphError, match="999 rows of 400 columns, more than 100000 values; ask for fewer columns or"):
        ask(store, f"SELECT {columns} FROM range(999)")
    assert ask(store, f"SELECT {columns} FROM range(99)").table.num_columns == 400


def test_an_error_is_no_way_to_send_much(store):
    with pytest.raises(GraphError, match="aaaa") as caught:
        ask(store, "SELECT error(repeat('a', 5000000))")
    assert len(str(caught.value)) == 2000


def test_parameters_that_the_query_does_not_name_are_left_out(store):
    assert ask(store, "SELECT $a AS a -- $b", {"a": 1, "b": 2}).table.to_pylist() == [{"a": 1}]


def test_a_query_that_nobody_waits_for_is_stopped(store):
    asked = []
    with pytest.raises(GraphError, match="the query was stopped: nobody waits for its answer any more"):
        ask(store, ENDLESS, seconds=60.0, is_wanted=lambda: len(asked.append(1) or asked) < 3)
    assert len(asked) == 3


def test_values_of_every_kind_come_back(store):
    [row] = ask(
        store, "SELECT $a AS a, $b AS b, $c AS c, $d AS d, $e AS e, 'NaN'::DOUBLE AS f, '\\x00'::BLOB AS g",
        {"a": 1, "b": 2.5, "c": True, "d": None, "e": ["x", "'; DROP TABLE nodes; --"]},
    ).table.to_pylist()  # fmt: skip
    assert (row["a"], row["b"], row["c"], row["d"]) == (1, 2.5, True, None)
    assert row["e"] == ["x", "'; DROP TABLE nodes; --"]
    assert row["f"] != row["f"]
    assert row["g"] == "\\x00"


REFUSED = [
    # reading other files
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM '{folder}/../secret.parquet'",
    "SELECT * FROM 'https://example.com/x.parquet'",
    "SELECT * FROM contents",
    # settings
    "SET memory_limit = '100GB'",
    "RESET ALL",
    "PRAGMA enable_profiling",
    "CALL enable_logging()",
    # writing, also where reading is allowed
    "COPY nodes TO '{new}'",
    "COPY (SELECT 1) TO 'store://nodes-0.parquet' (USE_TMP_FILE false, FORMAT parquet)",
    "WITH x AS (COPY (SELECT 1 AS a) TO 'store://nodes-0.parquet' (USE_TMP_FILE false, FORMAT parquet)) SELECT 1",
    "WITH x AS (COPY (SELECT 1 AS a) TO 'store://new.parquet' (USE_TMP_FILE false, FORMAT parquet)) SELECT 1",
    "WITH x AS (COPY (SELECT 1 AS a) TO '{file}' (USE_TMP_FILE false, FORMAT parquet)) SELECT 1",
    "WITH x AS (COPY (SELECT 1 AS a) TO '{new}') SELECT 1",
    "ATTACH '{new}' AS other",
    "ATTACH '{file}' AS other",
    "EXPORT DATABASE '{new}'",
    "CREATE TEMP TABLE x AS SELECT 1",
    "WITH x AS (INSERT INTO nodes (node) VALUES (1) RETURNING *) SELECT * FROM x",
    "EXPLAIN ANALYZE COPY nodes TO '{new}'",
    "PIVOT nodes ON kind",
    "CHECKPOINT",
    "LOAD httpfs",
    # a transaction that breaks every later query of the connection
    "BEGIN",
    "INSTALL httpfs",
    "SELECT 1; SELECT 2",
    "\ud800",
]


@pytest.fixture(scope="module")
def refusals(store) -> dict[str, str]:
    """What a worker of its own said to each; four at a time, as starting them takes longest."""
    root, file = store.folder.parent, next(store.folder.rglob("nodes-*"))
    (root / "secret.parquet").write_bytes(file.read_bytes())
    before = contents(root)

    def refusal(sql: str) -> str:
        for name, place in {"{file}": file, "{new}": root / "new", "{folder}": store.folder}.items():
            sql = sql.replace(name, str(place))
        try:
            return f"answered with {ask(store, sql).table}"
        except GraphError as error:
            return f"refused: {error}"

    with ThreadPoolExecutor(4) as threads:
        found = dict(zip(REFUSED, threads.map(refusal, REFUSED), strict=True))
    assert contents(root) == before, "a file was changed"
    return found


@pytest.mark.parametrize("sql", REFUSED)
def test_what_reads_elsewhere_or_writes_is_refused_in_one_line_and_changes_no_file(refusals, sql):
    assert refusals[sql].startswith("refused: ")
    assert "\n" not in refusals[sql]
    assert "was stopped" not in refusals[sql]


GREEDY = [
    "SELECT list_sum(range(400000000))",
    "SELECT length(repeat('a', 3000000000))",
    "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000))",
    "SELECT count(DISTINCT a.weight + b.weight + c.weight) FROM edges a, edges b, edges c",
    ENDLESS,
    "SELECT array_agg(a.range) FROM range(100000000) a, range(100) b",
    "SELECT list_sort(list_transform(range(200000000), lambda x: x::VARCHAR))",
]


ASK = """
import json, resource, sys
from graphs import GraphError, GraphStore
from graphs.sandbox import query
try:
    query(GraphStore(sys.argv[1]), sys.argv[2], {}, seconds=2.0, memory=1 << 30)
except GraphError as error:
    print(json.dumps([str(error), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@pytest.fixture(scope="module")
def ends(store) -> dict[str, tuple[str, int]]:
    """How each ended, and the kB that its worker had; asked by a process that has no other children."""

    def end(sql: str) -> tuple[str, int]:
        result = subprocess.run(
            [sys.executable, "-c", ASK, str(store.folder), sql], cwd=Path(__file__).parents[2], capture_output=True,
            text=True, check=True, timeout=60,
        )  # fmt: skip
        message, kilobytes = json.loads(result.stdout)
        return message, kilobytes

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(GREEDY, threads.map(end, GREEDY), strict=True))


@pytest.mark.parametrize("sql", GREEDY)
def test_what_takes_too_long_or_too_much_memory_is_stopped(ends, sql):
    message, kilobytes = ends[sql]
    assert re.search("took longer than 2 s|more than 1.1 GB of memory|Out of Memory", message)
    assert kilobytes < 2_500_000  # the limit and the libraries


def test_a_worker_cannot_write_anything_even_if_duckdb_would(store, tmp_path):
    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
        "from graphs.sandbox_worker import _give_up_rights\n"
        "_give_up_rights(1 << 30, 1.0)\n"
        "open(sys.argv[2], 'wb', buffering=0).write(b'x')\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(sys.path), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large" in result.stderr
    assert (tmp_path / "new").read_text() == ""


def test_a_worker_has_given_up_what_it_does_not_need():
    code = (
        "import sys, json, resource; sys.path[:] = json.loads(sys.argv[1])\n"
        "from graphs.sandbox_worker import _address_space, _give_up_rights\n"
        "before = _address_space()\n"
        "_give_up_rights(1 << 30, 1.0)\n"
        "limits = {name: resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in sys.argv[2].split()}\n"
        "limits['AS'] = [limit - before for limit in limits['AS']]\n"
        "print(json.dumps([limits, open('/proc/self/status').read()]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(sys.path), "AS CORE CPU FSIZE"],
        capture_output=True,
        text=True,
        check=True,
    )
    limits, status = json.loads(result.stdout)
    assert limits == {"AS": [1 << 30, 1 << 30], "CORE": [0, 0], "CPU": [9, 9], "FSIZE": [0, 0]}
    assert "NoNewPrivs:\t1\n" in status


def test_a_transaction_that_fails_breaks_no_later_query(store):
    for sql in ("BEGIN", "SELECT error('no')", "PRAGMA table_info('no_table')"):
        with pytest.raises(GraphError):
            ask(store, sql)
        assert ask(store, "SELECT 1 AS x").table.to_pylist() == [{"x": 1}]


def test_a_parameter_that_is_no_value_is_refused(store):
    with pytest.raises(GraphError, match="a parameter is no number"):
        ask(store, "SELECT $a", {"a": object()})


def test_a_store_that_is_none_is_told_in_one_line(tmp_path):
    store = GraphStore(tmp_path / "later")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "cat.jpg").write_text("x")
    with pytest.raises(GraphError, match="belongs to something else"):
        ask(store, "SELECT 1")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent is gone")
def test_a_worker_ends_with_the_process_that_asked(store):
    code = (
        "import sys; from graphs import GraphStore; from graphs.sandbox import query\n"
        "query(GraphStore(sys.argv[1]), sys.argv[2], {}, seconds=60.0)"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder), ENDLESS], cwd=Path(__file__).parents[2]
    )  # fmt: skip
    worker = wait_until(lambda: busy_child(asking.pid), asking)
    asking.kill()
    asking.wait()
    wait_until(lambda: not is_running(worker), seconds=30)  # or else it would run for a minute


def busy_child(pid):
    """A child of the process that has already worked for a second: long after it gave up its rights."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # of one that has just ended
            user_time = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11])
            if user_time > os.sysconf("SC_CLK_TCK"):
                return int(child)
    return None


def is_running(pid):
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
