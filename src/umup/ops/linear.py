"""Scaled matrix product: three GEMMs, each with its own factor in the GEMM's own scale, so that scaling is free."""

from typing import Any

import torch
from torch import Tensor

from umup.numerics.gemm import (
    Formats,
    Gemm,
    GemmState,
    dynamic_gradient,
    dynamic_input,
    encode_gradient,
    encode_input,
    forward_product,
    input_product,
    plain_product,
    weight_product,
)
from umup.ops.scaled import scale


class _Linear(torch.autograd.Function):
    """In the operands' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gemm: Gemm) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gemm = gemm
        return plain_product(x, weight.to(x.dtype).mT, gemm.multiplier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        g = ctx.gemm
        dx = plain_product(grad, weight.to(grad.dtype), g.grad_input) if ctx.needs_input_grad[0] else None
        dw = plain_product(grad.mT, x, g.grad_weight).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _StaticLinear(torch.autograd.Function):
    """In FP8. The weight itself is there for its gradient: its value is in the state. Only FP8 is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, row: Tensor, column: Tensor, scales: Tensor, gemm: Gemm) -> Tensor:
        formats = gemm.formats
        assert formats is not None
        if formats.dynamic:
            scales = dynamic_input(x, gemm, scales)
        x8 = encode_input(x, formats, scales)
        ctx.save_for_backward(x8, column, scales)
        ctx.gemm, ctx.dtype = gemm, weight.dtype
        return forward_product(x8, row, formats, scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x8, column, scales = ctx.saved_tensors
        formats = ctx.gemm.formats
        if formats.dynamic:
            scales = dynamic_gradient(grad, ctx.gemm, scales)
        g8 = encode_gradient(grad, formats, scales)
        dx = input_product(g8, column, formats, scales, grad.dtype) if ctx.needs_input_grad[0] else None
        dw = weight_product(g8, x8, formats, scales, ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    multiplier: float,
    grad_input: float,
    grad_weight: float,
    formats: Formats | None = None,
    state: GemmState | None = None,
) -> Tensor:
    """`multiplier * x W^T`, with input gradient `grad_input * g W` and weight gradient `grad_weight * g^T x`.

    x: (..., fan_in); weight: (fan_out, fan_in), or (models, fan_out, fan_in) with x: (models, ..., fan_in).
    Without formats the product runs in x's dtype; with formats and a state in FP8 (two-dimensional weights only). The
    result has x's dtype, the weight gradient the weight's. A readout is the same op with other factors.
    """
    lead = weight.shape[:-2]
    flat = x.reshape(*lead, -1, x.shape[-1])
    gemm = Gemm(multiplier, grad_input, grad_weight, formats)
    function, tensors = (_Linear, ()) if state is None else (_StaticLinear, state)
    out: Tensor = function.apply(flat, weight, *tensors, gemm)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[-2])


def add_bias(x: Tensor, bias: Tensor, multiplier: float, grad_bias: float) -> Tensor:
    """`x + multiplier*bias`, the bias's gradient being `grad_bias * (sum of g)`.

    bias: (features), or (models, features) with x: (models, ..., features).
    """
    return x + align(scale(bias, multiplier, grad_bias).to(x.dtype), x)


def align(parameter: Tensor, x: Tensor) -> Tensor:
    """A per-feature parameter, its model axis (if any) lined up with x's first axis."""
    return parameter if parameter.ndim == 1 else parameter.view(len(parameter), *[1] * (x.ndim - 2), -1)
