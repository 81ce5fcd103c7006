"""Moments of an optimiser in eight bits a number (Dettmers et al., "8-bit Optimizers", 2022).

Every block of a row is scaled by its largest number. Levels are geometric, and rounding is by chance so that the mean
is exact: a running mean that moves by a thousandth a step would stand still if it were rounded to nearest.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale, where a row can be divided so."""


@dataclass(frozen=True)
class Levels:
    """What a number can be, as shares of its block's largest."""

    signed: bool
    n_steps: int
    decades: float
    """From the largest level down to the smallest that is not zero."""
    keeps_small: bool
    """Whether what is smaller than the smallest level becomes that rather than, perhaps, zero."""


MEAN = Levels(signed=True, n_steps=126, decades=7.0, keeps_small=False)
MEAN_SQUARE = Levels(signed=False, n_steps=254, decades=14.0, keeps_small=True)
"""Steps are divided by its root: as zero, it would let a small gradient leap."""


class EightBits:
    """A moment of a weight of two or more axes, of which the last is divided into blocks."""

    def __init__(self, weight: Tensor, levels: Levels) -> None:
        self._levels = levels
        self._block = BLOCK if weight.shape[-1] % BLOCK == 0 else weight.shape[-1]
        self.codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        n_blocks = weight.shape[-1] // self._block
        self.sizes = torch.zeros(*weight.shape[:-1], n_blocks, dtype=torch.float32, device=weight.device)

    def read(self, rows: slice) -> Tensor:
        codes = self.codes[rows].unflatten(-1, (-1, self._block))
        return (decoded(codes, self._levels) * self.sizes[rows][..., None]).flatten(-2)

    def write(self, rows: slice, values: Tensor, noise: torch.Generator) -> None:
        blocks = values.unflatten(-1, (-1, self._block))
        sizes = blocks.abs().amax(-1)
        shares = blocks / sizes.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        self.codes[rows] = encoded(shares, self._levels, noise).flatten(-2)
        self.sizes[rows] = sizes

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"": self.codes, ":sizes": self.sizes}


def encoded(shares: Tensor, levels: Levels, noise: torch.Generator) -> Tensor:
    """Numbers up to 1 as the level below or above, with the chance that makes the mean exact."""
    ladder = _ladder(levels, shares.device)
    size = shares.abs()
    least, step = 10.0**-levels.decades, levels.decades / levels.n_steps
    # ladder[0] is nothing, ladder[1] the smallest level, the last one 1
    below = ((size.clamp(min=least).log10_() + levels.decades) / step).floor_().clamp_(0, levels.n_steps - 1).int() + 1
    below = torch.where(size < least, 0, below)
    low, high = ladder[below], ladder[below + 1]
    chance = torch.rand(shares.shape, generator=noise, device=shares.device)
    level = below + (chance * (high - low) < size - low)
    if levels.keeps_small:
        level = torch.where(size > 0, level.clamp(min=1), level)
    if levels.signed:
        level = level + (shares < 0) * (levels.n_steps + 2)
    return level.to(torch.uint8)


def decoded(codes: Tensor, levels: Levels) -> Tensor:
    """The shares that the codes stand for."""
    ladder = _ladder(levels, codes.device)
    if levels.signed:
        ladder = torch.cat([ladder, -ladder])
    return ladder[codes.int()]


@cache
def _ladder(levels: Levels, device: torch.device) -> Tensor:
    """Nothing, then the levels from the smallest up to 1."""
    exponents = torch.linspace(-levels.decades, 0, levels.n_steps + 1, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 10**exponents]).float().to(device)
