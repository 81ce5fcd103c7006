"""The linear model that remains of a replacement model for one prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracer.errors import TraceError
from tracer.linear import FrozenAttention, FrozenNorm, freeze_attention, freeze_norm
from tracer.precision import computing_in
from transcoders import CrossLayerTranscoder, TranscoderConfig
from transcoders.activations import as_read, read_site, reads_before_gain, recording, write_site
from transcoders.families import Anatomy
from transcoders.memory import free_memory

PATTERNS = 1 / 8
"""Attention patterns may take this share of the free memory; those of the lowest layers, through which most rows pass,
are held, and the others computed again whenever they are needed."""
FEATURES_AT_ONCE, FEATURES_AT_ONCE_ON_GPU = 1 << 9, 1 << 14
"""Decoder rows made wide at once: few stay in a processor's cache."""
TOKENS_AT_ONCE = 1 << 14


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
    row: Int[Tensor, " active"]
    """Of its layer's `decoders`: a feature active at many positions has its vectors once."""
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
    """Per layer the decoder vectors (row, reach, d_model) of the features active anywhere; of all features where those
    stay in their file, or in memory, as they are."""
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
    relative_error: float
    """Median over layers and positions, but the first, of ‖error‖² / ‖MLP output‖²; 0 for a prompt of one token."""

    @property
    def n_layers(self) -> int:
        return len(self.attention)

    @property
    def n_positions(self) -> int:
        return len(self.prompt.token_ids)


@torch.no_grad()
def localize(
    model: PreTrainedModel, anatomy: Anatomy, transcoder: CrossLayerTranscoder, prompt: Prompt, origin: Origin
) -> LocalReplacementModel:
    """Run a prompt once and hold everything nonlinear at its value."""
    config, n_layers = transcoder.config, len(anatomy.layers)
    ids = torch.tensor([prompt.token_ids], device=model.device)
    dtype = torch.promote_types(model.dtype, torch.float32)  # bfloat16 weights, float32 sums
    pattern = model.config.num_attention_heads * len(prompt.token_ids) ** 2 * dtype.itemsize
    n_held = int(PATTERNS * free_memory(model.device) / pattern)
    modules = _modules(anatomy, config)
    with computing_in(model, dtype), recording(modules) as seen, _watching_attention(anatomy, dtype, n_held) as attend:
        logits = model(ids, use_cache=False).logits[0].to(dtype)
        uncapped = logits if anatomy.softcap is None else anatomy.unembedding(seen["final"][1][0]).to(dtype)
    _check_finite("model", logits)

    def norm(module: nn.Module | None, name: str) -> FrozenNorm:
        x = seen[name if module is not None else "embedding"][0 if module is not None else 1][0]
        return freeze_norm(module, x, dtype, anatomy.gain_offset)

    attention, reading, writing = [], [], []
    for i, layer in enumerate(anatomy.layers):
        before = norm(layer.attention_norm, f"attention norm {i}")
        after = norm(layer.attention_post_norm, f"attention post norm {i}")
        attention.append(freeze_attention(before, attend.pop(i), layer.projections, after, hold=i < n_held))
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
    final_norm, final = norm(anatomy.final_norm, "final"), seen["final"][1][0].to(dtype)
    embedding = seen["embedding"][1][0].to(dtype)
    positions = torch.zeros_like(embedding)
    if "positions" in seen:
        positions = seen["positions"][1].reshape(embedding.shape).to(dtype)
    seen.clear()
    features, decoders = _active(transcoder, inputs)
    _check_finite("transcoder", features.activation, transcoder.b_dec)
    size = torch.linalg.vector_norm(outputs[:, 1:], dim=-1)
    outputs -= transcoder.skip(inputs)  # a skip connection is no node: effects flow through it
    error, constant = _unexplained(transcoder, outputs, features, decoders)
    missing = torch.linalg.vector_norm(error[:, 1:], dim=-1)
    relative = (missing / size.clamp(min=torch.finfo(dtype).tiny)).square()
    unembedding = anatomy.unembedding
    bias = unembedding.bias if unembedding.bias is not None else torch.zeros(len(unembedding.weight))
    return LocalReplacementModel(
        prompt, origin, transcoder, tuple(attention), tuple(reading), tuple(writing), anatomy.parallel, final_norm,
        unembedding.weight.detach(), bias.detach().to(unembedding.weight.device, dtype), anatomy.softcap,
        embedding, positions, features, decoders, error, constant, logits, uncapped, final,
        float(relative.median()) if relative.numel() else 0.0,
    )  # fmt: skip


def _modules(anatomy: Anatomy, config: TranscoderConfig) -> dict[str, nn.Module]:
    """What is recorded of the forward pass."""
    modules: dict[str, Any] = {
        "embedding": anatomy.embedding, "final": anatomy.final_norm, "positions": anatomy.positions
    }  # fmt: skip
    for i, layer in enumerate(anatomy.layers):
        modules |= {
            f"attention norm {i}": layer.attention_norm, f"attention post norm {i}": layer.attention_post_norm,
            f"mlp norm {i}": layer.mlp_norm, f"mlp post norm {i}": layer.mlp_post_norm,
            f"read {i}": read_site(layer, config.reads), f"write {i}": write_site(layer, config.writes),
        }  # fmt: skip
    return {name: module for name, module in modules.items() if module is not None}


@contextmanager
def _watching_attention(
    anatomy: Anatomy, dtype: torch.dtype, n_held: int
) -> Iterator[dict[int, Callable[[], Float[Tensor, "head position position"]]]]:
    """Per layer how to get its attention pattern: the one of the forward pass inside the block, or the same again."""
    attend: dict[int, Callable[[], Tensor]] = {}

    def watch(layer: int):
        def record(module: nn.Module, arguments: tuple, keywords: dict, output: tuple) -> None:
            def again() -> Tensor:
                with computing_in(module, dtype):
                    return module(*arguments, **keywords)[1][0].to(dtype)

            pattern = output[1][0].to(dtype) if layer < n_held else None
            attend[layer] = again if pattern is None else lambda: pattern

        return record

    handles = [
        layer.attention.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(anatomy.layers)
    ]
    try:
        yield attend
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(part: str, *values: Tensor) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise TraceError(
            f"the {part} gives NaN or infinite values on this prompt; its weights are damaged, or too large for their "
            "dtype: use float32 or bfloat16, or download it again."
        )


def _active(
    transcoder: CrossLayerTranscoder, inputs: Float[Tensor, "layer position d_model"]
) -> tuple[ActiveFeatures, tuple[Float[Tensor, "_ _ d_model"], ...]]:
    """Layer by layer: all pre-activations of a long prompt together would not fit into memory."""
    parts, decoders = [], []
    for layer, read in enumerate(inputs):
        pre_activation = transcoder.pre_activations_of(layer, read)
        activation = transcoder.activate_layer(layer, pre_activation)
        activation[0] = 0
        position, feature = activation.nonzero(as_tuple=True)
        distinct, place = feature.unique(return_inverse=True)
        decoder, used = transcoder.decoders_with(layer, distinct)
        for some in used.split(FEATURES_AT_ONCE):
            _check_finite("transcoder", decoder[some])
        decoders.append(decoder)
        parts.append(
            (
                torch.full_like(position, layer), position, feature, used[place],
                activation[position, feature], pre_activation[position, feature],
            )
        )  # fmt: skip
    return ActiveFeatures(*(torch.cat(column) for column in zip(*parts, strict=True))), tuple(decoders)


def _unexplained(
    transcoder: CrossLayerTranscoder, outputs: Float[Tensor, "layer position d_model"], features: ActiveFeatures,
    decoders: tuple[Tensor, ...],
) -> tuple[Float[Tensor, "layer position d_model"], Float[Tensor, "layer position d_model"]]:  # fmt: skip
    """Errors and constants of MLP outputs, which become the errors: a second copy of long prompts' would be large."""
    constant = transcoder.b_dec[:, None].to(outputs.dtype).expand_as(outputs).clone()
    constant[:, 0] = outputs[:, 0]
    error = outputs.sub_(constant)
    for layer, missing in enumerate(error):
        _add_writes(missing, transcoder.config.sources(layer), layer, features, decoders, -1.0)
    error[:, 0] = 0
    return error, constant


def _add_writes(
    written: Float[Tensor, "position d_model"], sources: range, to: int, features: ActiveFeatures,
    decoders: tuple[Tensor, ...], sign: float = 1.0,
) -> None:  # fmt: skip
    """Add to `written` what the active features write to the MLP output of layer `to`."""
    at_once = FEATURES_AT_ONCE if written.is_cpu else FEATURES_AT_ONCE_ON_GPU
    for source in sources:
        decoder = decoders[source].select(1, to - source)
        for here in (features.layer == source).nonzero()[:, 0].split(at_once):
            rows = decoder.index_select(0, features.row[here]).to(written.dtype)
            written.index_add_(0, features.position[here], features.activation[here, None] * rows, alpha=sign)


def linear_logits(local: LocalReplacementModel) -> Float[Tensor, "position vocab"]:
    """Logits of the local replacement model, from its nodes and constants alone (law 1: they equal the model's)."""
    return torch.cat([logits for _, logits in _logits(local, _linear_output(local))], dim=1)


def logits_error(local: LocalReplacementModel) -> float:
    """Largest difference between these and the model's, as a share of the largest logit."""
    worst = largest = torch.zeros((), device=local.error.device)
    for part, logits in _logits(local, _linear_output(local)):
        worst = torch.maximum(worst, (logits - local.logits[:, part]).abs().max())
        largest = torch.maximum(largest, local.logits[:, part].abs().max())
    return float(worst / largest.clamp(min=1e-30))


def _logits(
    local: LocalReplacementModel, output: Float[Tensor, "position d_model"]
) -> Iterator[tuple[slice, Float[Tensor, "position some"]]]:
    """Parts of the vocabulary: all logits of a long prompt twice would be gigabytes."""
    for first in range(0, len(local.unembedding), TOKENS_AT_ONCE):
        part = slice(first, first + TOKENS_AT_ONCE)
        logits = output @ local.unembedding[part].to(output.dtype).T + local.unembedding_bias[part]
        yield part, logits if local.softcap is None else local.softcap * (logits / local.softcap).tanh()


@torch.no_grad()
def _linear_output(local: LocalReplacementModel) -> Float[Tensor, "position d_model"]:
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
    return local.final_norm.apply(x) + local.final_norm.bias
