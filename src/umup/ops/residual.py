"""Residual connections with weights, backward factors delayed to the branching point (2407.17465, appendix G).

`split` and `add` belong together: `add` weighs the two paths forward, `split` weighs their gradients where they meet
again, in one pass each. The stream's gradient is exact iff `split_grad * branch_grad == branch`; inside the branch
gradients are then larger than exact by branch_grad/branch, which unit scaling wants and Adam ignores.
"""

from typing import Any

import torch
from torch import Tensor


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_grad: float, skip_weight: float) -> tuple[Tensor, Tensor]:
        ctx.factors = split_grad, skip_weight
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, branch: Tensor, skip: Tensor) -> tuple[Tensor, None, None]:
        split_grad, skip_weight = ctx.factors
        return torch.add(skip * skip_weight, branch, alpha=split_grad), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, skip: Tensor, branch: float, branch_grad: float, skip_weight: float) -> Tensor:
        ctx.branch_grad = branch_grad
        # Not in place: torch 2.11's compiler loses the gradient of a Function whose forward writes into its result.
        return torch.add(skip * skip_weight, out, alpha=branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return (grad if ctx.branch_grad == 1.0 else grad * ctx.branch_grad), grad, None, None, None


def residual_split(x: Tensor, split_grad: float, skip_weight: float) -> tuple[Tensor, Tensor]:
    """(branch input, skip), equal to x; x's gradient is `split_grad*g_branch + skip_weight*g_skip`."""
    if split_grad == skip_weight == 1.0:
        return x, x
    pair: tuple[Tensor, Tensor] = _Split.apply(x, split_grad, skip_weight)  # type: ignore[no-untyped-call]
    return pair


def residual_add(out: Tensor, skip: Tensor, branch: float, branch_grad: float, skip_weight: float) -> Tensor:
    """`branch*out + skip_weight*skip`; gradients: `branch_grad*g` to the branch, g to the skip."""
    if branch == branch_grad == skip_weight == 1.0:
        return out + skip
    total: Tensor = _Add.apply(out, skip, branch, branch_grad, skip_weight)  # type: ignore[no-untyped-call]
    return total
