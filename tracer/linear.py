"""The frozen layers as explicit linear maps, and their transpose applied to a batch of cotangents.

With attention patterns and norm denominators constant, a layer adds N' W_O A W_V N x to the residual stream (N the norm
before attention, N' the one after it, where the family has them). A cotangent at the layer's output comes out at its
input as g + Nᵀ W_Vᵀ Aᵀ W_Oᵀ N'ᵀ g ("Circuit Tracing", appendix).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transcoders.families import Projections, epsilon


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its denominator held: x ↦ gain · scale · (x − its mean, for LayerNorm) + bias."""

    gain: Float[Tensor, " d_model"]
    scale: Float[Tensor, " position"]
    bias: Float[Tensor, " d_model"]
    centres: bool
    """Whether the mean over d_model is taken off first (LayerNorm): that stays linear."""

    def apply(self, x: Float[Tensor, "*batch position d_model"]) -> Float[Tensor, "*batch position d_model"]:
        """The norm of a residual stream of this prompt, less the bias."""
        return self._centred(x) * self.gain * self.scale[: x.shape[-2], None]

    def transpose(self, g: Float[Tensor, "*batch position d_model"]) -> Float[Tensor, "*batch position d_model"]:
        """Cotangents at the norm's output → at its input; positions may stop before the prompt's end."""
        return self._centred(g * self.gain * self.scale[: g.shape[-2], None])

    def transpose_at(
        self, g: Float[Tensor, "target d_model"], position: Int[Tensor, " target"]
    ) -> Float[Tensor, "target d_model"]:
        """The same for cotangents that each live at one position."""
        return self._centred(g * self.gain * self.scale[position, None])

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention with its pattern held, the norms around it included."""

    norm: FrozenNorm
    pattern: Float[Tensor, "head position position"]
    """Weight of each source position (last axis) for each target position; a sink may leave less than 1 in all."""
    W_V: Float[Tensor, "kv_head d_head d_model"]
    W_O: Float[Tensor, "d_model head d_head"]
    post_norm: FrozenNorm
    constant: Float[Tensor, "position d_model"]
    """What the biases of norms and projections add."""

    def apply(self, x: Float[Tensor, "position d_model"]) -> Float[Tensor, "position d_model"]:
        """What attention adds to the residual stream x, less the constant."""
        return self.post_norm.apply(self._moved(torch.einsum("pd,vkd->vpk", self.norm.apply(x), self.W_V)))

    def _moved(self, value: Float[Tensor, "kv_head position d_head"]) -> Float[Tensor, "position d_model"]:
        value = value.repeat_interleave(self.pattern.shape[0] // self.W_V.shape[0], dim=0)
        return torch.einsum("htp,hpk,dhk->td", self.pattern, value, self.W_O)

    def transpose(self, cotangent: Float[Tensor, "target p d_model"]) -> Float[Tensor, "target p d_model"]:
        """Cotangents at attention's output → at its input; `p` may stop before the prompt's end (causality)."""
        n = cotangent.shape[1]
        per_head = torch.einsum("btd,dhk->hbtk", self.post_norm.transpose(cotangent), self.W_O)
        moved = torch.einsum("htp,hbtk->hbpk", self.pattern[:, :n, :n], per_head)
        return self._through_values(moved)

    def transpose_at(
        self, cotangent: Float[Tensor, "target d_model"], position: Int[Tensor, " target"], n: int
    ) -> Float[Tensor, "target {n} d_model"]:
        """The same for cotangents that each live at one position: the cheap first step down."""
        per_head = torch.einsum("bd,dhk->hbk", self.post_norm.transpose_at(cotangent, position), self.W_O)
        moved = torch.einsum("hbp,hbk->hbpk", self.pattern[:, position, :n], per_head)
        return self._through_values(moved)

    def _through_values(self, moved: Float[Tensor, "head target p d_head"]) -> Float[Tensor, "target p d_model"]:
        """Sum the query heads that share a value head, then back through W_V and the norm."""
        grouped = moved.unflatten(0, (self.W_V.shape[0], -1)).sum(1)
        return self.norm.transpose(torch.einsum("vbpk,vkd->bpd", grouped, self.W_V))


def freeze_norm(
    module: Any, x: Float[Tensor, "position d_model"], dtype: torch.dtype, gain_offset: float = 0.0
) -> FrozenNorm:
    """Hold a norm's denominator at its value for the residual stream x; None is the norm that does nothing."""
    wide = x.to(dtype)
    if module is None:
        return FrozenNorm(torch.ones_like(wide[0]), torch.ones_like(wide[:, 0]), torch.zeros_like(wide[0]), False)
    centres = isinstance(module, nn.LayerNorm)
    gain = module.weight.detach().to(dtype) + gain_offset
    bias = module.bias.detach().to(dtype) if centres and module.bias is not None else torch.zeros_like(gain)
    variance = wide.var(-1, correction=0) if centres else wide.pow(2).mean(-1)
    return FrozenNorm(gain, (variance + epsilon(module)).rsqrt(), bias, centres)


def freeze_attention(
    norm: FrozenNorm,
    pattern: Float[Tensor, "head position position"],
    projections: Projections,
    post_norm: FrozenNorm,
) -> FrozenAttention:
    """Hold an attention pattern; the projections are those of the layer."""
    dtype = pattern.dtype
    W_V, b_V, W_O, b_O = (
        part.detach().to(dtype) for part in (projections.W_V, projections.b_V, projections.W_O, projections.b_O)
    )
    zero = torch.zeros(pattern.shape[1], W_O.shape[0], dtype=dtype, device=pattern.device)
    frozen = FrozenAttention(norm, pattern, W_V, W_O, post_norm, zero)
    value = torch.einsum("d,vkd->vk", norm.bias, W_V) + b_V
    moved = frozen._moved(value[:, None].expand(-1, pattern.shape[1], -1))
    constant = post_norm.apply(moved + b_O) + post_norm.bias
    return FrozenAttention(norm, pattern, W_V, W_O, post_norm, constant)
