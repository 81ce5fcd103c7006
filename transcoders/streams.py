"""Activations to learn from: streams of text through a frozen model, scaled, shuffled, without attention sinks."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transcoders.activations import mlp_activations
from transcoders.config import TrainConfig
from transcoders.corpus import Corpus, pack
from transcoders.errors import TranscoderError
from transcoders.files import told_in_one_line, write_atomically
from transcoders.fingerprint import fingerprint
from transcoders.scales import Scales, check_finite, measure_scales
from transcoders.shuffle import Activations, Batch, ShuffleBuffer

FORWARD_TOKENS = 8192
"""Tokens of one forward pass of the model."""
SAMPLE = 16_384
LARGEST_SAMPLE = 65_536
"""Tokens that scales are measured on, and that features start from: four for each feature, within these bounds."""


@runtime_checkable
class Stream(Protocol):
    """One stream of activations."""

    device: torch.device

    def next(self, n: int) -> Batch:
        """The next tokens."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that is needed to go on: plain values, and tensors."""
        ...

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from there."""
        ...


Forward = Callable[[Int[Tensor, "sequence position"]], Activations]


def forward_of(model: PreTrainedModel, config: TrainConfig, first_token: int | None) -> Forward:
    """What MLPs read and write at all tokens but the first ones, which are attention sinks, of some sequences."""

    def forward(tokens: Int[Tensor, "sequence position"]) -> Activations:
        tokens = tokens.to(model.device)
        keep = torch.ones_like(tokens, dtype=torch.bool) if first_token is None else tokens != first_token
        keep[:, 0] = False
        inputs, outputs = mlp_activations(model, tokens, keep, config.reads, config.writes)
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[keep]
        return inputs, outputs, position

    return forward


def cached(
    forward: Forward, model: PreTrainedModel, config: TrainConfig, first_token: int | None, folder: Path
) -> Forward:
    """The same, but what was computed once is read from files in the folder, onto the model's device.

    A file's name holds all that decides what is in it: the model's weights and precision, the hooks, the token that
    is left out, and the tokens.
    """
    precision = str(model.dtype).removeprefix("torch.")
    folder = folder / f"{fingerprint(model)}-{precision}-{config.reads}-{config.writes}-{first_token}"

    def read_or_make(tokens: Int[Tensor, "sequence position"]) -> Activations:
        content = f"{tuple(tokens.shape)} ".encode() + tokens.numpy().tobytes()
        path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.safetensors"
        if path.is_file():
            with told_in_one_line(f"read {path}"):
                held = load_file(path, device=str(model.device))
            return held["inputs"], held["outputs"], held["position"]
        inputs, outputs, position = forward(tokens)
        made = {"inputs": inputs.cpu(), "outputs": outputs.cpu(), "position": position.cpu()}
        with told_in_one_line(f"write {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(save_file, made))
        return inputs, outputs, position

    return read_or_make


def scaled(forward: Forward, scales: Scales, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Forward:
    """The same in the units of training, without tokens that are far larger than usual."""

    def forward_scaled(tokens: Int[Tensor, "sequence position"]) -> Activations:
        inputs, outputs, position = (part.to(device) for part in forward(tokens))
        sizes = inputs.float().norm(dim=-1)
        check_finite(sizes, outputs)
        keep = (sizes <= config.largest_norm * scales.largest.to(device)[:, None]).all(0)
        if not bool(keep.any()):
            raise TranscoderError(
                f"none of {len(keep)} tokens read at once is of usual size: all are more than {config.largest_norm:g} "
                "times as large as those at the beginning of the data; shuffle its documents."
            )
        inputs = inputs[:, keep].float() * scales.inputs.to(device)[:, None, None]
        outputs = outputs[:, keep].float() * scales.outputs.to(device)[:, None, None]
        return inputs.to(dtype), outputs.to(dtype), position[keep]

    return forward_scaled


def sample(
    forward: Forward, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, device: torch.device,
) -> tuple[Scales, Activations]:  # fmt: skip
    """The first activations of the corpus as they come from the model, and their scales."""
    wanted, filled = sample_size(config), 0
    packed = pack(corpus, tokenizer, config.context)
    held: Activations | None = None  # room for all at once: parts put together in the end would be there twice
    while held is None or filled < wanted:
        inputs, outputs, position = forward(packed.next(sequences_of(config)))
        if held is None:
            shape = inputs.shape[0], wanted, inputs.shape[2]
            held = (
                inputs.new_empty(shape, device=device), outputs.new_empty(shape, device=device),
                position.new_empty(wanted, device=device),
            )  # fmt: skip
        n = min(inputs.shape[1], wanted - filled)
        here = slice(filled, filled + n)
        held[0][:, here], held[1][:, here], held[2][here] = inputs[:, :n], outputs[:, :n], position[:n]
        filled += n
    return measure_scales(held[0], held[1]), held


def sample_size(config: TrainConfig) -> int:
    """Tokens that features start from."""
    return max(SAMPLE, min(4 * config.n_features, LARGEST_SAMPLE), config.n_features)


def open_streams(
    forward: Forward, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, numbers: Iterable[int],
    device: torch.device,
) -> dict[int, Stream]:  # fmt: skip
    """Some of the streams that the corpus is split into, by number."""
    return {
        number: ShuffleBuffer(
            pack(corpus, tokenizer, config.context, part=number, parts=config.streams), forward,
            config.buffer_tokens // config.streams, sequences_of(config), config.seed + 1000 * number, device,
        )
        for number in numbers
    }  # fmt: skip


def sequences_of(config: TrainConfig) -> int:
    """Sequences of one forward pass."""
    return max(1, FORWARD_TOKENS // config.context)


def next_batch(streams: dict[int, Stream], config: TrainConfig) -> Batch:
    """A step's tokens: as many of every stream of this process."""
    parts = [stream.next(config.batch_tokens // config.streams) for stream in streams.values()]
    if len(parts) == 1:
        return parts[0]
    return Batch(
        torch.cat([part.inputs for part in parts], dim=1), torch.cat([part.outputs for part in parts], dim=1),
        torch.cat([part.position for part in parts]),
    )  # fmt: skip
