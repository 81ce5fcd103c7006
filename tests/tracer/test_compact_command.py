"""`trace compact` and what the other commands make of a compacted store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphs import Annotations, GraphStore, Supernode
from tests.graphs.conftest import _random_graph


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "tracer", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path) -> GraphStore:
    store = GraphStore(tmp_path / "graphs-store")
    for prompt in ("Dallas is in", "Paris is in"):
        store.save(_random_graph(0, prompt=prompt))
    return store


def test_a_compacted_store_is_listed_shown_queried_and_deleted_from_as_before(store, tmp_path):
    listed, shown = run("list", "--json", folder=tmp_path).stdout, run("show", "dallas", folder=tmp_path).stdout
    result = run("compact", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Moved    2 graphs into packs"
    n_edges = sum(graph["edges"] for graph in json.loads(listed))
    assert lines[1].startswith(f"Packed   2 graphs with {n_edges} edges in 0.0 MB, ")
    assert len(lines) == 2
    assert run("list", "--json", folder=tmp_path).stdout == listed
    assert run("show", "dallas", folder=tmp_path).stdout == shown
    assert run("rm", "dallas", folder=tmp_path).stderr.startswith("deleted dallas")
    assert run("sql", "SELECT prompt FROM graphs", folder=tmp_path).stdout == '"prompt"\n"Paris is in"\n'


def test_damaged_graphs_are_named_and_a_folder_that_is_no_store_is_refused(store, tmp_path):
    victim = store.resolve("dallas")
    [edges] = (store.folder / "graphs" / victim).glob("edges-*")
    edges.write_bytes(b"PAR1")
    result = run("compact", folder=tmp_path)
    assert result.stdout.splitlines()[-1].startswith(f"Left     {victim}: ")
    result = run("compact", "nowhere", folder=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nowhere does not exist" in result.stderr


def test_graphs_in_packs_are_compared_and_exchanged(store, tmp_path):
    store.compact()
    for arguments in (("diff", "dallas", "paris"), ("merge", "dallas", "paris"), ("stability", "dallas")):
        result = run(*arguments, "--name", arguments[0], folder=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
    query = "SELECT comparison, n_graphs FROM comparisons ORDER BY 1"
    assert store.sql(query).to_pylist() == [
        {"comparison": "diff", "n_graphs": 2}, {"comparison": "merge", "n_graphs": 2},
        {"comparison": "stability", "n_graphs": 20},
    ]  # fmt: skip
    store.annotate(store.resolve("dallas"), Annotations((Supernode("Texas", (0,)),)))
    assert run("export", "dallas", "dallas.json", folder=tmp_path).returncode == 0
    assert json.loads((tmp_path / "dallas.json").read_text())["qParams"]["supernodes"][0][0] == "Texas"
