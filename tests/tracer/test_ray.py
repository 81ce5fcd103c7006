"""The same store from a Ray cluster, also when one of its workers is killed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphs import GraphStore
from tests.tracer.processes import refused, run
from tests.tracer.test_batch import PROMPTS, ROWS, interrupt_and_go_on, prompts_in, write_tiny_model
from tracer.batch import Job, Status
from tracer.config import TraceConfig
from tracer.prompts import Row
from tracer.ray_engine import trace_on_ray
from tracer.worker import begin

pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.ray


def graphs_in(folder: Path) -> dict:
    """All graphs by id, but for what depends on the clock."""
    store = GraphStore(folder)
    found = {stored.graph_id: store.load(stored.graph_id) for stored in store.list()}
    fixed = {"created_at": next(iter(found.values())).info.created_at, "seconds": 0.0, "peak_memory_mb": 0.0}
    return {graph_id: replace(graph, info=replace(graph.info, **fixed)) for graph_id, graph in found.items()}


@pytest.mark.slow
def test_two_actors_one_of_them_killed_make_the_store_that_one_process_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    source = write_tiny_model(tmp_path)
    job = Job(Path("store"), source, TraceConfig())
    rows = [*ROWS, Row(21, "")]
    outcomes, killed = [], None
    for outcome in trace_on_ray(job, rows, None, workers=2):
        outcomes.append(outcome)
        if killed is None and len(outcomes) == 4:
            killed = outcome.process
            os.kill(killed, signal.SIGKILL)
    assert sorted(outcome.row.number for outcome in outcomes) == list(range(1, 22))
    assert [outcome.row.number for outcome in outcomes if outcome.status == Status.FAILED] == [21]
    by_row = {outcome.row.number: outcome.process for outcome in outcomes}
    assert by_row[1] != by_row[2]  # the first row of each actor
    assert len(set(by_row.values()) - {killed}) == 2  # the other actor, and the one that was started again
    assert sum(outcome.process == killed for outcome in outcomes[5:]) == 0
    assert prompts_in(tmp_path / "store") == sorted(PROMPTS)
    worker = begin(replace(job, store=tmp_path / "alone"), "cpu", share=1)
    for row in ROWS:
        worker.trace(row)
    ours, alone = graphs_in(tmp_path / "store"), graphs_in(tmp_path / "alone")
    assert ours.keys() == alone.keys()
    for graph_id, graph in ours.items():
        expected = alone[graph_id]
        # sums may differ in the last digit: an actor has other threads than this process
        for name in ("kind", "layer", "position", "feature"):
            assert np.array_equal(getattr(graph, name), getattr(expected, name), equal_nan=True)
        ours_by_end, theirs = (sorted(zip(g.source, g.target, g.weight, strict=True)) for g in (graph, expected))
        assert [edge[:2] for edge in ours_by_end] == [edge[:2] for edge in theirs]
        assert [edge[2] for edge in ours_by_end] == pytest.approx([edge[2] for edge in theirs], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_ctrl_c_ends_the_cluster_and_keeps_what_is_done(tmp_path):
    interrupt_and_go_on(write_tiny_model(tmp_path), tmp_path, "--engine", "ray", "--workers", "2")


def test_a_cluster_that_does_not_answer_is_told_in_one_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("calc: 1+1=\n")
    result = run("batch", "prompts.txt", "--engine", "ray", "--address", "127.0.0.1:1", folder=tmp_path)
    assert "no Ray cluster answers at 127.0.0.1:1" in refused(result)
