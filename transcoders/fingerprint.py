"""Tell models by their weights: names and folders stay the same when weights change."""

import hashlib

import torch
from torch import nn

SAMPLES = 256
"""Numbers read of each tensor: training changes nearly all, and reading all would take long."""


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Ten hexadecimal digits of the names, shapes and some numbers of all weights."""
    digest = hashlib.sha256()
    for name, weights in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        some = weights.flatten()[:: max(1, weights.numel() // SAMPLES)].float().cpu()
        digest.update(f"{name} {tuple(weights.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:10]
