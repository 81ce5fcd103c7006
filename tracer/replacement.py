"""A language model with a transcoder in place of its MLPs."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tracer.errors import TraceError
from tracer.local import LocalReplacementModel, Origin, Prompt, localize
from transcoders import CrossLayerTranscoder, load_on_demand
from transcoders.activations import read_site
from transcoders.checkpoint import revision
from transcoders.families import Anatomy, dissect
from transcoders.hub import locate

WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class ReplacementModel:
    """A Hugging Face causal language model plus a transcoder of its MLPs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    transcoder: CrossLayerTranscoder
    anatomy: Anatomy
    origin: Origin

    @classmethod
    def load(
        cls,
        model: str | Path,
        transcoder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> "ReplacementModel":
        """Load a model (directory or name[@revision]) and a transcoder in any layout, and check that they fit."""
        network, tokenizer = load_model(model, dtype)
        folder = locate(transcoder)
        loaded = load_on_demand(folder, device=device, dtype=dtype)
        origin = Origin(
            name or str(model), _model_revision(network, Path(model)),
            f"{name}-clt" if name else str(transcoder), revision(folder),
        )  # fmt: skip
        return cls.of(network.to(device).eval(), tokenizer, loaded, origin)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transcoder: CrossLayerTranscoder,
        origin: Origin = Origin(),  # noqa: B008 (a frozen value)
    ) -> "ReplacementModel":
        """Put loaded parts together, and check that they fit."""
        anatomy = dissect(model)
        config = transcoder.config
        for what, ours, theirs in (
            ("layers", config.n_layers, len(anatomy.layers)), ("width", config.d_model, model.config.hidden_size)
        ):  # fmt: skip
            if ours != theirs:
                raise TraceError(
                    f"the transcoder has {what} {ours}, the model {theirs}; it was trained on another model."
                )
        for layer in anatomy.layers:
            read_site(layer, config.reads)  # or it says why the hook cannot be read
        if model.config._attn_implementation != "eager":
            raise TraceError('the model hides its attention patterns; load it with attn_implementation="eager".')
        return cls(model, tokenizer, transcoder, anatomy, origin)

    def tokenize(self, text: str) -> Prompt:
        """Split a prompt into tokens; a beginning-of-sequence token is put first where the tokenizer did not."""
        if not text.strip():
            raise TraceError('the prompt is empty; give some text, as in trace "the capital of Texas is".')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TraceError(
                f"the prompt is no valid Unicode text ({error.reason}); replace lone surrogates."
            ) from error
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        special = set(self.tokenizer.all_special_ids)
        first = self.tokenizer.bos_token_id
        if ids[0] not in special and first is not None:
            ids, offsets = [first, *ids], [(0, 0), *offsets]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) > longest:
            raise TraceError(f"the prompt has {len(ids)} tokens, the model reads at most {longest}; shorten it.")
        return Prompt(text, tuple(ids), tuple(self.token_text(i) for i in ids), _words(text, offsets))

    def token_text(self, token_id: int) -> str:
        """A token as text."""
        return str(self.tokenizer.decode([token_id]))

    def localize(self, prompt: Prompt) -> LocalReplacementModel:
        """Run the prompt once and hold everything nonlinear at its value."""
        return localize(self.model, self.anatomy, self.transcoder, prompt, self.origin)


def load_model(model: str | Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """A language model and its tokenizer from a directory or name[@revision], with attention patterns to be seen."""
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise TraceError(f"{model} is not a Hugging Face model directory: it has no config.json.")
    try:
        place, pinned = _pinned(model)
        network: Any = AutoModelForCausalLM.from_pretrained(
            place, revision=pinned, dtype=dtype, attn_implementation="eager"
        )
        return network, AutoTokenizer.from_pretrained(place, revision=pinned)
    except (OSError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise TraceError(
            f"the model {model} cannot be loaded ({first}); give a local directory or a Hub id."
        ) from error


def _pinned(model: str | Path) -> tuple[str, str]:
    """A model and its revision, from name[@revision]."""
    if Path(model).exists():
        return str(model), "main"
    name, _, revision = str(model).partition("@")
    return name, revision or "main"


def _words(text: str, offsets: list[tuple[int, int]]) -> tuple[str, ...]:
    """The word around each token's first visible character."""
    spans = [(match.start(), match.end()) for match in WORD.finditer(text)]
    words = []
    for start, end in offsets:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        words.append(next((text[a:b] for a, b in spans if a <= start < b), "") if end > start else "")
    return tuple(words)


def _model_revision(model: PreTrainedModel, folder: Path) -> str:
    """The Hub commit, or for a local directory ten hexadecimal digits of its configuration and weight files."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return commit
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # the same model in another folder is the same model
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            # The header holds every tensor's name, shape and place; sampled bytes tell weights of one shape apart.
            digest.update(file.read(1 << 16))
            file.seek(-min(1 << 16, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()[:10]
