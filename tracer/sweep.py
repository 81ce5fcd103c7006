"""Dense rows of direct effects: cotangents carried from their targets down to the embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.local import LocalReplacementModel
from tracer.sources import Sources


def feature_effects(
    local: LocalReplacementModel, sources: Sources, layer: int, rows: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row column"], Float[Tensor, " row"]]:
    """Effects on some active features of one layer, and their biases."""
    transcoder, feature = local.transcoder, local.features.feature[rows]
    dtype = local.error.dtype
    encoder, bias = transcoder.W_enc[layer][feature].to(dtype), transcoder.b_enc[layer][feature].to(dtype)
    return effects(local, sources, layer, local.features.position[rows], encoder, bias)


def effects(
    local: LocalReplacementModel,
    sources: Sources,
    layer: int,
    position: Int[Tensor, " row"],
    direction: Float[Tensor, "row d_model"],
    reader_bias: Float[Tensor, " row"],
) -> tuple[Float[Tensor, "row column"], Float[Tensor, " row"]]:
    """Effects on directions that a layer's encoder reads, or above the last layer what the unembedding reads.

    The first step down touches one position each; the highest of them bounds all that follows.
    """
    is_output = layer == local.n_layers
    norm = local.final_norm if is_output else local.reading[layer]
    read = norm.transpose_at(direction, position)
    n = int(position.max()) + 1
    bias = direction @ norm.bias + reader_bias
    if is_output or local.parallel:
        cotangent = read.new_zeros(len(position), n, read.shape[-1])
    else:
        cotangent = local.attention[layer].transpose_at(read, position, n)
        bias += (read * local.attention[layer].constant[position]).sum(1)
    cotangent[torch.arange(len(position)), position] += read
    effect = read.new_zeros(len(position), sources.n_columns(n))
    for below in reversed(range(layer)):
        for p, columns, writes in sources.writes(below, n):
            effect[:, columns].addmm_(cotangent[:, p], writes.T)
        bias += cotangent.flatten(1) @ sources.constant[below][:n].flatten()
        cotangent, skipped_bias = _through_layer(local, below, cotangent)
        bias += skipped_bias
    effect *= sources.size[: effect.shape[1]]
    effect[:, sources.tokens(n)] = torch.einsum("bpd,pd->bp", cotangent, local.embedding[:n])
    bias += cotangent.flatten(1) @ local.position_embedding[:n].flatten()
    return effect, bias


def _through_layer(
    local: LocalReplacementModel, layer: int, cotangent: Float[Tensor, "row p d_model"]
) -> tuple[Float[Tensor, "row p d_model"], Tensor | float]:
    """Cotangents at a layer's output → at its input, and what biases add on the way through a skip connection."""
    attention = local.attention[layer]
    W_skip = local.transcoder.W_skip
    if W_skip is None:
        attention.add_transposed(cotangent, cotangent)
        return cotangent, 0.0
    reading = local.reading[layer]
    read = local.writing[layer].transpose(cotangent) @ W_skip[layer].T.to(cotangent.dtype)
    skipped = reading.transpose(read)
    bias = read.sum(1) @ reading.bias
    moved = cotangent + skipped
    if local.parallel:
        attention.add_transposed(cotangent, moved)
        return moved, bias
    attention.add_transposed(moved, moved)
    return moved, bias + skipped.flatten(1) @ attention.constant[: cotangent.shape[1]].flatten()
