"""The frozen layers as explicit linear maps, and their transpose applied to a batch of cotangents.

With attention patterns and norm denominators constant, a layer adds W_O A W_V (s γ x) to the residual stream. A
cotangent at the layer's output comes out at its input as g + s γ W_Vᵀ Aᵀ W_Oᵀ g ("Circuit Tracing", appendix).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its denominator held: x ↦ gain · scale · x, position by position (RMSNorm: nothing else)."""

    gain: Float[Tensor, " d_model"]
    scale: Float[Tensor, " position"]

    def apply(self, x: Float[Tensor, "*batch position d_model"]) -> Float[Tensor, "*batch position d_model"]:
        """The norm of a residual stream of this prompt; its own transpose."""
        return x * self.gain * self.scale[:, None]

    def apply_at(
        self, x: Float[Tensor, "target d_model"], position: Int[Tensor, " target"]
    ) -> Float[Tensor, "target d_model"]:
        """The same for vectors that each live at one position."""
        return x * self.gain * self.scale[position, None]


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention with its pattern held, norm before it included."""

    norm: FrozenNorm
    pattern: Float[Tensor, "head position position"]
    """Weight of each source position (last axis) for each target position."""
    W_V: Float[Tensor, "kv_head d_head d_model"]
    W_O: Float[Tensor, "d_model head d_head"]
    constant: Float[Tensor, " d_model"]
    """What the biases of the two projections add at every position."""

    def apply(self, x: Float[Tensor, "position d_model"]) -> Float[Tensor, "position d_model"]:
        """What attention adds to the residual stream x, less the constant."""
        value = torch.einsum("pd,vkd->vpk", self.norm.apply(x), self.W_V)
        value = value.repeat_interleave(self.pattern.shape[0] // self.W_V.shape[0], dim=0)
        return torch.einsum("htp,hpk,dhk->td", self.pattern, value, self.W_O)

    def transpose(self, cotangent: Float[Tensor, "target p d_model"]) -> Float[Tensor, "target p d_model"]:
        """Cotangents at attention's output → at its input; `p` may stop before the prompt's end (causality)."""
        n = cotangent.shape[1]
        per_head = torch.einsum("btd,dhk->hbtk", cotangent, self.W_O)
        moved = torch.einsum("htp,hbtk->hbpk", self.pattern[:, :n, :n], per_head)
        return self._through_values(moved, n)

    def transpose_at(
        self, cotangent: Float[Tensor, "target d_model"], position: Int[Tensor, " target"], n: int
    ) -> Float[Tensor, "target {n} d_model"]:
        """The same for cotangents that each live at one position: the cheap first step down."""
        per_head = torch.einsum("bd,dhk->hbk", cotangent, self.W_O)
        moved = torch.einsum("hbp,hbk->hbpk", self.pattern[:, position, :n], per_head)
        return self._through_values(moved, n)

    def _through_values(self, moved: Float[Tensor, "head target p d_head"], n: int) -> Tensor:
        """Sum the query heads that share a value head, then back through W_V and the norm."""
        grouped = moved.unflatten(0, (self.W_V.shape[0], -1)).sum(1)
        back = torch.einsum("vbpk,vkd->bpd", grouped, self.W_V)
        return back * self.norm.gain * self.norm.scale[:n, None]


def freeze_norm(module: Any, x: Float[Tensor, "position d_model"], dtype: torch.dtype) -> FrozenNorm:
    """Hold an RMSNorm's denominator at its value for the residual stream x."""
    epsilon = float(module.variance_epsilon)
    scale = (x.to(dtype).pow(2).mean(-1) + epsilon).rsqrt()
    return FrozenNorm(module.weight.detach().to(dtype), scale)


def freeze_attention(
    norm: FrozenNorm, pattern: Float[Tensor, "head position position"], value: nn.Linear, output: nn.Linear
) -> FrozenAttention:
    """Hold an attention pattern; the projections are those of the layer."""
    dtype = pattern.dtype
    d_head = output.in_features // pattern.shape[0]
    W_O = output.weight.detach().to(dtype).unflatten(1, (pattern.shape[0], d_head))
    W_V = value.weight.detach().to(dtype).unflatten(0, (-1, d_head))
    constant = torch.zeros(W_O.shape[0], dtype=dtype, device=W_O.device)
    if value.bias is not None:
        bias = value.bias.detach().to(dtype).unflatten(0, (-1, d_head))
        bias = bias.repeat_interleave(pattern.shape[0] // bias.shape[0], dim=0)
        constant = constant + torch.einsum("hk,dhk->d", bias, W_O)  # a pattern's rows sum to 1
    if output.bias is not None:
        constant = constant + output.bias.detach().to(dtype)
    return FrozenAttention(norm, pattern, W_V, W_O, constant)
