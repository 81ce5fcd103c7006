"""Where each Hugging Face model family keeps its norms, attention and MLPs: the only per-family table."""

from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from transcoders.errors import TranscoderError


@dataclass(frozen=True)
class Family:
    """Attribute paths inside a model (first block) and inside one of its layers (second block)."""

    embedding: str
    layers: str
    final_norm: str
    unembedding: str

    attention_norm: str
    attention: str
    value: str
    """The value projection, inside the attention module."""
    output: str
    """The output projection, inside the attention module."""
    mlp_norm: str
    mlp: str


FAMILIES = {
    "llama": Family(
        embedding="model.embed_tokens", layers="model.layers", final_norm="model.norm", unembedding="lm_head",
        attention_norm="input_layernorm", attention="self_attn", value="v_proj", output="o_proj",
        mlp_norm="post_attention_layernorm", mlp="mlp",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The modules of one layer that matter here."""

    attention_norm: nn.Module
    attention: nn.Module
    value: nn.Linear
    output: nn.Linear
    mlp_norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """The modules of a model that matter here."""

    embedding: nn.Module
    layers: tuple[Layer, ...]
    final_norm: nn.Module
    unembedding: nn.Linear


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the modules of a model by its family."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise TranscoderError(
            f"models of type {model.config.model_type!r} cannot be traced yet; known types: {', '.join(FAMILIES)}; "
            "add an entry to transcoders/families.py that says where its norms, attention and MLPs are."
        )
    layers = []
    for block in attrgetter(family.layers)(model):
        attention = attrgetter(family.attention)(block)
        layers.append(
            Layer(
                attention_norm=attrgetter(family.attention_norm)(block),
                attention=attention,
                value=attrgetter(family.value)(attention),
                output=attrgetter(family.output)(attention),
                mlp_norm=attrgetter(family.mlp_norm)(block),
                mlp=attrgetter(family.mlp)(block),
            )
        )
    return Anatomy(
        embedding=attrgetter(family.embedding)(model),
        layers=tuple(layers),
        final_norm=attrgetter(family.final_norm)(model),
        unembedding=attrgetter(family.unembedding)(model),
    )
