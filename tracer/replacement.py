"""A language model with a transcoder, and the linear model that remains of it for one prompt."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tracer.errors import TraceError
from tracer.linear import FrozenAttention, FrozenNorm, freeze_attention, freeze_norm
from tracer.precision import computing_in
from transcoders import CrossLayerTranscoder, load_on_demand
from transcoders.activations import as_read, read_site, reads_before_gain, recording, write_site
from transcoders.checkpoint import revision
from transcoders.families import Anatomy, Layer, dissect
from transcoders.hub import locate

WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    """Per position the word of the text that holds the token; "" for special tokens."""


@dataclass(frozen=True)
class Origin:
    """Which model and transcoder a graph comes from; a revision changes with the weights."""

    model: str = "model"
    model_revision: str = ""
    transcoder: str = "transcoder"
    transcoder_revision: str = ""


@dataclass(frozen=True)
class ActiveFeatures:
    """The nonzero features of one prompt, ordered by layer, position, feature."""

    layer: Int[Tensor, " active"]
    position: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    activation: Float[Tensor, " active"]
    pre_activation: Float[Tensor, " active"]


@dataclass(frozen=True)
class LocalReplacementModel:
    """One prompt: patterns and norm denominators frozen, error terms added; linear in its nodes."""

    prompt: Prompt
    origin: Origin
    transcoder: CrossLayerTranscoder
    attention: tuple[FrozenAttention, ...]
    reading: tuple[FrozenNorm, ...]
    """Per layer, from the residual stream to what the transcoder reads."""
    writing: tuple[FrozenNorm, ...]
    """Per layer, from what the transcoder writes to what is added to the residual stream."""
    parallel: bool
    """Whether MLPs read the residual stream as it was before their layer's attention (GPT-NeoX)."""
    final_norm: FrozenNorm
    unembedding: Float[Tensor, "vocab d_model"]
    unembedding_bias: Float[Tensor, " vocab"]
    softcap: float | None
    """The model squashes its logits to ± this, last of all."""
    embedding: Float[Tensor, "position d_model"]
    """Token vectors as they enter the residual stream."""
    position_embedding: Float[Tensor, "position d_model"]
    """Learned position vectors: no nodes."""
    features: ActiveFeatures
    decoders: tuple[Float[Tensor, "_ _ d_model"], ...]
    """Per layer the decoder rows (active, reach, d_model) of its active features, in their order."""
    error: Float[Tensor, "layer position d_model"]
    """MLP output less its reconstruction; zero at position 0."""
    constant: Float[Tensor, "layer position d_model"]
    """The part of each MLP output that is no node: b_dec, and all of it at position 0."""
    logits: Float[Tensor, "position vocab"]
    """The model's own."""
    uncapped_logits: Float[Tensor, "position vocab"]
    """The model's before the soft cap: what is explained."""
    output: Float[Tensor, "position d_model"]
    """The model's own final norm's output, which the unembedding and any other direction read."""

    @property
    def n_layers(self) -> int:
        return len(self.attention)

    @property
    def n_positions(self) -> int:
        return len(self.prompt.token_ids)


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
        if Path(model).exists() and not (Path(model) / "config.json").is_file():
            raise TraceError(f"{model} is not a Hugging Face model directory: it has no config.json.")
        try:
            place, pinned = _pinned(model)
            network: Any = AutoModelForCausalLM.from_pretrained(
                place, revision=pinned, dtype=dtype, attn_implementation="eager"
            )
            tokenizer = AutoTokenizer.from_pretrained(place, revision=pinned)
        except (OSError, SafetensorError) as error:
            first = str(error).splitlines()[0]
            raise TraceError(
                f"the model {model} cannot be loaded ({first}); give a local directory or a Hub id."
            ) from error
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
        origin: Origin = Origin(),
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
        return _localize(self, prompt)


@torch.no_grad()
def _localize(replacement: ReplacementModel, prompt: Prompt) -> LocalReplacementModel:
    model, anatomy, transcoder = replacement.model, replacement.anatomy, replacement.transcoder
    config, n_layers = transcoder.config, len(anatomy.layers)
    modules = {"embedding": anatomy.embedding, "final": anatomy.final_norm}
    if anatomy.positions is not None:
        modules["positions"] = anatomy.positions
    for i, layer in enumerate(anatomy.layers):
        modules |= _recorded(i, layer) | {
            f"read {i}": read_site(layer, config.reads), f"write {i}": write_site(layer, config.writes)
        }  # fmt: skip
    ids = torch.tensor([prompt.token_ids], device=model.device)
    dtype = torch.promote_types(model.dtype, torch.float32)  # bfloat16 weights, float32 sums
    with computing_in(model, dtype), recording(modules) as seen:
        result = model(ids, output_attentions=True, use_cache=False)
        uncapped_logits = anatomy.unembedding(seen["final"][1][0])

    def norm(module: nn.Module | None, name: str) -> FrozenNorm:
        x = seen[name if module is not None else "embedding"][0 if module is not None else 1][0]
        return freeze_norm(module, x, dtype, anatomy.gain_offset)

    attention, reading, writing = [], [], []
    for i, layer in enumerate(anatomy.layers):
        attention.append(
            freeze_attention(
                norm(layer.attention_norm, f"attention norm {i}"), result.attentions[i][0].to(dtype),
                layer.projections, norm(layer.attention_post_norm, f"attention post norm {i}"),
            )
        )  # fmt: skip
        gainless = reads_before_gain(layer, config.reads)
        reads_residual = read_site(layer, config.reads) is not layer.mlp and not gainless
        read = norm(None if reads_residual else layer.mlp_norm, f"mlp norm {i}")
        reading.append(replace(read, gain=torch.ones_like(read.gain)) if gainless else read)
        writes_residual = write_site(layer, config.writes) is not layer.mlp
        writing.append(norm(None if writes_residual else layer.mlp_post_norm, f"mlp post norm {i}"))
    inputs = torch.stack(
        [as_read(layer, config.reads, seen[f"read {i}"][0][0].to(dtype)) for i, layer in enumerate(anatomy.layers)]
    )
    outputs = torch.stack([seen[f"write {i}"][1][0] for i in range(n_layers)]).to(dtype)
    features = _active(transcoder, inputs)
    decoders = tuple(transcoder.decoder_rows(i, features.feature[features.layer == i]) for i in range(n_layers))
    _check_finite("model", result.logits)
    _check_finite("transcoder", features.activation, transcoder.b_dec, *decoders)
    constant = transcoder.b_dec[:, None].to(dtype).expand_as(outputs).clone()
    outputs = outputs - transcoder.skip(inputs)  # a skip connection is no node: effects flow through it
    constant[:, 0] = outputs[:, 0]
    error = outputs - constant
    for i in range(n_layers):
        _add_writes(error[i], config.sources(i), i, features, decoders, -1.0)
    error[:, 0] = 0
    unembedding = anatomy.unembedding
    bias = unembedding.bias if unembedding.bias is not None else torch.zeros(len(unembedding.weight))
    embedding = seen["embedding"][1][0].to(dtype)
    positions = seen["positions"][1].reshape(-1, embedding.shape[-1]).to(dtype) if "positions" in seen else None
    return LocalReplacementModel(
        prompt, replacement.origin, transcoder, tuple(attention), tuple(reading), tuple(writing), anatomy.parallel,
        norm(anatomy.final_norm, "final"),
        unembedding.weight.detach().to(dtype), bias.detach().to(unembedding.weight.device, dtype), anatomy.softcap,
        embedding, torch.zeros_like(embedding) if positions is None else positions,
        features, decoders, error, constant, result.logits[0].to(dtype), uncapped_logits.to(dtype),
        seen["final"][1][0].to(dtype),
    )  # fmt: skip


def _check_finite(part: str, *values: Tensor) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise TraceError(
            f"the {part} gives NaN or infinite values on this prompt; its weights are damaged, or too large for their "
            "dtype: use float32 or bfloat16, or download it again."
        )


def _active(transcoder: CrossLayerTranscoder, inputs: Float[Tensor, "layer position d_model"]) -> ActiveFeatures:
    """Layer by layer: all pre-activations of a long prompt together would not fit into memory."""
    parts = []
    for layer, read in enumerate(inputs):
        pre_activation = transcoder.pre_activations_of(layer, read)
        activation = transcoder.activate_layer(layer, pre_activation)
        activation[0] = 0
        position, feature = activation.nonzero(as_tuple=True)
        parts.append(
            (
                torch.full_like(position, layer), position, feature,
                activation[position, feature], pre_activation[position, feature],
            )
        )  # fmt: skip
    return ActiveFeatures(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _add_writes(
    written: Float[Tensor, "position d_model"], sources: range, to: int, features: ActiveFeatures,
    decoders: tuple[Tensor, ...], sign: float = 1.0,
) -> None:  # fmt: skip
    """Add to `written` what the active features write to the MLP output of layer `to`."""
    for source in sources:
        here = features.layer == source
        rows = decoders[source][:, to - source].to(written.dtype)
        written.index_add_(0, features.position[here], features.activation[here, None] * rows, alpha=sign)


def _recorded(i: int, layer: Layer) -> dict[str, nn.Module]:
    """The norms of one layer, named."""
    norms = {
        f"attention norm {i}": layer.attention_norm, f"attention post norm {i}": layer.attention_post_norm,
        f"mlp norm {i}": layer.mlp_norm, f"mlp post norm {i}": layer.mlp_post_norm,
    }  # fmt: skip
    return {name: module for name, module in norms.items() if module is not None}


@torch.no_grad()
def linear_logits(local: LocalReplacementModel) -> Float[Tensor, "position vocab"]:
    """Logits of the local replacement model, from its nodes and constants alone (law 1: they equal the model's)."""
    features, transcoder = local.features, local.transcoder
    x = local.embedding + local.position_embedding
    for layer in range(local.n_layers):
        written = local.error[layer] + local.constant[layer]
        _add_writes(written, transcoder.config.sources(layer), layer, features, local.decoders)
        writing = local.writing[layer]
        moved = local.attention[layer].apply(x) + local.attention[layer].constant
        if transcoder.W_skip is not None:
            read = local.reading[layer]
            seen = read.apply(x if local.parallel else x + moved) + read.bias
            written += seen @ transcoder.W_skip[layer].to(x.dtype)
        x = x + moved + writing.apply(written) + writing.bias
    logits = (local.final_norm.apply(x) + local.final_norm.bias) @ local.unembedding.T + local.unembedding_bias
    return logits if local.softcap is None else local.softcap * (logits / local.softcap).tanh()


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
