"""Scaled table lookup."""

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.ops.scaled import scale


def embedding(ids: Tensor, weight: Tensor, multiplier: float, grad_weight: float) -> Tensor:
    """`multiplier * weight[ids]`, the table's gradient multiplied by `grad_weight` instead.

    ids: (...) integers; weight: (vocab, features), or (models, vocab, features) with ids: (models, ...).
    """
    if weight.ndim == 3:
        offsets = torch.arange(len(weight), device=ids.device) * weight.shape[1]
        ids = ids + offsets.view(-1, *[1] * (ids.ndim - 1))
        weight = weight.flatten(0, 1)
    return scale(F.embedding(ids, weight), multiplier, grad_weight)


def add(a: Tensor, b: Tensor, output: float) -> Tensor:
    """`output * (a + b)`; both gradients are exact."""
    return scale(a + b, output, output)
