"""Export, import and comparison as people run them: real processes, one-line errors, nothing half imported."""

import json
from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest

from graphs import Annotations, GraphStore, NodeKind, Supernode
from tests.tracer.conftest import CASES
from tests.tracer.processes import refused, run

THEIRS = CASES / "circuit-tracer"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder into which circuit-tracer's files were imported."""
    folder = tmp_path_factory.mktemp("imported")
    files = [str(THEIRS / name) for name in ("pruned.json", "whole.json", "graph.pt")]
    result = run("import", *files, "--tokenizer", str(CASES / "llama-clt-jumprelu" / "model"), folder=folder)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if line.startswith("Saved")]
    assert [line.split(": ")[1] for line in said] == [
        "40 nodes, 244 edges", "129 nodes, 3033 edges", "175 nodes, 5108 edges",
    ]  # fmt: skip
    return folder


def graph_of(store: Path, n_nodes: int) -> str:
    [found] = [graph.graph_id for graph in GraphStore(store / "graphs-store").list() if graph.n_nodes == n_nodes]
    return found


def test_imported_graphs_answer_sql_and_show_their_circuit(store):
    query = "SELECT n_nodes, tokens[2] AS token FROM graphs ORDER BY n_nodes"
    rows = json.loads(run("sql", query, "--format", "json", folder=store).stdout)
    assert rows == [{"n_nodes": n, "token": "w28"} for n in (40, 129, 175)]
    shown = run("show", graph_of(store, 40), folder=store)
    assert shown.returncode == 0, shown.stderr
    assert "Checked  nothing: the graph was imported" in shown.stdout


def test_export_and_import_give_the_same_graph(store, tmp_path):
    graph_id = graph_of(store, 40)
    assert run("export", graph_id, str(tmp_path / "out.json"), "--scan", "gemma-2-2b", folder=store).returncode == 0
    checked = run("import", "--check", str(tmp_path / "out.json"), folder=store)
    assert checked.stdout == f"Valid    {tmp_path / 'out.json'}: 40 nodes, 244 edges\n"
    assert run("import", str(tmp_path / "out.json"), "--store", str(tmp_path / "other"), folder=store).returncode == 0
    assert GraphStore(tmp_path / "other").load(graph_id) == GraphStore(store / "graphs-store").load(graph_id)
    assert run("export", graph_id, str(tmp_path / "out.graphml"), folder=store).returncode == 0
    assert networkx.read_graphml(tmp_path / "out.graphml").number_of_edges() == 244
    assert "end it in .json or .graphml" in refused(run("export", graph_id, str(tmp_path / "out.txt"), folder=store))


def test_supernodes_pins_and_labels_go_out_and_come_in(store, tmp_path):
    theirs = GraphStore(store / "graphs-store")
    graph = theirs.load(graph_of(store, 40))
    own = GraphStore(tmp_path / "own")
    features = np.flatnonzero(graph.kind == NodeKind.FEATURE).tolist()
    label = graph.label.copy()
    label[features[0]] = "a state"
    told = Annotations((Supernode("states", tuple(features[:2])),), tuple(features[1:3]))
    graph_id = own.save(replace(graph, label=label), told)
    out = str(tmp_path / "out.json")
    assert run("export", graph_id, out, "--store", str(tmp_path / "own"), folder=tmp_path).returncode == 0
    assert run("import", out, "--store", str(tmp_path / "other"), folder=tmp_path).returncode == 0
    other = GraphStore(tmp_path / "other")
    [came] = other.ids()
    found = other.annotations(came)
    assert (found.supernodes, found.pinned) == (told.supernodes, told.pinned)
    assert other.load(came).label[features[0]] == "a state"
    assert [row["name"] for row in other.sql("SELECT DISTINCT supernode AS name FROM supernodes").to_pylist()] == [
        "states"
    ]


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    """A folder with a graph of the bundled model and its export."""
    folder = tmp_path_factory.mktemp("traced")
    assert run("calc: 36+59=", "--store", "own", folder=folder).returncode == 0
    assert run("export", "calc", "calc.json", "--store", "own", folder=folder).returncode == 0
    return folder


def imported(*arguments: str, folder: Path) -> str:
    """The id under which a graph was saved."""
    result = run("import", *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1]


def sizes(folder: Path) -> list[tuple[int, int]]:
    return sorted((graph.n_nodes, graph.n_edges) for graph in GraphStore(folder).list())


@pytest.mark.parametrize("name", ["graph.pt", "whole.json"])
def test_a_graph_pruned_otherwise_on_the_way_in_is_another_graph(tmp_path, name):
    stricter = ("--node-threshold", "0.3", "--edge-threshold", "0.5")
    first = imported(str(THEIRS / name), "--node-threshold", "0.8", folder=tmp_path)
    second = imported(str(THEIRS / name), *stricter, folder=tmp_path)
    assert imported(str(THEIRS / name), "--node-threshold", "0.8", folder=tmp_path) == first != second
    assert sizes(tmp_path / "graphs-store") == [(15, 5), (40, 366)]


def test_what_has_supernodes_or_pins_is_not_pruned_on_the_way_in(tmp_path):
    document = json.loads((THEIRS / "whole.json").read_text())
    document["qParams"]["pinnedIds"] = ["E_1_0"]
    (tmp_path / "pinned.json").write_text(json.dumps(document))
    message = refused(run("import", "pinned.json", "--node-threshold", "0.8", folder=tmp_path))
    assert "a graph with supernodes or pins cannot be pruned" in message


def test_files_of_one_question_with_other_links_are_two_graphs(tmp_path):
    document = json.loads((THEIRS / "pruned.json").read_text())
    del document["links"][-1]
    (tmp_path / "other.json").write_text(json.dumps(document))
    first = imported(str(THEIRS / "pruned.json"), folder=tmp_path)
    assert imported("other.json", folder=tmp_path) != first
    assert imported(str(THEIRS / "pruned.json"), folder=tmp_path) == first
    assert sizes(tmp_path / "graphs-store") == [(40, 243), (40, 244)]


def test_an_export_keeps_its_id_and_a_changed_one_leaves_the_traced_graph_alone(traced):
    store = GraphStore(traced / "own")
    [graph_id] = store.ids()
    before = store.load(graph_id)
    for folder in ("own", "elsewhere"):
        assert imported("calc.json", "--store", folder, folder=traced) == graph_id
        assert GraphStore(traced / folder).load(graph_id) == before
    document = json.loads((traced / "calc.json").read_text("utf-8"))
    del document["links"][-3:]
    (traced / "changed.json").write_text(json.dumps(document), "utf-8")
    changed = imported("changed.json", "--store", "own", folder=traced)
    assert changed != graph_id
    assert store.load(graph_id) == before
    assert imported("changed.json", "--store", "own", folder=traced) == changed
    cut = imported("calc.json", "--store", "own", "--node-threshold", "0.5", folder=traced)
    assert len({graph_id, changed, cut}) == 3
    assert store.ids() == sorted([graph_id, changed, cut])
    assert store.load(graph_id) == before
    assert store.load(changed).n_edges == before.n_edges - 3
    told = run("import", "changed.json", "--store", "own", folder=traced).stdout
    assert told.startswith(f"Note     {graph_id} in own has other nodes or edges; it stays")


def test_endings_are_told_in_any_letters(tmp_path):
    (tmp_path / "GRAPH.PT").write_bytes((THEIRS / "graph.pt").read_bytes())
    assert run("import", "--check", "GRAPH.PT", folder=tmp_path).stdout == "Valid    GRAPH.PT: 175 nodes, 5108 edges\n"
    graph_id = imported("GRAPH.PT", folder=tmp_path)
    for name in ("w28.GraphML", "w28.JSON"):
        assert run("export", graph_id, name, folder=tmp_path).returncode == 0
    assert networkx.read_graphml(tmp_path / "w28.GraphML").number_of_edges() == 5108
    assert imported("w28.JSON", folder=tmp_path) == graph_id


def test_dashboards_are_imported(store):
    arguments = ("import", "--features", str(THEIRS / "features"), "--transcoder", "tests/llama-clt-jumprelu")
    assert run(*arguments, folder=store).stdout == "Saved    6 features of tests/llama-clt-jumprelu in graphs-store\n"
    counted = run("sql", "SELECT count(*) AS n FROM features", "--format", "json", folder=store).stdout
    assert json.loads(counted) == [{"n": 6}]
    assert "belong together" in refused(run(*arguments[:3], folder=store))


def test_graphs_are_compared_merged_and_shaken(store):
    two = [graph_of(store, n) for n in (40, 129)]
    told = run("diff", *two, "--name", "pair", folder=store)
    assert told.returncode == 0, told.stderr
    assert "Only in B: " in told.stdout
    merged = run("merge", "--query", "SELECT graph_id FROM graphs", "--name", "all", folder=store)
    assert "Merged   3 graphs" in merged.stdout, merged.stderr
    shaken = run("stability", two[1], "--node-thresholds", "0.5,0.9", "--edge-thresholds", "0.9", folder=store)
    assert "Pruned   1 graphs at 2 pairs of thresholds each" in shaken.stdout, shaken.stderr
    query = "SELECT comparison, kind, n_graphs FROM comparisons ORDER BY kind"
    rows = json.loads(run("sql", query, "--format", "json", folder=store).stdout)
    assert [tuple(row.values())[1:] for row in rows] == [("diff", 2), ("merge", 3), ("stability", 2)]
    assert [row["comparison"] for row in rows[:2]] == ["pair", "all"]
    assert "was given twice" in refused(run("diff", two[0], two[0], folder=store))
    assert "no comparison 'x' in" in refused(run("rm", two[0], "--comparison", "x", folder=store))
    assert run("show", two[0], folder=store).returncode == 0  # nothing was deleted
    assert run("rm", "--comparison", "pair", folder=store).stderr == "deleted pair\n"
    assert "there is no comparison 'pair' in" in refused(run("rm", "--comparison", "pair", folder=store))
    assert "nothing was named; give the id of a graph" in refused(run("rm", folder=store))
    assert "expected numbers with commas between" in refused(
        run("stability", two[0], "--node-thresholds", "x", folder=store)
    )
    one = ("--node-thresholds", "0.8", "--edge-thresholds", "0.98")
    assert refused(run("stability", two[0], *one, folder=store)) == (
        "trace: one graph at one pair of thresholds leaves nothing to compare; give several thresholds."
    )
    assert "7.0 is not in the range 0<=x<=1" in refused(run("stability", two[0], "--least", "7", folder=store))
    assert "-0.1 is not in the range 0<=x<=1" in refused(run("merge", *two, "--least", "-0.1", folder=store))
    assert "select graph_id" in refused(run("merge", "--query", "SELECT 1 AS x", folder=store))


def test_stability_says_which_graphs_were_pruned_before(store, tmp_path):
    pruned, whole = (graph_of(store, n) for n in (40, 129))
    told = run("stability", whole, pruned, "--store", str(store / "graphs-store"), folder=tmp_path).stdout.splitlines()
    assert told[1] == f"Note     only what was left can be seen of {pruned}, pruned before; trace with --no-prune"
    told = run("stability", whole, "--store", str(store / "graphs-store"), folder=tmp_path).stdout.splitlines()
    assert told[1].startswith("Overlap  ")
    cut = imported(str(THEIRS / "whole.json"), "--edge-threshold", "0.9", folder=tmp_path)
    told = run("stability", cut, folder=tmp_path).stdout.splitlines()
    assert told[1].startswith(f"Note     only what was left can be seen of {cut}")


@pytest.mark.parametrize(
    ("options", "line"),
    [((), "Note     only what was left can be seen of calc-36-59-"), (("--no-prune",), "Overlap  ")],
)
def test_a_traced_graph_was_pruned_unless_that_was_not_wanted(tmp_path, options, line):
    assert run("calc: 36+59=", *options, folder=tmp_path).returncode == 0
    told = run("stability", "calc", folder=tmp_path).stdout.splitlines()
    assert told[1].startswith(line)


# bad input


BOMBS = {
    "deep": '{"metadata": ' + "[" * 500_000,
    "deep node": '{"nodes": [' + '{"a":' * 500_000,
    "huge number": '{"nodes": [' + "9" * 1_000_000 + "]}",
    "truncated": (THEIRS / "pruned.json").read_text()[:20_000],
    "empty": "",
    "of another kind": '{"hello": 1}',
    "list": "[1, 2]",
    "wrong types": '{"metadata": 1, "qParams": 2, "nodes": [], "links": []}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_broken_files_are_one_line_and_leave_nothing(tmp_path, name):
    (tmp_path / "bad.json").write_text(BOMBS[name])
    refused(run("import", "bad.json", folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_a_string_without_end_does_not_fill_the_memory(tmp_path):
    with (tmp_path / "long.json").open("wb") as file:
        file.write(b'{"metadata": "')
        file.seek(1 << 30)  # a hole: a gigabyte of NUL on the disk takes none
        file.write(b'"}')
    assert "long.json" in refused(run("import", "long.json", folder=tmp_path, memory=3 << 30))
    assert not (tmp_path / "graphs-store").exists()


def test_of_several_files_the_good_ones_before_the_bad_one_are_there(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    refused(run("import", str(THEIRS / "pruned.json"), "bad.json", folder=tmp_path))
    store = GraphStore(tmp_path / "graphs-store")
    assert [graph.n_nodes for graph in store.list()] == [40]
    assert store.damaged() == []


def test_a_store_of_another_tool_is_refused_and_untouched(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "data.sqlite").write_bytes(b"SQLite format 3\0")
    message = refused(run("import", str(THEIRS / "pruned.json"), "--store", "theirs", folder=tmp_path))
    assert "belongs to something else" in message
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["data.sqlite"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import",), "nothing to import was named"),
        (("import", "no.json"), "does not exist"),
        (("import", "a.csv"), "is no .json or .pt file"),
        (("export", "x", "y.json"), "graphs-store does not exist"),
        (("diff", "a", "b"), "graphs-store does not exist"),
    ],
)
def test_what_is_missing_is_told(tmp_path, arguments, message):
    (tmp_path / "a.csv").write_text("x")
    assert message in refused(run(*arguments, folder=tmp_path))
