"""Queries, keys and values of one FP8 product, by heads and rotated, as one segment.

The forward pass is plain torch after the product. The backward pass takes the gradients as attention leaves them to
the encoded gradient of the product, in both layouts, in one pass (numerics/kernels/rope.py). Kept for it: the encoded
input.

Not covered: biases, dynamic scales, formats without a dtype, token counts that are no multiple of 16, a cache.
ops.linear and ops.attention.rotary one after another serve those. They differ in rounding alone: here a 16-bit stream
is not rounded to on the gradients' way back through the rotation.
"""

from typing import Any

import torch
from torch import Tensor

from umup.numerics.gemm import (
    G_ENCODE,
    Formats,
    GemmState,
    encode_input,
    entry,
    forward_product,
    input_product,
    transposed_weight_product,
)
from umup.numerics.kernels.rope import rope_backward
from umup.numerics.kernels.transpose import transpose8
from umup.ops.attention import rotary

Heads = tuple[Tensor, Tensor, Tensor]


class _RotaryProjection(torch.autograd.Function):
    """As in ops/linear.py, the weight is there for its gradient: its value is in the state."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        row: Tensor,
        column: Tensor,
        scales: Tensor,
        heads: tuple[int, int],
        formats: Formats,
    ) -> Heads:
        x8 = encode_input(x.flatten(0, 1), formats, scales)
        qkv = forward_product(x8, row, formats, scales, x.dtype).view(*x.shape[:2], -1, 2 * cos.shape[-1])
        q, k, v = qkv.transpose(1, 2).split([heads[0], heads[1], heads[1]], 1)  # type: ignore[no-untyped-call]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(x8, column, scales, cos, sin)
        ctx.formats, ctx.dtype = formats, weight.dtype
        # A copy: as a view it would keep all of q | k | v, unrotated, alive until attention has run backward.
        return rotary(q, cos, sin), rotary(k, cos, sin), v.clone()

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x8, column, scales, cos, sin = ctx.saved_tensors
        formats = ctx.formats
        g8, g8t = rope_backward(dq, dk, dv, cos, sin, entry(scales, G_ENCODE), formats.gradient.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_product(g8, column, formats, scales, dq.dtype).view(len(dq), dq.shape[2], -1)
        if ctx.needs_input_grad[1]:
            dw = transposed_weight_product(g8t, transpose8(x8), formats, scales, ctx.dtype)
        return dx, dw, *[None] * 7


def rotary_projection(
    x: Tensor,
    weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    formats: Formats,
    state: GemmState,
) -> Heads:
    """`rotary(q), rotary(k), v` for q | k | v = x W^T in FP8: (B, H, S, D) and twice (B, Hkv, S, D), in x's dtype.

    x: (B, S, C), B*S a multiple of 16. weight: ((H + 2*Hkv)*D, C). rotation: cos and sin, (S, D/2). heads: (H, Hkv).
    formats, state: the product's, whose factors are in the state's scales. Gradients are ops.linear's.
    """
    out: Heads = _RotaryProjection.apply(x, weight, *rotation, *state, heads, formats)  # type: ignore[no-untyped-call]
    return out
