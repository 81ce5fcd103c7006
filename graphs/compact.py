"""Move saved graphs into packs, while others save, delete, read and are killed.

1. Under the lock of packs/: list folders, deletions and packs, and write new packs beside the old ones.
2. Under the lock of packs/deleted/, which every deletion takes: note as deleted what was deleted meanwhile, and put
   packs.json in place. Up to here nothing that readers use has changed; a reader who finds no folder looks there.
3. Remove the folders that are still as they were read, and the old packs, unless somebody reads: then the next time.

A graph's folder comes before its pack, so that between 2 and 3 no graph is doubled, and a later save counts at once.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from graphs.errors import GraphError
from graphs.files import is_temporary, locked_folder, new_nonce, sync_folder, unread, write_atomically
from graphs.folder import DAMAGE, HEAD, Stamp, read_version, remove_saved, stamp
from graphs.names import is_graph_id, one_line
from graphs.pack_files import PackWriter, Saved, saved_in_folder, saved_in_packs
from graphs.packs import (
    DELETED,
    MANIFEST,
    PACKS,
    PARTS,
    Pack,
    deleted_versions,
    hidden_graphs,
    read_manifest,
    read_packs,
)

PACK_EDGES = 1 << 24
"""A pack is closed when it has more edges; one with half as many, and nothing dead in it, is left as it is."""

_PATIENCE = 2.0  # seconds to wait for readers in all, before folders and old packs are left to the next time


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    n_moved: int
    """Graphs that had folders of their own."""
    n_graphs: int
    """Graphs in packs now."""
    n_edges: int
    n_bytes: int
    """Size of the packs."""
    damaged: dict[str, str]
    """Graphs that were left where they are, and why."""


@dataclass
class _Plan:
    """What is where, and what becomes of it."""

    kept: list[Pack]
    changes: bool
    """Whether there is anything to write."""
    repacked: dict[str, Pack]
    """Graphs of packs that are written anew."""
    in_folders: list[str]
    """Graphs in folders whose version is in no pack."""
    done: dict[str, Stamp] = field(default_factory=dict)
    """Graphs whose folder, if it still has this stamp, holds what a pack holds too."""
    versions: dict[str, str] = field(default_factory=dict)
    """The version of each graph that was read from a folder."""
    damaged: dict[str, str] = field(default_factory=dict)


def compact_folder(folder: Path, on_progress: Callable[[int, int], None]) -> Compacted:
    """Put the graphs of the store into packs; `on_progress` hears how many of how many are written."""
    with locked_folder(folder / PACKS):
        _sweep(folder)
        plan = _plan(folder)
        if plan.changes:
            _write(folder, plan, on_progress)
        _remove_folders(folder, {name: None for name in _folders(folder, saved=False)} | plan.done)
        _sweep(folder)
        packs = read_packs(folder, {})
        hidden = hidden_graphs(packs, deleted_versions(folder))
        return Compacted(
            n_moved=len(plan.versions),
            n_graphs=sum(len(pack.index) for pack in packs) - len(hidden),
            n_edges=sum(_n_edges(pack) for pack in packs),
            n_bytes=sum(path.stat().st_size for pack in packs for path in map(pack.path, PARTS) if path.exists()),
            damaged=plan.damaged,
        )


def mark_deleted(folder: Path, graph_id: str, version: str) -> None:
    """Hide this version of a graph, which is in a pack; needs the lock of packs/deleted/."""
    (folder / PACKS / DELETED / f"{graph_id}.{version}").touch()
    sync_folder(folder / PACKS / DELETED)


def _plan(folder: Path) -> _Plan:
    saved = _folders(folder, saved=True)
    deleted = deleted_versions(folder)  # before the packs
    packs = read_packs(folder, {})
    packed = {graph_id: version for pack in packs for graph_id, version in pack.versions.items()}
    _require_indexes(folder, packs)
    out_of_reach = {graph_id for pack in packs if pack.problem for graph_id in pack.places}
    plan = _Plan([], False, {}, [name for name in saved if name not in packed])
    for name in saved:
        if name in packed and name not in out_of_reach:
            with suppress(*DAMAGE):  # a damaged one stays, and so does the version in the pack
                before = stamp(folder / "graphs" / name / HEAD)
                if read_version(folder / "graphs" / name) == packed[name]:
                    plan.done[name] = before
                else:
                    plan.in_folders.append(name)
    whole = [pack for pack in packs if not pack.problem]
    dead = hidden_graphs(packs, deleted).union(plan.in_folders)
    rewritten = [pack for pack in whole if dead & pack.places.keys()]
    small = [pack for pack in whole if pack not in rewritten and _n_edges(pack) < PACK_EDGES // 2]
    plan.changes = bool(plan.in_folders or rewritten or len(small) > 1)
    if plan.changes:
        rewritten += small
    plan.kept = [pack for pack in packs if pack not in rewritten]
    hidden = hidden_graphs(packs, deleted)
    plan.repacked = {name: pack for pack in rewritten for name in pack.places if name not in hidden}
    return plan


def _require_indexes(folder: Path, packs: list[Pack]) -> None:
    for pack in packs:
        if pack.problem and not len(pack.index):
            raise GraphError(
                f"{pack.problem}; restore {pack.path('graphs')} from a copy, or take {pack.name} out of "
                f"{folder / PACKS / MANIFEST}, which gives up its graphs."
            )


def _folders(folder: Path, *, saved: bool) -> list[str]:
    """Folders in which a graph is, or those that a killed process left without one."""
    parent = folder / "graphs"
    if not parent.is_dir():
        return []
    return sorted(path.name for path in parent.iterdir() if is_graph_id(path.name) and (path / HEAD).exists() == saved)


def _n_edges(pack: Pack) -> int:
    return int(pack.index["n_edges"].to_numpy().sum())


def _write(folder: Path, plan: _Plan, on_progress: Callable[[int, int], None]) -> None:
    """Write new packs and commit them."""
    written: list[PackWriter] = []
    names = sorted({*plan.in_folders, *plan.repacked})
    try:
        for done, saved in enumerate(_saved(folder, plan, names), start=1):
            if not written or written[-1].n_edges > PACK_EDGES:
                written.append(PackWriter(folder / PACKS, new_nonce()))
            written[-1].add(saved)
            if written[-1].n_edges > PACK_EDGES:
                written[-1].close()
            on_progress(done, len(names))
        if written and written[-1].n_edges <= PACK_EDGES:
            written[-1].close()
        sync_folder(folder / PACKS)
        _commit(folder, plan, [*(pack.name for pack in plan.kept), *(writer.name for writer in written)])
    except BaseException:
        committed = read_manifest(folder)
        for writer in written:
            if writer.name not in committed:
                writer.discard()
        raise


def _saved(folder: Path, plan: _Plan, names: list[str]) -> Iterator[Saved]:
    """The graphs by id, each as it is now; one that is damaged or gone comes from its pack, if it is in one."""
    in_folders = set(plan.in_folders)
    with saved_in_packs() as read_packed:
        for name in names:
            if name in in_folders:
                path = folder / "graphs" / name
                try:
                    saved = saved_in_folder(path)
                except DAMAGE as error:
                    if (path / HEAD).exists():
                        plan.damaged[name] = one_line(error)
                else:
                    assert saved.stamp is not None
                    plan.done[name], plan.versions[name] = saved.stamp, saved.version
                    yield saved
                    continue
            if name in plan.repacked:
                pack = plan.repacked[name]
                try:
                    saved = read_packed(pack, name)
                except DAMAGE as error:
                    raise GraphError(
                        f"graph {name} in pack {pack.name} is damaged: {one_line(error)}; restore the pack from a "
                        "copy, or delete the graph."
                    ) from error
                yield saved


def _commit(folder: Path, plan: _Plan, names: list[str]) -> None:
    with locked_folder(folder / PACKS / DELETED):
        for name, version in plan.versions.items():
            if not (folder / "graphs" / name / HEAD).exists():
                mark_deleted(folder, name, version)
        manifest = json.dumps({"packs": names})
        write_atomically(folder / PACKS / MANIFEST, partial(Path.write_text, data=manifest, encoding="utf-8"))
        packs = read_packs(folder, {})
        if not any(pack.problem for pack in packs):
            present = {(graph_id, version) for pack in packs for graph_id, version in pack.versions.items()}
            for graph_id, version in deleted_versions(folder) - present:
                (folder / PACKS / DELETED / f"{graph_id}.{version}").unlink(missing_ok=True)


def _remove_folders(folder: Path, done: Mapping[str, Stamp | None]) -> None:
    """Remove what is in a pack now or what a kill left; while somebody reads, it stays until the next compaction."""
    until = time.monotonic() + _PATIENCE
    for name, saved in done.items():
        path = folder / "graphs" / name
        while path.exists():
            with locked_folder(path), unread(path.parent) as free:
                if free:
                    remove_saved(path, saved)
                    break
            if time.monotonic() > until:
                return
            time.sleep(0.01)


def _sweep(folder: Path) -> None:
    """Remove packs that are no longer the store's, and what killed compactions left; needs the lock of packs/."""
    names = read_manifest(folder)
    files = {folder / PACKS / f"{part}-{name}.parquet" for name in names for part in PARTS}
    parent = folder / "graphs"
    until = time.monotonic() + _PATIENCE
    while parent.is_dir():
        with unread(parent) as free:
            if free:
                for path in (folder / PACKS).iterdir():
                    left = path.name.partition("-")[0] in PARTS and path.suffix == ".parquet" and path not in files
                    if left or is_temporary(path):
                        path.unlink(missing_ok=True)
                return
        if time.monotonic() > until:
            return
        time.sleep(0.01)
