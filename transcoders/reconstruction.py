"""How well a transcoder writes what MLPs write, and from how many features: per layer, by size and by position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transcoders.activations import mlp_activations
from transcoders.metrics import NORMS, POSITIONS, bucket
from transcoders.model import CrossLayerTranscoder
from transcoders.passages import Passages, batches

DENSITIES = tuple(10 ** (exponent / 2) for exponent in range(-11, 0))
"""Where features are parted by the share of tokens they fire on: half a power of ten each."""
NUMBERS_AT_ONCE = 1 << 25
"""Features times tokens, or words times tokens, that are held at once; 128 MB in float32."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Reconstruction:
    """Every kept token, sequence by sequence: what all means are taken of."""

    error: Float[Tensor, "layer token"]
    """Squared error of each MLP output."""
    size: Float[Tensor, "layer token"]
    """Its squared norm."""
    active: Int[Tensor, "layer token"]
    """How many features of the layer fire."""
    fired: Int[Tensor, "layer feature"]
    """On how many tokens each feature fires."""
    position: Int[Tensor, " token"]
    readout: Bool[Tensor, " token"]
    """Whether an answer is read there."""

    @property
    def n_tokens(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Errors:
    """Means over some tokens, layer by layer; NaN where a layer has none of them."""

    tokens: Int[Tensor, " layer"]
    nmse: Float[Tensor, " layer"]
    """Squared errors over squared norms, both summed: large outputs rule it."""
    relative_error: Float[Tensor, " layer"]
    """Mean of each token's squared error over its own squared norm: every token counts alike."""
    l0: Float[Tensor, " layer"]
    """Features of the layer that fire on a token."""


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    transcoder: CrossLayerTranscoder,
    passages: Passages,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reconstruction:
    """Run the model once over all passages; `on_progress` gets sequences done and their number."""
    config = transcoder.config
    fired = torch.zeros(config.n_layers, config.n_features, dtype=torch.int64)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for part in batches(passages, NUMBERS_AT_ONCE // config.n_features):
        tokens, keep = part.tokens.to(model.device), part.keep.to(model.device)
        inputs, outputs = mlp_activations(model, tokens, keep, config.reads, config.writes)
        written = list(transcoder.skip(inputs) + transcoder.b_dec[:, None])
        active = []
        for layer in range(config.n_layers):  # one after the other: activations of all would not fit
            activations = transcoder.encode_layer(layer, inputs[layer])
            fires = activations != 0
            fired[layer] += fires.sum(0).cpu()
            active.append(fires.sum(1))
            for k, write in enumerate(transcoder.writes(layer, activations)):
                written[layer + k] = written[layer + k] + write
        error, size = (torch.stack(written) - outputs).square().sum(-1), outputs.square().sum(-1)
        parts.append((error.cpu(), size.cpu(), torch.stack(active).cpu()))
        done += len(tokens)
        on_progress(done, len(passages.tokens))
    error, size, active = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
    position = torch.arange(passages.tokens.shape[1]).expand_as(passages.tokens)[passages.keep]
    return Reconstruction(error, size, active, fired, position, passages.readout[passages.keep])


def errors(seen: Reconstruction, chosen: Bool[Tensor, "#layer token"] | None = None) -> Errors:
    """Means over all tokens, or over the chosen ones."""
    weight = torch.ones_like(seen.error) if chosen is None else chosen.expand_as(seen.error)
    weight = weight.double()
    n = weight.sum(1)
    relative = seen.error.double() / seen.size.double().clamp(min=1e-12)
    return Errors(
        n.long(), (seen.error * weight).sum(1) / (seen.size * weight).sum(1), (relative * weight).sum(1) / n,
        (seen.active * weight).sum(1) / n,
    )  # fmt: skip


def errors_by_norm(seen: Reconstruction) -> list[Errors]:
    """By the norm of the MLP output in units of the layer's root mean square: one for each bucket of `NORMS`."""
    return [errors(seen, bucket(_norms(seen), NORMS) == i) for i in range(len(NORMS) + 1)]


def answer_norms(seen: Reconstruction) -> Float[Tensor, " readout"]:
    """Where each answer is read, the root of the layers' mean squared norm, each in units of its layer's."""
    return _norms(seen)[:, seen.readout].square().mean(0).sqrt()


def errors_by_position(seen: Reconstruction) -> list[Errors]:
    """By position in the sequence: one for each bucket of `POSITIONS`."""
    return [errors(seen, (bucket(seen.position, POSITIONS) == i)[None]) for i in range(len(POSITIONS) + 1)]


def _norms(seen: Reconstruction) -> Float[Tensor, "layer token"]:
    return (seen.size / seen.size.double().mean(1, keepdim=True)).sqrt()


def densities(seen: Reconstruction) -> Float[Tensor, "layer feature"]:
    """Share of tokens on which each feature fires; of a layer they sum to its L0."""
    return seen.fired.double() / seen.n_tokens


def density_histogram(density: Float[Tensor, "layer feature"]) -> Int[Tensor, "layer bin"]:
    """How many features of each layer fire on such a share of tokens: never, then the buckets of `DENSITIES`."""
    bins = torch.where(density > 0, bucket(density, DENSITIES) + 1, 0)
    n_bins = len(DENSITIES) + 2
    return torch.stack([torch.bincount(layer, minlength=n_bins) for layer in bins])


@torch.no_grad()
def decoder_norms(transcoder: CrossLayerTranscoder) -> Float[Tensor, "layer layer"]:
    """Mean norm of the decoder vectors from the features of a layer (row) to each MLP output; 0 below the layer."""
    config = transcoder.config
    norms = torch.zeros(config.n_layers, config.n_layers, dtype=torch.float64)
    for source in range(config.n_layers):
        for features in torch.arange(config.n_features).split(ROWS_AT_ONCE):
            rows = transcoder.decoder_rows(source, features.to(transcoder.W_enc.device))
            norms[source, source : source + rows.shape[1]] += rows.float().norm(dim=-1).double().sum(0).cpu()
    return norms / config.n_features
