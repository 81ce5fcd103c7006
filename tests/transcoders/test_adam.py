"""Adam with few bits: rounding is right on average, and steps are those of torch's Adam but for the rounding."""

import pytest
import torch

from transcoders.adam import Adam, rounded
from transcoders.eight_bits import MEAN, MEAN_SQUARE, EightBits, decoded, encoded


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("levels", [MEAN, MEAN_SQUARE])
def test_eight_bits_are_right_on_average_and_next_to_the_number_always(levels):
    numbers = torch.tensor([1.0, 0.9, 0.5, 0.123, 1e-2, 3.3e-4, 2e-6])
    numbers = torch.cat([numbers, -numbers]) if levels.signed else numbers
    many = numbers[:, None].expand(-1, 20_000)
    found = decoded(encoded(many, levels, noise()), levels)
    step = 10 ** (levels.decades / levels.n_steps)
    assert bool((found / many <= step * 1.0001).all())
    assert bool((found / many >= 0.9999 / step).all())
    torch.testing.assert_close(found.double().mean(1).float(), numbers, rtol=2e-3, atol=0)
    assert int(found.unique(dim=1).shape[1]) > 1  # by chance, not to the nearest


def test_nothing_and_the_largest_are_exact_and_a_mean_square_is_never_rounded_to_nothing():
    numbers = torch.tensor([0.0, 1.0, 1e-30])
    assert decoded(encoded(numbers, MEAN, noise()), MEAN).tolist() == [0.0, 1.0, 0.0]
    assert decoded(encoded(numbers, MEAN_SQUARE, noise()), MEAN_SQUARE).tolist() == pytest.approx([0.0, 1.0, 1e-14])
    assert decoded(encoded(-numbers, MEAN, noise()), MEAN).tolist() == [0.0, -1.0, 0.0]


@pytest.mark.parametrize("width", [512, 96])
def test_blocks_have_scales_of_their_own(width):
    moment = EightBits(torch.zeros(3, width), MEAN)
    values = torch.randn(3, width, generator=noise(1)) * torch.tensor([1e-9, 1.0, 1e9])[:, None]
    values[0] = 0
    moment.write(slice(0, 3), values, noise())
    assert bool((moment.read(slice(0, 1)) == 0).all())
    for row in (1, 2):
        least = 1e-6 * float(values[row].abs().max())
        torch.testing.assert_close(moment.read(slice(row, row + 1))[0], values[row], rtol=0.14, atol=least)
    assert moment.codes.dtype == torch.uint8
    assert moment.sizes.shape == (3, 2 if width == 512 else 1)


def test_a_running_mean_in_eight_bits_follows_changes_smaller_than_a_level():
    """Rounded to the nearest level it would stay where it is."""
    moment = EightBits(torch.zeros(1, 256), MEAN_SQUARE)
    moment.write(slice(0, 1), torch.ones(1, 256), noise())
    generator = noise(2)
    for _ in range(2000):
        moment.write(slice(0, 1), moment.read(slice(0, 1)).lerp(torch.tensor(0.25), 0.001), generator)
    expected = 0.25 + 0.75 * 0.999**2000
    assert float(moment.read(slice(0, 1)).mean()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_steps_are_those_of_adam(dtype, eight_bits):
    """On a least-squares problem: the same way down, up to rounding."""
    target = torch.randn(8, 256, generator=noise(3))
    ours = torch.zeros(8, 256, dtype=dtype, requires_grad=True)
    theirs = torch.zeros(8, 256, requires_grad=True)
    adam = Adam({"W_enc": ours}, seed=0, eight_bits=eight_bits)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(100):
        (ours.float() - target).square().sum().backward()
        adam.step(0.01)
        (theirs - target).square().sum().backward()
        reference.step()
        reference.zero_grad()
    exact = dtype == torch.float32 and not eight_bits
    difference = (ours.float() - theirs).detach().abs()
    assert float(difference.max()) <= (1e-6 if exact else 0.15)
    assert float(difference.mean()) <= (1e-6 if exact else 0.03)


def test_biases_keep_their_moments_whole_and_all_moments_are_in_a_checkpoint():
    weights = {"W_enc": torch.zeros(2, 4, 512), "b_enc": torch.zeros(2, 4)}
    adam = Adam({name: weight.requires_grad_() for name, weight in weights.items()}, seed=0, eight_bits=True)
    kept = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adam.tensors().items()}
    whole, codes, sizes = (torch.float32, (2, 4)), (torch.uint8, (2, 4, 512)), (torch.float32, (2, 4, 2))
    assert kept == {
        "first:W_enc": codes, "first:W_enc:sizes": sizes, "first:b_enc": whole,
        "second:W_enc": codes, "second:W_enc:sizes": sizes, "second:b_enc": whole,
    }  # fmt: skip


def test_a_weight_is_moved_alike_in_parts_and_at_once(monkeypatch):
    moved = []
    for at_once in (1 << 24, 300):
        monkeypatch.setattr("transcoders.adam.AT_ONCE", at_once)
        weight = torch.zeros(6, 256, requires_grad=True)
        weight.grad = torch.randn(6, 256, generator=noise(4))
        adam = Adam({"W_dec.0": weight}, seed=0, eight_bits=True)
        adam.step(0.01)
        moved.append(weight.detach().clone())
    torch.testing.assert_close(*moved)


def test_bfloat16_is_right_on_average():
    numbers = torch.tensor([1.001, -3.14159, 1e-3])
    found = rounded(numbers[:, None].expand(-1, 20_000).contiguous(), noise())
    torch.testing.assert_close(found.double().mean(1).float(), numbers, rtol=1e-4, atol=0)
