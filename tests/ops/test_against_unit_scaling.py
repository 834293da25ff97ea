"""Outputs and gradients of every op equal those of the unit-scaling package on the same inputs."""

import warnings
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umup.ops.activation import dropout, gated_silu, gelu, silu
from umup.ops.attention import attention
from umup.ops.embedding import add, embedding
from umup.ops.linear import add_bias, linear
from umup.ops.loss import cross_entropy
from umup.ops.norm import layer_norm, rms_norm
from umup.ops.residual import residual_add, residual_split
from umup.rules.opscales import activation_scale, attention_scale, gated_silu_scale

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import unit_scaling.functional as U

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
dtypes = st.sampled_from(list(TOLERANCE))
dims = st.integers(2, 17)
mults = st.sampled_from([1.0, 0.25, 0.7, 2.0, 8.0])
many = settings(max_examples=25, deadline=None, derandomize=True)


def values_and_gradients(fn, inputs, seed=1):
    """The op's output and the gradient of every floating input, under the same random output gradient."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(seed)
    out = fn(*leaves)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    out.backward(upstream)
    return [out.detach(), *[x.grad for x in leaves if x.requires_grad]]


def assert_same(ours, theirs, *inputs):
    tolerance = TOLERANCE[next(x.dtype for x in inputs if x.is_floating_point())]
    pairs = zip(values_and_gradients(ours, inputs), values_and_gradients(theirs, inputs), strict=True)
    for mine, reference in pairs:
        size = reference.abs().max().clamp(min=1e-3)
        assert ((mine - reference).abs().max() / size) < tolerance


@many
@given(dtypes, dims, dims, dims, st.booleans(), st.booleans())
def test_linear_and_readout(dtype, batch, fan_in, fan_out, biased, readout):
    x, w = torch.randn(2, batch, fan_in, dtype=dtype), torch.randn(fan_out, fan_in, dtype=dtype)
    bias = [torch.randn(fan_out, dtype=dtype)] if biased else []
    forward = 1 / fan_in if readout else fan_in**-0.5
    grad_input = fan_out**-0.5 if readout else forward
    tokens = (2 * batch) ** -0.5

    def ours(x, w, *b):
        out = linear(x, w, forward, grad_input, tokens)
        return add_bias(out, b[0], forward, tokens) if b else out

    reference = U.linear_readout if readout else U.linear
    assert_same(ours, lambda x, w, *b: reference(x, w, b[0] if b else None), x, w, *bias)


@many
@given(dtypes, dims, dims, dims)
def test_embedding(dtype, batch, vocab, width):
    ids, w = torch.randint(vocab, (2, batch)), torch.randn(vocab, width, dtype=dtype)
    grad = (vocab / (2 * batch)) ** 0.5
    assert_same(lambda w: embedding(ids, w, 1.0, grad), lambda w: U.embedding(ids, w), w)


def rms_in_the_dtype_of_x(x, dims, keepdim, eps):
    return (x.pow(2).mean(dims, keepdim=keepdim) + eps).sqrt()


@many
@given(dtypes, dims, dims, st.booleans())
def test_norms(dtype, batch, width, parametric):
    # The package takes its mean square in float32 whatever the input, which hides float64 beyond 1e-7.
    with patch.object(U, "rms", rms_in_the_dtype_of_x):
        check_norms(dtype, batch, width, parametric)


def check_norms(dtype, batch, width, parametric):
    x = torch.randn(3, batch, width, dtype=dtype) * 3 + 1
    gain, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    grad = (3 * batch) ** -0.5
    if parametric:
        assert_same(lambda x, g: rms_norm(x, g, 1e-5, 1.0, grad), lambda x, g: U.rms_norm(x, (width,), g), x, gain)
        assert_same(
            lambda x, g, b: layer_norm(x, g, b, 1e-5, 1.0, grad, 1.0, grad),
            lambda x, g, b: U.layer_norm(x, (width,), g, b),
            x,
            gain,
            bias,
        )
    else:
        assert_same(lambda x: rms_norm(x, None, 1e-5), lambda x: U.rms_norm(x, (width,)), x)
        assert_same(lambda x: layer_norm(x, None, None, 1e-5), lambda x: U.layer_norm(x, (width,)), x)


@many
@given(dtypes, dims, dims, st.integers(1, 3), mults, st.sampled_from([0.0, 0.3]))
def test_causal_attention(dtype, seq, half_dim, heads, mult, p):
    q, k, v = torch.randn(3, 2, heads, seq, 2 * half_dim, dtype=dtype)
    output = attention_scale(mult, 2 * half_dim, seq, p)
    assert_same(
        lambda q, k, v: attention(q, k, v, mult / (2 * half_dim), output, p),
        lambda q, k, v: U.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, mult=mult),
        q,
        k,
        v,
    )


@many
@given(dtypes, dims, dims, mults)
def test_activations(dtype, batch, width, mult):
    x, gate = torch.randn(2, batch, width, dtype=dtype)
    glu = gated_silu_scale(mult)
    assert_same(lambda x, g: gated_silu(g, x, mult, glu), lambda x, g: U.silu_glu(x, g, mult), x, gate)
    assert_same(lambda x: silu(x, mult, activation_scale(mult)), lambda x: U.silu(x, mult), x)
    for approximate in ("none", "tanh"):
        assert_same(
            lambda x, a=approximate: gelu(x, mult, activation_scale(mult), a),
            lambda x, a=approximate: U.gelu(x, mult, approximate=a),
            x,
        )


@many
@given(dtypes, dims, dims, st.sampled_from([0.1, 1.0, 3.0]))
def test_residual(dtype, batch, width, tau):
    x, w = torch.randn(batch, width, dtype=dtype), torch.randn(width, dtype=dtype)
    branch, skip = tau / (1 + tau**2) ** 0.5, 1 / (1 + tau**2) ** 0.5

    def ours(x, w):
        f, s = residual_split(x, branch, skip)
        return residual_add((f * w).sin(), s, branch, 1.0, skip)

    def theirs(x, w):
        f, s = U.residual_split(x, tau)
        return U.residual_add((f * w).sin(), s, tau)

    assert_same(ours, theirs, x, w)


@many
@given(dtypes, dims, dims)
def test_add_and_dropout(dtype, batch, width):
    a, b = torch.randn(2, batch, width, dtype=dtype)
    assert_same(lambda a, b: add(a, b, 0.5**0.5), U.add, a, b)
    assert_same(lambda x: dropout(x, 0.4, 0.6**0.5, True), lambda x: U.dropout(x, 0.4), a)


@many
@given(dtypes, dims, dims, mults)
def test_cross_entropy(dtype, tokens, vocab, mult):
    logits, targets = torch.randn(tokens, vocab, dtype=dtype) * 3, torch.randint(vocab, (tokens,))
    grad = vocab / (vocab - 1) ** 0.5
    assert_same(
        lambda x: cross_entropy(x, targets, mult, grad), lambda x: U.cross_entropy(x, targets, mult=mult), logits
    )


def test_the_comparison_can_fail():
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    with pytest.raises(AssertionError):
        assert_same(lambda x, w: linear(x, w, 8**-0.5, 8**-0.5, 0.5 * 1.001), lambda x, w: U.linear(x, w, None), x, w)
