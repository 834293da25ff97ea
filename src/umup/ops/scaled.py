"""The primitive under every scaled op: one factor forward, another backward (2303.11257, section 3)."""

from typing import Any

import torch
from torch import Tensor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fwd: float, bwd: float) -> Tensor:
        ctx.bwd = bwd
        return x * fwd if fwd != 1.0 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.bwd if ctx.bwd != 1.0 else grad), None, None


def scale(x: Tensor, fwd: float, bwd: float) -> Tensor:
    """`fwd*x`, whose gradient is `bwd*grad`."""
    if fwd == bwd:
        return x if fwd == 1.0 else x * fwd
    result: Tensor = _Scale.apply(x, fwd, bwd)  # type: ignore[no-untyped-call]
    return result


def scale_fwd(x: Tensor, factor: float) -> Tensor:
    """`factor*x`, the gradient passing unchanged."""
    return scale(x, factor, 1.0)


def scale_bwd(x: Tensor, factor: float) -> Tensor:
    """`x`, its gradient multiplied by `factor`."""
    return scale(x, 1.0, factor)
