"""Digests of weights: another number anywhere is another model, wherever it is computed."""

import torch
from torch import nn

from transcoders.fingerprint import SAMPLES, fingerprint


def linear(seed: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(768, 4 * SAMPLES).to(dtype)


def test_equal_weights_have_the_same_digest():
    assert fingerprint(linear(0)) == fingerprint(linear(0))
    assert fingerprint(linear(0)) != fingerprint(linear(1))
    assert len(fingerprint(linear(0))) == 10


def test_one_column_set_to_zero_is_another_model():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        before, changed = linear(0, dtype), linear(0, dtype)
        with torch.no_grad():
            changed.weight[:, 5] = 0
        assert fingerprint(changed) != fingerprint(before)


def test_what_is_computed_anew_at_each_start_does_not_count():
    first, second = linear(0), linear(0)
    first.register_buffer("frequencies", torch.ones(3), persistent=False)
    second.register_buffer("frequencies", torch.ones(3) + 1e-7, persistent=False)
    assert fingerprint(first) == fingerprint(second)
