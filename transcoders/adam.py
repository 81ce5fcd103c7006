"""Adam (Kingma and Ba, 2015) for float32 and for bfloat16 weights, with moments in float32 or in eight bits."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from transcoders.eight_bits import MEAN, MEAN_SQUARE, EightBits

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_VECTORS = ("b_enc", "b_dec", "threshold")
"""Few numbers: their moments are float32 always."""
AT_ONCE = 1 << 24
"""Numbers of a weight that are moved at once where that takes copies."""
LEAST_THRESHOLD = 1e-3
"""Where JumpReLU's thresholds end: below 0 features would fire negatively, and at 0 a threshold has no gradient."""


class Moment(Protocol):
    """A running mean of one weight's gradients, or of their squares; parts of it are rows."""

    def read(self, rows: slice) -> Tensor: ...
    def write(self, rows: slice, values: Tensor, noise: torch.Generator) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...


class Float32:
    """A moment as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.values = torch.zeros_like(weight, dtype=torch.float32)

    def read(self, rows: slice) -> Tensor:
        return self.values[rows]

    def write(self, rows: slice, values: Tensor, noise: torch.Generator) -> None:
        self.values[rows] = values

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"": self.values}


class Adam:
    """The moments of some weights; half-precision weights would stand still if small steps were rounded to nearest."""

    def __init__(self, weights: dict[str, Tensor], seed: int, *, eight_bits: bool = False) -> None:
        self._weights = weights
        self.first: dict[str, Moment] = {}
        self.second: dict[str, Moment] = {}
        for name, weight in weights.items():
            small = eight_bits and name not in _VECTORS
            self.first[name] = EightBits(weight, MEAN) if small else Float32(weight)
            self.second[name] = EightBits(weight, MEAN_SQUARE) if small else Float32(weight)
        self.steps = 0
        self._seed = seed
        self._noise = torch.Generator(next(iter(weights.values())).device)
        wide = [weight for name, weight in weights.items() if self._is_plain(name)]
        self._fused = torch.optim.Adam(wide, betas=BETAS, eps=EPSILON, fused=True) if wide else None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Follow the gradients, and forget them."""
        if self._fused is not None:
            self._step_plain(self._fused, learning_rate)
        self.steps += 1
        self._noise.manual_seed(self._seed + 7919 * self.steps)  # a resumed run rounds as it would have
        for name, weight in self._weights.items():
            if weight.grad is not None and not self._is_plain(name):
                self._step_rounded(name, learning_rate)
            weight.grad = None
        if "threshold" in self._weights:  # after the step and not in the loss: what is saved is what was trained
            self._weights["threshold"].clamp_(min=LEAST_THRESHOLD)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, named first:<weight> and second:<weight>, with what else there is of it behind."""
        moments = [(f"first:{name}", moment) for name, moment in self.first.items()]
        moments += [(f"second:{name}", moment) for name, moment in self.second.items()]
        return {name + part: tensor for name, moment in moments for part, tensor in moment.tensors().items()}

    def _is_plain(self, name: str) -> bool:
        return self._weights[name].dtype == torch.float32 and isinstance(self.first[name], Float32)

    def _step_plain(self, fused: torch.optim.Adam, learning_rate: float) -> None:
        """In torch's one pass over each; the moments are ours, for checkpoints."""
        for name, weight in self._weights.items():
            first, second = self.first[name], self.second[name]
            if self._is_plain(name) and weight not in fused.state:
                assert isinstance(first, Float32) and isinstance(second, Float32)
                step = torch.tensor(float(self.steps), device=weight.device)
                fused.state[weight] = {"step": step, "exp_avg": first.values, "exp_avg_sq": second.values}
        for group in fused.param_groups:
            group["lr"] = learning_rate
        fused.step()

    def _step_rounded(self, name: str, learning_rate: float) -> None:
        weight = self._weights[name]
        assert weight.grad is not None
        for rows in _parts(weight):
            gradient = weight.grad[rows].float()
            first = self.first[name].read(rows).lerp_(gradient, 1 - BETAS[0])
            second = self.second[name].read(rows).lerp_(gradient.square_(), 1 - BETAS[1])
            size = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
            moved = weight[rows].float() - learning_rate / (1 - BETAS[0] ** self.steps) * first / size
            weight[rows] = rounded(moved, self._noise) if weight.dtype == torch.bfloat16 else moved
            self.first[name].write(rows, first, self._noise)
            self.second[name].write(rows, second, self._noise)


def _parts(weight: Tensor) -> Iterator[slice]:
    size = max(1, AT_ONCE // max(1, weight[0].numel()))
    for first in range(0, len(weight), size):
        yield slice(first, first + size)


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 as bfloat16, up or down with the chance that makes the mean exact."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
