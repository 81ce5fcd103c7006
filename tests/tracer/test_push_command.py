"""`trace push`, and the commands that read a store by its address."""

import json
from functools import partial

import pytest

from graphs import GraphStore
from tests.graphs.conftest import _random_graph

COUNT = "SELECT count(*) AS n FROM graphs"


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """The command with a query on stdin, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(command, given=COUNT)


@pytest.fixture
def address(tmp_path) -> str:
    """Where the store of one graph under the usual name is to be pushed."""
    GraphStore(tmp_path / "graphs-store").save(_random_graph(0))
    return f"file://{tmp_path}/there"


def test_a_pushed_store_is_read_by_its_address(run, address, tmp_path):
    code, out, _ = run("push", address)
    assert (code, out.split(",")[0]) == (0, "Pushed   4 files")
    for arguments in (("sql", address, COUNT), ("sql", address), ("sql", address, "-")):
        assert run(*arguments) == (0, '"n"\n1\n', "")
    [graph] = json.loads(run("list", address, "--json")[1])
    assert "Texas" in run("show", graph["graph_id"], "--store", address)[1]
    assert run("export", graph["graph_id"], "graph.json", "--store", address)[0] == 0
    GraphStore(tmp_path / "graphs-store").save(_random_graph(1))
    assert run("push", "graphs-store", address)[1].endswith("4 were there\n")
    assert run("sql", address, COUNT) == (0, '"n"\n2\n', "")


def test_what_is_shown_of_an_address_names_the_address(run, address):
    run("push", address)
    shown = run("show", "the-capital", "--store", address)[1]
    assert f" in {address} (" in next(line for line in shown.splitlines() if line.startswith("Saved"))
    assert f"Look closer:  trace view {address}\n              trace sql {address} " in shown
    assert "cache" not in shown
    assert json.loads(run("show", "the-capital", "--store", address, "--json")[1])["store"] == address
    assert "in graphs-store (" in run("show", "the-capital")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("a prompt", "--store"),
        ("batch", "prompts.txt", "--store"),
        ("rm", "x", "--store"),
        ("diff", "a", "b", "--store"),
        ("compact",),
    ],
)
def test_what_writes_takes_no_address(run, address, tmp_path, arguments):
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    code, out, errors = run(*arguments, address)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert f"{address} is no folder; trace into a folder, and then: trace push FOLDER {address}" in errors
    assert not (tmp_path / "file:").exists()


def test_a_push_that_cannot_be_is_told_in_one_line(run, address):
    for arguments, expected in (
        (("push", "nowhere", address), "nowhere does not exist"),
        (("push", "a", "b", "c"), "3 arguments were given; expected an optional folder and an address"),
        (("sql", address, COUNT), "has no files.json, so no store was pushed there"),
    ):
        code, out, errors = run(*arguments)
        assert (code, out, errors.count("\n")) == (2, "", 1)
        assert expected in errors
