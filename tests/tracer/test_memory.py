"""Memory that runs out on the way, by a real limit: one line that says what takes less, and no part of a graph."""

import json
import sys
from pathlib import Path

import pytest

from graphs import GraphStore
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.processes import refused, run
from transcoders import save

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses a process may use")

RAN_OUT = "trace: memory ran out; "
"""What takes less follows; where exactly a limit strikes is another place on every machine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that reads long prompts, and a transcoder for it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_llama(0)
    model.config.max_position_embeddings = 1000
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save(tiny_transcoder(1), folder / "transcoder")
    return folder


def prompt_of(n_words: int) -> str:
    return " ".join(f"w{i * i % 40}" for i in range(n_words))


def traced(place: Path, store: Path, what: int | tuple[str, ...], spare: int, *options: str):
    """`trace` with a prompt of so many words, or `batch FILE`, and so many spare megabytes of addresses."""
    first = (prompt_of(what),) if isinstance(what, int) else what
    named = ("--model", "model", "--transcoder", "transcoder", "--store", str(store), "--device", "cpu")
    return run(*first, *named, *options, folder=place, spare=spare << 20)


@pytest.mark.parametrize("spare", [40, 100, 200])
def test_memory_that_runs_out_while_a_prompt_is_traced_is_told_in_one_line(place, tmp_path, spare):
    assert refused(traced(place, tmp_path / "s", 600, spare)).startswith(RAN_OUT)
    assert not (tmp_path / "s").exists()


def test_the_same_prompt_is_traced_where_there_is_memory(place, tmp_path):
    result = traced(place, tmp_path / "s", 600, 4000)
    assert result.returncode == 0
    assert result.stderr.startswith("trace: the transcoder explains nothing")  # it is random
    store = GraphStore(tmp_path / "s")
    [graph_id] = store.ids()
    assert store.load(graph_id).info.n_active_features > 10_000


def test_memory_that_runs_out_while_a_graph_is_saved_is_told_and_leaves_no_part_of_it(place, tmp_path):
    """On most machines: what saving its 11 million edges may take is asked for before, and is more than is left."""
    result = traced(place, tmp_path / "s", 250, 400, "--coverage", "1", "--no-prune")
    assert refused(result).startswith(RAN_OUT)
    store = GraphStore(tmp_path / "s")
    assert (store.ids(), store.damaged()) == ([], [])
    assert [path for path in store.folder.rglob("*") if path.suffix == ".parquet"] == []
    assert [*store.folder.glob("graphs/*")] == []


def test_memory_that_runs_out_leaves_the_graphs_of_before(place, tmp_path):
    assert traced(place, tmp_path / "s", 6, 4000).returncode == 0
    [before] = GraphStore(tmp_path / "s").list()
    refused(traced(place, tmp_path / "s", 250, 500, "--coverage", "1", "--no-prune"))
    refused(traced(place, tmp_path / "s", 600, 60))
    assert GraphStore(tmp_path / "s").list() == [before]


@pytest.mark.slow
def test_a_batch_goes_on_after_a_graph_for_which_there_was_no_memory(place, tmp_path):
    (tmp_path / "p.txt").write_text(f"{prompt_of(250)}\n{prompt_of(5)}\n", encoding="utf-8")
    result = traced(place, tmp_path / "s", ("batch", str(tmp_path / "p.txt")), 600, "--coverage", "1", "--no-prune")
    assert result.returncode == 1, result.stderr
    [failed] = (tmp_path / "s.failed.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(failed)["error"].startswith("memory ran out; ")
    assert [stored.info.prompt for stored in GraphStore(tmp_path / "s").list()] == [prompt_of(5)]
