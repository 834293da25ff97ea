"""A gated MLP whose two products are in FP8, as one segment.

The activation is encoded as it is made, and the backward pass makes from its gradient, in one pass, all that the other
products read (numerics/kernels/swiglu.py). Kept for the backward pass: the encoded input, and gate | up in the stream's
dtype, or `compact` in E4M3. The activation itself is made twice.

Not covered: biases, dynamic scales, formats without a dtype, token counts that are no multiple of 16. ops.linear and
ops.activation one after another serve those. They differ in rounding alone: here a 16-bit stream is not rounded to
inside the activation's backward pass, nor on the activation's second way into its encoding.
"""

from typing import Any

import torch
from torch import Tensor

from umup.numerics.formats import E4M3, encode
from umup.numerics.gemm import (
    G_ENCODE,
    X_ENCODE,
    Formats,
    GemmState,
    encode_input,
    entry,
    forward_product,
    input_product,
    transposed_weight_product,
)
from umup.numerics.kernels.cast import cast_transpose
from umup.numerics.kernels.swiglu import swiglu_backward
from umup.numerics.kernels.transpose import transpose8
from umup.ops.activation import gated_silu


class _GatedMLP(torch.autograd.Function):
    """As in ops/linear.py, the weights are there for their gradients: their values are in the states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_state: GemmState,
        down_state: GemmState,
        formats: tuple[Formats, Formats],
        mult: float,
        output: float,
        compact: bool,
    ) -> Tensor:
        x8 = encode_input(x, formats[0], gate_up_state.scales)
        gu = forward_product(x8, gate_up_state.row, formats[0], gate_up_state.scales, x.dtype)
        gate, up = gu.chunk(2, -1)
        a8 = encode_input(gated_silu(gate, up, mult, output), formats[1], down_state.scales)
        # Gate and up have unit scale, so E4M3 holds them as they are.
        kept = encode(gu, 1.0, E4M3) if compact else gu
        ctx.save_for_backward(x8, kept, *gate_up_state[1:], *down_state[1:])
        ctx.formats, ctx.act, ctx.dtypes = formats, (mult, output), (gate_up.dtype, down.dtype)
        return forward_product(a8, down_state.row, formats[1], down_state.scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, gu, gate_up, gate_up_scales, down, down_scales = ctx.saved_tensors
        first, second = ctx.formats
        g8, g8t = cast_transpose(grad, entry(down_scales, G_ENCODE), second.gradient.dtype)
        da = input_product(g8, down, second, down_scales, grad.dtype)
        h8, h8t, a8t = swiglu_backward(
            da,
            gu,
            *ctx.act,
            entry(gate_up_scales, G_ENCODE),
            entry(down_scales, X_ENCODE),
            first.gradient.dtype,
            second.forward.dtype,
        )
        dx = d_gate_up = d_down = None
        if ctx.needs_input_grad[0]:
            dx = input_product(h8, gate_up, first, gate_up_scales, grad.dtype)
        if ctx.needs_input_grad[1]:
            d_gate_up = transposed_weight_product(h8t, transpose8(x8), first, gate_up_scales, ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            d_down = transposed_weight_product(g8t, a8t, second, down_scales, ctx.dtypes[1])
        return dx, d_gate_up, d_down, *[None] * 6


def gated_mlp(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    formats: tuple[Formats, Formats],
    states: tuple[GemmState, GemmState],
    mult: float,
    output: float,
    compact: bool = False,
) -> Tensor:
    """`down(gated_silu(gate, up, mult, output))` for gate | up = gate_up(x), both products in FP8 -> (..., C).

    x: (..., C), its tokens a multiple of 16. Of the two products, gate_up and down: weights (2f, C), gate above up, and
    (C, f); their formats; their states, whose scales hold the factors. Gradients are ops.linear's: each weight's in its
    own dtype.
    compact: keep gate and up in E4M3, half the memory, from which the gradients and the second activation follow.
    """
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _GatedMLP.apply(flat, *weights, *states, formats, mult, output, compact)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)
