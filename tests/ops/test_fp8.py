"""The FP8 linear: its products and factors, what it saves, and what no number does."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from umup.numerics.formats import E4M3, E5M2, encode, find_format, quantise
from umup.numerics.gemm import W_ENCODE, Formats, Gemm, GemmState, entry, scale_table
from umup.ops import linear as linear_module
from umup.ops.linear import linear

FAN_IN, FAN_OUT = 48, 32
FACTORS = (0.7, 1.3, 0.4)
EXPONENTS = (1, -2, 3)
PAIRS = {"E4M3/E5M2": (E4M3, E5M2), "E4M3/E4M3": (E4M3, E4M3), "E3M2": (find_format("E3M2"),) * 2}
CASES = [("E4M3/E5M2", "emulate"), ("E4M3/E5M2", "scaled_mm"), ("E4M3/E4M3", "scaled_mm"), ("E3M2", "emulate")]
every_case = pytest.mark.parametrize(("pair", "backend"), CASES)


def formats_of(pair, backend, dynamic=False):
    return Formats(*PAIRS[pair], backend, dynamic)


def state_of(weight, formats, factors=FACTORS):
    scales = scale_table(Gemm(*factors, formats), torch.tensor(EXPONENTS, dtype=torch.int32))
    row = encode(weight.detach(), entry(scales, W_ENCODE), formats.forward)
    column = row.view(torch.uint8).t().contiguous().view(row.dtype) if row.element_size() == 1 else row.t()
    return GemmState(row, column.contiguous(), scales)


def leaves(*lead, dtype=torch.float32):
    x, w = torch.randn(*lead, FAN_IN).to(dtype), torch.randn(FAN_OUT, FAN_IN)
    return x.requires_grad_(), w.requires_grad_(), torch.randn(*lead, FAN_OUT).to(dtype)


def run(x, w, g, formats, factors=FACTORS):
    """y, dx, dW of the FP8 product of leaves."""
    y = linear(x, w, *factors, formats, state_of(w, formats, factors))
    return y, *torch.autograd.grad(y, (x, w), g)


def rounded(tensor, fmt, exponent):
    return quantise(tensor.detach().double() * 2.0**exponent, fmt) * 2.0**-exponent


def expected(x, w, g, formats, factors=FACTORS):
    """The same in float64, from what the encoded operands are worth."""
    x8, w8 = rounded(x, formats.forward, EXPONENTS[0]), rounded(w, formats.forward, EXPONENTS[2])
    g8 = rounded(g, formats.gradient, EXPONENTS[1])
    m, gi, gw = factors
    return m * x8 @ w8.t(), gi * g8 @ w8, gw * g8.reshape(-1, FAN_OUT).t() @ x8.reshape(-1, FAN_IN)


def assert_close(found, reference, rtol=1e-5):
    for mine, theirs, name in zip(found, reference, ("y", "dx", "dW"), strict=True):
        assert mine.shape == theirs.shape, name
        assert (mine.double() - theirs).abs().max() <= rtol * theirs.abs().max(), name


@every_case
@pytest.mark.parametrize("lead", [(64,), (1,), (7,), (17,), (2, 3), ()], ids=str)
def test_outputs_and_gradients_are_those_of_the_encoded_operands(pair, backend, lead):
    tensors, formats = leaves(*lead), formats_of(pair, backend)
    assert_close(run(*tensors, formats), expected(*tensors, formats))


@every_case
def test_dtypes_follow_the_stream_and_the_master_weight(pair, backend):
    tensors, formats = leaves(2, 16, dtype=torch.bfloat16), formats_of(pair, backend)
    y, dx, dw = run(*tensors, formats)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    reference = expected(*tensors, formats)
    assert_close((y, dx, dw), reference, 2.0**-8)
    assert_close((reference[0], reference[1], dw), reference)  # the weight gradient skips the rounding to bfloat16


def test_a_bfloat16_weight_gets_a_bfloat16_gradient():
    x, w, g = leaves(16, dtype=torch.bfloat16)
    w = w.detach().to(torch.bfloat16).requires_grad_()
    assert run(x, w, g, formats_of("E4M3/E5M2", "emulate"))[2].dtype == torch.bfloat16


@pytest.mark.parametrize("which", range(3))
def test_each_factor_reaches_its_own_product_and_no_other(which):
    tensors, formats = leaves(16), formats_of("E4M3/E5M2", "emulate")
    factors = [1.0, 1.0, 1.0]
    plain = run(*tensors, formats, factors)
    factors[which] = 0.3
    for i, (a, b) in enumerate(zip(plain, run(*tensors, formats, factors), strict=True)):
        torch.testing.assert_close(b, 0.3 * a if i == which else a, rtol=3e-7, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
@every_case
def test_only_the_gradients_that_are_asked_for_are_computed(pair, backend, frozen, monkeypatch):
    tensors, formats = leaves(16), formats_of(pair, backend)
    reference = run(*tensors, formats)[1:][1 - frozen]
    x, w, g = tensors
    (x, w)[frozen].requires_grad_(False)
    y = linear(x, w, *FACTORS, formats, state_of(w, formats))
    monkeypatch.delattr(linear_module, ("input_product", "weight_product")[frozen])
    torch.testing.assert_close(torch.autograd.grad(y, (x, w)[1 - frozen], g)[0], reference, rtol=0, atol=0)


def test_what_is_saved_is_one_byte_per_element():
    saved = []
    x, w, _ = leaves(64)
    formats = formats_of("E4M3/E5M2", "emulate")
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, w, *FACTORS, formats, state_of(w, formats))
    sizes = sorted((tuple(t.shape), t.element_size()) for t in saved if t.numel() > 32)
    assert sizes == [((48, 32), 1), ((64, 48), 1)]


@every_case
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(pair, backend, dynamic, bad):
    formats = formats_of(pair, backend, dynamic)
    x, w, g = leaves(16)
    spoilt = x.detach().clone()
    spoilt[3, 5] = bad
    y, _, dw = run(spoilt.requires_grad_(), w, g, formats)
    assert y[3].isnan().all()
    assert dw[:, 5].isnan().all()
    g[3, 7] = bad
    _, dx, dw = run(x, w, g, formats)
    assert dx[3].isnan().all()
    assert dw[7].isnan().all()


@every_case
def test_overflow_saturates(pair, backend):
    formats = formats_of(pair, backend)
    x, w, g = leaves(16)
    limits = [fmt.max / 2.0**e for fmt, e in zip((formats.forward, formats.gradient), EXPONENTS[:2], strict=True)]
    big, small = x.detach().clone(), x.detach().clone()
    big[0, 0], small[0, 0] = 1e30, limits[0]
    g_big, g_small = g.clone(), g.clone()
    g_big[1, 1], g_small[1, 1] = -1e30, -limits[1]
    mine = run(big.requires_grad_(), w, g_big, formats)
    for a, b in zip(mine, run(small.requires_grad_(), w, g_small, formats), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@every_case
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_dynamic_scales_serve_values_of_any_size(pair, backend, size):
    formats = formats_of(pair, backend, dynamic=True)
    x, w, g = leaves(64)
    x, g = (size * x.detach()).requires_grad_(), g / size
    m, gi, gw = FACTORS
    w8 = rounded(w, formats.forward, EXPONENTS[2])
    exact = m * x.double() @ w8.t(), gi * g.double() @ w8, gw * g.double().t() @ x.double()
    for mine, reference in zip(run(x, w, g, formats), exact, strict=True):
        assert (mine - reference).norm() < 0.12 * reference.norm()
