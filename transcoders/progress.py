"""The folder of a training run: its settings, and the latest checkpoint, from which any number of processes go on.

run.json                   settings and data; a run is resumed with the same only
metrics.parquet            one row every so many steps
checkpoint/step-<n>/       state.json, common.safetensors, stream-<i>.safetensors and, for every process's features,
                           features-<first>-<last>.safetensors; renamed into place when all of it is on the disk
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from transcoders.config import TrainConfig
from transcoders.corpus import Corpus
from transcoders.errors import TranscoderError
from transcoders.files import sync, told_in_one_line, write_atomically
from transcoders.fingerprint import fingerprint
from transcoders.parallel import Place, wait_for_all

SETTINGS, METRICS, STATE, COMMON = "run.json", "metrics.parquet", "state.json", "common.safetensors"
ADDED = ("dtype", "model_weights", "corpus_content")
"""Settings that runs from before these were noted go on without."""


def settings_of(model: PreTrainedModel, model_name: str, corpus: Corpus, config: TrainConfig) -> dict[str, Any]:
    """All that decides the result of a run."""
    return asdict(config) | {
        "model": model_name, "model_weights": fingerprint(model), "dtype": str(model.dtype).removeprefix("torch."),
        "corpus": corpus.name, "corpus_content": corpus.content,
    }  # fmt: skip


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note a new run's settings. Raises `TranscoderError` where a run with others is there already."""
    path = folder / SETTINGS
    if not path.is_file():
        with told_in_one_line(f"write {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(settings, indent=2, default=str) + "\n"
            write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
        return
    known = read_settings(folder)
    asked = json.loads(json.dumps(settings, default=str))
    others = [
        f"{name} was {known.get(name)!r} and is {asked.get(name)!r}"
        for name in dict.fromkeys([*known, *asked])
        if known.get(name) != asked.get(name) and (name in known or name not in ADDED)
    ]
    if others:
        raise TranscoderError(
            f"{folder} holds a run with other settings: {'; '.join(others)}. Give the same to go on with it, or "
            "another --out."
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run was started with."""
    try:
        return json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TranscoderError(
            f"{folder / SETTINGS} is unreadable ({error}); give the folder of a training run."
        ) from error


def latest(folder: Path) -> Path | None:
    """The last checkpoint that is whole."""
    found = [path for path in (folder / "checkpoint").glob("step-*") if (path / STATE).is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def write_checkpoint(
    folder: Path, place: Place, features: range, sharded: dict[str, Tensor], common: dict[str, Tensor],
    streams: dict[int, dict[str, Tensor]], state: dict[str, Any],
) -> None:  # fmt: skip
    """Every process writes its part; the first one puts the whole into place and removes what was there before.

    `sharded` tensors have the process's features as their second axis ("layer feature …") or, of decoders, first.
    """
    parent = folder / "checkpoint"
    unfinished, path = parent / ".unfinished", parent / f"step-{state['step']}"
    with told_in_one_line(f"write a checkpoint to {parent}"):
        if place.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        wait_for_all(place)
        try:
            if place.data_part == 0:
                _save(sharded, unfinished / f"features-{features.start}-{features.stop}.safetensors")
            if place.shard == 0:
                for number, tensors in streams.items():
                    _save(tensors, unfinished / f"stream-{number}.safetensors")
            if place.is_first:
                _save(common, unfinished / COMMON)
                (unfinished / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
                sync(unfinished / STATE)
            wait_for_all(place)
        except BaseException:
            if place.size == 1:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if place.is_first:
            before = [old for old in parent.glob("step-*") if old != path]
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            for old in before:
                shutil.rmtree(old, ignore_errors=True)
    wait_for_all(place)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text("utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one of its files."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_features(checkpoint: Path, features: range) -> dict[str, Tensor]:
    """The tensors of some features, whatever number of processes wrote them."""
    parts: dict[str, list[Tensor]] = {}
    for path in sorted(checkpoint.glob("features-*.safetensors"), key=_first_feature):
        first, last = _first_feature(path), _last_feature(path)
        if last <= features.start or features.stop <= first:
            continue
        here = slice(max(features.start, first) - first, min(features.stop, last) - first)
        with _opened(path) as file:
            for name in file.keys():
                part = file.get_slice(name)
                parts.setdefault(name, []).append(part[here] if feature_axis(name) == 0 else part[:, here])
    return {name: torch.cat(values, dim=feature_axis(name)) for name, values in parts.items()}


def feature_axis(name: str) -> int:
    """Decoders have features first, everything else layers before them."""
    return 0 if "W_dec" in name else 1


def read_weight(checkpoint: Path, name: str) -> Tensor:
    """One weight of all features."""
    parts = [part[:] for part in _parts(checkpoint, name)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=feature_axis(name))


def read_layer(checkpoint: Path, name: str, layer: int) -> Float[Tensor, "feature ..."]:
    """One layer of a weight of all features that has layers first."""
    parts = [part[layer] for part in _parts(checkpoint, name)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(checkpoint: Path, name: str) -> Iterator[Any]:
    """A weight's part in every process's file; values are read where it is indexed."""
    for path in sorted(checkpoint.glob("features-*.safetensors"), key=_first_feature):
        with _opened(path) as file:
            yield file.get_slice(f"weight:{name}")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with told_in_one_line(f"read {path}"), safe_open(path, framework="pt") as file:
        yield file


def _first_feature(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _last_feature(path: Path) -> int:
    return int(path.stem.split("-")[2])
