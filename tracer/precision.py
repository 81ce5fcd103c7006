"""Run a model in a precision wider than that of its weights or kernels: exact, and no second copy of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block every module's own weights are `dtype` while it runs, and as they were afterwards.

    A residual stream rounded to half precision after each layer is not the sum of what was written to it, so that edges
    could not add up; only the weights may be rounded.
    """
    stored: dict[nn.Module, dict[str, Tensor]] = {}

    def widen(module: nn.Module, arguments: tuple) -> None:
        stored[module] = {name: p.data for name, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        for name, weights in stored[module].items():
            getattr(module, name).data = weights.to(dtype)

    def restore(module: nn.Module, arguments: tuple, output: object) -> None:
        for name, weights in stored.pop(module).items():
            getattr(module, name).data = weights

    narrow = [m for m in model.modules() if any(p.dtype != dtype for p in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(widen) for module in narrow]
    handles += [module.register_forward_hook(restore, always_call=True) for module in narrow]
    try:
        with _experts_one_by_one(model, dtype):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _experts_one_by_one(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Grouped products, by which transformers runs a mixture of experts, know no float64; plain ones do."""
    if dtype != torch.float64 or not isinstance(model, PreTrainedModel):
        yield
        return
    before: Any = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
