"""From names of a model and a transcoder to a loaded pair, or to the bundled one."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from graphs import GraphStore
from tracer import lab
from tracer.errors import TraceError

if TYPE_CHECKING:  # importing torch takes seconds, and who only names a model does not need it
    from tracer.replacement import ReplacementModel


SMALL = 10_000_000
"""Weights of model and encoders. The products of a smaller pair are over before a second thread has begun, and the
first one waits for it."""


@dataclass(frozen=True)
class Source:
    """What to load, and where to."""

    model: str | None = None
    """Model directory or NAME[@REVISION]; None is the bundled one."""
    transcoder: str | None = None
    """Folder in any known layout, or a Hub id; None is the bundled one, which is of the bundled model."""
    device: str = "auto"
    """auto, cpu, cuda or mps; a number may follow, as in cuda:1."""
    dtype: str = "float32"
    """Of the weights."""
    tokenizer: str | None = None
    """Tokenizer directory or NAME[@REVISION]; None is the model's own."""

    def __post_init__(self) -> None:
        if self.model is not None and self.transcoder is None:
            raise TraceError(
                f"a transcoder of {self.model} is lacking; give --transcoder too, or no --model for the bundled one."
            )


@dataclass(frozen=True)
class Loaded:
    """A model with its transcoder, and what is known about its features."""

    replacement: "ReplacementModel"
    features: pa.Table | None
    """Rows of table `features`, where they came with the model."""
    labels: dict[tuple[int, int], str]
    """Names of features by (layer, feature)."""
    words: frozenset[str] | None
    """All words that the model knows, where it knows few."""

    def check(self, prompt: str) -> None:
        """Refuse a prompt with words that the model never saw."""
        if self.words is not None:
            lab.check_words(prompt, self.words)


def load(source: Source) -> Loaded:
    """Load the pair, quietly but for downloads."""
    import huggingface_hub
    import torch
    import transformers

    from tracer.replacement import ReplacementModel

    transformers.utils.logging.disable_progress_bar()  # of reading weights, and of downloads
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()
    place, dtype = resolve_device(source.device), getattr(torch, source.dtype)
    model, transcoder = source.model or lab.folder() / "model", source.transcoder or lab.folder() / "transcoder"
    bundled = lab.NAME if source.transcoder is None else None
    replacement = ReplacementModel.load(
        model, transcoder, tokenizer=source.tokenizer, device=place, dtype=dtype, name=bundled
    )
    if source.model is not None:
        return Loaded(replacement, None, {}, None)
    origin = replace(replacement.origin, model=lab.NAME)
    features = lab.features() if source.transcoder is None else None
    labels = {} if features is None else lab.labels(features)
    return Loaded(replace(replacement, origin=origin), features, labels, lab.words())


def share_threads(loaded: Loaded, share: int = 1) -> None:
    """Compute with as many threads as tracing with this model is quickest with, or fewer, where `share` others compute
    too: one where the model is small."""
    import torch

    replacement = loaded.replacement
    n_weights = replacement.model.num_parameters() + replacement.transcoder.W_enc.numel()
    torch.set_num_threads(1 if n_weights < SMALL else max(1, torch.get_num_threads() // share))


def load_for_training(model: str | None, device: str, dtype: str) -> tuple[Any, Any, str]:
    """A frozen language model on its device, its tokenizer and its name."""
    import torch
    import transformers

    from tracer.replacement import load_model

    transformers.utils.logging.disable_progress_bar()  # of reading weights
    place = resolve_device(device)
    if place == "cuda" and "LOCAL_RANK" in os.environ:  # as torchrun numbers the processes of a machine
        place = f"cuda:{os.environ['LOCAL_RANK']}"
    network, tokenizer = load_model(model or lab.folder() / "model", getattr(torch, dtype))
    return network.to(place).eval().requires_grad_(False), tokenizer, model or lab.NAME


def save_features(store: GraphStore, loaded: Loaded) -> None:
    """Put what came with the model about its features into the store, once."""
    transcoder = loaded.replacement.origin.transcoder
    if loaded.features is not None and not store.has_features(transcoder):
        store.save_features(loaded.features, transcoder)


def resolve_device(name: str) -> str:
    """The device, or for 'auto' the best there is. Raises `TraceError` for a device that is not there."""
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise TraceError(f"device {name!r} is unknown; expected auto, cpu, cuda or mps.")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in there and not there[kind]():
        raise TraceError(
            f"device {kind} was asked for, but torch sees no {kind.upper()} device; use --device cpu or auto."
        )
    return name


def resolve_devices(name: str) -> list[str]:
    """Every device that the name stands for: of 'cuda', and of 'auto' where there are GPUs, all of them."""
    device = resolve_device(name)
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
