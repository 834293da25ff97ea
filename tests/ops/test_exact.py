"""With equal factors both ways an op's gradient is that of its formula; with others it is that times their quotient."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from umup.ops.activation import dropout, gated_silu, gelu, silu
from umup.ops.attention import attention, rotary, rotary_tables
from umup.ops.embedding import add, embedding
from umup.ops.linear import add_bias, linear
from umup.ops.loss import cross_entropy
from umup.ops.norm import layer_norm, rms_norm
from umup.ops.residual import residual_add, residual_split
from umup.ops.scaled import scale, scale_bwd, scale_fwd


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def ids(rows, *shape):
    return torch.randint(rows, shape)


def residual(x, w, branch, skip_weight, split_grad, branch_grad):
    inside, skip = residual_split(x, split_grad, skip_weight)
    return residual_add(torch.sin(inside * w), skip, branch, branch_grad, skip_weight)


EXACT: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda x, w: linear(x, w, 0.3, 0.3, 0.3), [(2, 3, 5), (4, 5)]),
    "linear without factor": (lambda x, w: linear(x, w, 1.0, 1.0, 1.0), [(3, 5), (4, 5)]),
    "linear of a vector": (lambda x, w: linear(x, w, 0.3, 0.3, 0.3), [(5,), (4, 5)]),
    "stacked linear": (lambda x, w: linear(x, w, 0.3, 0.3, 0.3), [(2, 3, 2, 5), (2, 4, 5)]),
    "bias": (lambda x, b: add_bias(x, b, 0.3, 0.3), [(2, 3, 5), (5,)]),
    "embedding": (lambda w: embedding(torch.tensor([[0, 2, 2], [5, 0, 1]]), w, 0.3, 0.3), [(6, 4)]),
    "add": (lambda a, b: add(a, b, 0.3), [(3, 4), (3, 4)]),
    "rms norm": (lambda x: rms_norm(x, None, 1e-3), [(3, 5)]),
    "rms norm with gain": (lambda x, g: rms_norm(x, g, 1e-3, 0.3, 0.3), [(3, 5), (5,)]),
    "layer norm": (lambda x: layer_norm(x, None, None, 1e-3), [(3, 5)]),
    "layer norm with gain and bias": (
        lambda x, g, b: layer_norm(x, g, b, 1e-3, 0.3, 0.3, 0.7, 0.7),
        [(3, 5), (5,), (5,)],
    ),
    "gated silu": (lambda g, u: gated_silu(g, u, 1.0, 1.7), [(3, 5), (3, 5)]),
    "gated silu at a temperature": (lambda g, u: gated_silu(g, u, 0.6, 1.7), [(3, 5), (3, 5)]),
    "silu": (lambda x: silu(x, 1.0, 1.7), [(3, 5)]),
    "silu at a temperature": (lambda x: silu(x, 0.6, 1.7), [(3, 5)]),
    "gelu": (lambda x: gelu(x, 1.0, 1.7), [(3, 5)]),
    "gelu at a temperature": (lambda x: gelu(x, 0.6, 1.7), [(3, 5)]),
    "tanh gelu at a temperature": (lambda x: gelu(x, 0.6, 1.7, "tanh"), [(3, 5)]),
    "dropout at inference": (lambda x: dropout(x, 0.4, 0.3, False), [(3, 5)]),
    "attention": (lambda q, k, v: attention(q, k, v, 0.4, 1.7), [(2, 3, 5, 4)] * 3),
    "attention, shared keys": (
        lambda q, k, v: attention(q, k, v, 0.4, 1.7),
        [(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
    ),
    "attention, last queries": (
        lambda q, k, v: attention(q, k, v, 0.4, 1.7),
        [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
    ),
    "attention, one query": (lambda q, k, v: attention(q, k, v, 0.4, 1.0), [(2, 2, 1, 4), (2, 2, 5, 4), (2, 2, 5, 4)]),
    "rotary": (lambda x: rotary(x, *rotary_tables(6, 5, 100.0)), [(2, 5, 6)]),
    "residual, all exact": (lambda x, w: residual(x, w, 0.6, 0.8, 1.0, 0.6), [(3, 4), (3, 4)]),
    "plain residual": (lambda x, w: residual(x, w, 1.0, 1.0, 1.0, 1.0), [(3, 4), (3, 4)]),
}


@pytest.mark.parametrize("name", EXACT)
def test_equal_factors_give_the_exact_gradient(name):
    fn, shapes = EXACT[name]
    assert gradcheck(fn, [leaf(*shape) for shape in shapes])


@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_the_loss_gradient_is_exact_with_multiplier_over_tokens(multiplier):
    targets = ids(7, 2, 3)
    assert gradcheck(lambda x: cross_entropy(x, targets, multiplier, multiplier / 6), [leaf(2, 3, 7)])


def test_gradcheck_notices_a_factor_that_differs():
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(lambda x, w: linear(x, w, 0.3, 0.3, 0.4), [leaf(3, 5), leaf(4, 5)])


@pytest.mark.parametrize(("split_grad", "branch_grad"), [(0.6, 1.0), (0.3, 2.0), (1.0, 0.6)])
def test_the_streams_gradient_is_exact_when_the_two_backward_factors_make_the_branchs(split_grad, branch_grad):
    w = torch.randn(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x: residual(x, w, 0.6, 0.8, split_grad, branch_grad), [leaf(3, 4)])


def test_inside_the_branch_the_gradient_is_branch_grad_over_branch_of_the_exact_one():
    x, w = leaf(3, 4), leaf(3, 4)
    delayed = torch.autograd.grad(residual(x, w, 0.6, 0.8, 0.3, 2.0).sum(), w)[0]
    exact = torch.autograd.grad(residual(x, w, 0.6, 0.8, 1.0, 0.6).sum(), w)[0]
    torch.testing.assert_close(delayed, exact * (2.0 / 0.6))


@pytest.mark.parametrize(("fwd", "bwd"), [(0.5, 3.0), (1.0, 3.0), (0.5, 1.0), (0.5, 0.5), (-2.0, 0.0)])
def test_scale_multiplies_forward_by_one_factor_and_backward_by_the_other(fwd, bwd):
    x, g = leaf(3, 4), torch.randn(3, 4, dtype=torch.float64)
    out = scale(x, fwd, bwd)
    out.backward(g)
    assert torch.equal(out, fwd * x)
    assert x.grad is not None
    assert torch.equal(x.grad, bwd * g)


def test_scale_fwd_and_scale_bwd_leave_the_other_direction_alone():
    x = leaf(3)
    assert torch.equal(scale_fwd(x, 0.5), 0.5 * x)
    assert torch.equal(scale_bwd(x, 0.5), x)
    assert torch.autograd.grad(scale_fwd(x, 0.5).sum(), x)[0].tolist() == [1.0] * 3
    assert torch.autograd.grad(scale_bwd(x, 0.5).sum(), x)[0].tolist() == [0.5] * 3


def test_factors_of_one_do_nothing_at_all():
    x, y = leaf(3, 4), leaf(3, 4)
    assert scale(x, 1.0, 1.0) is x
    assert residual_split(x, 1.0, 1.0)[0] is x
    assert dropout(x, 0.0, 1.0, True).data_ptr() == x.data_ptr()
    out = residual_add(x, y, 1.0, 1.0, 1.0)
    assert torch.equal(out, x + y)
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "AddBackward0"


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_equal_factors_need_no_autograd_function(factor):
    node = scale(leaf(3), factor, factor).grad_fn
    assert node is not None
    assert node.name() == "MulBackward0"


def test_backward_scaling_copies_nothing_forward():
    x = leaf(3, 4)
    assert scale_bwd(x, 0.5).data_ptr() == x.data_ptr()


def test_each_product_of_linear_has_its_own_factor():
    x, w, g = leaf(2, 3, 5), leaf(4, 5), torch.randn(2, 3, 4, dtype=torch.float64)
    out = linear(x, w, 0.5, 3.0, 7.0)
    out.backward(g)
    torch.testing.assert_close(out, 0.5 * x @ w.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, 3.0 * g @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.grad, 7.0 * torch.einsum("bso,bsi->oi", g, x), rtol=1e-12, atol=1e-12)


def test_linear_computes_only_the_gradients_that_are_asked_for():
    x, w = leaf(3, 5), leaf(4, 5)
    assert torch.autograd.grad(linear(x, w.detach(), 0.5, 3.0, 7.0).sum(), x)[0].shape == (3, 5)
    assert torch.autograd.grad(linear(x.detach(), w, 0.5, 3.0, 7.0).sum(), w)[0].shape == (4, 5)


def test_the_factors_of_lookups_biases_gains_and_loss_differ_both_ways():
    table, bias, gain, logits = leaf(6, 4), leaf(4), leaf(4), leaf(3, 7)
    x, rows, targets = torch.randn(3, 4, dtype=torch.float64), ids(6, 3), ids(7, 3)
    cases = [
        (embedding(rows, table, 0.5, 3.0), table[rows], table, 0.5),
        (add_bias(x, bias, 0.5, 3.0) - x, bias.expand(3, 4), bias, 0.5),
        (rms_norm(x, gain, 1e-5, 0.5, 3.0), rms_norm(x, gain, 1e-5), gain, 0.5),
        (layer_norm(x, gain, bias, 1e-5, 0.5, 3.0, 0.5, 1.0), layer_norm(x, gain, bias, 1e-5), gain, 0.5),
        (layer_norm(x, gain, bias, 1e-5, 0.5, 1.0, 0.5, 3.0), layer_norm(x, gain, bias, 1e-5), bias, 0.5),
        (cross_entropy(logits, targets, 1.0, 3.0 / 3), F.cross_entropy(logits, targets), logits, 1.0),
    ]
    for scaled, plain, parameter, forward in cases:
        torch.testing.assert_close(scaled, forward * plain, rtol=1e-12, atol=1e-12)
        gradient, reference = (torch.autograd.grad(out.sum(), parameter)[0] for out in (scaled, plain))
        torch.testing.assert_close(gradient, 3.0 * reference, rtol=1e-12, atol=1e-12)


def test_the_loss_is_nats_whatever_the_factors():
    logits, targets = leaf(2, 3, 7), ids(7, 2, 3)
    expected = F.cross_entropy(2.5 * logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(cross_entropy(logits, targets, 2.5, 40.0), expected, rtol=1e-12, atol=1e-12)
    summed = torch.autograd.grad(cross_entropy(logits, targets, 2.5, 40.0), logits)[0]
    exact = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(summed, exact * 40.0 / (2.5 / 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "kv_heads"), [(5, 4), (3, 4), (1, 4), (5, 2), (3, 1)])
def test_attention_is_the_textbooks(queries, kv_heads):
    q, k, v = leaf(2, 4, queries, 6), leaf(2, kv_heads, 5, 6), leaf(2, kv_heads, 5, 6)
    rows, columns = torch.arange(5 - queries, 5)[:, None], torch.arange(5)
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    logits = (0.4 * q @ keys.mT).masked_fill(columns > rows, float("-inf"))
    torch.testing.assert_close(attention(q, k, v, 0.4, 1.7), 1.7 * logits.softmax(-1) @ values, rtol=1e-12, atol=1e-12)


def test_rotary_turns_pairs_and_makes_products_depend_on_distance_only():
    cos, sin = (t.double() for t in rotary_tables(6, 9, 100.0))
    q, k = torch.randn(2, 6, dtype=torch.float64)
    turned_q, turned_k = rotary(q.expand(9, 6), cos, sin), rotary(k.expand(9, 6), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(9))
    products = turned_q @ turned_k.T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(products[0, 0], products[0, 3])


def test_dropout_keeps_its_factor_at_inference_and_scales_the_survivors_while_training():
    x = torch.ones(2000)
    assert torch.equal(dropout(x, 0.4, 0.3, False), 0.3 * x)
    kept = dropout(x, 0.4, 0.3, True)
    torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 0.3 / 0.6))
    assert 0.5 < (kept != 0).double().mean() < 0.7
