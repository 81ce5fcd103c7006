"""The frozen layers as explicit linear maps, and their transpose applied to a batch of cotangents.

With attention patterns and norm denominators constant, a layer adds N' W_O A W_V N x to the residual stream (N the norm
before attention, N' the one after it, where the family has them). A cotangent at the layer's output comes out at its
input as g + Nᵀ W_Vᵀ Aᵀ W_Oᵀ N'ᵀ g ("Circuit Tracing", appendix). Both norms are multiplied into A, W_V and W_O once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    does_nothing: bool = False
    """Stands where a family has no norm."""

    def apply(self, x: Float[Tensor, "*batch position d_model"]) -> Float[Tensor, "*batch position d_model"]:
        """The norm of a residual stream of this prompt, less the bias."""
        return self._centred(x) * self.gain * self.scale[: x.shape[-2], None]

    def apply_at(self, x: Float[Tensor, "row d_model"], position: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """The same for vectors that each live at one position."""
        return x if self.does_nothing else self._centred(x) * self.gain * self.scale[position, None]

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
    """One layer's attention with its pattern held; the norms before and after it are part of the three factors."""

    held: Float[Tensor, "head position position"] | Callable[[], Float[Tensor, "head position position"]]
    """The pattern, or what computes it anew where it is too large to be held."""
    W_V: Float[Tensor, "kv_head d_head d_model"]
    W_O: Float[Tensor, "d_model head d_head"]
    constant: Float[Tensor, "position d_model"]
    """What the biases of norms and projections add."""

    @property
    def pattern(self) -> Float[Tensor, "head position position"]:
        """Weight of each source position (last axis) for each target position, times the norms' scales at both."""
        return self.held if isinstance(self.held, Tensor) else self.held()

    def apply(self, x: Float[Tensor, "position d_model"]) -> Float[Tensor, "position d_model"]:
        """What attention adds to the residual stream x, less the constant."""
        value = torch.einsum("pd,vkd->vpk", x, self.W_V)
        return _moved(self.pattern, value, self.W_O)

    def add_transposed(
        self, cotangent: Float[Tensor, "target p d_model"], onto: Float[Tensor, "target p d_model"]
    ) -> None:
        """Cotangents at attention's output → at its input, added to `onto` in place; `p` may stop before the end."""
        n_targets, n, d_model = cotangent.shape
        n_kv, d_head = self.W_V.shape[:2]
        per_head = cotangent.reshape(-1, d_model) @ self.W_O.flatten(1)
        per_head = per_head.view(n_targets, n, n_kv, -1, d_head).permute(3, 2, 1, 0, 4)
        patterns = self.pattern.unflatten(0, (n_kv, -1)).transpose(0, 1)
        # Query heads that share a value head meet before W_V: one product less for each of them.
        moved = cotangent.new_zeros(n_kv, n, n_targets * d_head)
        for pattern, heads in zip(patterns, per_head, strict=True):
            moved.baddbmm_(pattern[:, :n, :n].mT, heads.reshape(n_kv, n, -1))
        values = moved.view(n_kv, n, n_targets, d_head).permute(2, 1, 0, 3).reshape(n_targets * n, -1)
        onto.view(-1, d_model).addmm_(values, self.W_V.flatten(0, 1))

    def transpose_at(
        self, cotangent: Float[Tensor, "target d_model"], position: Int[Tensor, " target"], n: int
    ) -> Float[Tensor, "target {n} d_model"]:
        """Cotangents that each live at one position → at the input's first n positions: the cheap first step down."""
        n_kv = len(self.W_V)
        per_head = torch.einsum("bd,dhk->hbk", cotangent, self.W_O).unflatten(0, (n_kv, -1))
        patterns = self.pattern[:, position, :n].unflatten(0, (n_kv, -1))
        moved = torch.einsum("vgbp,vgbk->bpvk", patterns, per_head)
        return moved.reshape(len(cotangent), n, -1) @ self.W_V.flatten(0, 1)


def freeze_norm(
    module: Any, x: Float[Tensor, "position d_model"], dtype: torch.dtype, gain_offset: float = 0.0
) -> FrozenNorm:
    """Hold a norm's denominator at its value for the residual stream x; None is the norm that does nothing."""
    wide = x.to(dtype)
    if module is None:
        return FrozenNorm(torch.ones_like(wide[0]), torch.ones_like(wide[:, 0]), torch.zeros_like(wide[0]), False, True)
    centres = isinstance(module, nn.LayerNorm)
    gain = module.weight.detach().to(dtype) + gain_offset
    bias = module.bias.detach().to(dtype) if centres and module.bias is not None else torch.zeros_like(gain)
    variance = wide.var(-1, correction=0) if centres else wide.pow(2).mean(-1)
    return FrozenNorm(gain, (variance + epsilon(module)).rsqrt(), bias, centres)


def freeze_attention(
    norm: FrozenNorm,
    attend: Callable[[], Float[Tensor, "head position position"]],
    projections: Projections,
    post_norm: FrozenNorm,
    *,
    hold: bool,
) -> FrozenAttention:
    """Freeze a layer's attention: `attend` gives its pattern, which is held or computed again whenever it is needed."""

    def scaled() -> Tensor:
        return attend().mul(post_norm.scale[:, None]).mul_(norm.scale)

    pattern = attend()
    dtype = pattern.dtype
    W_V, b_V, W_O, b_O = (
        part.detach().to(dtype) for part in (projections.W_V, projections.b_V, projections.W_O, projections.b_O)
    )
    value = torch.einsum("d,vkd->vk", norm.bias, W_V) + b_V
    moved = _moved(pattern, value[:, None].expand(-1, pattern.shape[1], -1), W_O)
    constant = post_norm.apply(moved + b_O) + post_norm.bias
    # Norms mix d_model and scale positions, so the one goes into the weights, the other into the pattern.
    one = torch.ones_like(norm.scale)
    W_V = replace(norm, scale=one[:1]).transpose(W_V.flatten(0, 1)[:, None])[:, 0].view_as(W_V)
    W_O = replace(post_norm, scale=one[:1]).apply(W_O.flatten(1).T[:, None])[:, 0].T.reshape(W_O.shape)
    return FrozenAttention(scaled() if hold else scaled, W_V, W_O, constant)


def _moved(
    pattern: Float[Tensor, "head position position"],
    value: Float[Tensor, "kv_head position d_head"],
    W_O: Float[Tensor, "d_model head d_head"],
) -> Float[Tensor, "position d_model"]:
    value = value.repeat_interleave(pattern.shape[0] // value.shape[0], dim=0)
    return torch.einsum("htp,hpk,dhk->td", pattern, value, W_O)
