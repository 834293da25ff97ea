"""Residual connections with weights, the branch's backward factor delayed to its start (2407.17465, appendix G).

`split` and `add` belong together: the stream's gradient is exact iff `split_grad * branch_grad == branch`.
Gradients inside the branch are then larger than exact by branch_grad/branch, which unit scaling wants and Adam ignores.
"""

import torch
from torch import Tensor

from umup.ops.scaled import scale, scale_bwd


def residual_split(x: Tensor, split_grad: float) -> tuple[Tensor, Tensor]:
    """(branch input, skip): the same values; the branch's gradient is multiplied by `split_grad`."""
    return scale_bwd(x, split_grad), x


def residual_add(out: Tensor, skip: Tensor, branch: float, branch_grad: float, skip_weight: float) -> Tensor:
    """`branch*out + skip_weight*skip`, with `branch_grad` towards the branch and the exact gradient to the skip."""
    if branch == branch_grad == skip_weight == 1.0:
        return out + skip
    if branch == branch_grad:
        return torch.add(skip * skip_weight, out, alpha=branch)
    return skip * skip_weight + scale(out, branch, branch_grad)
