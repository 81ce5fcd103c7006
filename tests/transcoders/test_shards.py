"""Shards of a transcoder: any number of processes reads what any number wrote, and clips by the norm of the whole."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.forks import FORKS
from tests.transcoders.split_script import clip_in_one_of_two
from tests.transcoders.test_parallel import assert_close, finish, losses
from tests.transcoders.test_train import SMALL, run_script, trained, wait_for_step
from tests.waiting import ended
from transcoders import load
from transcoders.parallel import Place
from transcoders.progress import latest, read_features, read_layer, read_weight
from transcoders.train import Stopped

N_FEATURES = 12
WHOLE = {
    "weight:W_enc": torch.arange(2.0 * N_FEATURES * 3).reshape(2, N_FEATURES, 3),
    "weight:W_dec.0": torch.arange(2.0 * N_FEATURES * 3).reshape(N_FEATURES, 2, 3) + 1000,
    "weight:threshold": torch.arange(2.0 * N_FEATURES).reshape(2, N_FEATURES) + 2000,
}
"""Numbers that tell the feature they belong to; layers come first but in decoders."""


def part(name, features):
    here = slice(features.start, features.stop)
    return WHOLE[name][here] if name == "weight:W_dec.0" else WHOLE[name][:, here]


def shares(ranks):
    return [Place(shard=rank, shards=ranks).features(N_FEATURES) for rank in range(ranks)]


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("writers", [1, 2, 3, 12])
def test_each_process_reads_its_features_whatever_number_of_processes_wrote_them(tmp_path, writers, readers):
    for features in shares(writers):
        tensors = {name: part(name, features).contiguous() for name in WHOLE}
        save_file(tensors, tmp_path / f"features-{features.start}-{features.stop}.safetensors")
    for features in shares(readers):
        read = read_features(tmp_path, features)
        assert read.keys() == WHOLE.keys()
        for name, tensor in read.items():
            assert torch.equal(tensor, part(name, features)), name
    for name, tensor in WHOLE.items():  # as the transcoder that comes out is read
        weight = name.removeprefix("weight:")
        assert torch.equal(read_weight(tmp_path, weight), tensor)
        if weight != "W_dec.0":
            assert torch.equal(read_layer(tmp_path, weight, 1), tensor[1])


def test_gradients_of_two_processes_are_clipped_by_the_norm_of_all_of_them(tmp_path):
    processes = [FORKS.Process(target=clip_in_one_of_two, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"clipped-{rank}.json").read_text()) for rank in range(2))
    assert first == pytest.approx({"W_enc": 0.2, "b_dec": 0.9})
    assert second == pytest.approx({"W_enc": 0.6, "b_dec": 0.9})


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_and_then_with_three(tmp_path):
    config, alone, folder, done = replace(SMALL, streams=2), tmp_path / "alone", tmp_path / "moved", []
    trained(alone, config, report_every=1)
    with pytest.raises(Stopped, match="stopped after step 7 of 60"):
        trained(folder, config, report_every=1, on_step=lambda step, steps: done.append(step),
                should_stop=lambda: done[-1:] == [7])  # fmt: skip
    assert shards_in(folder) == ["features-0-48"]
    process = run_script(folder, "--streams", "--slow", n=2)
    wait_for_step(process, folder, 20)
    process.send_signal(signal.SIGTERM)
    _, error = ended(process)
    assert "start the same command again to go on" in error
    assert shards_in(folder) == ["features-0-24", "features-24-48"]
    finish(run_script(folder, "--streams", n=3))
    assert shards_in(folder) == ["features-0-16", "features-16-32", "features-32-48"]
    torch.testing.assert_close(losses(folder), losses(alone), atol=1e-5, rtol=1e-5)
    assert_close(load(folder / "transcoder"), load(alone / "transcoder"))


def shards_in(folder):
    checkpoint = latest(folder)
    assert checkpoint is not None
    return sorted(path.stem for path in checkpoint.glob("features-*"))
