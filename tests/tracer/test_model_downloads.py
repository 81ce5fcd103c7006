"""Models by their Hub id: out of a cache without a network, and downloaded from a Hub on this machine."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from graphs import GraphStore
from tests.hub_server import COMMIT, point_to, serving
from tests.tracer.conftest import CASES
from tests.tracer.processes import ENVIRONMENT, TRACE, refused
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel

CASE = CASES / "llama-clt-jumprelu"
PROMPT = "w28 w12 w25 w16"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's client that holds org/model and org/clt; no network may be used."""
    for name in ("model", "transcoder"):
        place = tmp_path / "hub" / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        shutil.copytree(CASE / name, place / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("pin", ["", "@main", f"@{COMMIT}"])
def test_a_model_in_the_cache_is_traced_without_a_network(cache, pin):
    replacement = ReplacementModel.load(f"org/model{pin}", f"org/transcoder{pin}")
    assert (replacement.origin.model_revision, replacement.origin.transcoder_revision) == (COMMIT, COMMIT)
    assert (replacement.origin.model, replacement.origin.transcoder) == (f"org/model{pin}", f"org/transcoder{pin}")
    found = trace(PROMPT, replacement).graph
    expected = trace(PROMPT, ReplacementModel.load(CASE / "model", CASE / "transcoder")).graph
    np.testing.assert_array_equal(found.weight, expected.weight)


def test_commits_of_one_configuration_and_other_weights_are_told_apart(cache, tmp_path):
    later = "f" * 40
    place = cache / "models--org--model" / "snapshots"
    shutil.copytree(place / COMMIT, place / later)
    weights = load_file(place / COMMIT / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, place / later / "model.safetensors", metadata={"format": "pt"})
    store = GraphStore(tmp_path / "store")
    for pin in ("main", later):
        store.save(trace(PROMPT, ReplacementModel.load(f"org/model@{pin}", CASE / "transcoder", name="one")).graph)
    assert {stored.info.model_revision for stored in store.list()} == {COMMIT, later}


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_of_which_a_part_is_in_the_cache_is_refused_in_one_line(cache, command, lacking):
    (cache / "models--org--model" / "snapshots" / COMMIT / lacking).unlink()
    arguments = (PROMPT, "--model", "org/model", "--transcoder", "org/transcoder", "--store", "s")
    line = refused(subprocess.CompletedProcess(arguments, *command(*arguments)))
    assert "org/model cannot be loaded (" in line
    assert not (cache.parent / "s").exists()


@pytest.mark.slow
def test_a_model_and_a_transcoder_are_downloaded_once_and_then_traced_offline(tmp_path):
    arguments = (PROMPT, "--model", f"org/model@{COMMIT}", "--transcoder", "org/clt", "--store", "s", "--json")
    home = ENVIRONMENT | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    with serving({"org/model": CASE / "model", "org/clt": CASE / "transcoder"}) as hub:
        online = started(tmp_path, *arguments, environment=home | {"HF_ENDPOINT": hub.address})
        assert online.returncode == 0, online.stderr
        assert {"org/model/model.safetensors", "org/clt/W_dec_1.safetensors"} < set(hub.fetched)
        assert len(hub.fetched) == len(set(hub.fetched))
    assert "Fetching 9 files" in online.stderr
    offline = started(tmp_path, *arguments, environment=home | {"HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, offline.stderr) == (0, "")
    graph_ids = {json.loads(result.stdout)["graph_id"] for result in (online, offline)}
    assert graph_ids == set(GraphStore(tmp_path / "s").ids())
    [graph] = [GraphStore(tmp_path / "s").load(graph_id) for graph_id in graph_ids]
    assert (graph.info.model_revision, graph.info.transcoder_revision) == (COMMIT, COMMIT)
    local = trace(PROMPT, ReplacementModel.load(CASE / "model", CASE / "transcoder"), TraceConfig()).graph
    np.testing.assert_array_equal(graph.weight, local.weight)


def test_a_model_in_the_cache_is_traced_at_once_where_the_hub_cannot_be_reached(cache, monkeypatch, caplog):
    asked = []
    with refusing(asked) as address:
        point_to(address, monkeypatch)
        replacement = ReplacementModel.load("org/model", CASE / "transcoder")
    assert replacement.origin.model_revision == COMMIT
    assert len(asked) == 1  # the client alone tries six times, and transformers each file
    [warning] = [record.getMessage() for record in caplog.records if record.name == "transcoders.hub"]
    assert warning.startswith("the Hub cannot be reached (")
    assert warning.endswith("): looking for org/model in its cache.")


def test_a_model_that_is_nowhere_is_refused_in_one_line_where_the_hub_cannot_be_reached(command, cache, monkeypatch):
    arguments = (PROMPT, "--model", "org/other", "--transcoder", str(CASE / "transcoder"), "--store", "s")
    with refusing([]) as address:
        point_to(address, monkeypatch)
        status, out, told = command(*arguments)
    assert "the model org/other cannot be loaded (" in refused(
        subprocess.CompletedProcess(arguments, status, out, told)
    )


@pytest.mark.parametrize("name", ["org/nothing", "org/model@v9", "org/closed"])
def test_a_model_that_the_hub_does_not_give_is_refused_in_one_line(tmp_path, command, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = (PROMPT, "--model", name, "--transcoder", str(CASE / "transcoder"), "--store", "s")
    with serving({"org/model": CASE / "model", "org/closed": CASE / "model"}) as hub:
        hub.gated.add("org/closed")
        point_to(hub.address, monkeypatch)
        line = refused(subprocess.CompletedProcess(arguments, *command(*arguments)))
    assert f"the model {name} cannot be loaded (" in line
    assert not (tmp_path / "s").exists()


@contextmanager
def refusing(asked: list[str]) -> Iterator[str]:
    """The address of a server that breaks off every connection, and notes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # as the shutdown raises below
                while True:
                    connection, address = server.accept()
                    asked.append(str(address))
                    connection.close()

        thread = Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def started(folder: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`trace` in a new process: the Hub's client reads its environment when it is imported."""
    return subprocess.run(
        [*TRACE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
