"""Floating-point formats: what each can hold, and how a tensor is put on its grid.

Every format is `sign, exponent_bits, mantissa_bits` with the usual bias `2^(exponent_bits-1) - 1` and subnormals. The
top exponent is reserved for infinities and NaN as in IEEE 754, with one exception: E4M3 is the "FN" variant that the
hardware multiplies (no infinity, one NaN pattern, largest value 448; Micikevicius et al., 2209.05433, table 1).

One policy holds for all of them beyond their range: a finite value saturates to the largest finite one, and NaN and
both infinities become NaN. So a diverging run still shows as NaN, and a single large value costs no more than itself.

Two functions, two purposes: `quantise` rounds any tensor to any format and stays in the tensor's dtype (simulation,
measurement, and the reference for everything else); `encode` is the fast cast into storage, which torch.compile fuses
into the producer. They agree exactly (the sign of a NaN apart, which no device promises). Not covered: block-scaled
formats, and formats without subnormals.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umup.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class FloatFormat:
    """One format: its name, the widths of its fields, its largest finite value and torch's dtype for it, if any."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    dtype: torch.dtype | None

    @property
    def bias(self) -> int:
        """What the stored exponent exceeds the true one by."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal value, shared by all subnormals."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        """The smallest value with full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """The smallest nonzero value; half of it and less rounds to zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)


def _ieee(name: str, exponent_bits: int, mantissa_bits: int, dtype: torch.dtype | None) -> FloatFormat:
    top = int(2 ** (exponent_bits - 1)) - 1
    largest = math.ldexp(2.0 - math.ldexp(1.0, -mantissa_bits), top)
    return FloatFormat(name, exponent_bits, mantissa_bits, largest, dtype)


E4M3 = FloatFormat("E4M3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = _ieee("E5M2", 5, 2, torch.float8_e5m2)
FP16 = _ieee("fp16", 5, 10, torch.float16)
BF16 = _ieee("bf16", 8, 7, torch.bfloat16)
FP32 = _ieee("fp32", 8, 23, torch.float32)

FORMATS = {fmt.name: fmt for fmt in (FP32, BF16, FP16, E4M3, E5M2)}


def find_format(name: str) -> FloatFormat:
    """The format called `name`: fp32, bf16, fp16, E4M3, E5M2, or any "ExMy" with 2 <= x <= 8 and 0 <= y <= 10.

    Those found by "ExMy" have no torch dtype. Raises ConfigError for any other name.
    """
    if name in FORMATS:
        return FORMATS[name]
    if (match := re.fullmatch(r"E([2-8])M(\d|10)", name)) is None:
        raise ConfigError(
            f"format {name!r} does not exist; {did_you_mean(name, FORMATS)} (or write ExMy with x in 2..8, y in 0..10)"
        )
    return _ieee(name, int(match[1]), int(match[2]), None)


# Working dtype: the integer of its size, its mantissa bits and its bias.
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def quantise(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`x` rounded to the values of `fmt`, in x's own shape and dtype.

    Nearest rounds ties to even (where there is no mantissa bit to be even, away from zero, as IEEE 754 has it).
    Stochastic rounds up with the probability of the distance to the value below, hence without bias (to 2^-24 of a
    step), drawing from `generator`. Where x's dtype cannot hold a value of a wider format (65504 in bf16), the result
    is rounded once more to that dtype.
    """
    # A step of an 8-bit-exponent format, or its inverse, is beyond float32's normal range.
    wide = torch.float64 if x.dtype == torch.float64 or fmt.exponent_bits == 8 else torch.float32
    integer, mantissa, bias = _LAYOUT[wide]
    value = torch.where(torch.isinf(x), math.nan, x).to(wide).clamp(-fmt.max, fmt.max)
    exponent = ((value.view(integer) >> mantissa) & (2 * bias + 1)) - bias
    step = exponent.clamp(min=fmt.min_exponent) - fmt.mantissa_bits
    # Powers of two built from their bits: exact on every device, where exp2 and ldexp promise an error bound only.
    in_steps = value * ((bias - step) << mantissa).view(wide)
    if rounding == "nearest":
        rounded = in_steps.round()
    else:
        below = in_steps.floor()
        drawn = torch.rand(x.shape, generator=generator, dtype=wide, device=x.device)
        rounded = (below + (drawn < in_steps - below)).copysign(in_steps)
    return (rounded * ((bias + step) << mantissa).view(wide)).to(x.dtype)


def encode(x: Tensor, scale: Tensor | float, fmt: FloatFormat) -> Tensor:
    """`x * scale` in the storage dtype of `fmt`, by the policy of the module; same shape.

    `scale` is a power of two, a number or a float32 scalar tensor on x's device (a tensor may change its value without
    recompiling). A format without a torch dtype gives its values in float32. The value of `x` is read as float32.
    """
    # In float32, because a bf16 or fp16 product could leave its range; and infinity is looked for in x, not in
    # the product, because a finite value that the scale takes out of float32 must saturate.
    scaled = torch.where(torch.isinf(x), math.nan, x.float() * scale).clamp(-fmt.max, fmt.max)
    return quantise(scaled, fmt) if fmt.dtype is None else scaled.to(fmt.dtype)
