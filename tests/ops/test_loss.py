"""The loss that never holds all logits: the same value and gradients as the loss of a linear's outputs."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from umup.errors import DataError
from umup.nn.fp8 import convert
from umup.nn.modules import Linear, UseScales
from umup.numerics.formats import E4M3, E5M2, find_format
from umup.numerics.gemm import Formats, Gemm
from umup.ops import loss as loss_module
from umup.ops.linear import linear
from umup.ops.loss import cross_entropy, linear_cross_entropy

FAN_IN, VOCAB = 16, 48
MULTIPLIER, GRAD = 1.7, 0.3
FACTORS = (0.7, 1.3, 0.4)
FORMATS = {
    "emulated": Formats(E4M3, E5M2, "emulate"),
    "scaled_mm": Formats(E4M3, E5M2, "scaled_mm"),
    "simulated": Formats(find_format("E4M2"), find_format("E5M1"), "emulate"),
    "dynamic": Formats(E4M3, E5M2, "emulate", dynamic=True),
}
every_format = pytest.mark.parametrize("kind", FORMATS)
# Tokens that exist at a time, of 39: all, an uneven split, and one chunk of the least size with what is left.
every_chunking = pytest.mark.parametrize("tokens", [100, 24, 16])


@pytest.fixture
def chunked(monkeypatch):
    return lambda tokens: monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", tokens * VOCAB)


def leaves(*lead, dtype=torch.float64):
    x, w = torch.randn(*lead, FAN_IN, dtype=dtype), torch.randn(VOCAB, FAN_IN, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(VOCAB, lead)


def whole(x, w, targets, factors=FACTORS, multiplier=MULTIPLIER, grad=GRAD):
    return cross_entropy(linear(x, w, *factors), targets, multiplier, grad)


def chunks(x, w, targets, factors=FACTORS, multiplier=MULTIPLIER, grad=GRAD):
    return linear_cross_entropy(x, w, targets, Gemm(*factors), multiplier, grad)


def both(functions, x, w, targets, upstream=1.0):
    """Value and gradients of each function."""
    found = []
    for function in functions:
        loss = function(x, w, targets)
        found.append((loss.detach(), *torch.autograd.grad(upstream * loss, (x, w))))
    return zip(*found, strict=True)


def head_of(kind, weight):
    """A linear whose product runs in a format, with scales that suit the gradients of this loss."""
    head = Linear(FAN_IN, VOCAB, UseScales(*FACTORS))
    head.weight.data = weight.detach().clone()
    (product,) = convert(nn.ModuleDict({"head": head}), {"head": FORMATS[kind]})
    product.matmul.set_exponents(torch.tensor([2, 6, int(product.matmul.exponents[2])]))
    return head


@every_chunking
@pytest.mark.parametrize("lead", [(39,), (3, 13)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("factors", [FACTORS, (1.0, 1.0, 1.0)], ids=str)
def test_value_and_gradients_are_those_of_all_logits_at_once(chunked, tokens, lead, upstream, factors):
    chunked(tokens)
    functions = (lambda *a: chunks(*a, factors), lambda *a: whole(*a, factors))
    for mine, reference in both(functions, *leaves(*lead), upstream):
        assert mine.shape == reference.shape
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@every_chunking
def test_matching_factors_give_the_exact_gradient(chunked, tokens):
    """grad = multiplier/tokens, and one factor for all three products."""
    chunked(tokens)
    x, w, targets = leaves(39)
    assert gradcheck(
        lambda x, w: chunks(x, w, targets, (0.7, 0.7, 0.7), MULTIPLIER, MULTIPLIER / 39), (x, w), fast_mode=True
    )


def test_gradcheck_notices_a_factor_that_differs():
    x, w, targets = leaves(39)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(lambda x, w: chunks(x, w, targets, (0.7, 0.7, 0.71), 1.0, 1 / 39), (x, w))


def test_a_tied_weight_gets_the_gradients_of_both_uses(chunked):
    chunked(16)
    _, w, targets = leaves(39)
    ids = torch.randint(VOCAB, (39,))
    mine, reference = (torch.autograd.grad(f(w[ids], w, targets), w)[0] for f in (chunks, whole))
    torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_leaves_the_others_gradient_alone(chunked, frozen):
    chunked(16)
    x, w, targets = leaves(39)
    (x, w)[frozen].requires_grad_(False)
    leaf = (x, w)[1 - frozen]
    mine, reference = (torch.autograd.grad(f(x, w, targets), leaf)[0] for f in (chunks, whole))
    torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@every_chunking
@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_without_gradients_the_value_is_the_same_and_nothing_is_kept(chunked, tokens, kind):
    chunked(tokens)
    x, w, targets = leaves(39, dtype=torch.float32)
    state = gemm = None
    if kind is not None:
        matmul = head_of(kind, w).matmul
        state, gemm = matmul.state, matmul.gemm
    arguments = x, w, targets, gemm or Gemm(*FACTORS), MULTIPLIER, GRAD, state
    trained = linear_cross_entropy(*arguments)
    assert trained.requires_grad
    with torch.no_grad():
        evaluated = linear_cross_entropy(*arguments)
    assert not evaluated.requires_grad
    assert torch.equal(trained.detach(), evaluated)


@every_chunking
def test_bfloat16_activations_give_a_float32_loss_and_gradients_in_their_own_dtypes(chunked, tokens):
    chunked(tokens)
    x, w, targets = leaves(39, dtype=torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    mine = chunks(x, w, targets)
    dx, dw = torch.autograd.grad(mine, (x, w))
    assert (mine.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    wide = x.detach().double().requires_grad_()
    reference = whole(wide, w.double(), targets)
    exact = torch.autograd.grad(reference, (wide, w))
    assert mine.item() == pytest.approx(reference.item(), rel=5e-3)
    for a, b in zip((dx, dw), exact, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@every_format
@every_chunking
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_in_a_format_has_the_loss_and_gradients_of_its_logits(chunked, tokens, kind, dtype):
    """The reference runs the same FP8 product on all tokens, so only bfloat16 and the order of sums differ."""
    chunked(tokens)
    x, w, targets = leaves(39, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    head = head_of(kind, w)
    loss = head.matmul.loss(x, head.weight, targets, MULTIPLIER, GRAD)
    reference = cross_entropy(head(x), targets, MULTIPLIER, GRAD)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(value, (x, head.weight)) for value in (loss, reference))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        # In bfloat16 the reference rounds the gradient at the logits once more on its way into the product.
        assert (mine - theirs).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * theirs.norm()


@every_format
@pytest.mark.parametrize("upstream", [-2.5, 1e-6, 3e4])
def test_an_upstream_factor_scales_the_gradients_of_a_format_too(kind, upstream):
    x, w, targets = leaves(39, dtype=torch.float32)
    head = head_of(kind, w)
    plain, scaled = (
        torch.autograd.grad(f * head.matmul.loss(x, head.weight, targets, MULTIPLIER, GRAD), (x, head.weight))
        for f in (1.0, upstream)
    )
    for mine, reference in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, upstream * reference, rtol=1e-5, atol=1e-6 * float(mine.abs().max()))


@every_format
def test_a_format_costs_no_more_than_its_rounding(kind):
    x, w, targets = leaves(39, dtype=torch.float32)
    head = head_of(kind, w)
    loss = head.matmul.loss(x, head.weight, targets, MULTIPLIER, GRAD)
    reference = whole(x, w, targets)
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    found = torch.autograd.grad(loss, (x, head.weight))
    for mine, exact in zip(found, torch.autograd.grad(reference, (x, w)), strict=True):
        assert (mine - exact).norm() < (0.3 if kind == "simulated" else 0.15) * exact.norm()


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_none_in_loss_and_gradients(kind, bad):
    x, w, targets = leaves(39, dtype=torch.float32)
    spoilt = x.detach().clone()
    spoilt[5, 3] = bad
    spoilt.requires_grad_()
    head = head_of(kind, w)
    loss = head.matmul.loss(spoilt, head.weight, targets, MULTIPLIER, GRAD)
    assert loss.isnan()
    dx, dw = torch.autograd.grad(loss, (spoilt, head.weight))
    assert dx[5].isnan().all()
    assert dw.isnan().all()


def test_the_gradient_at_the_logits_is_kept_in_the_products_format():
    saved = []
    x, w, targets = leaves(39, dtype=torch.float32)
    matmul = head_of("emulated", w).matmul
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        matmul.loss(x, w, targets, MULTIPLIER, GRAD)
    assert [t.dtype for t in saved if t.shape == (39, VOCAB)] == [E5M2.dtype]
    assert [t.dtype for t in saved if t.shape == (39, FAN_IN)] == [E4M3.dtype]


def test_logits_exist_a_chunk_at_a_time(chunked, monkeypatch):
    chunked(24)
    sizes, original = [], loss_module.token_losses
    monkeypatch.setattr(loss_module, "token_losses", lambda z, *rest: sizes.append(z.shape) or original(z, *rest))
    chunks(*leaves(3, 20))
    assert sizes == [(24, VOCAB), (24, VOCAB), (12, VOCAB)]


def test_far_logits_neither_overflow_nor_lose_the_loss():
    x, w, targets = leaves(39)
    for mine, reference in both((chunks, whole), (1e4 * x.detach()).requires_grad_(), w, targets):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-9)


def test_no_tokens_have_no_loss():
    x, w = torch.randn(0, 8), torch.randn(32, 8)
    with pytest.raises(DataError, match="leave empty batches out"):
        linear_cross_entropy(x, w, torch.empty(0, dtype=torch.long), Gemm(1.0, 1.0, 1.0), 1.0, 1.0)
