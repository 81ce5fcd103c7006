"""How much memory may still be taken: what the machine has, or what is left of the container's share."""

import pytest
import torch

from transcoders import memory

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
