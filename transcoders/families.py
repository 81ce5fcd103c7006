"""Where each Hugging Face model family keeps its norms, attention and MLPs: the only per-family table."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from transcoders.errors import TranscoderError


@dataclass(frozen=True)
class Projections:
    """How attention's values are made and written back, whatever the family fuses or transposes."""

    W_V: Float[Tensor, "kv_head d_head d_model"]
    b_V: Float[Tensor, "kv_head d_head"]
    W_O: Float[Tensor, "d_model head d_head"]
    b_O: Float[Tensor, " d_model"]


def separate(attention: Any, n_heads: int, n_kv_heads: int) -> Projections:
    """v_proj and o_proj, as in Llama and most others."""
    return _projections(attention.v_proj.weight, attention.v_proj.bias, attention.o_proj, n_heads, n_kv_heads)


def fused_rows(attention: Any, n_heads: int, n_kv_heads: int) -> Projections:
    """qkv_proj with the rows of queries, keys and values one after the other (Phi-3)."""
    fused = attention.qkv_proj
    n_rows = fused.weight.shape[0] // (n_heads + 2 * n_kv_heads) * n_kv_heads
    bias = None if fused.bias is None else fused.bias[-n_rows:]
    return _projections(fused.weight[-n_rows:], bias, attention.o_proj, n_heads, n_kv_heads)


def fused_by_head(attention: Any, n_heads: int, n_kv_heads: int) -> Projections:
    """query_key_value with query, key and value of each head side by side (GPT-NeoX)."""
    fused = attention.query_key_value
    weight = fused.weight.unflatten(0, (n_heads, 3, -1))[:, 2].flatten(0, 1)
    bias = None if fused.bias is None else fused.bias.unflatten(0, (n_heads, 3, -1))[:, 2].flatten()
    return _projections(weight, bias, attention.dense, n_heads, n_heads)


def fused_columns(attention: Any, n_heads: int, n_kv_heads: int) -> Projections:
    """c_attn and c_proj, whose weights are stored transposed (GPT-2)."""
    d_model = attention.c_proj.weight.shape[1]
    weight, bias = attention.c_attn.weight[:, -d_model:].T, attention.c_attn.bias[-d_model:]
    return Projections(
        weight.unflatten(0, (n_heads, -1)), bias.unflatten(0, (n_heads, -1)),
        attention.c_proj.weight.T.unflatten(1, (n_heads, -1)), attention.c_proj.bias,
    )  # fmt: skip


def _projections(weight: Tensor, bias: Tensor | None, output: nn.Linear, n_heads: int, n_kv_heads: int) -> Projections:
    W_V = weight.unflatten(0, (n_kv_heads, -1))
    b_V = weight.new_zeros(W_V.shape[:2]) if bias is None else bias.unflatten(0, (n_kv_heads, -1))
    b_O = weight.new_zeros(output.out_features) if output.bias is None else output.bias
    return Projections(W_V, b_V, output.weight.unflatten(1, (n_heads, -1)), b_O)


@dataclass(frozen=True)
class Family:
    """Attribute paths inside a model (first block) and inside one of its layers (second block).

    A norm that the family does not have is "".
    """

    embedding: str = "model.embed_tokens"
    """The module that gives token vectors as they enter the residual stream."""
    positions: str = ""
    """The module that adds learned position vectors: no nodes, they count as bias."""
    layers: str = "model.layers"
    final_norm: str = "model.norm"

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    projections: Callable[[Any, int, int], Projections] = separate
    attention_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_post_norm: str = ""
    parallel: str = ""
    """The config flag that makes attention and MLP read the same residual stream, side by side."""
    gain_offset: float = 0.0
    """Added to the stored norm weights: Gemma stores gains less one."""
    not_causal: str = ""
    """The config flag that lets positions read later ones: edges would run backward, so it must be off."""
    not_in_float64: str = ""
    """The config flag with which the model itself computes attention in float32, and refuses anything wider."""


GEMMA_2 = Family(
    attention_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm", gain_offset=1.0, not_causal="use_bidirectional_attention",
)  # fmt: skip

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gpt_oss": Family(),
    "phi3": Family(projections=fused_rows),
    "gemma": Family(gain_offset=1.0, not_causal="use_bidirectional_attention"),
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_2,
    "olmo2": Family(
        attention_norm="", attention_post_norm="post_attention_layernorm",
        mlp_norm="", mlp_post_norm="post_feedforward_layernorm",
    ),
    "gpt2": Family(
        embedding="transformer.wte", positions="transformer.wpe", layers="transformer.h",
        final_norm="transformer.ln_f", attention_norm="ln_1", attention="attn", projections=fused_columns,
        mlp_norm="ln_2", not_in_float64="reorder_and_upcast_attn",
    ),
    "gpt_neox": Family(
        embedding="gpt_neox.embed_in", layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm",
        attention="attention", projections=fused_by_head, parallel="use_parallel_residual",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The modules of one layer that matter here; a norm that is not there is None."""

    attention_norm: nn.Module | None
    attention: nn.Module
    projections: Projections
    attention_post_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp: nn.Module
    mlp_post_norm: nn.Module | None


@dataclass(frozen=True)
class Anatomy:
    """The modules of a model that matter here."""

    embedding: nn.Module
    positions: nn.Module | None
    layers: tuple[Layer, ...]
    final_norm: nn.Module
    unembedding: nn.Linear
    parallel: bool
    gain_offset: float
    softcap: float | None
    """Logits are squashed to ± this, after everything that is traced."""


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the modules of a model by its family."""
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise TranscoderError(
            f"models of type {config.model_type!r} cannot be traced yet; known types: {', '.join(FAMILIES)}; "
            "add an entry to transcoders/families.py that says where its norms, attention and MLPs are."
        )
    _check_flags(family, config, model.dtype)
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    layers = []
    unembedding: Any = model.get_output_embeddings()  # named otherwise in some versions of transformers
    for block in attrgetter(family.layers)(model):
        attention = attrgetter(family.attention)(block)
        with torch.no_grad():
            projections = family.projections(attention, n_heads, n_kv_heads)
        layers.append(
            Layer(
                attention_norm=_part(block, family.attention_norm),
                attention=attention,
                projections=projections,
                attention_post_norm=_part(block, family.attention_post_norm),
                mlp_norm=_part(block, family.mlp_norm),
                mlp=attrgetter(family.mlp)(block),
                mlp_post_norm=_part(block, family.mlp_post_norm),
            )
        )
    return Anatomy(
        embedding=attrgetter(family.embedding)(model),
        positions=_part(model, family.positions),
        layers=tuple(layers),
        final_norm=attrgetter(family.final_norm)(model),
        unembedding=unembedding,
        parallel=bool(family.parallel) and bool(getattr(config, family.parallel)),
        gain_offset=family.gain_offset,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _check_flags(family: Family, config: Any, dtype: torch.dtype) -> None:
    if family.not_causal and getattr(config, family.not_causal, False):
        raise TranscoderError(
            f"this {config.model_type} model has {family.not_causal} on, and what reads later positions cannot be "
            "traced; expected a causal model: take another, or turn the flag off if the weights were trained without."
        )
    if family.not_in_float64 and getattr(config, family.not_in_float64) and dtype == torch.float64:
        raise TranscoderError(
            f"this {config.model_type} model has {family.not_in_float64} on, with which it does not run in float64; "
            "use float32, bfloat16 or float16."
        )
    if not config.return_dict:
        raise TranscoderError(
            "the model's config has return_dict off, with which transformers cannot run it; set it to true."
        )


def longest_context(model: PreTrainedModel) -> int | None:
    """The most tokens of a sequence that the model can read, if it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def epsilon(norm: Any) -> float:
    """What a norm adds to the mean square before it takes the root; it may be 0."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _part(module: nn.Module, path: str) -> nn.Module | None:
    return attrgetter(path)(module) if path else None
