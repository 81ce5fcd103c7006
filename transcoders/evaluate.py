"""How well a transcoder stands in for the MLPs, in five numbers; trace evaluate tells more."""

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from transcoders.comparison import compare
from transcoders.model import CrossLayerTranscoder
from transcoders.passages import Passages
from transcoders.reconstruction import errors, reconstruct


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


def evaluate(
    model: PreTrainedModel,
    transcoder: CrossLayerTranscoder,
    tokens: Int[Tensor, "batch position"],
    keep: Bool[Tensor, "batch position"],
    last: Int[Tensor, " batch"],
) -> Report:
    """Measure on right-padded prompts; `keep` marks real tokens after the first, `last` the read-out position."""
    passages = Passages(tokens, keep, one_hot(last, tokens.shape[1]).bool())
    seen = reconstruct(model, transcoder, passages)
    _, [replaced] = compare(model, transcoder, passages, [tuple(range(transcoder.config.n_layers))])
    means = errors(seen)
    return Report(
        top1_match=replaced.top1_match,
        kl=replaced.mean_kl,
        relative_error=float(means.relative_error.mean()),
        l0=float(means.l0.sum()),
        active=seen.fired > 0,
    )
