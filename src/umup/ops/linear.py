"""Scaled matrix product: three GEMMs, each with its own factor in the GEMM's `alpha`, so that scaling costs no pass.

Not covered: FP8 products.
"""

from typing import Any

import torch
from torch import Tensor

from umup.ops.scaled import scale


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """`alpha * a @ b`, for matrices or stacks of matrices."""
    if alpha == 1.0:
        return a @ b
    nothing = a.new_empty(())
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(nothing, a, b, beta=0.0, alpha=alpha)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, multiplier: float, grad_input: float, grad_weight: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factors = grad_input, grad_weight
        return _product(x, weight.to(x.dtype).mT, multiplier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad_input, grad_weight = ctx.factors
        dx = _product(grad, weight.to(grad.dtype), grad_input) if ctx.needs_input_grad[0] else None
        dw = _product(grad.mT, x, grad_weight).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def linear(x: Tensor, weight: Tensor, multiplier: float, grad_input: float, grad_weight: float) -> Tensor:
    """`multiplier * x W^T`, with input gradient `grad_input * g W` and weight gradient `grad_weight * g^T x`.

    x: (..., fan_in); weight: (fan_out, fan_in), or (models, fan_out, fan_in) with x: (models, ..., fan_in).
    The product runs in x's dtype; the weight gradient has the weight's. A readout is the same op with other factors.
    """
    lead = weight.shape[:-2]
    flat = x.reshape(*lead, -1, x.shape[-1])
    out: Tensor = _Linear.apply(flat, weight, multiplier, grad_input, grad_weight)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[-2])


def add_bias(x: Tensor, bias: Tensor, multiplier: float, grad_bias: float) -> Tensor:
    """`x + multiplier*bias`, the bias's gradient being `grad_bias * (sum of g)`.

    bias: (features), or (models, features) with x: (models, ..., features).
    """
    return x + align(scale(bias, multiplier, grad_bias).to(x.dtype), x)


def align(parameter: Tensor, x: Tensor) -> Tensor:
    """A per-feature parameter, its model axis (if any) lined up with x's first axis."""
    return parameter if parameter.ndim == 1 else parameter.view(len(parameter), *[1] * (x.ndim - 2), -1)
