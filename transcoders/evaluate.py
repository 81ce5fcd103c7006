"""How well a transcoder stands in for the MLPs: reconstruction, sparsity, and the replacement model's answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from transcoders.activations import mlp_activations, replaced_mlps
from transcoders.loss import relative_error
from transcoders.model import CrossLayerTranscoder


@dataclass(frozen=True)
class Report:
    """A transcoder on one set of prompts."""

    top1_match: float
    """Share of prompts on which the replacement model's first choice is the model's."""
    kl: float
    """Mean KL divergence from the model to the replacement model at the read-out position, in nats."""
    relative_error: float
    """Mean over layers and tokens of squared error / squared norm of the MLP output."""
    l0: float
    """Active features per token, summed over layers."""
    active: Tensor
    """(layer, feature): True where a feature fired at least once."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    transcoder: CrossLayerTranscoder,
    tokens: Int[Tensor, "batch position"],
    keep: Bool[Tensor, "batch position"],
    last: Int[Tensor, " batch"],
    batch_size: int = 256,
) -> Report:
    """Measure on right-padded prompts; `keep` marks real tokens after the first, `last` the read-out position."""
    matches, divergences, errors, counts = [], [], [], []
    active = torch.zeros(transcoder.config.n_layers, transcoder.config.n_features, dtype=torch.bool)
    for rows in torch.arange(len(tokens)).split(batch_size):
        ids, kept, ends = tokens[rows], keep[rows], last[rows]
        inputs, outputs = mlp_activations(model, ids, kept, transcoder.config.reads)
        activations = transcoder.encode(inputs)
        errors.append(relative_error(transcoder.decode(activations), outputs).mean(0))
        counts.append((activations > 0).sum((0, 2)))
        active |= (activations > 0).any(1)
        own = model(ids).logits[torch.arange(len(ids)), ends].log_softmax(-1)
        with replaced_mlps(model, transcoder):
            other = model(ids).logits[torch.arange(len(ids)), ends].log_softmax(-1)
        matches.append(own.argmax(-1) == other.argmax(-1))
        divergences.append((own.exp() * (own - other)).sum(-1))
    return Report(
        top1_match=float(torch.cat(matches).double().mean()),
        kl=float(torch.cat(divergences).double().mean()),
        relative_error=float(torch.cat(errors).double().mean()),
        l0=float(torch.cat(counts).double().mean()),
        active=active,
    )
