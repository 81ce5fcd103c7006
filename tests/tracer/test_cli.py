"""The command as people run it: a real process, its output, its exit status, and what it leaves behind."""

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphs import GraphStore
from tests.graphs.conftest import _random_graph
from tests.tracer.processes import ENVIRONMENT, TRACE, Signal, refused, run
from tests.waiting import catches, ended, wait_until
from tracer.errors import INTERRUPTED

DALLAS = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which three prompts were traced."""
    folder = tmp_path_factory.mktemp("traced")
    for prompt in (DALLAS, "calc: 36+59=", "the bird of the state containing Oakland is"):
        result = run(prompt, folder=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_the_dallas_circuit_passes_through_texas_to_austin(tmp_path):
    result = run(DALLAS, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    answer = next(line for line in result.stdout.splitlines() if line.startswith("Answer"))
    assert answer.split()[1] == "Austin"
    circuit = [line for line in result.stdout.splitlines() if "→" in line]
    assert any("Dallas → " in line and "Texas" in line and line.endswith("Austin") for line in circuit), result.stdout
    assert re.search(r"^Saved    the-capital-of-the-state-containing-[0-9a-f]{8} in graphs-store", result.stdout, re.M)
    assert result.stderr == ""


def test_json_holds_what_other_programs_rely_on(tmp_path):
    result = run("calc: 36+59=", "--json", folder=tmp_path)
    record = json.loads(result.stdout)
    assert record["predictions"][0]["token"] == "95"
    assert record["tokens"] == ["<bos>", "calc", ":", "36", "+", "59", "="]
    assert set(record) >= {
        "graph_id", "store", "prompt", "tokens", "predictions", "scores", "counts", "coverage", "skipped_influence",
        "conservation_error", "seconds", "paths", "routes", "commands",
    }  # fmt: skip
    assert set(record["scores"]) == {"replacement", "completeness", "pruned_replacement", "pruned_completeness"}
    assert set(record["counts"]) == {"active_features", "nodes", "edges", "pruned_nodes", "pruned_edges"}
    assert set(record["paths"][0]["nodes"][0]) == {"node", "kind", "layer", "position", "feature", "token", "label"}
    assert record["paths"][0]["nodes"][0]["kind"] == "token"
    assert record["paths"][0]["nodes"][-1]["kind"] == "logit"


@pytest.mark.parametrize("prompt", [DALLAS, "calc: 36+59="])
def test_json_holds_the_routes_and_the_commands_that_are_printed(store, prompt):
    [graph_id] = [g.graph_id for g in GraphStore(store / "graphs-store").list() if g.info.prompt == prompt]
    printed = run("show", graph_id, folder=store).stdout.splitlines()
    record = json.loads(run("show", graph_id, "--json", folder=store).stdout)
    told = [f"  {route['share']:6.1%}  {' → '.join(route['steps'])}" for route in record["routes"]]
    assert len(told) >= 4
    assert told == [line for line in printed if "%  " in line and " → " in line]
    assert {route["target"] for route in record["routes"]} <= {target["node"] for target in record["targets"]}
    assert all(set(route) == {"target", "share", "steps", "n_paths"} for route in record["routes"])
    assert any(route["n_paths"] > 1 for route in record["routes"])
    assert [line.removeprefix("Look closer:").strip() for line in printed[-2:]] == record["commands"]
    assert record["commands"][0] == "trace view"
    assert record["commands"][1].startswith('trace sql "FROM strongest_circuit(')


def test_several_targets_of_every_kind_make_one_graph(store, tmp_path):
    find = "SELECT layer, feature FROM nodes WHERE kind = 'feature' AND word = 'Dallas' ORDER BY influence DESC LIMIT 1"
    [found] = json.loads(run("sql", find, "--format", "json", folder=store).stdout)
    name = f"{found['layer']}/{found['feature']}"
    asked = ("--target", "Austin", "--target-feature", f"{name}@Dallas", "--store", str(tmp_path), "--json")
    record = json.loads(run(DALLAS, *asked, folder=tmp_path).stdout)
    assert [target["name"] for target in record["targets"]] == [f"feature {name} at Dallas", "Austin"]
    assert record["targets"][0] | {"node": 0, "value": 0} == {
        "node": 0, "name": f"feature {name} at Dallas", "token_id": None, "layer": found["layer"], "position": 9,
        "feature": found["feature"], "weight": 1.0, "value": 0,
    }  # fmt: skip
    assert {path["nodes"][-1]["token"] for path in record["paths"]} <= {one["name"] for one in record["targets"]}
    assert record["predictions"][0]["token"] == "Austin"
    shown = run("show", record["graph_id"], "--store", str(tmp_path), folder=tmp_path).stdout
    assert f"Explains feature {name} at Dallas" in shown
    assert "strongest ways from the words to what is explained" in shown
    assert [line for line in shown.splitlines() if line.startswith("Answer")] == [
        f"Answer   Austin {record['predictions'][0]['probability']:.1%}"
    ]


def test_a_trace_says_when_small_inputs_were_left_out(tmp_path):
    result = run("calc: 36+59=", "--row-share", "0.9", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Left out of each target's inputs the smallest, which hold 10.00% at most\n" in result.stdout
    assert "Left out" not in run("calc: 36+59=", folder=tmp_path).stdout


def test_tokens_and_differences_of_tokens_make_one_graph(tmp_path):
    result = run("calc: 36+59=", "--target", "95", "--target-difference", "95", "94", "--json", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {target["name"] for target in json.loads(result.stdout)["targets"]} == {"95", "95 − 94"}


def test_the_traced_position_may_be_a_word(tmp_path):
    result = run(DALLAS, "--position", "Dallas", folder=tmp_path)
    assert re.search(r"^Answer   after Dallas: Texas \d", result.stdout, re.M), result.stdout
    assert "→ Texas after Dallas" in result.stdout
    assert "Explains" not in result.stdout


def test_sql_finds_the_way_from_a_word_to_the_answer(store):
    result = run("sql", "SELECT answer, path FROM strongest_path('Dallas')", "--format", "json", folder=store)
    rows = json.loads(result.stdout)
    assert [row["answer"].strip() for row in rows] == ["Austin"]
    assert rows[0]["path"].startswith("Dallas → ")


def test_sql_takes_parameters_and_writes_every_format(store, tmp_path):
    query = "SELECT count(*) AS n FROM nodes WHERE kind = $kind"
    counted = run("sql", query, "-p", "kind=logit", "--format", "csv", folder=store).stdout.splitlines()
    assert counted[0].strip('"') == "n"
    assert int(counted[1]) >= 3
    assert json.loads(run("sql", "SELECT 1 AS x", "--format", "jsonl", folder=store).stdout) == {"x": 1}
    out = tmp_path / "out.parquet"
    assert run("sql", "FROM graphs", "--format", "parquet", "-o", str(out), folder=store).returncode == 0
    assert out.read_bytes()[:4] == b"PAR1"


def test_list_show_and_rm(store):
    listed = json.loads(run("list", "--json", folder=store).stdout)
    assert {row["prompt"] for row in listed} >= {DALLAS, "calc: 36+59="}
    shown = run("show", "calc", folder=store)
    assert "Prompt   calc: 36+59=" in shown.stdout
    assert run("calc: 1+1=", folder=store).returncode == 0
    graph_id = next(
        row["graph_id"]
        for row in json.loads(run("list", "--json", folder=store).stdout)
        if row["prompt"] == "calc: 1+1="
    )
    assert run("rm", graph_id, folder=store).returncode == 0
    assert graph_id in refused(run("show", graph_id, folder=store))


def test_help_answers_without_torch(tmp_path):
    code = (
        "import sys; from tracer.cli import cli; cli(['-h'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Examples:" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["the capital of the state containing Gotham is"], "'Gotham' is not a word of the lab model; did you mean"),
        (["the capital of 🙂 is"], "'🙂' is not a word of the lab model; /"),
        (["calc: 150+199="], "'199' is not a word of the lab model; sums go from 0+0 to 99+99; /"),
        (["The capital of Texas is"], "'The' is known to the lab model from The Hague only; did you mean the?"),
        (["calc: 36+59"], "answers sums after an equals sign only; write them like this: trace 'calc: 36+59='."),
        (["the " * 100], "tokens, the model reads at most"),
        (["lsit"], "'lsit' is no command; did you mean 'trace list'? If it is a prompt, write trace prompt 'lsit'."),
        (["sqll", "SELECT 1"], "'sqll' is no command; did you mean 'trace sql'?"),
        (["shwo", "calc", "--json"], "'shwo' is no command; did you mean 'trace show'?"),
        (["calc: 1+1=", "--model", "x"], "a transcoder of x is lacking; give --transcoder too"),
        (["calc: 1+1=", "--coverage", "1.5"], "coverage is 1.5; expected a share above 0 and up to 1"),
        (["calc: 1+1=", "--target", "Dallas"], "name a text that is one token"),
        (["calc: 1+1=", "--target-minus", "2"], "target_minus was given without target"),
        (["calc: 1+1=", "--position", "9"], "position 9 is not in the prompt; it has 7 tokens"),
        (["calc: 1+1=", "--target-feature", "0/1@0"], "is not active at position 0 ('<bos>')"),
        (["calc: 1+1=", "--device", "tpu"], "device 'tpu' is unknown"),
        (["calc: 1+1=", "--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, arguments, message):
    line = refused(run(*arguments, folder=tmp_path))
    assert message in line
    assert not (tmp_path / "graphs-store").exists()


def test_an_unknown_word_is_refused_with_the_closest(tmp_path):
    assert "Dallas" in refused(run("the capital of the state containing Dalas is", folder=tmp_path))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "one"),
        ("DROP TABLE graphs", "SELECT"),
        ("COPY graphs TO 'x.csv'", "SELECT"),
        ("FROM read_text('/etc/hostname')", ""),
        ("SELECT nothing FROM graphs", "nothing"),
        ("", ""),
    ],
)
def test_bad_sql_is_refused_in_one_line(store, query, message):
    assert message.lower() in refused(run("sql", query, folder=store)).lower()
    assert not (store / "x.csv").exists()


def test_an_unknown_graph_is_refused_with_the_closest(store):
    assert "calc-36-59" in refused(run("show", "calc-36-95-00000000", folder=store))


def test_a_store_that_is_a_file_or_of_another_tool_is_refused(tmp_path):
    (tmp_path / "file").write_text("hello")
    refused(run("calc: 1+1=", "--store", "file", folder=tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused(run("calc: 1+1=", "--store", "other", folder=tmp_path))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    assert "does not exist" in refused(run("list", "nowhere", folder=tmp_path))


def test_a_damaged_graph_does_not_close_the_others(store, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(store / "graphs-store", copy)
    victim = next(path for path in copy.rglob("edges-*.parquet") if "calc" in str(path))
    victim.write_bytes(victim.read_bytes()[:50])
    listed = run("list", str(copy), "--json", folder=tmp_path)
    assert listed.returncode == 0
    assert DALLAS in listed.stdout
    assert "calc-36-59" in listed.stderr
    counted = run("sql", str(copy), "SELECT count(*) AS n FROM graphs", "--format", "csv", folder=tmp_path)
    assert int(counted.stdout.split()[-1]) == len(json.loads(listed.stdout))
    refused(run("show", victim.parent.name, "--store", str(copy), folder=tmp_path))


@pytest.mark.parametrize("place", ["features", "comparisons"])
def test_files_beside_the_graphs_that_cannot_be_read_are_named(store, command, tmp_path, place):
    shutil.copytree(store / "graphs-store", tmp_path / "s")
    if place == "comparisons":
        assert command("diff", "the-capital", "calc", "--store", "s")[0] == 0
    for victim in (tmp_path / "s" / place).glob("*.parquet"):
        victim.write_bytes(victim.read_bytes()[:-20])
        asked = [command("list", "s"), command("sql", "s", f"SELECT count(*) AS n FROM {place}")]
        assert [code for code, _, _ in asked] == [0, 0]
        assert asked[1][1] == '"n"\n0\n'
        for _, _, errors in asked:
            assert re.search(
                rf"^trace: left out the rows of s/{place}/{victim.name}: Parquet magic bytes not found", errors, re.M
            )
            assert errors.endswith("; restore it from a copy, or delete it.\n")


def test_a_list_shortens_long_prompts_for_people(command, tmp_path):
    store = GraphStore(tmp_path / "graphs-store")
    for seed, prompt in enumerate(("é" * 60, "é" * 61, "word\n" * 100)):
        store.save(_random_graph(seed, prompt=prompt))
    _, text, _ = command("list")
    assert {line.split(" │ ")[1].rstrip() for line in text.splitlines()[2:]} == {
        "é" * 60, "é" * 59 + "…", "word↵" * 11 + "word…"
    }  # fmt: skip
    listed = json.loads(command("list", "--json")[1])
    assert sorted(len(row["prompt"]) for row in listed) == [60, 61, 500]


@pytest.mark.slow
def test_a_prompt_traced_again_keeps_the_tags_of_its_batch(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "calc: 1+1=", "group": "sums"}')
    assert run("batch", "p.jsonl", "--store", "s", folder=tmp_path).returncode == 0
    [before] = GraphStore(tmp_path / "s").list()
    for _ in range(2):
        assert run("calc: 1+1=", "--store", "s", folder=tmp_path).returncode == 0
        [after] = GraphStore(tmp_path / "s").list()
        assert (after.graph_id, after.info.tags) == (before.graph_id, (("group", "sums"),))
    assert after.info.created_at > before.info.created_at
    (tmp_path / "s" / "packs").mkdir()
    (tmp_path / "s" / "packs" / "packs.json").write_text("{")
    assert run("calc: 1+2=", "--store", "s", folder=tmp_path).returncode == 0  # what was traced is not lost
    assert len(list((tmp_path / "s" / "graphs").iterdir())) == 2


def test_a_port_in_use_is_refused(store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused(run("view", "--port", str(taken.getsockname()[1]), folder=store))
    assert "--port" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("list",), ("sql", "FROM edges"), ("show", "calc")])
def test_a_full_disk_behind_stdout_is_told_in_one_line(store, arguments):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*TRACE, *arguments], cwd=store, env=ENVIRONMENT, text=True, check=False, stdout=full,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "trace: the output cannot be written: No space left on device; send it elsewhere.\n"


def test_saved_graphs_close_pruned_as_they_are(store):
    query = (
        "WITH brought AS (SELECT graph_id, target, sum(weight) AS input FROM edges GROUP BY ALL) "
        "SELECT count(*) AS n, max(abs(coalesce(input, 0) + bias - pre_activation) / input_size) AS gap "
        "FROM nodes AS n LEFT JOIN brought AS b ON b.graph_id = n.graph_id AND b.target = n.node "
        "WHERE bias IS NOT NULL AND input_size > 0"
    )
    [row] = json.loads(run("sql", query, "--format", "json", folder=store).stdout)
    assert row["n"] > 30
    assert row["gap"] < 1e-5


def test_the_commands_that_look_closer_can_be_copied(tmp_path):
    result = run("calc: 1+1=", "--store", "my graphs/~x", folder=tmp_path)
    [view] = [line for line in result.stdout.splitlines() if "trace view" in line]
    assert shlex.split(view.split(":", 1)[1]) == ["trace", "view", "my graphs/~x"]


@pytest.mark.parametrize("arguments", [(DALLAS,), ("batch", "prompts.txt"), ("import", "graph.json")])
@pytest.mark.parametrize(
    ("closed", "store", "place"),
    [
        ("closed", "closed/store", "closed/store"),
        ("closed", "closed/new", "closed"),
        ("closed/store", "closed/store", "closed/store"),
        ("closed/store/graphs", "closed/store", "closed/store/graphs"),
    ],
)
def test_a_store_without_permission_is_refused_before_the_work(
    tmp_path, command, read_only, arguments, closed, store, place
):
    GraphStore(tmp_path / "closed" / "store").save(_random_graph(0))
    (tmp_path / "prompts.txt").write_text(DALLAS)
    (tmp_path / "graph.json").write_text("what is in it is not looked at")
    read_only(tmp_path / closed)
    assert command(*arguments, "--store", store) == (
        2, "", f"trace: {store} cannot be written to: no permission in {place}; allow it, or use another folder.\n"
    )  # fmt: skip
    assert not (tmp_path / "closed" / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("prompt", [DALLAS, "the flower of the state containing Dallas is"])
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("tracer.pipeline:attribute", 1),
        ("tracer.rows:_most_influential", 2),  # between rows
        ("tracer.pipeline:prune", 1),
        ("graphs.folder:write_durably", 2),  # nodes are written, edges not yet
        ("graphs.folder:sync_folder", 1),  # all is written, and has to take its name
    ],
)
def test_a_trace_that_is_struck_in_the_middle_of_its_work_leaves_the_store_as_it_was(
    store, tmp_path, function, call, prompt, number
):
    """Whether the prompt was traced before, and keeps the graph that it had, or not."""
    shutil.copytree(store / "graphs-store", tmp_path / "graphs-store")
    files = contents(tmp_path)
    result = run(prompt, folder=tmp_path, struck=Signal(number, function, call))
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"trace: {INTERRUPTED}\n")
    assert contents(tmp_path) == files
    after = GraphStore(tmp_path / "graphs-store")
    assert (after.ids(), after.damaged()) == (GraphStore(store / "graphs-store").ids(), [])
    assert {after.load(graph_id).info.prompt for graph_id in after.ids()} >= {DALLAS, "calc: 36+59="}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.3, pytest.param(2.0, marks=pytest.mark.slow), 3.5])
def test_an_interrupted_trace_leaves_nothing_half_written(tmp_path, number, after):
    process = subprocess.Popen(
        [*TRACE, DALLAS, "--coverage", "1", "--no-prune"], cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: catches(process, signal.SIGTERM), process)
    time.sleep(after)
    process.send_signal(number)
    output, errors = ended(process)
    store = GraphStore(tmp_path / "graphs-store")
    if "\nSaved    " in output:  # done before the signal came, and Python catches nothing at its very end
        assert process.returncode in (0, 2, -number), errors
        assert len(store.ids()) == 1
    else:
        assert (process.returncode, errors) == (2, f"trace: {INTERRUPTED}\n")
    assert store.damaged() == []
    for graph_id in store.ids():  # if it was saved when the signal came, then whole
        store.load(graph_id)
    whole = len(store.ids()) * 3 + 1
    files = [path for path in store.folder.rglob("*") if path.is_file() and path.parent.name != "features"]
    assert len(files) <= whole, files
