"""Modules over umup.ops. Parameters are created empty; models/build.py fills them by the plan.

Activations run in the dtype they arrive in, and parameters are cast where they are used, so that float32 parameters
with a bf16 stream is mixed precision without autocast.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from umup.numerics.gemm import Gemm
from umup.ops.activation import dropout
from umup.ops.attention import attention
from umup.ops.embedding import embedding
from umup.ops.linear import add_bias, linear
from umup.ops.loss import linear_cross_entropy
from umup.ops.norm import layer_norm, rms_norm
from umup.ops.residual import residual_add, residual_split


class UseScales(NamedTuple):
    """A parameter's factors where it is used (rules/schemes.py says what they mean)."""

    multiplier: float = 1.0
    grad_input: float = 1.0
    grad_weight: float = 1.0


class Matmul(nn.Module):
    """The matrix product of one linear layer, or of several that read the same input, in the input's dtype.

    Several weights are one product: their outputs lie side by side. nn/fp8.py replaces this module by one in FP8.
    """

    def __init__(self, scales: UseScales) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """x: (..., fan_in), weights: (fan_out, fan_in) each -> (..., sum of fan_out)."""
        return linear(x, join(weights), *self.scales)

    @property
    def joins(self) -> bool:
        """Whether several weights run as one product now: not in decoding, where joining them would cost more."""
        return torch.is_grad_enabled()

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor, multiplier: float, grad: float) -> Tensor:
        """Cross entropy of the outputs as logits (ops/loss.py)."""
        return linear_cross_entropy(x, weight, targets, Gemm(*self.scales), multiplier, grad)


def join(weights: tuple[Tensor, ...]) -> Tensor:
    """Weights stacked along fan_out."""
    return weights[0] if len(weights) == 1 else torch.cat(weights, -2)


class Linear(nn.Module):
    """`multiplier * x W^T (+ bias_multiplier * b)`."""

    def __init__(self, fan_in: int, fan_out: int, scales: UseScales, bias: UseScales | None = None) -> None:
        super().__init__()
        self.scales, self.bias_scales = scales, bias
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = None if bias is None else nn.Parameter(torch.empty(fan_out))
        self.matmul = Matmul(scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out)."""
        return self.add_bias(self.matmul(x, self.weight))

    def add_bias(self, out: Tensor) -> Tensor:
        """The product plus the bias, if there is one."""
        if self.bias is None or self.bias_scales is None:
            return out
        return add_bias(out, self.bias, self.bias_scales.multiplier, self.bias_scales.grad_weight)


def share_matmul(*linears: Linear) -> None:
    """Let linears that read the same input, with the same scales, run as one product. Others are left alone."""
    if all(part.scales == linears[0].scales for part in linears):
        for part in linears:
            part.matmul = linears[0].matmul


def project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Each linear of x, (..., fan_in) -> (..., fan_out); those that share a product run as one."""
    groups: dict[Matmul, list[int]] = {}
    for i, part in enumerate(linears):
        groups.setdefault(part.matmul, []).append(i)
    found: dict[int, Tensor] = {}
    for matmul, members in groups.items():
        weights = [linears[i].weight for i in members]
        if matmul.joins:
            parts = matmul(x, *weights).split([w.shape[-2] for w in weights], -1)
        else:
            parts = [matmul(x, w) for w in weights]
        found |= {i: linears[i].add_bias(y) for i, y in zip(members, parts, strict=True)}
    return tuple(found[i] for i in range(len(linears)))


class Embedding(nn.Module):
    """`multiplier * weight[ids]`."""

    def __init__(self, rows: int, width: int, scales: UseScales) -> None:
        super().__init__()
        self.scales = scales
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width)."""
        return embedding(ids, self.weight, self.scales.multiplier, self.scales.grad_weight)


class RMSNorm(nn.Module):
    """RMS norm, with a gain when `gain` is given."""

    def __init__(self, width: int, eps: float, gain: UseScales | None) -> None:
        super().__init__()
        self.eps, self.gain = eps, gain or UseScales()
        self.weight = None if gain is None else nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        return rms_norm(x, self.weight, self.eps, self.gain.multiplier, self.gain.grad_weight)


class LayerNorm(nn.Module):
    """Layer norm, with a gain and a bias when both are given."""

    def __init__(self, width: int, eps: float, gain: UseScales | None, bias: UseScales | None) -> None:
        super().__init__()
        self.eps, self.gain, self.shift = eps, gain or UseScales(), bias or UseScales()
        self.weight = None if gain is None else nn.Parameter(torch.empty(width))
        self.bias = None if bias is None else nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        gain, shift = self.gain, self.shift
        return layer_norm(
            x, self.weight, self.bias, self.eps, gain.multiplier, gain.grad_weight, shift.multiplier, shift.grad_weight
        )


class Attention(nn.Module):
    """Scaled attention on separate heads; owns no parameter."""

    def __init__(self, logits: float, output: float, probability: float) -> None:
        super().__init__()
        self.logits, self.output, self.probability = logits, output, probability

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q: (..., heads, queries, d); k, v: (..., kv_heads, keys, d); bias: (heads, queries, keys) -> q's shape."""
        return attention(q, k, v, self.logits, self.output, self.probability if self.training else 0.0, bias)


class Dropout(nn.Module):
    """Scaled dropout."""

    def __init__(self, probability: float, output: float) -> None:
        super().__init__()
        self.probability, self.output = probability, output

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(x, self.probability, self.output, self.training)


class Residual(nn.Module):
    """`branch * f(x) + skip * x`."""

    def __init__(self, branch: float, skip: float, split_grad: float, branch_grad: float) -> None:
        super().__init__()
        self.branch, self.skip, self.split_grad, self.branch_grad = branch, skip, split_grad, branch_grad

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(branch input, skip)."""
        return residual_split(x, self.split_grad, self.skip)

    def add(self, out: Tensor, skip: Tensor) -> Tensor:
        """The weighted sum."""
        return residual_add(out, skip, self.branch, self.branch_grad, self.skip)
