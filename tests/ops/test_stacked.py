"""A leading model axis is a loop over models: same outputs, same gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from umup.ops.activation import gated_silu, gelu, silu
from umup.ops.attention import attention, rotary, rotary_tables
from umup.ops.embedding import add, embedding
from umup.ops.linear import add_bias, linear
from umup.ops.loss import cross_entropy
from umup.ops.norm import layer_norm, rms_norm
from umup.ops.residual import residual_add, residual_split

MODELS, BATCH, LENGTH, WIDTH, INNER, VOCAB = 3, 2, 5, 6, 4, 7
X = (BATCH, LENGTH, WIDTH)
HEADS = (BATCH, 4, LENGTH, WIDTH)
KV_HEADS = (BATCH, 2, LENGTH, WIDTH)


def residual(x, w):
    inside, skip = residual_split(x, 0.3, 0.8)
    return residual_add(torch.sin(inside * w), skip, 0.6, 1.1, 0.8)


# An op's shapes are those of one model; integers are token ids.
OPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda x, w: linear(x, w, 0.5, 0.7, 0.9), [X, (INNER, WIDTH)]),
    "linear without factors": (lambda x, w: linear(x, w, 1.0, 1.0, 1.0), [X, (INNER, WIDTH)]),
    "linear on rows": (lambda x, w: linear(x, w, 0.5, 0.7, 0.9), [(LENGTH, WIDTH), (INNER, WIDTH)]),
    "linear on heads": (lambda x, w: linear(x, w, 0.5, 0.7, 0.9), [HEADS, (INNER, WIDTH)]),
    "bias": (lambda x, b: add_bias(x, b, 0.5, 0.9), [X, (WIDTH,)]),
    "bias on rows": (lambda x, b: add_bias(x, b, 0.5, 0.9), [(LENGTH, WIDTH), (WIDTH,)]),
    "bias on heads": (lambda x, b: add_bias(x, b, 0.5, 0.9), [HEADS, (WIDTH,)]),
    "add": (lambda a, b: add(a, b, 0.5), [X, X]),
    "rms norm": (lambda x: rms_norm(x, None, 1e-3), [X]),
    "rms norm with gain": (lambda x, g: rms_norm(x, g, 1e-3, 0.5, 0.9), [X, (WIDTH,)]),
    "layer norm": (lambda x: layer_norm(x, None, None, 1e-3), [X]),
    "layer norm with gain": (lambda x, g: layer_norm(x, g, None, 1e-3, 0.5, 0.9), [X, (WIDTH,)]),
    "layer norm with gain and bias": (
        lambda x, g, b: layer_norm(x, g, b, 1e-3, 0.5, 0.9, 0.4, 0.7),
        [X, (WIDTH,), (WIDTH,)],
    ),
    "gated silu": (lambda g, u: gated_silu(g, u, 0.6, 1.7), [X, X]),
    "silu": (lambda x: silu(x, 0.6, 1.7), [X]),
    "gelu": (lambda x: gelu(x, 0.6, 1.7), [X]),
    "attention": (lambda q, k, v: attention(q, k, v, 0.4, 1.7), [HEADS, HEADS, HEADS]),
    "attention, shared keys": (lambda q, k, v: attention(q, k, v, 0.4, 1.7), [HEADS, KV_HEADS, KV_HEADS]),
    "rotary": (lambda x: rotary(x, *rotary_tables(WIDTH, LENGTH, 100.0)), [HEADS]),
    "residual": (residual, [X, X]),
}


def check(stacked, single, inputs, result_shape=None):
    """`stacked` on stacked leaves equals `single` on each model's slice."""
    together = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = stacked(*together)
    if result_shape is not None:
        assert out.shape == result_shape
    upstream = torch.randn(out.shape, dtype=torch.float64)
    out.backward(upstream)
    for model in range(MODELS):
        alone = [x[model].clone().requires_grad_(x.is_floating_point()) for x in inputs]
        one = single(*alone)
        one.backward(upstream[model])
        torch.testing.assert_close(out[model], one, rtol=1e-12, atol=1e-12)
        for mine, reference in zip(together, alone, strict=True):
            if mine.is_floating_point():
                assert mine.grad is not None
                torch.testing.assert_close(mine.grad[model], reference.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_a_stacked_op_is_a_loop_over_models(name):
    op, shapes = OPS[name]
    check(op, op, [torch.randn(MODELS, *shape, dtype=torch.float64) for shape in shapes])


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH)])
def test_stacked_lookups_read_each_models_own_table(shape):
    def op(ids, w):
        return embedding(ids, w, 0.5, 0.9)

    tables = torch.randn(MODELS, VOCAB, WIDTH, dtype=torch.float64)
    check(op, op, [torch.randint(VOCAB, (MODELS, *shape)), tables], (MODELS, *shape, WIDTH))


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH)])
def test_a_stacked_loss_is_one_mean_per_model(shape):
    check(
        lambda x, t: cross_entropy(x, t, 0.7, 0.3, stacked=True),
        lambda x, t: cross_entropy(x, t, 0.7, 0.3),
        [torch.randn(MODELS, *shape, VOCAB, dtype=torch.float64), torch.randint(VOCAB, (MODELS, *shape))],
        (MODELS,),
    )


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError):
        check(
            lambda x, w: linear(x, w, 0.5, 0.7, 0.9),
            lambda x, w: linear(x, w, 0.5, 0.7, 0.9 + 1e-9),
            [torch.randn(MODELS, *shape, dtype=torch.float64) for shape in (X, (INNER, WIDTH))],
        )
