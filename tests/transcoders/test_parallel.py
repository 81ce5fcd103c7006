"""Several processes train what one would: real torchrun, gloo on CPU."""

import pyarrow.parquet as pq
import pytest
import torch

from tests.transcoders.test_train import SMALL, run_script, wait_for_step
from transcoders import TranscoderError, load
from transcoders.parallel import Place
from transcoders.progress import latest


def losses(folder):
    return torch.tensor([row["loss"] for row in pq.read_table(folder / "metrics.parquet").to_pylist()])


def finish(process):
    _, error = process.communicate(timeout=180)
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
    _, error = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "another process of this training run was lost" in error
    wait_for_step(tmp_path, 10)
    assert latest(tmp_path).name == "step-10"
    finish(run_script(tmp_path, "--streams"))  # on another number of processes
    torch.testing.assert_close(losses(tmp_path)[-1], losses(alone)[-1], atol=1e-5, rtol=1e-5)
    assert_close(load(tmp_path / "transcoder"), load(alone / "transcoder"))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TranscoderError, match="48 features a layer cannot be split over 5 processes"):
        Place(shards=5).features(SMALL.n_features)
    with pytest.raises(TranscoderError, match="1 streams cannot be split over 2 groups"):
        Place(data_parts=2).streams(1)
