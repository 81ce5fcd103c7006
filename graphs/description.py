"""store.json: that a folder is a store, and the version of its format."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, is_temporary, write_atomically
from graphs.names import one_line
from graphs.schema import SCHEMA_VERSION

FORMAT = "clt-tracer store"

FILES = "files.json"
"""In a copy of a store that was fetched: names its files, see `graphs.remote`."""

_DESCRIPTION = "store.json"


def check_folder(folder: Path) -> None:
    """Raise `GraphError` unless the folder is a store that this program reads, or nothing yet."""
    with file_errors_as_graph_errors(f"open {folder}"):
        if not folder.exists():
            return
    if not folder.is_dir():
        raise GraphError(f"{folder} is a file, not a folder of graphs; give another path.")
    if is_foreign(folder):
        raise GraphError(f"{folder} belongs to something else: it has no {_DESCRIPTION}; give a new or empty folder.")
    if (folder / _DESCRIPTION).exists():
        _read_version(folder)


def is_foreign(folder: Path) -> bool:
    """Whether there is something in the folder, but no store."""
    with file_errors_as_graph_errors(f"read {folder}"):
        entries = [path for path in folder.iterdir() if not is_temporary(path)]
    # store.json is written before anything else
    return bool(entries) and not (folder / _DESCRIPTION).exists()


def create_folder(folder: Path) -> None:
    """Make the folder a store of this version, before anything is written to it; nothing else may be in it.

    An older program must not open it then: it would miss graphs in packs, and take new columns for damage.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _DESCRIPTION).exists() or _read_version(folder) < SCHEMA_VERSION:
        content = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION})
        write_atomically(folder / _DESCRIPTION, partial(Path.write_text, data=content + os.linesep, encoding="utf-8"))


def check_is_store(folder: Path) -> None:
    """Raise `GraphError` if the folder is no store, or none yet."""
    check_folder(folder)
    if not (folder / _DESCRIPTION).exists():
        raise GraphError(f"{folder} is no store: it has no {_DESCRIPTION}; name a folder that graphs were saved in.")


def check_writable(folder: Path, parts: Sequence[str] = ()) -> None:
    """Raise `GraphError` unless the folder is a store of its own or nothing yet, and may be written to.

    So may these folders in it, where they are there already.
    """
    check_folder(folder)
    if (folder / FILES).exists():
        raise GraphError(
            f"{folder} is a copy of a store that was pushed, and only read; write to the store and push it again."
        )
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    for place in (nearest, *(folder / part for part in parts if (folder / part).is_dir())):
        if not os.access(place, os.W_OK | os.X_OK):
            raise GraphError(
                f"{folder} cannot be written to: no permission in {place}; allow it, or use another folder."
            )


def _read_version(folder: Path) -> int:
    path = folder / _DESCRIPTION
    try:
        description = json.loads(path.read_text("utf-8"))
        is_ours = isinstance(description, dict) and description.get("format") == FORMAT
        version = int(description["schema_version"]) if is_ours else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise GraphError(f"{path} is unreadable ({one_line(error)}); restore it, or give another folder.") from error
    if not is_ours:
        raise GraphError(f"{folder} belongs to something else: {path.name} is of another program; give another folder.")
    if version > SCHEMA_VERSION:
        raise GraphError(
            f"{folder} has schema version {version}, and this program knows versions up to {SCHEMA_VERSION}; "
            "upgrade the program."
        )
    return version
