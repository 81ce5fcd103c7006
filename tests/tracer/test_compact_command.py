"""`trace compact` and what the other commands make of a compacted store."""

import json

import pytest

from graphs import Annotations, GraphStore, Supernode
from tests.graphs.conftest import _random_graph


@pytest.fixture
def store(tmp_path) -> GraphStore:
    store = GraphStore(tmp_path / "graphs-store")
    for prompt in ("Dallas is in", "Paris is in"):
        store.save(_random_graph(0, prompt=prompt))
    return store


def test_a_compacted_store_is_listed_shown_queried_and_deleted_from_as_before(store, command):
    _, listed, _ = command("list", "--json")
    _, shown, _ = command("show", "dallas", "--json")
    code, printed, errors = command("compact")
    assert (code, errors) == (0, "")
    n_edges = sum(graph["edges"] for graph in json.loads(listed))
    first, second = printed.splitlines()
    assert first == "Moved    2 graphs into packs"
    assert second.startswith(f"Packed   2 graphs with {n_edges} edges in 0.0 MB, ")
    assert command("list", "--json")[1] == listed
    assert command("show", "dallas", "--json")[1] == shown
    assert command("rm", "dallas")[2].startswith("deleted dallas")
    assert command("sql", "graphs-store", "SELECT prompt FROM graphs")[1] == '"prompt"\n"Paris is in"\n'


def test_damaged_graphs_are_named_and_a_folder_that_is_no_store_is_refused(store, command):
    victim = store.resolve("dallas")
    [edges] = (store.folder / "graphs" / victim).glob("edges-*")
    edges.write_bytes(b"PAR1")
    assert command("compact")[1].splitlines()[-1].startswith(f"Left     {victim}: ")
    code, _, errors = command("compact", "nowhere")
    assert (code, errors.count("\n")) == (2, 1)
    assert "nowhere does not exist" in errors


def test_a_folder_inside_a_store_does_not_become_a_store(store, command):
    assert command("compact")[0] == 0
    told = "graphs-store/graphs is no store: it has no store.json; name a folder that graphs were saved in."
    assert command("compact", "graphs-store/graphs") == (2, "", f"trace: {told}\n")
    assert list((store.folder / "graphs").iterdir()) == []


def test_graphs_in_packs_are_compared_and_exchanged(command, store, tmp_path):
    store.compact()
    for arguments in (("diff", "dallas", "paris"), ("merge", "dallas", "paris"), ("stability", "dallas")):
        code, _, errors = command(*arguments, "--name", arguments[0])
        assert (code, errors) == (0, "")
    query = "SELECT comparison, n_graphs FROM comparisons ORDER BY 1"
    assert store.sql(query).to_pylist() == [
        {"comparison": "diff", "n_graphs": 2}, {"comparison": "merge", "n_graphs": 2},
        {"comparison": "stability", "n_graphs": 20},
    ]  # fmt: skip
    store.annotate(store.resolve("dallas"), Annotations((Supernode("Texas", (0,)),)))
    assert command("export", "dallas", "dallas.json")[0] == 0
    assert json.loads((tmp_path / "dallas.json").read_text())["qParams"]["supernodes"][0][0] == "Texas"
