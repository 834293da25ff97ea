"""The three products of a linear layer, in the operands' own dtype or in FP8 with static scales.

    forward  y  = multiplier  * x W^T        x, W in the forward format
    input    dx = grad_input  * g W          g in the gradient format
    weight   dW = grad_weight * g^T x

An FP8 operand is cast(value * 2^exponent). The powers of two are undone, and the three factors applied, by the GEMM's
own scale arguments, which multiply its float32 accumulator: scaling costs no pass. What may move during training (the
exponents) lives in tensors, what may not in `Gemm`, so that a moved scale recompiles nothing. Hopper's FP8 units want
both operands contiguous along the contraction, hence weights in two layouts, and byte transposes for the weight
gradient.

Sides of W must be multiples of 16 and are refused otherwise, on every backend; token counts are padded with zeros.
No product uses the tensor core's fast, short accumulator, which loses bits: on a Hopper GPU at the power it trains at,
slow accumulation is as fast (docs/log.md).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.errors import ConfigError
from umup.numerics.formats import FloatFormat, encode
from umup.numerics.kernels import ALIGNMENT
from umup.numerics.kernels.transpose import transpose8

# Entries of a product's table of scales.
X_ENCODE, G_ENCODE, W_ENCODE, Y_DECODE, DX_DECODE, DW_DECODE, X_DECODE, W_DECODE = range(8)


class Formats(NamedTuple):
    """Operand formats and how their products run: backend "scaled_mm" or "emulate"; `dynamic`: scales from data."""

    forward: FloatFormat
    gradient: FloatFormat
    backend: str
    dynamic: bool = False


class Gemm(NamedTuple):
    """What never changes about a product: its factors, and its formats (None: the operands' own dtype)."""

    multiplier: float
    grad_input: float
    grad_weight: float
    formats: Formats | None = None


class GemmState(NamedTuple):
    """The tensors of an FP8 product: W, (N, K), encoded as (N, K) and as (K, N), and the scales, (8, 1, 4)."""

    row: Tensor
    column: Tensor
    scales: Tensor


def scale_table(gemm: Gemm, exponents: Tensor) -> Tensor:
    """A product's scales from the exponents (x, g, w): (3,)."""
    x, g, w = power_of_two(exponents).unbind()
    return _table(x, g, w, gemm.multiplier / x, gemm.grad_input / g, gemm.grad_weight / g, 1 / x, 1 / w)


def entry(scales: Tensor, name: int) -> Tensor:
    """One scale, (1, 1)."""
    return scales[name, :, :1]


def _table(*scales: Tensor) -> Tensor:
    """(8, 1, 4): each scale four times, since cuBLAS wants them at addresses that are multiples of 16 bytes."""
    return torch.stack(scales).view(-1, 1, 1).repeat(1, 1, 4)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float32, for integers in -126..127."""
    # From bits, since a GPU's exp2 promises an error bound only.
    return ((exponents.int() + 127) << 23).view(torch.float32)


def encode_input(x: Tensor, formats: Formats, scales: Tensor) -> Tensor:
    """x: (T, K) in the forward format."""
    return encode(x, entry(scales, X_ENCODE), formats.forward)


def encode_gradient(grad: Tensor, formats: Formats, scales: Tensor) -> Tensor:
    """grad: (T, N) in the gradient format."""
    return encode(grad, entry(scales, G_ENCODE), formats.gradient)


def forward_product(x8: Tensor, row: Tensor, formats: Formats, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, K) x (N, K) -> y (T, N)."""
    return _scaled(x8, row, entry(scales, Y_DECODE), entry(scales, W_DECODE), dtype, formats.backend)


def input_product(g8: Tensor, column: Tensor, formats: Formats, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, N) x (K, N) -> dx (T, K)."""
    return _scaled(g8, column, entry(scales, DX_DECODE), entry(scales, W_DECODE), dtype, formats.backend)


def weight_product(g8: Tensor, x8: Tensor, formats: Formats, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, N), (T, K) -> dW (N, K). T is padded with zeros to a multiple of 16."""
    odd = -len(g8) % ALIGNMENT
    if odd:
        g8, x8 = _pad_rows(g8, odd), _pad_rows(x8, odd)
    return transposed_weight_product(_transpose(g8), _transpose(x8), formats, scales, dtype)


def transposed_weight_product(g8t: Tensor, x8t: Tensor, formats: Formats, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, T), (K, T) -> dW (N, K), for T a multiple of 16."""
    return _scaled(g8t, x8t, entry(scales, DW_DECODE), entry(scales, X_DECODE), dtype, formats.backend)


def dynamic_input(x: Tensor, gemm: Gemm, scales: Tensor) -> Tensor:
    """The scales with those of x taken from its largest value."""
    assert gemm.formats is not None
    by = _power_of_two(x, gemm.formats.forward)
    return _changed(scales, {X_ENCODE: by, Y_DECODE: gemm.multiplier / by, X_DECODE: 1 / by})


def dynamic_gradient(grad: Tensor, gemm: Gemm, scales: Tensor) -> Tensor:
    """The scales with those of the output gradient taken from its largest value."""
    assert gemm.formats is not None
    by = _power_of_two(grad, gemm.formats.gradient)
    return _changed(scales, {G_ENCODE: by, DX_DECODE: gemm.grad_input / by, DW_DECODE: gemm.grad_weight / by})


def scale_gradients(scales: Tensor, factor: Tensor) -> Tensor:
    """The scales with the products that give gradients multiplied by `factor`, 0-d: no pass over the gradients."""
    return _changed(scales, {which: scales[which, 0, 0] * factor for which in (DX_DECODE, DW_DECODE)})


def _changed(scales: Tensor, changes: dict[int, Tensor]) -> Tensor:
    return _table(*(changes.get(i, scales[i, 0, 0]) for i in range(len(scales))))


def plain_product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """`alpha * a @ b` in their dtype, for matrices or stacks of matrices."""
    if alpha == 1.0:
        return a @ b
    nothing = a.new_empty(())
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(nothing, a, b, beta=0.0, alpha=alpha)


def require_fp8(device: torch.device) -> None:
    """Raises ConfigError, naming what is missing, where FP8 matrix products do not run in hardware."""
    if device.type != "cuda":
        raise ConfigError(
            f"precision.backend: FP8 products need a GPU and this run is on {device.type}; "
            "write precision.backend: emulate (or scaled_mm, torch's own kernel for CPUs)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ConfigError(
            f"precision.backend: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, FP8 products need 8.9; write precision.recipe: bf16, or "
            "precision.backend: emulate"
        )


def _scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`scale_a * scale_b * a b^T` for a: (M, K), b: (N, K). The one place that calls torch's private FP8 product."""
    if b.element_size() == 1 and (a.shape[1] % ALIGNMENT or b.shape[0] % ALIGNMENT):
        raise ConfigError(
            f"an FP8 product of {tuple(a.shape)} and {tuple(b.shape)}: sides must be multiples of {ALIGNMENT}; spare "
            "this layer by precision.overrides {name: bf16}"
        )
    if backend == "scaled_mm":
        return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)
    # Products of 8-bit numbers are exact in float32; only their sum rounds.
    product = (a.float() @ b.float().t()) * (scale_a * scale_b)
    # Not `.to` alone: where it changes nothing, torch 2.11's compiler loses the gradient of the Function returning it.
    return product if dtype == torch.float32 else product.to(dtype)


def _transpose(x: Tensor) -> Tensor:
    return transpose8(x) if x.element_size() == 1 else x.t()


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    if x.element_size() > 1:
        return F.pad(x, (0, 0, 0, rows))
    return F.pad(x.view(torch.uint8), (0, 0, 0, rows)).view(x.dtype)


def _power_of_two(x: Tensor, form: FloatFormat) -> Tensor:
    """The largest 2^k with 2^k * max|x| inside the format (float32, 0-d), by clearing the mantissa of the ratio."""
    ratio = form.max / x.detach().abs().amax().float().clamp(2.0**-100, 2.0**100)
    return (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)
