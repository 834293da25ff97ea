"""The torch functions that unit scaling knows: which factors each gets, and how it runs with them.

An op's factors are measured once, from the shapes of example inputs, and are floats from then on (house rule: no size
is taken from a batch at run time). Factors are those of 2407.17465, appendix B, and of the unit-scaling library, with
its default constraint: an edge that is no cut of the graph has the same factor forward and backward, so that gradients
stay exact up to one factor per parameter. Against that library:

    bias            added after the product's factor, as in rules/schemes.py; the library adds it before
    attention       a mask's own row sizes give the flat limit; the library reads every mask as bidirectional
    norm            gains' and biases' gradients have 1/sqrt(tokens), as there; norms are torch's own
    conv1d/2d/3d    the library has conv1d alone

Not covered: what `FUNCTIONS` does not list; adapt/unit_trace.py sees and reports it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.adapt.unit_products import (
    Factors,
    fused_applies,
    measure_addmm,
    measure_attention,
    measure_conv,
    measure_embedding,
    measure_fused,
    measure_linear,
    measure_matmul,
    run_addmm,
    run_attention,
    run_conv,
    run_embedding,
    run_fused,
    run_linear,
    run_matmul,
)
from umup.ops.scaled import scale
from umup.rules.opscales import activation_scale, log_interpolate


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True)
class Op:
    """A known op: `measure(out, *args)` gives its factors, `run(function, factors, *args)` its scaled result.

    `applies(*args)` says, from types and flags alone, whether a call is one the op covers. `mixes`: it has a weight, or
    mixes positions, which makes a residual branch of a path through it.
    """

    name: str
    rule: str
    measure: Callable[..., Factors]
    run: Callable[..., Any]
    applies: Callable[..., bool] = _always
    mixes: bool = False


def _times_factor(function: Callable[..., Tensor], f: Factors, *args: Any, **kwargs: Any) -> Tensor:
    return scale(function(*args, **kwargs), f[0], f[0])


def _constant(factor: float) -> Callable[..., Factors]:
    return lambda out, *args, **kwargs: (factor,)


def _measure_softmax(out: Tensor, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Factors:
    n = x.shape[dim]
    return (log_interpolate(1 / 5, n, sqrt(n)),)


def _measure_dropout(out: Tensor, x: Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> Factors:
    return (sqrt(1 - p),)


def _measure_norm(
    out: Tensor, x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, *args: Any, **kwargs: Any
) -> Factors:
    return (sqrt(prod(shape) / x.numel()),)


def _run_norm(
    function: Callable[..., Tensor],
    f: Factors,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    *args: Any,
    bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """F.layer_norm(x, shape, weight, bias, eps) or F.rms_norm(x, shape, weight, eps)."""
    rest = [scale(a, 1.0, f[0]) if isinstance(a, Tensor) else a for a in args]
    if bias is not None:
        kwargs["bias"] = scale(bias, 1.0, f[0])
    return function(x, normalized_shape, None if weight is None else scale(weight, 1.0, f[0]), *rest, **kwargs)


def _measure_cross_entropy(
    out: Tensor, logits: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **kwargs: Any
) -> Factors:
    vocab = logits.shape[1] if logits.ndim > 1 else len(logits)
    rows = 1 if reduction == "sum" else logits.numel() / vocab
    return (rows * vocab / sqrt(vocab - 1),)


def _measure_mse(out: Tensor, x: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **kwargs: Any) -> Factors:
    return ((1 if reduction == "sum" else x.numel()) / sqrt(8),)


def _run_loss(function: Callable[..., Tensor], f: Factors, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # 1/tokens underflows in 16 bits before the factor undoes it.
    return function(scale(x.float() if x.element_size() < 4 else x, 1.0, f[0]), *args, **kwargs)


def _is_sum(*args: Any, alpha: float = 1.0, **kwargs: Any) -> bool:
    return alpha == 1 and len(args) == 2 and all(isinstance(t, Tensor) and t.is_floating_point() for t in args)


def _run_sum(function: Callable[..., Tensor], f: Factors, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    return in_place(function, a, scale(a + b, f[0], f[0]))


def in_place(function: Callable[..., Any], target: Tensor, out: Tensor) -> Tensor:
    """`out`, written to `target` if that is what the sum does: torch calls `x += y` `x.add_(y)`."""
    return target.copy_(out) if function is Tensor.add_ else out


def _plain_addmm(*args: Any, **kwargs: Any) -> bool:
    return not kwargs


LINEAR = Op(
    "linear", "1/sqrt(fan_in) and to the input, 1/sqrt(rows) to the weight", measure_linear, run_linear, mixes=True
)
ADDMM = Op("addmm", LINEAR.rule, measure_addmm, run_addmm, _plain_addmm, mixes=True)
MATMUL = Op("matmul", "1/sqrt(inner side), both ways", measure_matmul, run_matmul, mixes=True)
CONV = Op("conv", "1/sqrt(fan_in) both ways, 1/sqrt(rows) to the weight", measure_conv, run_conv, mixes=True)
EMBEDDING = Op("embedding", "1, sqrt(rows of the table/lookups) to the table", measure_embedding, run_embedding)
ATTENTION = Op("attention", "logits 1/head_dim, result 1/std", measure_attention, run_attention, mixes=True)
FUSED = Op("multi-head attention", "as linear and attention", measure_fused, run_fused, fused_applies, mixes=True)
NORM = Op("norm", "1, 1/sqrt(rows) to gain and bias", _measure_norm, _run_norm)
SOFTMAX = Op("softmax", "n^0.9 over n logits, both ways", _measure_softmax, _times_factor)
DROPOUT = Op("dropout", "sqrt(1-p), both ways", _measure_dropout, _times_factor)
SILU = Op("silu", "1.77, both ways", _constant(activation_scale(1.0)), _times_factor)
GELU = Op("gelu", "1.77, both ways", _constant(activation_scale(1.0)), _times_factor)
RELU = Op("relu", "sqrt(2/(1-1/pi)), both ways", _constant(sqrt(2 / (1 - 1 / pi))), _times_factor)
CROSS_ENTROPY = Op("cross entropy", "1, V/sqrt(V-1) on softmax - onehot", _measure_cross_entropy, _run_loss)
MSE = Op("mse loss", "1, 1/sqrt(8) on 2(x - y)", _measure_mse, _run_loss)
SUM = Op("add", "1/sqrt(2), both ways", _constant(sqrt(0.5)), _run_sum, _is_sum)

FUNCTIONS: Mapping[Callable[..., Any], Op] = {
    F.linear: LINEAR,
    torch.addmm: ADDMM,
    torch.matmul: MATMUL,
    Tensor.matmul: MATMUL,
    torch.bmm: MATMUL,
    Tensor.bmm: MATMUL,
    torch.mm: MATMUL,
    Tensor.mm: MATMUL,
    F.conv1d: CONV,
    F.conv2d: CONV,
    F.conv3d: CONV,
    F.embedding: EMBEDDING,
    F.scaled_dot_product_attention: ATTENTION,
    F.multi_head_attention_forward: FUSED,
    F.layer_norm: NORM,
    torch.layer_norm: NORM,
    F.rms_norm: NORM,
    torch.rms_norm: NORM,
    F.softmax: SOFTMAX,
    torch.softmax: SOFTMAX,
    Tensor.softmax: SOFTMAX,
    F.dropout: DROPOUT,
    F.silu: SILU,
    F.gelu: GELU,
    F.relu: RELU,
    torch.relu: RELU,
    Tensor.relu: RELU,
    F.cross_entropy: CROSS_ENTROPY,
    F.mse_loss: MSE,
    torch.add: SUM,
    Tensor.add: SUM,
    Tensor.add_: SUM,
}
