"""A run may be killed at any moment, in the middle of a checkpoint too: its last whole one is there to go on from."""

import signal

import pyarrow.parquet as pq
import pytest

from tests.forks import FORKS
from tests.transcoders import killed
from tests.transcoders.test_train import assert_same, trained
from transcoders import load
from transcoders.progress import latest, read_state, read_tensors


def run(folder, log, **moment):
    """How the process ended."""
    process = FORKS.Process(target=killed.train, args=(folder, log), kwargs=moment)
    process.start()
    process.join(timeout=240)
    return process.exitcode


def losses(folder):
    return [(row["step"], row["loss"]) for row in pq.read_table(folder / "metrics.parquet").to_pylist()]


def assert_whole(checkpoint):
    """All that a run goes on from can be read."""
    step = int(checkpoint.name.removeprefix("step-"))
    assert read_state(checkpoint)["step"] == step
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "common.safetensors", "features-0-48.safetensors", "state.json", "stream-0.safetensors",
    ]  # fmt: skip
    for path in checkpoint.glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in read_tensors(path).values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, killed.CONFIG, checkpoint_every=killed.EVERY, report_every=10)
    return folder


@pytest.mark.parametrize(
    ("events", "sizes"),
    [((4, 9, 14, 18), (50_000,)), pytest.param(range(2, 30), (200, 50_000, 100_000), marks=pytest.mark.slow)],
)
def test_kill_9_while_a_checkpoint_is_written_costs_one_interval_at_most(tmp_path, whole, events, sizes):
    """The same run is killed again and again: at one event of the file system after another, and within writes."""
    folder, reached = tmp_path / "killed", 0
    moments = [({"event": event}, signal.SIGKILL) for event in events]
    moments += [({"size": size}, signal.SIGXFSZ) for size in sizes]
    for number, (moment, by) in enumerate(moments):
        log = tmp_path / f"log-{number}"
        assert run(folder, log, **moment) == -by, moment
        done = [int(line) for line in log.read_text().split()]
        assert done[0] == reached + 1  # it went on from the last checkpoint
        checkpoint = latest(folder)
        assert checkpoint is not None, moment
        assert_whole(checkpoint)
        reached = int(checkpoint.name.removeprefix("step-"))
        assert 0 <= done[-1] - reached <= killed.EVERY, moment
    assert not (folder / "transcoder").exists()
    assert run(folder, tmp_path / "log") == 0
    assert_same(load(folder / "transcoder"), load(whole / "transcoder"))
    assert losses(folder) == losses(whole)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-150"]
