"""Any process may be killed at any moment, and any disk may be full: what was acknowledged is there, whole and once."""

import resource
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from graphs import GraphError, GraphStore
from graphs.names import graph_id_of
from tests.forks import FORKS
from tests.graphs import storm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks between processes")


def states(logs: list[Path]) -> dict[str, set[int]]:
    """Per prompt the versions that may be there: the last that a writer was acknowledged, or one that it only began.

    Where no writer was acknowledged any, it may be what was found there before; 0 is none.
    """
    found = {prompt: 0 for prompt in storm.EVERY}
    acknowledged: dict[str, dict[Path, int]] = {prompt: {} for prompt in storm.EVERY}
    only_begun: dict[str, set[int]] = {prompt: set() for prompt in storm.EVERY}
    for log in logs:
        begun = None
        for line in log.read_text().splitlines() if log.exists() else ():
            if line == "done":
                assert begun is not None
                prompt, version = begun
                acknowledged[prompt][log] = version
                begun = None
            else:
                word, *words, version = line.split()
                if word == "found":
                    found[" ".join(words)] = int(version)
                else:
                    begun = " ".join(words), int(version)
        if begun is not None:  # killed before it was acknowledged
            only_begun[begun[0]].add(begun[1])
    return {
        prompt: (set(acknowledged[prompt].values()) or {found[prompt]}) | only_begun[prompt] for prompt in storm.EVERY
    }


def versions_in(store: GraphStore) -> dict[str, int]:
    """Which version of each graph is there; 0 is none."""
    graphs, listed = storm.originals(), {stored.graph_id for stored in store.list()}
    ids = {prompt: graph_id_of(graph.info) for prompt, graph in graphs.items()}
    return {
        prompt: storm.version_of(store.load(graph_id), graphs[prompt]) if graph_id in listed else 0
        for prompt, graph_id in ids.items()
    }


def assert_what_was_acknowledged_is_there(folder: Path, logs: list[Path]) -> None:
    graphs, store, allowed = storm.originals(), GraphStore(folder), states(logs)
    assert store.damaged() == []
    versions = versions_in(store)
    for prompt, version in versions.items():
        assert version in allowed[prompt], f"{prompt} is version {version}, not one of {allowed[prompt]}"
    rows = store.sql(storm.COUNTS).to_pylist()
    assert {row["prompt"]: (row["n"], row["n_nodes"], row["most"]) for row in rows} == {
        prompt: (graph.n_edges, graph.n_nodes, 1) for prompt, graph in graphs.items() if versions[prompt]
    }


def settle(logs: list[Path], folder: Path) -> None:
    """What a killed process left open is decided now: the logs begin anew with what is there."""
    for log in logs:
        log.unlink(missing_ok=True)
    lines = [f"found {prompt} {version}" for prompt, version in versions_in(GraphStore(folder)).items()]
    logs[0].write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_among_savers_deleters_and_compactors_loses_nothing_and_readers_never_err(tmp_path, rounds):
    folder, errors, random = tmp_path / "store", tmp_path / "errors", np.random.default_rng(rounds)
    logs = [tmp_path / f"log{number}" for number in range(storm.N_WRITERS)]
    GraphStore(folder).save(storm.originals()[storm.SHARED])
    logs[0].write_text(f"found {storm.SHARED} 1\n")
    reader = FORKS.Process(target=storm.read, args=(str(folder), str(errors)), daemon=True)
    reader.start()
    for turn in range(rounds):
        processes = [
            FORKS.Process(target=storm.write, args=(str(folder), str(log), number, turn + 1), daemon=True)
            for number, log in enumerate(logs)
        ]
        processes += [FORKS.Process(target=storm.compact, args=(str(folder), 0.01 * k), daemon=True) for k in (0, 1)]
        for process in processes:
            process.start()
        moments = np.sort(random.uniform(0.05, 0.4, len(processes)))
        for place, (process, pause) in enumerate(
            zip(random.permutation(np.array(processes, object)), np.diff(moments, prepend=0), strict=True)
        ):
            time.sleep(pause)
            assert process.exitcode is None, f"process {place} ended by itself"
            process.kill()
        for process in processes:
            process.join()
        assert not errors.exists(), errors.read_text()
        assert_what_was_acknowledged_is_there(folder, logs)
        settle(logs, folder)
    assert comes(tmp_path / "errors.turns", reader, errors)
    turns = int((tmp_path / "errors.turns").read_text())
    assert reader.is_alive()
    reader.kill()
    reader.join()
    assert turns >= rounds / 5
    done = GraphStore(folder).compact()
    assert done.damaged == {}
    assert not [path for path in folder.rglob("*.parquet") if path.parent.parent.name == "graphs"]
    assert len([path for path in (folder / "packs").iterdir() if path.suffix == ".parquet"]) in (0, 3)
    assert_what_was_acknowledged_is_there(folder, logs)


# full disks


def limited(size: int, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the code where no file may grow beyond the size."""
    command = [sys.executable, "-c", f"from graphs import GraphStore\nimport sys\n{code}", *arguments]
    return subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_compaction_on_a_full_disk_is_told_in_one_line_and_changes_nothing(tmp_path):
    store, graphs = GraphStore(tmp_path), storm.originals()
    for graph in graphs.values():
        store.save(graph)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    result = limited(3000, "GraphStore(sys.argv[1]).compact()", str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"graphs.errors.GraphError: cannot compact {tmp_path}: ")
    assert "File too large" in last
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    for graph in graphs.values():
        assert store.load(graph_id_of(graph.info)) == graph


def test_on_a_small_disk_everything_acknowledged_is_there_when_it_is_full(small_disk, tmp_path):
    graphs = storm.originals([f"number {seed}" for seed in range(100)])
    store, saved, errors, turns = GraphStore(small_disk / "store"), {}, tmp_path / "errors", tmp_path / "errors.turns"
    reader = FORKS.Process(target=storm.read, args=(str(store.folder), str(errors), tuple(graphs)), daemon=True)
    reader.start()
    with pytest.raises(GraphError, match=r"cannot save graph .*No space left on device"):
        for number, graph in enumerate(graphs.values()):
            saved[store.save(graph)] = graph
            if number == 3:
                store.compact()
    assert len(saved) > 5
    for _ in range(2):
        assert {stored.graph_id for stored in GraphStore(store.folder).list()} == set(saved)
        assert store.damaged() == []
        for graph_id, graph in saved.items():
            assert store.load(graph_id) == graph
        try:
            store.compact()
        except GraphError as error:
            assert "No space left on device" in str(error)
    turns.unlink(missing_ok=True)
    assert comes(turns, reader, errors), "nobody read from the full disk"
    gone = next(iter(saved))
    store.delete(gone)
    assert {stored.graph_id for stored in store.list()} == set(saved) - {gone}
    turns.unlink()
    assert comes(turns, reader, errors), "nobody read after the deletion"
    reader.kill()
    reader.join()


def comes(path: Path, reader: BaseProcess, errors: Path) -> bool:
    """Whether the reader writes the file, rather than that something is wrong."""
    until = time.monotonic() + 60
    while not path.exists() and reader.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not errors.exists(), errors.read_text()
    return path.exists()
