"""What a trace's settings ask to explain: texts, words of the prompt and files → targets."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tracer.config import TraceConfig, parse_feature
from tracer.errors import TraceError
from tracer.local import LocalReplacementModel
from tracer.replacement import ReplacementModel
from tracer.targets import (
    Targets,
    difference_target,
    direction_target,
    feature_target,
    join,
    token_targets,
    top_targets,
)


def choose_targets(replacement: ReplacementModel, local: LocalReplacementModel, config: TraceConfig) -> Targets:
    """Everything the settings name, or the most probable tokens if they name nothing."""
    position = config.position
    asked = _named_tokens(replacement, local, config) if config.target else []
    for plus, minus in config.target_difference:
        asked.append(_difference(replacement, local, plus, one_token(replacement, minus), position))
    for text in config.target_feature:
        layer, feature, at = parse_feature(text)
        asked.append(feature_target(local, layer, feature, position=position if at is None else at))
    for file in config.target_direction:
        asked.append(direction_target(local, read_direction(Path(file)), Path(file).stem, position=position))
    if asked:
        return join(*asked)
    return top_targets(
        local, replacement.token_text, max_logits=config.max_logits, logit_mass=config.logit_mass, position=position
    )


def _named_tokens(replacement: ReplacementModel, local: LocalReplacementModel, config: TraceConfig) -> list[Targets]:
    position = config.position
    if config.target_minus is not None:
        minus = one_token(replacement, config.target_minus)
        return [_difference(replacement, local, text, minus, position) for text in config.target]
    named = tuple(one_token(replacement, text) for text in config.target)
    return [token_targets(local, named, tuple(map(replacement.token_text, named)), position=position)]


def _difference(
    replacement: ReplacementModel, local: LocalReplacementModel, text: str, minus: int, position: int | str
) -> Targets:
    plus = one_token(replacement, text)
    name = f"{replacement.token_text(plus)} − {replacement.token_text(minus)}"
    return difference_target(local, plus, minus, name, position=position)


def one_token(replacement: ReplacementModel, text: str) -> int:
    """The token that is exactly this text."""
    ids = replacement.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = " ".join(replacement.token_text(i) for i in ids)
        raise TraceError(
            f"target {text!r} is {len(ids)} tokens ({pieces}); name a text that is one token of this model."
        )
    if ids[0] == replacement.tokenizer.unk_token_id and text != replacement.tokenizer.unk_token:
        raise TraceError(
            f"target {text!r} is no token of this model, which reads it as {replacement.token_text(ids[0])!r}; name a "
            "text that is one of its tokens."
        )
    return ids[0]


def read_direction(file: Path) -> Tensor:
    """The one array of a .npy or .safetensors file; neither can hold code."""
    if file.suffix not in (".npy", ".safetensors"):
        raise TraceError(f"{file} is no direction; give a .npy or .safetensors file with one vector.")
    try:
        arrays = [_numbers(file)] if file.suffix == ".npy" else list(load_file(file).values())
    except (OSError, ValueError, SafetensorError) as error:
        raise TraceError(f"{file} cannot be read as a direction ({error}); give a file with one vector.") from error
    if len(arrays) != 1:
        raise TraceError(f"{file} holds {len(arrays)} tensors; give a file with one vector.")
    return arrays[0]


def _numbers(file: Path) -> Tensor:
    with file.open("rb") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype.kind not in "fiu":
        raise TraceError(f"{file} holds values of type {array.dtype}; give a file with one vector of real numbers.")
    return torch.from_numpy(array.astype(np.float64))
