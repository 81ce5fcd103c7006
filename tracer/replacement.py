"""A language model with a transcoder in place of its MLPs."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tracer.errors import TraceError
from tracer.local import LocalReplacementModel, Origin, Prompt, localize
from tracer.memory import LOAD_LESS, explaining_lack_of_memory
from transcoders import CrossLayerTranscoder, load_on_demand
from transcoders.activations import read_site
from transcoders.checkpoint import revision
from transcoders.errors import is_lack_of_memory
from transcoders.families import Anatomy, dissect, longest_context
from transcoders.fingerprint import digest_of, fingerprint
from transcoders.hub import commit, is_out_of_reach, locate

DECODER_ROWS = 16
"""Features of each layer whose decoder vectors tell transcoders apart."""
UNEXPLAINED = 0.95
"""Where errors are as large as what was to be explained, a transcoder is of another model; to write nothing gives 1."""
DAMAGED = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError, EOFError,
    RuntimeError, UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for files that are lacking, cut, or hold settings that are none."""
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
    @explaining_lack_of_memory(LOAD_LESS)
    def load(
        cls,
        model: str | Path,
        transcoder: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> "ReplacementModel":
        """Load a model and a tokenizer, by default the model's (directories or name[@revision]), and a transcoder in
        any layout, and check that they fit."""
        network, loaded_tokenizer = load_model(model, dtype, tokenizer)
        folder = locate(transcoder)
        loaded = load_on_demand(folder, device=device, dtype=dtype)
        origin = Origin(
            name or str(model), _model_revision(network, model),
            f"{name}-clt" if name else str(transcoder), revision(folder),
        )  # fmt: skip
        return cls.of(network.to(device), loaded_tokenizer, loaded, origin)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transcoder: CrossLayerTranscoder,
        origin: Origin | None = None,
    ) -> "ReplacementModel":
        """Put loaded parts together, and check that they fit; without `origin` they are told apart by their weights.

        The model is put into evaluation mode, and made to show its attention patterns.
        """
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
        model.eval()  # dropout would draw another graph each time
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation("eager")
        return cls(model, tokenizer, transcoder, anatomy, origin or _origin_of(model, transcoder))

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
        if not self.tokenizer.is_fast:
            raise TraceError("the tokenizer does not say where in the text its tokens are; load its fast version.")
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        unknown = self.tokenizer.unk_token_id
        special = {number for number in self.tokenizer.all_special_ids if number != unknown}
        first = _first_token(self.tokenizer)
        if first is not None and (not ids or ids[0] not in special):
            ids, offsets = [first, *ids], [(0, 0), *offsets]
        self._check_ids(text, ids)
        _check_all_is_said(text, offsets)
        offsets = [(0, 0) if i in special else place for i, place in zip(ids, offsets, strict=True)]
        return Prompt(text, tuple(ids), tuple(self.token_text(i) for i in ids), _words(text, offsets))

    def _check_ids(self, text: str, ids: list[int]) -> None:
        if not ids:
            raise TraceError(f"the prompt {text[:40]!r} has no tokens; give text that the tokenizer knows.")
        longest = longest_context(self.model)
        if longest is not None and len(ids) > longest:
            raise TraceError(f"the prompt has {len(ids)} tokens, the model reads at most {longest}; shorten it.")
        n_known = self.model.config.vocab_size
        if max(ids) >= n_known:
            raise TraceError(
                f"the tokenizer gives {self.token_text(max(ids))!r} number {max(ids)}, and the model knows {n_known} "
                "tokens; use the tokenizer of this model."
            )

    def token_text(self, token_id: int) -> str:
        """A token as text."""
        return str(self.tokenizer.decode([token_id]))

    def localize(self, prompt: Prompt) -> LocalReplacementModel:
        """Run the prompt once and hold everything nonlinear at its value."""
        return localize(self.model, self.anatomy, self.transcoder, prompt, self.origin)

    def doubt(self, local: LocalReplacementModel) -> str:
        """Why the transcoder seems not to be of this model: of another one of the same size its graphs are exact too,
        but nearly all errors. "" where it explains something."""
        if local.relative_error < UNEXPLAINED:
            return ""
        said = self.transcoder.config.model_name
        named = f" of {said}" if said else ""
        return (
            f"the transcoder{named} explains nothing of what most MLPs of {self.origin.model} write here (median error "
            f"{local.relative_error:.0%}); use one that was trained on this model, or correct its hooks (trace convert "
            "--reads, --writes)."
        )


def _check_all_is_said(text: str, offsets: list[tuple[int, int]]) -> None:
    """Refuse characters that no token stands for: some tokenizers leave them out without a word."""
    said = {i for start, end in offsets for i in range(start, end)}
    for i, character in enumerate(text):
        # what is not seen, or only changes the letter before it, may be dropped on purpose
        if i not in said and not character.isspace() and unicodedata.category(character)[0] not in "CM":
            raise TraceError(
                f"the tokenizer has no token for {character!r}, character {i + 1} of the prompt; leave it out."
            )


def load_model(
    model: str | Path, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A language model with attention patterns to be seen, and a tokenizer, by default the model's, each from a
    directory or name[@revision]."""
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise TraceError(f"{model} is not a Hugging Face model directory: it has no config.json.")
    with _told("model", model):
        place = _place(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    network, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:  # they would be random numbers
        raise TraceError(
            f"the model {model} lacks the weights {', '.join(lacking[:4])}{' …' if len(lacking) > 4 else ''}; copy or "
            "download it again."
        )
    if tokenizer is not None:
        return network, load_tokenizer(tokenizer)
    with _told("tokenizer", model):
        return network, AutoTokenizer.from_pretrained(**place)


def load_tokenizer(tokenizer: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory or name[@revision]."""
    with _told("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(**_place(tokenizer))


@dataclass(frozen=True)
class _told:
    """Tells in one line why something cannot be loaded in the block."""

    what: str
    place: str | Path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # tokenizers raises no narrower kind than Exception itself, and whoever names that would catch all others too
        if not (isinstance(error, DAMAGED) or kind is Exception) or error is None or is_lack_of_memory(error):
            return
        said = " ".join(str(error).split())[:200]
        reason = said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"
        told = f"the {self.what} {self.place} cannot be loaded ({reason.rstrip(': ')})"
        raise TraceError(f"{told}; give a local directory or a Hub id.") from error


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What is put before a prompt: models that have no beginning-of-sequence token are traced after padding or an
    end, as circuit-tracer does, because the first position has no features."""
    known = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in known if isinstance(number, int)), None)


def _place(model: str | Path) -> dict[str, Any]:
    """Where transformers finds a model or a tokenizer: a directory, the Hub, or only the Hub's cache."""
    if Path(model).exists():
        return {"pretrained_model_name_or_path": str(model)}
    name, pinned = _pinned(model)
    only_here = is_out_of_reach(name, pinned)
    return {"pretrained_model_name_or_path": name, "revision": pinned, "local_files_only": only_here}


def _pinned(model: str | Path) -> tuple[str, str]:
    """A model's name on the Hub and its revision, from name[@revision]."""
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


def _model_revision(model: PreTrainedModel, source: str | Path) -> str:
    """The Hub commit, or for a local directory ten hexadecimal digits of its configuration and weight files."""
    folder = Path(source)
    if not folder.exists():
        place, pinned = _pinned(source)
        cached = try_to_load_from_cache(place, "config.json", revision=pinned)  # transformers no longer tells it
        found = commit(Path(cached)) if isinstance(cached, str) else None
        return found or fingerprint(model)
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # in another folder, or opened by another version
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            # The header holds every tensor's name, shape and place; sampled bytes tell weights of one shape apart.
            digest.update(file.read(1 << 16))
            file.seek(-min(1 << 16, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()[:10]


def _origin_of(model: PreTrainedModel, transcoder: CrossLayerTranscoder) -> Origin:
    """Names and digests of what came as objects: graphs of other weights must not replace each other."""
    return Origin(
        model.config._name_or_path or model.config.model_type, fingerprint(model),
        transcoder.config.model_name or "transcoder", _transcoder_fingerprint(transcoder),
    )  # fmt: skip


def _transcoder_fingerprint(transcoder: CrossLayerTranscoder) -> str:
    """Of decoders that stay in their files some rows of each layer; where no other numbers differ, nobody notices."""
    some = torch.linspace(0, transcoder.config.n_features - 1, DECODER_ROWS).long()
    layers = range(transcoder.config.n_layers)
    return digest_of(
        {f"decoder {layer}": transcoder.decoder_rows(layer, some) for layer in layers} | transcoder.state_dict()
    )
