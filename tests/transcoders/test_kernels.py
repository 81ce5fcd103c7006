"""Sparse encode and decode equal the dense products they replace, gradients too, in torch and in Triton."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from transcoders import kernels_torch
from transcoders.kernels import (
    BREAK_EVEN,
    Selection,
    decode,
    encode,
    gather_decode,
    kernels_for,
    select_above,
    select_top,
    sparse_encode,
    sparse_encode_top,
)

SHAPES = {
    "odd sizes": (7, 13, 5, 0.3),
    "wider than a block of columns": (3, 6, 1030, 0.4),
    "many pairs of a token and of a feature": (30, 40, 16, 0.6),
    "features that never fire": (5, 100, 8, 0.01),
    "nothing fires": (6, 9, 10, 0.0),
    "no tokens": (0, 9, 10, 0.3),
}  # tokens, features, width, share of pairs that fire
CASES = [(shape, torch.float32) for shape in SHAPES] + [
    ("odd sizes", dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    if request.param == "torch":
        return kernels_torch
    if not find_spec("triton"):
        pytest.skip("Triton is not installed: it has no build for this system")
    from transcoders import kernels_triton

    return kernels_triton


@pytest.fixture
def device(kernels):
    """Compiled Triton needs a GPU; interpreted Triton and torch run on the CPU."""
    return "cuda" if kernels is not kernels_torch and torch.cuda.is_available() else "cpu"


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def some_pairs(n_tokens, n_features, share, device, dtype=torch.float32):
    """A share of all pairs, the first feature on every token."""
    fires = torch.rand(n_tokens, n_features, generator=torch.Generator().manual_seed(1)) < share
    if share:
        fires[:, 0] = True
    token, feature = fires.nonzero(as_tuple=True)
    return token.to(device), feature.to(device), normal(len(token), device=device, dtype=dtype)


def assert_close(ours, expected, *dtypes):
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    torch.testing.assert_close(ours.to(expected.dtype), expected, atol=tolerance * max(size, 1), rtol=0)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gathering_decoder_rows_equals_the_dense_product(kernels, device, shape, dtype):
    n_tokens, n_features, width, share = SHAPES[shape]
    token, feature, value = some_pairs(n_tokens, n_features, share, device, dtype)
    decoder = normal(n_features, width, device=device, dtype=dtype, seed=2)
    upstream = normal(n_tokens, width, device=device, seed=3).detach()
    written = gather_decode(value, token, feature, decoder, n_tokens, kernels=kernels)
    ours = torch.autograd.grad(written, [value, decoder], upstream.to(written.dtype))

    wide_value, wide_decoder = value.detach().double().requires_grad_(), decoder.detach().double().requires_grad_()
    dense = torch.zeros(n_tokens, n_features, dtype=torch.float64, device=device).index_put(
        (token, feature), wide_value
    )
    expected = dense @ wide_decoder
    # sums are float32 whatever the rows: only their own precision is between ours and the exact result
    torch.testing.assert_close(written.double(), expected, atol=1e-4 if dtype != torch.float64 else 1e-12, rtol=1e-5)
    assert written.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.autograd.grad(expected, [wide_value, wide_decoder], upstream.double())
    for gradient, reference, of in zip(ours, exact, [value, decoder], strict=True):
        assert gradient.dtype == of.dtype
        assert_close(gradient, reference, dtype)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_sparse_encoding_equals_dense_encoding(kernels, device, shape, dtype):
    n_tokens, n_features, d_model, share = SHAPES[shape]
    inputs = normal(n_tokens, d_model, device=device, dtype=dtype)
    W_enc = normal(n_features, d_model, device=device, seed=1)
    b_enc = normal(n_features, device=device, seed=2)
    pre_activation = torch.addmm(b_enc.to(dtype), inputs, W_enc.to(dtype).T)
    threshold = pre_activation.detach().float().flatten().quantile(1 - share).item() if n_tokens else 0.0
    selection = sparse_encode(inputs, W_enc, b_enc, threshold, kernels=kernels)
    active = pre_activation > threshold
    token, feature = active.nonzero(as_tuple=True)
    assert torch.equal(selection.token, token)
    assert torch.equal(selection.feature, feature)
    assert torch.equal(selection.value, pre_activation[token, feature])

    upstream = normal(len(token), device=device, dtype=dtype, seed=4).detach()
    ours = torch.autograd.grad(selection.value, [inputs, W_enc, b_enc], upstream)
    scattered = torch.zeros_like(pre_activation, dtype=torch.float64).index_put((token, feature), upstream.double())
    exact = scattered @ W_enc.to(dtype).double(), scattered.T @ inputs.double(), scattered.sum(0)
    for gradient, reference, of in zip(ours, exact, [inputs, W_enc, b_enc], strict=True):
        assert gradient.dtype == of.dtype
        assert_close(gradient, reference, dtype, of.dtype)


def test_every_feature_may_have_a_threshold_of_its_own(kernels, device):
    pre_activation = torch.tensor([[0.5, 0.5, -1.0], [2.0, 0.5, 3.0]], device=device)
    threshold = torch.tensor([1.0, 0.25, -2.0], device=device)
    selection = select_above(pre_activation, threshold, kernels=kernels)
    assert selection.token.tolist() == [0, 0, 1, 1, 1]
    assert selection.feature.tolist() == [1, 2, 0, 1, 2]
    assert selection.value.tolist() == [0.5, -1.0, 2.0, 0.5, 3.0]


def test_a_selection_passes_its_gradient_to_what_is_active_alone(kernels, device):
    pre_activation = torch.tensor([[0.5, 1.5], [2.5, -1.0]], device=device, requires_grad=True)
    selection = select_above(pre_activation, torch.tensor(1.0, device=device), kernels=kernels)
    (selection.value * torch.tensor([3.0, 4.0], device=device)).sum().backward()
    assert pre_activation.grad.tolist() == [[0.0, 3.0], [4.0, 0.0]]


def test_pre_activations_may_be_a_slice_of_a_wider_array(kernels, device):
    part = normal(5, 2300, device=device).detach()[:, 4:2204]  # more features than one program compares at once
    selection = select_above(part, 1.5, kernels=kernels)
    token, feature = (part > 1.5).nonzero(as_tuple=True)
    assert torch.equal(selection.token, token)
    assert torch.equal(selection.feature, feature)
    assert torch.equal(selection.value, part[token, feature])


def test_the_gradient_may_be_a_slice_of_a_wider_array(kernels, device):
    token, feature, value = some_pairs(6, 9, 0.4, device)
    decoder = normal(9, 10, device=device, seed=2)
    written = torch.zeros(6, 24, device=device)
    written[:, 7:17] += gather_decode(value, token, feature, decoder, 6, kernels=kernels)
    upstream = normal(6, 24, device=device, seed=3).detach()
    to_value, to_decoder = torch.autograd.grad(written, [value, decoder], upstream)
    dense = torch.zeros(6, 9, device=device).index_put((token, feature), value.detach())
    torch.testing.assert_close(to_value, (upstream[:, 7:17] @ decoder.detach().T)[token, feature])
    torch.testing.assert_close(to_decoder, dense.T @ upstream[:, 7:17])


def test_top_selections_hold_k_pairs_a_token_and_nothing_below_zero():
    pre_activation = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 4.0, -2.0]], requires_grad=True)
    selection = select_top(pre_activation, 2)
    assert selection.token.tolist() == [0, 0, 1, 1]
    dense = torch.zeros(2, 3).index_put((selection.token, selection.feature), selection.value)
    assert dense.tolist() == [[3.0, 0.0, 2.0], [0.0, 4.0, 0.0]]
    selection.value.sum().backward()
    assert pre_activation.grad.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


def test_encoding_the_top_equals_selecting_it_from_pre_activations(kernels, device):
    inputs, W_enc, b_enc = (normal(*s, device=device) for s in [(6, 5), (30, 5), (30,)])
    ours = sparse_encode_top(inputs, W_enc, b_enc, 8, kernels=kernels)
    plain = select_top(torch.addmm(b_enc, inputs, W_enc.T), 8)
    for part, expected in zip(ours, plain, strict=True):
        assert torch.equal(part, expected)
    upstream = normal(48, device=device, seed=1).detach()
    gradients = (torch.autograd.grad(s.value, [inputs, W_enc, b_enc], upstream) for s in (ours, plain))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_gradients_equal_finite_differences(kernels, device):
    token, feature, _ = some_pairs(3, 4, 0.4, device)
    value = normal(len(token), device=device, dtype=torch.float64)
    decoder = normal(4, 3, device=device, dtype=torch.float64, seed=1)
    inputs, W_enc, b_enc = (normal(*s, device=device, dtype=torch.float64, seed=2) for s in [(3, 2), (4, 2), (4,)])
    assert torch.autograd.gradcheck(
        lambda value, decoder: gather_decode(value, token, feature, decoder, 3, kernels=kernels), (value, decoder)
    )
    assert torch.autograd.gradcheck(
        lambda *parts: sparse_encode(*parts, 0.3, kernels=kernels).value, (inputs, W_enc, b_enc)
    )
    assert torch.autograd.gradcheck(lambda z: select_above(z, 0.3, kernels=kernels).value, (inputs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_decoding_is_the_same_on_both_sides_of_the_break_even(share, dtype):
    n_tokens, n_features = 20, 100
    n_pairs = int(share * BREAK_EVEN["cpu"] * n_tokens * n_features)
    place = torch.randperm(n_tokens * n_features, generator=torch.Generator().manual_seed(0))[:n_pairs].sort().values
    value = normal(n_pairs, dtype=dtype)
    decoder = normal(n_features, 8, dtype=dtype, seed=1)
    selection = Selection(place // n_features, place % n_features, value)
    ours = decode(selection, decoder, n_tokens)
    plain = gather_decode(value, selection.token, selection.feature, decoder, n_tokens)
    assert ours.dtype == plain.dtype == torch.float32
    assert_close(ours, plain, dtype)
    upstream = normal(n_tokens, 8, seed=2).detach()
    gradients = (torch.autograd.grad(written, [value, decoder], upstream) for written in (ours, plain))
    for gradient, expected in zip(*gradients, strict=True):
        assert_close(gradient, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_the_gradient_of_encoding_is_the_same_on_both_sides_of_the_break_even(share, dtype):
    inputs, W_enc, b_enc = normal(20, 8, dtype=dtype), normal(100, 8, seed=1), normal(100, seed=2)
    z = torch.addmm(b_enc.to(dtype), inputs, W_enc.to(dtype).T).detach().float().flatten()
    threshold = float(z.quantile(1 - share * BREAK_EVEN["cpu"]))
    ours, plain = encode(inputs, W_enc, b_enc, threshold), sparse_encode(inputs, W_enc, b_enc, threshold)
    assert (len(ours.value) > BREAK_EVEN["cpu"] * 2000) is (share > 1)
    assert torch.equal(ours.value, plain.value) and torch.equal(ours.feature, plain.feature)
    upstream = normal(len(ours.value), dtype=dtype, seed=4).detach()
    of = [inputs, W_enc, b_enc]
    gradients = (torch.autograd.grad(selection.value, of, upstream) for selection in (ours, plain))
    for gradient, expected, tensor in zip(*gradients, of, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, expected, dtype)


@pytest.mark.parametrize(("n_pairs", "product"), [(12, "_Decode"), (13, "Mm")])
def test_a_dense_product_is_taken_where_more_than_the_break_even_share_of_features_fires(n_pairs, product):
    """0.12 of 25 features at each of 4 tokens are 12 pairs; what computes the gradient tells which product it was."""
    assert BREAK_EVEN["cpu"] == 0.12
    token, feature = torch.arange(n_pairs) // 5, torch.arange(n_pairs) % 5 * 3
    decoder = normal(25, 8, seed=1)
    selection = Selection(token, feature, normal(n_pairs))
    written = decode(selection, decoder, 4)
    assert written.grad_fn is not None
    assert written.grad_fn.name().startswith(product)
    dense = torch.zeros(4, 25).index_put((token, feature), selection.value.detach()) @ decoder.detach()
    torch.testing.assert_close(written.detach(), dense)


def test_sums_do_not_depend_on_how_a_half_precision_sum_would_round(kernels, device):
    """A thousand ones on top of 256 are lost in bfloat16, whose next number is 258."""
    decoder = torch.tensor([[256.0], [1.0]], device=device, dtype=torch.bfloat16)
    feature = torch.tensor([0] + [1] * 1000, device=device)
    token = torch.zeros(1001, dtype=torch.int64, device=device)
    value = torch.ones(1001, device=device, dtype=torch.bfloat16)
    assert gather_decode(value, token, feature, decoder, 1, kernels=kernels).tolist() == [[1256.0]]


def test_tensors_on_the_cpu_are_left_to_torch():
    assert kernels_for(torch.zeros(1)) is kernels_torch


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from transcoders.kernels_triton import _count_above, _dot_rows, _sum_rows, _write_above

def text(kernel, types, **constants):
    signature = dict(zip(kernel.arg_names, [*types.split(), *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): c for name, c in constants.items()})
    return compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

blocks = {"SUM": tl.float32, "ROWS": 8, "COLUMNS": 512}
for programs in [
    text(_count_above, "*bf16 *fp32 *i64 i32 i32 i32", SCAN=1024),
    text(_write_above, "*bf16 *fp32 *i64 i32 i32 i32 *i64 *i64 *bf16", SCAN=1024),
    text(_sum_rows, "*bf16 *i64 *i64 *bf16 *fp32 i32 i32", **blocks),
    text(_dot_rows, "*bf16 *i64 *i64 *bf16 *fp32 i32 i32 i32 i32", **blocks),
]:
    assert "ld.global" in programs and "atom" not in programs and "red.global" not in programs
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed: it has no build for this system")
def test_kernels_compile_for_a_gpu_and_use_no_atomics():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
