"""Decoders that stay in their files: the same results, and only rows of active features are read."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer.attribution import attribute
from tracer.replacement import ReplacementModel
from tracer.targets import token_targets
from transcoders import CrossLayerTranscoder, TranscoderConfig, load, load_on_demand, save
from transcoders.activations import replaced_mlps
from transcoders.errors import TranscoderError
from transcoders.stored import map_tensors

PROMPT = "w3 w1 w4 w1 w5 w9"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_transcoder(1, reads="ln2.hook_normalized"), tmp_path)
    return tmp_path


def traced(transcoder: CrossLayerTranscoder):
    replacement = ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), transcoder)
    local = replacement.localize(replacement.tokenize(PROMPT))
    return local.features, attribute(local, token_targets(local, (3, 4), ("a", "b")), coverage=1.0)


def test_a_trace_is_the_same_in_memory_and_on_demand(folder):
    _, in_memory = traced(load(folder))
    _, on_demand = traced(load_on_demand(folder))
    assert in_memory.n_edges > 100
    np.testing.assert_allclose(on_demand.weight, in_memory.weight, rtol=1e-4, atol=1e-6)


def test_a_trace_reads_no_row_of_a_feature_that_is_not_active(folder):
    features, expected = traced(load(folder))
    n_spoilt = 0
    for layer in range(3):
        path = folder / f"W_dec_{layer}.safetensors"
        rows = load_file(path)[f"W_dec_{layer}"].clone()
        idle = torch.ones(len(rows), dtype=torch.bool)
        idle[features.feature[features.layer == layer]] = False
        rows[idle] = float("nan")
        n_spoilt += int(idle.sum())
        save_file({f"W_dec_{layer}": rows}, path)
    assert n_spoilt > 0
    _, graph = traced(load_on_demand(folder))
    np.testing.assert_allclose(graph.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_replaced_mlps_answer_the_same_on_demand(folder):
    model, tokens = tiny_llama(0), torch.tensor([[1, 5, 3, 6], [1, 7, 2, 2]])
    logits = []
    for transcoder in (load(folder), load_on_demand(folder)):
        with replaced_mlps(model, transcoder), torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0])


def test_rows_come_in_the_order_asked_for_repeated_ones_too(folder):
    features = torch.tensor([7, 2, 7, 19, 0])
    assert torch.equal(load_on_demand(folder).decoder_rows(1, features), load(folder).W_dec[1][features])


def test_all_rows_of_a_layer_stay_in_the_file(folder):
    stored = load_on_demand(folder)
    every = torch.arange(20)
    assert torch.equal(stored.decoder_rows(1, every), load(folder).W_dec[1])
    assert stored.decoder_rows(1, every).data_ptr() == stored.decoder_rows(1, every).data_ptr()
    assert stored.decoder_rows(1, every[:5]).data_ptr() != stored.decoder_rows(1, every).data_ptr()


@pytest.mark.parametrize("n_used", [0, 3, 11, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoders_are_used_in_their_file_if_most_are_needed_as_they_are_and_copied_otherwise(folder, n_used, dtype):
    features = torch.arange(20)[torch.arange(20) * 7 % 20 < n_used]
    stored, in_memory = load_on_demand(folder, dtype=dtype), load(folder, dtype=dtype)
    rows, place = stored.decoders_with(1, features)
    assert torch.equal(rows[place], in_memory.W_dec[1][features])
    in_its_file = n_used > 10 and dtype == torch.float32
    assert len(rows) == (20 if in_its_file else n_used)
    assert (rows.data_ptr() == stored.decoder_rows(1, torch.arange(20)).data_ptr()) == in_its_file
    rows, place = in_memory.decoders_with(1, features)
    assert rows.data_ptr() == in_memory.W_dec[1].data_ptr()
    assert torch.equal(place, features)


def test_rows_of_a_file_that_was_cut_meanwhile_are_told_in_one_line(folder):
    stored = load_on_demand(folder)
    os.truncate(folder / "W_dec_1.safetensors", (folder / "W_dec_1.safetensors").stat().st_size - 8)
    with pytest.raises(TranscoderError, match=r"W_dec_1.safetensors ends too early; copy or download it again\."):
        stored.decoder_rows(1, torch.tensor([2, 19]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the mapped pages in /proc")
def test_of_a_large_decoder_only_what_is_used_comes_into_memory(tmp_path):
    n_features, d_model = 20_000, 512
    config = TranscoderConfig(1, d_model, n_features, "relu")
    save(CrossLayerTranscoder(config), tmp_path)
    path = tmp_path / "W_dec_0.safetensors"
    transcoder = load_on_demand(tmp_path)
    rows = transcoder.decoder_rows(0, torch.tensor([5, 19_000]))
    assert rows.shape == (2, 1, d_model)
    assert path.stat().st_size > 40_000_000
    assert _mapped_kilobytes(path) < 1_000


def _mapped_kilobytes(path: Path) -> int:
    """How much of a file this process has in its memory."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from transcoders.stored import map_tensors
size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + 20_000_000, -1))
try:
    map_tensors(Path(sys.argv[1]))
except MemoryError:
    print("memory ran out")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses a process may use")
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.npz", "weights.pt"])
def test_a_sound_file_that_there_is_no_memory_to_map_is_not_called_broken(tmp_path, name):
    path, tensor = tmp_path / name, torch.zeros(30_000_000)
    match path.suffix:
        case ".safetensors":
            save_file({"W": tensor}, path)
        case ".npz":
            np.savez(path, W=tensor.numpy())
        case _:
            torch.save({"W": tensor}, path)
    ran = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, path], capture_output=True, text=True, check=True)
    assert ran.stdout == "memory ran out\n"


def test_other_faults_of_reading_are_still_told_in_one_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no tensors at all")
    with pytest.raises(
        TranscoderError, match=r"weights.safetensors cannot be read \(.*\); copy or download it again\."
    ):
        map_tensors(path)
