"""Folders that cannot be written to, and small disks: also for root, who may write wherever no mount forbids it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with _mounted(folder, "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)):
        yield folder


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Close a folder and all that is in it for writing, until the test ends."""
    with ExitStack() as closed:
        yield lambda folder: closed.enter_context(_read_only(folder))


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        with _without_permission(folder):
            yield
        return
    with _mounted(folder, "--bind", str(folder), str(folder)):
        if subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=False).returncode:
            pytest.skip("mounting for reading only is not allowed here")
        yield


@contextmanager
def _without_permission(folder: Path) -> Iterator[None]:
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


@contextmanager
def _mounted(folder: Path, *arguments: str) -> Iterator[None]:
    mount = shutil.which("mount")
    if mount is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    if subprocess.run([mount, *arguments], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
