"""What fits: memory that may still be taken, by the machine or the container, and what a run needs of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.containers import in_container, in_container_with
from tests.forks import FORKS
from tests.transcoders import peak
from tests.transcoders.test_train import SMALL, trained
from transcoders import TrainConfig, TranscoderConfig, TranscoderError, memory, start
from transcoders.parallel import Place
from transcoders.start import start_layer

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
    in_container(tmp_path, monkeypatch, {str(Path(folder, name)): text for name, text in files.items()}, line)
    assert memory.free_memory(CPU) == 500_000


@pytest.mark.parametrize("limit", [{"memory.max": "max"}, {}])
def test_without_a_limit_the_machine_decides(tmp_path, monkeypatch, limit):
    in_container(tmp_path, monkeypatch, limit)
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
def test_the_start_is_found_within_the_memory_that_is_counted_for_it(tmp_path):
    config = TrainConfig(n_features=4096, k=4, batch_tokens=64, buffer_tokens=128, tokens=64)
    counted = memory.needed_to_start(TranscoderConfig(1, 16, 4096, "relu"), config, Place(), torch.float32)
    # of 16,384 tokens x 4096 features every array takes 268 MB, and several of them would be held at once
    assert peak_of(peak.start, tmp_path, config) < counted < 350_000_000


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_the_batch_that_is_said_to_fit_does_fit(tmp_path, monkeypatch, activation):
    """In a container of which 700 MB are free; twice that batch would not fit.

    Arrays of all features are larger than 32 MB: of smaller ones the C library keeps some that are freed.
    """
    in_container_with(700_000_000, tmp_path, monkeypatch)
    config = replace(SMALL, n_features=2048, tokens=1 << 15, buffer_tokens=1 << 16, activation=activation)
    with pytest.raises(TranscoderError, match=r"this run needs .* GB are free; --batch-tokens \d+ fits") as error:
        trained(tmp_path, replace(config, batch_tokens=1 << 15))
    [fits] = re.findall(r"--batch-tokens (\d+) fits", str(error.value))
    with pytest.raises(TranscoderError, match="this run needs"):
        trained(tmp_path, replace(config, batch_tokens=2 * int(fits)))
    run = replace(config, batch_tokens=int(fits), tokens=2 * int(fits))
    assert peak_of(peak.train, tmp_path, run) < 700_000_000


def peak_of(work: Callable[[Path, TrainConfig], None], folder: Path, config: TrainConfig) -> int:
    """Bytes that it took in a process of its own: one that has run other tests has holes on its heap."""
    process = FORKS.Process(target=work, args=(folder, config))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == 0
    return int((folder / "peak").read_text())
