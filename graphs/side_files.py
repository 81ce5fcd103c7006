"""Files beside a store's graphs that queries leave out because they cannot be read: nothing else tells of them."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from graphs.additions import ADDITIONS, added_files
from graphs.annotations import read_annotations
from graphs.comparisons import comparison_contents
from graphs.errors import GraphError
from graphs.folder import DAMAGE
from graphs.names import one_line


@dataclass(frozen=True)
class DamagedFile:
    """A file whose rows no query finds."""

    path: Path
    reason: str


def damaged_files(folder: Path) -> list[DamagedFile]:
    """The unreadable ones of features, comparisons, annotations and what checks added; they are looked at briefly."""
    return [*_features(folder), *_comparisons(folder), *_annotations(folder), *_additions(folder)]


def _features(folder: Path) -> Iterator[DamagedFile]:
    yield from _unreadable((folder / "features").glob("[!.]*.parquet"))


def _comparisons(folder: Path) -> Iterator[DamagedFile]:
    # before the readable ones, so that none that is saved meanwhile passes for damaged
    heads = [path for path in (folder / "comparisons").glob("[!.]*.parquet") if "." not in path.stem]
    readable = {name for _, name in comparison_contents(folder)["comparison_nodes"].files} if heads else set()
    for head in sorted(heads):
        if head.stem not in readable:
            files = [head, *head.parent.glob(f"{head.stem}.*.parquet")]
            yield from _unfit(head, files, "it does not fit its nodes and edges, or these are gone")


def _annotations(folder: Path) -> Iterator[DamagedFile]:
    for path in sorted((folder / "annotations").glob("[!.]*.json")):
        try:
            read_annotations(folder, path.stem)
        except GraphError:
            yield DamagedFile(path, "it does not hold what is written there")


def _additions(folder: Path) -> Iterator[DamagedFile]:
    parent = folder / "graphs"
    # texts and no `Path`s: of ten thousand graphs hardly any has such a file
    names = os.listdir(parent) if parent.is_dir() else []
    places = (f"{parent}/{name}/{table}.parquet" for name in names for table in ADDITIONS)
    found = [Path(place) for place in places if os.path.exists(place)]
    readable = {path for _, path, _ in added_files(parent)} if found else set()
    for path in sorted(set(found) - readable):
        yield from _unfit(path, [path], "it does not have the columns of its table")


def _unfit(path: Path, files: Iterable[Path], reason: str) -> Iterator[DamagedFile]:
    """What is wrong with a file that could not be used: what cannot be read of it, or else the reason."""
    found = list(_unreadable(files))
    if found or path.exists():  # or it was deleted just now
        yield from found or [DamagedFile(path, reason)]


def _unreadable(paths: Iterable[Path]) -> Iterator[DamagedFile]:
    for path in sorted(paths):
        try:
            pq.read_metadata(path)
        except FileNotFoundError:
            continue  # it was replaced just now
        except DAMAGE as error:
            yield DamagedFile(path, one_line(error))
