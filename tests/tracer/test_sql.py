"""`trace sql`: queries from everywhere, parameters of every kind, answers in every form, and the shell."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from graphs import GraphStore
from tests.graphs.conftest import _random_graph
from tracer.sql_shell import run_shell
from transcoders.metrics import save_metrics
from transcoders.progress import METRICS, SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(command, folder):
    """What `trace sql …` writes to stdout, in this process."""

    def run_here(*arguments: str, given: str = "", inside: Path = folder) -> str:
        code, output, errors = command("sql", *arguments, given=given, inside=inside)
        assert (code, errors) == (0, "")
        return output

    return run_here


@pytest.fixture
def refused(command, folder):
    """The one line that `trace sql …` ends with."""

    def refused_here(*arguments: str, inside: Path = folder) -> str:
        code, _, errors = command("sql", *arguments, inside=inside)
        assert code == 2
        [line] = errors.splitlines()
        assert line.startswith("trace: ")
        return line

    return refused_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a store of two graphs under its usual name."""
    folder = tmp_path_factory.mktemp("sql")
    store = GraphStore(folder / "graphs-store")
    for seed in range(2):
        store.save(_random_graph(seed))
    return folder


def test_a_query_comes_from_an_argument_a_file_stdin_or_a_name(run, tmp_path):
    sql = "SELECT count(*) AS n FROM graphs"
    (tmp_path / "question.sql").write_text(sql)
    expected = '"n"\n2\n'
    assert run(sql) == expected
    assert run("graphs-store", sql) == expected
    assert run(f"{sql} WHERE prompt <> '{'x' * 300}'") == expected  # longer than a file's name may be
    assert run("-", given=sql) == expected
    assert run(given=sql) == expected
    assert run("graphs-store", given=sql) == expected
    assert run("--file", str(tmp_path / "question.sql")) == expected
    assert run(sql, "--save", "how-many") == expected
    assert run("--saved", "how-many") == expected
    assert json.loads(run("--list-saved", "--format", "json")) == [{"name": "how-many", "query": sql}]


def test_a_saved_query_is_deleted_with_rm(run, command, folder):
    run("SELECT 1 AS x", "--save", "gone")
    assert command("rm", "--query", "gone", inside=folder) == (0, "", "deleted gone\n")
    code, _, errors = command("rm", "--query", "gone", inside=folder)
    assert code == 2
    assert errors.startswith("trace: there is no query 'gone' in graphs-store; ")


def test_parameters_are_numbers_truth_values_and_texts(run):
    sql = "SELECT $a + 1 AS a, $b AS b, $c AS c, $d AS d, $e AS e, $f AS f"
    given = ["a=2", "b=true", "c=0.5", "d=is = 5", 'e="95"', "f=null"]
    pairs = [part for pair in given for part in ("--param", pair)]
    [row] = json.loads(run(sql, *pairs, "--format", "json"))
    assert row == {"a": 3, "b": True, "c": 0.5, "d": "is = 5", "e": "95", "f": None}
    [row] = json.loads(run("SELECT $t AS t", "-p", "t=95", "--format", "json"))
    assert row == {"t": "95"}


def test_every_form_of_an_answer(run, tmp_path):
    sql = "SELECT 1 AS x, 'a\"b' AS y, [1, 2] AS z, 'NaN'::DOUBLE AS w"
    assert run(sql, "--format", "csv") == '"x","y","z","w"\n1,"a""b","[1, 2]",nan\n'
    assert json.loads(run(sql, "--format", "json")) == [{"x": 1, "y": 'a"b', "z": [1, 2], "w": None}]
    assert run(sql, "--format", "jsonl") == '{"x": 1, "y": "a\\"b", "z": [1, 2], "w": null}\n'
    assert run("SELECT 10 AS n, 'ä' AS text", "--format", "table") == ("  n ┃ text\n━━━━╇━━━━━━\n 10 │ ä\n")
    for form in ("csv", "parquet"):
        path = tmp_path / f"out.{form}"
        path.write_text("old")
        assert run("SELECT 1 AS x", "--format", form, "-o", str(path)) == ""
    assert (tmp_path / "out.csv").read_text() == '"x"\n1\n'
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"x": 1}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.parquet"]


def test_the_ending_of_the_output_says_its_form(run, tmp_path):
    for name in ("out.json", "out.JSONL", "out.parquet", "out.txt"):
        run("SELECT 1 AS x", "-o", str(tmp_path / name))
    assert json.loads((tmp_path / "out.json").read_text()) == [{"x": 1}]
    assert (tmp_path / "out.JSONL").read_text() == '{"x": 1}\n'
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"x": 1}]
    assert (tmp_path / "out.txt").read_text() == '"x"\n1\n'


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "table"])
def test_values_that_other_programs_do_not_know_are_text(run, form):
    values = {
        "INTERVAL 3 MONTH": "3 months",
        "TIMESTAMP '290000-01-01'": "290000-01-01 00:00:00",
        "'infinity'::TIMESTAMP": "infinity",
        "MAP {[1]: 2}": "{[1]=2}",
        "TIME '24:00:00'": "24:00:00",
    }
    answer = run(f"SELECT {', '.join(f'{value} AS c{n}' for n, value in enumerate(values))}", "--format", form)
    assert [shown for shown in values.values() if shown not in answer] == []


def test_sums_and_decimals_are_numbers_in_json(run):
    sql = "SELECT sum(n_edges - n_edges + 5) AS a, 1.5 AS b, [2.50] AS c FROM graphs"
    assert json.loads(run(sql, "--format", "json")) == [{"a": 10, "b": 1.5, "c": [2.5]}]


def test_saved_queries_that_cannot_be_read_are_named_and_left_out(folder, command):
    path = folder / "graphs-store" / "queries" / "latin.sql"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"SELECT '\xe9'")
    try:
        code, output, errors = command("sql", "--list-saved", inside=folder)
    finally:
        path.unlink()
    assert code == 0
    assert "latin" not in output
    assert errors.startswith("trace: left out latin: there is no readable query 'latin'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SELECT 1 AS a, 2 AS a", "--format", "json"], "two columns are named 'a', which JSON cannot hold; rename"),
        (["SELECT INTERVAL 3 MONTH", "-o", "x.parquet"], "x.parquet cannot hold the answer"),
        (["my-grahps"], "there is no folder my-grahps, and a query has more than one word; name a store of graphs or"),
        (
            ["SELEC"],
            "there is no folder SELEC, and a query has more than one word; name a store of graphs or a training"
            ' run, or give a query in quotes, as in "FROM graphs".',
        ),
        (["SELECT 1", "--saved", "a"], "'SELECT 1' is a second query, as one comes from an option; give one of them"),
        (["a", "b", "c"], "3 arguments were given; expected an optional folder and one query in quotes"),
        (["a", "b", "--saved", "x"], "2 arguments were given; expected an optional folder, as the query comes from"),
        (["--saved", "missing"], "there is no readable query 'missing' in graphs-store; "),
        (["--saved", "../x"], "is no name for a query"),
        (["SELECT 1", "--save", "a/b"], "is no name for a query"),
        (["--file", "missing.sql"], "missing.sql cannot be read"),
        (["--file", "x", "--saved", "y"], "--file and --saved are two queries"),
        (["SELECT 1", "--param", "x"], "'x' is no parameter; write it as NAME=VALUE"),
        (["SELECT $n", "--param", "n=1", "--param", "m=2"], "parameter"),
        (["SELECT 1", "--format", "parquet"], "--format parquet writes binary data; name a file with -o"),
        (["SELECT 1", "-o", "missing/out.csv"], "cannot write missing/out.csv: No such file or directory"),
        (["nowhere", "SELECT 1"], "nowhere does not exist; trace a prompt first"),
        (["SELECT 1; SELECT 2"], "the query has 2 statements"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(folder, refused, arguments, message):
    assert message in refused(*arguments)
    assert not (folder / "graphs-store" / "queries" / "a").exists()


def test_python_m_tracer_is_trace(folder):
    result = subprocess.run(
        [sys.executable, "-m", "tracer", "sql"], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, input="SELECT 1 AS x", check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, '"x"\n1\n', "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_query_that_is_interrupted_is_told_in_one_line(folder, number):
    sql, environment = (
        "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b",
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tracer", "sql", sql],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    time.sleep(2.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    [line] = errors.strip().splitlines()
    assert line.startswith("trace: interrupted; ")


def test_a_query_of_somebody_else_is_answered_safely(run, refused, command, folder, monkeypatch):
    sql = "SELECT kind, count(*) AS n FROM nodes WHERE layer < $most GROUP BY kind ORDER BY kind"
    assert run(sql, "--safe", "--param", "most=2") == run(sql, "--param", "most=2")
    assert "disabled by configuration" in refused("FROM read_text('/etc/hostname')", "--safe")
    monkeypatch.setattr("tracer.sql_command.SAFE_ROWS", 7)
    code, output, errors = command("sql", "FROM range(9)", "--safe", inside=folder)
    assert (code, len(output.splitlines())) == (0, 8)
    assert errors == "trace: only the first 7 rows of the answer are told.\n"
    monkeypatch.setattr("tracer.sql_command.SAFE_SECONDS", 3.0)
    endless = "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"
    assert "took longer than 3 s" in refused(endless, "--safe")


def test_a_query_that_fails_is_not_saved(folder, refused):
    refused("SELEC 1", "--save", "broken")
    assert "broken" not in GraphStore(folder / "graphs-store").saved_query_names()


def shell(folder: Path, typed: str, capsys: pytest.CaptureFixture[str], **parameters: object) -> tuple[str, str]:
    with create_pipe_input() as keys:
        keys.send_text(typed)
        history = folder / "history"
        run_shell(GraphStore(folder / "graphs-store"), parameters, history=history, input=keys, output=DummyOutput())
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_shell_answers_line_by_line_and_goes_on_after_errors(folder, capsys):
    typed = "SELEC 1;\nSELECT count(*) AS n\nFROM graphs;\nSELECT $k AS k;\n.quit\n"
    out, err = shell(folder, typed, capsys, k=7)
    assert out.startswith(str(folder / "graphs-store"))
    assert " n\n━━━\n 2\n" in out
    assert " k\n━━━\n 7\n" in out
    assert err.startswith("error: Parser Error: syntax error")
    assert "SELECT count(*) AS n" in (folder / "history").read_text()


def test_the_shell_ends_with_its_input_and_forgets_what_was_interrupted(folder, capsys):
    out, err = shell(folder, "SELECT nonsense\n\x03SELECT 5 AS five;\n\x04", capsys)
    assert " five\n" in out
    assert err == ""


def test_the_shell_knows_where_a_query_ends_and_which_parameters_it_names(folder, capsys):
    typed = "SELECT 1 AS one; -- a note\nSELECT 'a;\nb' AS two;\nSELECT $kind AS three;\n.help\n.quit\n"
    out, err = shell(folder, typed, capsys, k=1, kind="feature")
    assert err == ""
    assert " one\n━━━━━\n   1\n" in out
    assert " a;↵b\n" in out
    assert " three\n━━━━━━━━━\n feature\n" in out
    assert out.count("end a query with ;") == 2
    assert "common_features(words, k)" in out


# a training run


@pytest.fixture
def training(tmp_path) -> Path:
    """The folder of a training run, as far as it has got."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / SETTINGS).write_text("{}")
    rows = [{"step": step, "tokens": 100 * step, "nmse_by_layer": [0.5, 0.25]} for step in (1, 2)]
    save_metrics(folder / METRICS, rows)
    (folder / "query.sql").write_text("SELECT max(tokens) AS t FROM metrics")
    return folder


def test_the_metrics_of_a_training_run_are_a_table(run, training, tmp_path):
    query = "SELECT step, nmse_by_layer FROM metrics WHERE step = $s"
    answer = run("run", query, "--param", "s=2", "--format", "json", inside=tmp_path)
    assert json.loads(answer) == [{"step": 2, "nmse_by_layer": [0.5, 0.25]}]
    assert run("run", "FROM metrics SELECT count(*) AS n", inside=tmp_path) == '"n"\n2\n'
    assert run("run", "--file", "run/query.sql", inside=tmp_path) == '"t"\n200\n'
    assert run("run", "SHOW TABLES", inside=tmp_path) == '"name"\n"metrics"\n'


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("FROM graphs", "Table with name graphs does not exist"),
        ("DELETE FROM metrics", "DELETE statements are not allowed"),
        ("COPY metrics TO 'x.csv'", "COPY statements are not allowed"),
        ("FROM 'run/metrics.parquet'", "metrics.parquet"),
        ("FROM read_text('run/run.json')", "Permission Error"),
    ],
)
def test_a_training_run_is_only_read(refused, training, tmp_path, query, message):
    before = sorted(training.iterdir())
    assert message in refused("run", query, inside=tmp_path)
    assert sorted(training.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_neither_a_store_nor_a_run_is_told_in_one_line(refused, training, tmp_path):
    neither = "run is neither a store of graphs, which has store.json, nor a training run that has reported"
    assert "saves no queries" in refused("run", "FROM metrics", "--save", "x", inside=tmp_path)
    (training / METRICS).write_bytes(b"PAR1")
    assert "run/metrics.parquet cannot be read" in refused("run", "FROM metrics", inside=tmp_path)
    (training / METRICS).unlink()
    assert neither in refused("run", "FROM metrics", inside=tmp_path)
    (training / SETTINGS).rename(training / "notes.txt")
    assert neither in refused("run", "FROM graphs", inside=tmp_path)
