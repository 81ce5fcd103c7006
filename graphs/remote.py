"""A store in a remote folder, as on S3: pushed there, and fetched into a local folder to be read.

Every file lies there under its name with its checksum in it, so that none is ever overwritten, and files.json says
which of them are the store; putting that in place is the commit. Anything that fsspec opens will do, also a plain web
server, which cannot be pushed to.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from graphs.description import FILES, check_folder
from graphs.errors import GraphError
from graphs.files import is_temporary, locked_folder, write_atomically
from graphs.folder import HEAD, Stamp, stamp
from graphs.names import digest, one_line, shown
from graphs.packs import MANIFEST

PUSHED = "pushed"
"""Folder of the store: what files.json said when the store was last pushed, for each place."""

_FORMAT = "clt-tracer files 1"
_CHECKSUM = re.compile("[0-9a-f]{64}")
_CHECKSUM_IN_NAME = 16  # characters
_ATTEMPTS = 10  # while others write
_SAFE_NAME = re.compile(r"[\w=-][\w.=-]*(/[\w=-][\w.=-]*)*")
_BUCKETS = {"s3", "gs", "az", "abfs"}  # have no folders, and would make a bucket of a mistyped name
# errors of the file systems' own libraries that are neither OSError nor ValueError
_FOREIGN_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError"),
    ("google.api_core.exceptions", "GoogleAPIError"), ("azure.core.exceptions", "AzureError"),
)  # fmt: skip

_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One file of a store."""

    n_bytes: int
    checksum: str


@dataclass(frozen=True)
class Sent:
    """What a push did."""

    n_files: int
    n_bytes: int
    n_unchanged: int
    n_removed: int


def push(folder: Path, url: str, *, replace: bool = False, on_progress: _Progress = lambda done, total: None) -> Sent:
    """Make the remote folder hold what the store holds; readers see the old store or the new one.

    What somebody else pushed there meanwhile is replaced only if `replace`. `on_progress` hears bytes. Raises
    `GraphError`.
    """
    check_folder(folder)
    if not folder.exists():
        raise GraphError(f"{folder} does not exist; push a folder of graphs.")
    record = folder / PUSHED / f"{digest([url])}.json"
    intended = record.with_suffix(".next.json")  # it may have been put there by a push that was killed then
    with _told_in_one_line(f"push {folder} to {url}"), locked_folder(record.parent):
        system, root = url_to_fs(url)
        there = _read_remote(system, root, url) or {}
        if there and there not in (_read_local(record), _read_local(intended)) and not replace:
            raise GraphError(
                f"{url} holds {len(there)} files that were not pushed from {folder}; give another address, or "
                "--replace to put this store in their place."
            )
        here = _settled(folder, lambda entries: _upload(system, root, folder, entries, there, on_progress))
        content = _written(here)
        write_atomically(intended, partial(Path.write_text, data=content, encoding="utf-8"))
        system.pipe_file(f"{root}/{FILES}", content.encode())
        intended.replace(record)
        for name in {_remote_name(*file) for file in there.items() - here.items()}:
            with suppress(FileNotFoundError):
                system.rm_file(f"{root}/{name}")
    changed = [entry for name, entry in here.items() if there.get(name) != entry]
    gone = there.keys() - here.keys()
    return Sent(len(changed), sum(entry.n_bytes for entry in changed), len(here) - len(changed), len(gone))


def fetch(url: str, folder: Path, *, on_progress: _Progress = lambda done, total: None) -> None:
    """Make the folder hold what was pushed there; only files that changed are fetched. Raises `GraphError`.

    Nothing else may write to the folder.
    """
    with _told_in_one_line(f"fetch {url} into {folder}"), locked_folder(folder):
        system, root = url_to_fs(url)
        have, wanted = _read_local(folder / FILES), None
        for _ in range(_ATTEMPTS):
            before, wanted = wanted, _read_remote(system, root, url)
            if wanted is None:
                raise GraphError(f"{url} has no {FILES}, so no store was pushed there; use trace push.")
            if wanted == have:
                return
            if wanted == before:
                raise GraphError(f"{url} does not hold what its {FILES} says; push the store again.")
            if _download(system, root, folder, wanted, have, on_progress):
                break
        else:
            raise GraphError(f"{url} is pushed to faster than it can be fetched; ask again later.")
        for name in sorted(have.keys() - wanted.keys(), key=_is_data):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / FILES, partial(Path.write_text, data=_written(wanted), encoding="utf-8"))


def _settled(folder: Path, send: Callable[[dict[str, Entry]], None]) -> dict[str, Entry]:
    """The store's files once `send` has sent all of them as they still are."""
    for _ in range(_ATTEMPTS):
        before = _stamps(folder)
        try:
            entries = {name: _entry(folder / name) for name in before}
            send(entries)
        except FileNotFoundError:
            if _stamps(folder) == before:
                raise
            continue
        if _stamps(folder) == before:
            return entries
    raise GraphError(f"{folder} is written to faster than it can be pushed; push when nobody traces into it.")


def _stamps(folder: Path) -> dict[str, Stamp]:
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not is_temporary(path) and name != FILES and not name.startswith(f"{PUSHED}/"):
            found[name] = stamp(path)
    return found


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return Entry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _upload(
    system: AbstractFileSystem, root: str, folder: Path, entries: Mapping[str, Entry], there: Mapping[str, Entry],
    on_progress: _Progress,
) -> None:  # fmt: skip
    changed = {name: entry for name, entry in entries.items() if there.get(name) != entry}
    done, total = 0, sum(entry.n_bytes for entry in changed.values())
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    if _BUCKETS.isdisjoint(protocols):
        for parent in {f"{root}/{name}".rpartition("/")[0] for name in changed}:
            system.makedirs(parent, exist_ok=True)
    for name, entry in changed.items():
        on_progress(done, total)
        system.put_file(str(folder / name), f"{root}/{_remote_name(name, entry)}")
        done += entry.n_bytes


def _download(
    system: AbstractFileSystem, root: str, folder: Path, wanted: Mapping[str, Entry], have: Mapping[str, Entry],
    on_progress: _Progress,
) -> bool:  # fmt: skip
    """Whether every file was there as it should be."""
    missing = [name for name in sorted(wanted, key=_is_data, reverse=True) if have.get(name) != wanted[name]]
    done, total = 0, sum(wanted[name].n_bytes for name in missing)

    def get(name: str, path: Path) -> None:
        system.get_file(f"{root}/{_remote_name(name, wanted[name])}", str(path))
        if _entry(path) != wanted[name]:
            raise FileNotFoundError(name)

    for name in missing:
        on_progress(done, total)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(folder / name, partial(get, name))
        except FileNotFoundError:
            return False
        done += wanted[name].n_bytes
    return True


def _remote_name(name: str, entry: Entry) -> str:
    """Where the file lies: packs/edges-1a2b.parquet as packs/edges-1a2b.<checksum>.parquet."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}.{entry.checksum[:_CHECKSUM_IN_NAME]}{path.suffix}"))


def _is_data(name: str) -> bool:
    """Whether a reader of the local copy looks for the file only after another has named it."""
    return name.rpartition("/")[2] not in (HEAD, MANIFEST)


def _read_remote(system: AbstractFileSystem, root: str, url: str) -> dict[str, Entry] | None:
    try:
        return _parsed(system.cat_file(f"{root}/{FILES}"), f"{url}/{FILES}")
    except FileNotFoundError:
        return None


def _read_local(path: Path) -> dict[str, Entry]:
    return _parsed(path.read_bytes(), str(path)) if path.exists() else {}


def _parsed(content: str | bytes, place: str) -> dict[str, Entry]:
    try:
        read = json.loads(content)
        if read["format"] != _FORMAT:
            raise ValueError(f"its format is {shown(str(read['format']))}, not {shown(_FORMAT)}")
        entries = {name: Entry(int(size), str(checksum)) for name, (size, checksum) in read["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise GraphError(f"{place} is unreadable ({one_line(error)}); push the store again.") from error
    for name, entry in entries.items():
        if not (_SAFE_NAME.fullmatch(name) and _CHECKSUM.fullmatch(entry.checksum)):
            raise GraphError(f"{place} names {shown(name)}, which is no file of a store; do not trust it.")
    return entries


def _written(entries: Mapping[str, Entry]) -> str:
    files = {name: [entry.n_bytes, entry.checksum] for name, entry in sorted(entries.items())}
    return json.dumps({"format": _FORMAT, "files": files}, indent=0) + "\n"


@contextmanager
def _told_in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except GraphError:
        raise
    except (OSError, ValueError, ImportError, NotImplementedError, *_foreign_errors()) as error:
        reason = one_line(error) or type(error).__name__
        raise GraphError(f"cannot {what}: {reason}; check the address and what it lets you do.") from error


def _foreign_errors() -> tuple[Any, ...]:
    """Error classes of those libraries that were loaded; the others cannot have raised any."""
    loaded = ((sys.modules.get(module), name) for module, name in _FOREIGN_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if module is not None)
