"""Several processes train what one would: real torchrun, gloo on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.transcoders.split_script import KINDS, SHORT, train_all
from tests.transcoders.test_train import SMALL, run_script, trained
from tests.waiting import ended
from transcoders import TranscoderError, load
from transcoders.parallel import Place
from transcoders.progress import latest

HERE = Path(__file__).parent


def column(folder, name):
    return torch.tensor([row[name] for row in pq.read_table(folder / "metrics.parquet").to_pylist()])


def losses(folder):
    return column(folder, "loss")


def assert_same_metrics(folder, other, tolerance=1e-4):
    """Of all that is told of a step but its time; numbers for every layer or bucket, None where there is no token."""
    rows, others = (pq.read_table(place / "metrics.parquet").to_pylist() for place in (folder, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for name in rows[0]:
        if name not in ("seconds", "tokens_per_second"):
            for row, expected in zip(rows, others, strict=True):
                ours, theirs = (one if isinstance(one, list) else [one] for one in (row[name], expected[name]))
                assert [one is None for one in ours] == [one is None for one in theirs], name
                ours, theirs = ([one for one in values if one is not None] for values in (ours, theirs))
                assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), (name, row["step"])


def finish(process):
    _, error = ended(process)
    assert process.returncode == 0, error[-2000:]


def assert_close(first, second):
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    finish(run_script(folder, "--streams"))
    return folder


@pytest.mark.slow
def test_features_split_over_two_processes_give_the_same_losses_and_weights(alone, tmp_path):
    finish(run_script(tmp_path, "--streams", n=2))
    torch.testing.assert_close(losses(tmp_path), losses(alone), atol=1e-5, rtol=1e-5)
    assert_close(load(tmp_path / "transcoder"), load(alone / "transcoder"))
    assert sorted(path.name for path in latest(tmp_path).glob("features-*")) == [
        "features-0-24.safetensors", "features-24-48.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_data_split_over_two_processes_gives_the_same_losses_and_weights(alone, tmp_path):
    finish(run_script(tmp_path, "--streams", "--shards=1", n=2))
    torch.testing.assert_close(losses(tmp_path), losses(alone), atol=1e-5, rtol=1e-5)
    assert_close(load(tmp_path / "transcoder"), load(alone / "transcoder"))


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_one_process_goes_on(alone, tmp_path):
    process = run_script(tmp_path, "--streams", "--slow", "--die-at=12", n=2)
    _, error = ended(process)
    assert process.returncode != 0
    assert "another process of this training run was lost" in error
    assert latest(tmp_path).name == "step-10"
    finish(run_script(tmp_path, "--streams"))  # on another number of processes
    torch.testing.assert_close(losses(tmp_path)[-1], losses(alone)[-1], atol=1e-5, rtol=1e-5)
    assert_close(load(tmp_path / "transcoder"), load(alone / "transcoder"))


@pytest.fixture(scope="module")
def all_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all-alone")
    train_all(folder, Place())
    return folder


@pytest.fixture(scope="module", params=[2, 1], ids=["features split", "data split"])
def all_split(request, tmp_path_factory):
    """Every kind trained by two processes."""
    folder = tmp_path_factory.mktemp("all-split")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(HERE / "split_script.py"), str(folder),
               str(request.param)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    finish(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_by_two_processes_as_by_one(tmp_path, all_alone, all_split, kind):
    tolerance = 1e-4 if kind == "topk" else 1e-5  # rounding may decide which feature is the kth
    torch.testing.assert_close(losses(all_split / kind), losses(all_alone / kind), atol=tolerance, rtol=tolerance)
    assert_close(load(all_split / kind / "transcoder"), load(all_alone / kind / "transcoder"))
    if kind != "topk":
        assert_same_metrics(all_split / kind, all_alone / kind, 1e-3)
    if kind == "dead":
        assert float(column(all_alone / kind, "dead").max()) > 0.1  # or there was nothing to compare
    if kind == "clipped":
        trained(tmp_path, SHORT, report_every=1)
        assert not torch.allclose(losses(all_alone / kind), losses(tmp_path), rtol=1e-3)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TranscoderError, match="48 features a layer cannot be split over 5 processes"):
        Place(shards=5).features(SMALL.n_features)
    with pytest.raises(TranscoderError, match="1 streams cannot be split over 2 groups"):
        Place(data_parts=2).streams(1)
