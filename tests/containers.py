"""A container of which some memory is free, as the machine's files would tell of it."""

from pathlib import Path

import pytest

from transcoders import memory


def in_container(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], line: str = "0::/") -> None:
    """Let the process be in the control group that `line` names, of which `files` tell (path in `folder`: content)."""
    for name, text in {"groups": f"1:name=systemd:/\n{line}", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "GROUPS", folder / "groups")
    monkeypatch.setattr(memory, "ROOT", folder)


def in_container_with(free: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with so many bytes free (or fewer, where the machine has fewer)."""
    files = {"memory.max": str(free), "memory.current": "0", "memory.stat": "inactive_file 0\nactive_file 0"}
    in_container(folder, monkeypatch, files)
