"""Adam (Kingma and Ba, 2015), with float32 moments also for bfloat16 weights, which are rounded stochastically."""

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """The moments of some weights; half-precision weights would stand still if small steps were rounded to nearest."""

    def __init__(self, weights: dict[str, Tensor], seed: int) -> None:
        self._weights = weights
        self.first = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.steps = 0
        self._seed = seed
        self._noise = torch.Generator(next(iter(weights.values())).device)
        wide = [w for w in weights.values() if w.dtype == torch.float32]
        self._fused = torch.optim.Adam(wide, betas=BETAS, eps=EPSILON, fused=True) if wide else None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Follow the gradients, and forget them."""
        if self._fused is not None:
            self._step_wide(self._fused, learning_rate)
        self.steps += 1
        self._noise.manual_seed(self._seed + 7919 * self.steps)  # a resumed run rounds as it would have
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                self._step_narrow(name, learning_rate)
            weight.grad = None

    def _step_wide(self, fused: torch.optim.Adam, learning_rate: float) -> None:
        """All float32 weights in torch's one pass over each; the moments are ours, for checkpoints."""
        for name, weight in self._weights.items():
            if weight.dtype == torch.float32 and weight not in fused.state:
                step = torch.tensor(float(self.steps), device=weight.device)
                fused.state[weight] = {"step": step, "exp_avg": self.first[name], "exp_avg_sq": self.second[name]}
        for group in fused.param_groups:
            group["lr"] = learning_rate
        fused.step()

    def _step_narrow(self, name: str, learning_rate: float) -> None:
        weight, first, second = self._weights[name], self.first[name], self.second[name]
        if weight.grad is None:
            return
        gradient = weight.grad.float()
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        size = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
        moved = weight.float() - learning_rate / (1 - BETAS[0] ** self.steps) * first / size
        weight.copy_(rounded(moved, self._noise))


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 as bfloat16, up or down with the chance that makes the mean exact."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
