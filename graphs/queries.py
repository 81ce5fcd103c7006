"""SQL that was saved by name in a store: queries/<name>.sql."""

import re
from functools import partial
from pathlib import Path

from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, write_atomically
from graphs.names import shown, some

_MOST_BYTES = 256 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def write_query(folder: Path, name: str, sql: str) -> None:
    """Save the query under the name, in place of what had it."""
    path = _path(folder, name)
    if len(sql.encode("utf-8", "replace")) >= _MOST_BYTES:
        raise GraphError(f"query {name} has more than {_MOST_BYTES >> 10} kB; put its data into a table of its own.")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(Path.write_text, data=sql.strip() + "\n", encoding="utf-8"))


def read_query(folder: Path, name: str) -> str:
    """The query of this name. Raises `GraphError` if there is none."""
    path = _path(folder, name)
    try:
        # a link may lead out of the store, which need not be the reader's own
        if path.is_symlink() or path.stat().st_size > _MOST_BYTES:
            raise ValueError("no file of a query")
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise GraphError(f"there is no readable query {shown(name)} in {folder}; {_known(folder)}.") from error


def check_query(folder: Path, name: str) -> None:
    """Raise `GraphError` if there is no query of this name."""
    if not _path(folder, name).exists():
        raise GraphError(f"there is no query {shown(name)} in {folder}; {_known(folder)}.")


def delete_query(folder: Path, name: str) -> None:
    """Remove the query of this name, if there is one."""
    with file_errors_as_graph_errors(f"delete query {name} from {folder}"):
        _path(folder, name).unlink(missing_ok=True)


def query_names(folder: Path) -> list[str]:
    """The names of all saved queries."""
    return sorted(path.stem for path in (folder / "queries").glob("*.sql") if _NAME.fullmatch(path.stem))


def _known(folder: Path) -> str:
    known = query_names(folder)
    return f"saved are {some(known)}" if known else "none was saved yet"


def _path(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise GraphError(
            f"{shown(name)} is no name for a query; a name has up to 64 letters, digits, '-' and '_', and begins with "
            "a letter or digit."
        )
    return folder / "queries" / f"{name}.sql"
