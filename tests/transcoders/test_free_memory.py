"""What fits: memory that may still be taken, by the machine or the container, and what a run needs of it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.forks import FORKS
from tests.transcoders import peak
from tests.transcoders.test_train import SMALL, trained
from transcoders import TrainConfig, TranscoderConfig, TranscoderError, memory, start
from transcoders.parallel import Place
from transcoders.start import start_layer
from transcoders.streams import sample_size

CPU = torch.device("cpu")
ONE = {
    "memory.max": "1000000", "memory.current": "700000",
    "memory.stat": "anon 300000\ninactive_file 150000\nactive_file 50000",
}  # fmt: skip
OLD = {
    "memory.limit_in_bytes": "1000000", "memory.usage_in_bytes": "700000",
    "memory.stat": "rss 300000\ntotal_inactive_file 150000\ntotal_active_file 50000",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/", "", ONE),
        ("0::/jobs/7", "jobs/7", ONE),
        ("0::/outside/the/container", "", ONE),
        ("4:cpu,memory:/jobs/7", "memory/jobs/7", OLD),
        ("4:memory:/outside/the/container", "memory", OLD),
    ],
)
def test_a_container_gives_what_is_left_of_its_share_without_pages_of_files(tmp_path, monkeypatch, line, folder, files):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(f"1:name=systemd:/\n{line}\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.free_memory(CPU) == 500_000


@pytest.mark.parametrize("limit", [{"memory.max": "max"}, {}])
def test_without_a_limit_the_machine_decides(tmp_path, monkeypatch, limit):
    for name, text in limit.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "groups").write_text("0::/\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.free_memory(CPU) > 1 << 28


def test_a_step_that_does_not_fit_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(TranscoderError, match=r"this run needs .* GB are free; --batch-tokens \d+ fits"):
        trained(
            tmp_path, replace(SMALL, n_features=1 << 14, batch_tokens=1 << 20, tokens=1 << 21, buffer_tokens=1 << 21)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    config = replace(SMALL, n_features=1 << 34, batch_tokens=64, buffer_tokens=128)
    with pytest.raises(TranscoderError, match=r"features start from 17,179,869,184 tokens, for which .* GB are needed"):
        trained(tmp_path, config)


def test_features_are_looked_for_in_blocks_that_change_nothing(monkeypatch):
    inputs, outputs = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))

    def begin():
        return start_layer(inputs, outputs, 24, 4, 0.02, torch.Generator().manual_seed(1), at_once=5)

    whole = begin()
    monkeypatch.setattr(start, "BLOCK_BYTES", 4 * 5 * 24 * 7)  # seven tokens
    assert len(list(start.blocks(300, 24))) == 43
    parts = begin()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.slow
def test_the_start_is_found_within_the_memory_that_is_counted_for_it():
    config = TrainConfig(n_features=4096, k=4, batch_tokens=64, buffer_tokens=128, tokens=64)
    shape = TranscoderConfig(1, 16, 4096, "relu")
    counted = memory.needed_to_start(shape, config, Place(), torch.float32)
    inputs, outputs = torch.randn(2, sample_size(config), 16, generator=torch.Generator().manual_seed(0))
    start_layer(inputs[:64], outputs[:64], 8, 4, 0.02, torch.Generator())  # what torch itself takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    now = int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    start_layer(inputs, outputs, 4096, 4, 0.02, torch.Generator().manual_seed(1), at_once=2048)
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    # of 16,384 tokens x 4096 features every array takes 268 MB, and several of them would be held at once
    assert (peak - now) * 1024 < counted < 350_000_000


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_the_batch_that_is_said_to_fit_does_fit(tmp_path, monkeypatch, activation):
    """In a container of which 700 MB are free; twice that batch would not fit.

    Arrays of all features are larger than 32 MB: of smaller ones the C library keeps some that are freed.
    """
    (tmp_path / "memory.max").write_text("700000000\n")
    (tmp_path / "memory.current").write_text("0\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")
    (tmp_path / "groups").write_text("0::/\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    config = replace(SMALL, n_features=2048, tokens=1 << 15, buffer_tokens=1 << 16, activation=activation)
    with pytest.raises(TranscoderError, match=r"this run needs .* GB are free; --batch-tokens \d+ fits") as error:
        trained(tmp_path, replace(config, batch_tokens=1 << 15))
    [fits] = re.findall(r"--batch-tokens (\d+) fits", str(error.value))
    with pytest.raises(TranscoderError, match="this run needs"):
        trained(tmp_path, replace(config, batch_tokens=2 * int(fits)))
    run = replace(config, batch_tokens=int(fits), tokens=2 * int(fits))
    process = FORKS.Process(target=peak.train, args=(tmp_path, run))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == 0
    assert int((tmp_path / "peak").read_text()) < 700_000_000
