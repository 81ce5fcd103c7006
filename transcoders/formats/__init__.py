"""Readers of the layouts in which transcoders are published: one module each, docs/formats.md has the facts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transcoders.errors import TranscoderError
from transcoders.formats import (
    circuit_tracer,
    clt_forge,
    crosslayer_transcoder,
    gemma_scope,
    language_model_saes,
    sparsify,
)
from transcoders.formats.checks import checked
from transcoders.stored import Stored


@dataclass(frozen=True)
class Format:
    """A layout: how its folders are told from others, and how they are read."""

    name: str
    is_one: Callable[[Path], bool]
    read: Callable[[Path], Stored]


FORMATS = (
    Format("circuit-tracer", circuit_tracer.is_one, circuit_tracer.read),
    Format("Gemma Scope", gemma_scope.is_one, gemma_scope.read),
    Format("CLT-Forge", clt_forge.is_one, clt_forge.read),
    Format("Language-Model-SAEs", language_model_saes.is_one, language_model_saes.read),
    Format("crosslayer-transcoder", crosslayer_transcoder.is_one, crosslayer_transcoder.read),
    Format("sparsify", sparsify.is_one, sparsify.read),
)


def open_folder(folder: Path, **overrides: str) -> Stored:
    """A transcoder in any known layout; `overrides` replace what its files say, or leave unsaid, about hooks."""
    if "*" not in str(folder) and not folder.is_dir():
        raise TranscoderError(f"{folder} is no folder; expected a transcoder folder or a Hub id such as hf://org/repo.")
    for layout in FORMATS:
        if layout.is_one(folder):
            stored = layout.read(folder)
            return checked(replace(stored, config=replace(stored.config, **overrides)), folder)
    raise TranscoderError(
        f"{folder} is in no known transcoder layout ({', '.join(layout.name for layout in FORMATS)}); "
        "docs/formats.md lists the files that each of them has."
    )
