"""Stores in remote folders for the command line: pushed, and fetched into this user's cache."""

import os
from pathlib import Path

from graphs.names import digest
from graphs.remote import fetch, push
from tracer.commands import progress


def fetched(address: str) -> Path:
    """A local copy of the store at the address, brought up to date."""
    folder = _cache() / digest([address])
    with progress() as step:
        fetch(address, folder, on_progress=lambda done, total: step(f"fetching {address}", done, total))
    return folder


def push_store(folder: Path, address: str, *, replace: bool) -> str:
    """Push the store, and say what was sent."""
    with progress() as step:
        sent = push(
            folder, address, replace=replace, on_progress=lambda done, total: step(f"pushing {folder}", done, total)
        )
    removed = f", {sent.n_removed} removed" if sent.n_removed else ""
    return f"Pushed   {sent.n_files} files, {sent.n_bytes / 1e6:.1f} MB; {sent.n_unchanged} were there{removed}"


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "clt-tracer" / "stores"
