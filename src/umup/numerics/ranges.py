"""What a look at a tensor measures, and the power of two that puts it where its format is accurate.

A static scale is a constant that is known before the data is seen, so it needs room. A floating-point format gives it:
for a Gaussian the error of E4M3 is flat (2.6%) over twelve octaves of scale. Three steps use that:

1. `measure` counts |x| in quarter-binades (exponent and two mantissa bits), on the device, without waiting for it.
2. `Range` predicts from the counts what any format would do at any scale: share clipped, share flushed to zero, error.
3. `choose` keeps the present exponent while it is well inside the flat part, and else moves to the middle of it.

Edges: the largest values of E4M3 (448) and E5M2 (57344), and half of every smallest subnormal, are edges of the bins,
and a power of two moves a value by whole bins; so shares are exact, with two conventions: values at or above the
largest count as clipped (though it is representable, and up to half a step more rounds to it), and values of exactly
half the smallest subnormal count as kept. Within a bin, values are taken as spread evenly: where a format's largest
value lies inside a bin (fp16, most simulated ones), its clip share is interpolated.
Not covered: a scale per row or block, and which values of a tensor are large (all looks are at a whole tensor).
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from umup.numerics.formats import FloatFormat, quantise

Array = NDArray[np.float64]

MAX_EXPONENT = 60
"""Scales stay within 2^-60 .. 2^60: the product of two, or of their inverses, is still a normal float32."""

MARGIN = 2
"""Octaves kept free on both sides: the data may grow or shrink fourfold before the next look."""

ERROR_SLACK = 1.25
CLIP_LIMIT = 2.0**-20
FLUSH_LIMIT = 0.25
SERVES_WITHIN = 3.0

_BINS = 1024  # of |x| as float32: 8 exponent bits and 2 of the mantissa
_ZERO_BINS = 4  # below 2^-126: zeros and float32 subnormals
_KEPT_BINS = _BINS - 2 * _ZERO_BINS  # those, and the four of infinity and NaN, stay out
_OCTAVE = 4
_GOLDEN = (math.sqrt(5) - 1) / 2


def measure(x: Tensor, limit: int = 2**20) -> Tensor:
    """One look at `x` (any shape; bf16, fp16 or float32), as a float64 vector of 1027 numbers on x's device.

    They are: the largest finite |x| and the count of non-finite values, both over all of x; then, over a sample, the
    sum of squares and 1024 counts. The sample is every k-th row (last dimension), at most `limit` elements but at least
    one row; k is odd, so that it walks through all positions of sequences whose length is a power of two. Non-finite
    values count as zeros in the sample. Nothing waits for the device; `Range.of` reads the vector.
    """
    with torch.no_grad():
        if x.numel() == 0:
            return torch.zeros(3 + _BINS, dtype=torch.float64, device=x.device)
        finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        largest = torch.linalg.vector_norm(finite, math.inf)
        nonfinite = (finite != x).sum()
        sample = finite.reshape(-1, x.shape[-1] if x.ndim else 1)
        sample = sample[:: -(-x.numel() // limit) | 1].float().contiguous()
        bins = (sample.view(torch.int32) >> 21) & (_BINS - 1)
        counts = torch.histc(bins.float(), _BINS, 0, _BINS)  # bincount would wait for the largest index
        squares = sample.double().square().sum()
        return torch.cat((torch.stack((largest.double(), nonfinite.double(), squares)), counts.double()))


class _Behaviour(NamedTuple):
    """What a format does to the values of each bin, scaled bins from 2^(-126-60) to 2^(128+60)."""

    error: Array  # mean square error over mean square
    clip: Array  # share above the largest value
    flush: Array  # share rounded to zero


@lru_cache
def _behaviours(fmt: FloatFormat) -> _Behaviour:
    """For every exponent from -60 to 60, and the bins of a tensor: (121, bins) each.

    Found by quantising 64 values per bin, so that a prediction cannot disagree with the format.
    """
    points, energy = _bin_points(-126 - MAX_EXPONENT, 128 + MAX_EXPONENT)
    rounded = quantise(torch.from_numpy(points), fmt).numpy()
    error = np.square(rounded - points).mean(1) / energy
    per_bin = error, (points > fmt.max).mean(1), (rounded == 0).mean(1)
    windows = (sliding_window_view(numbers, _KEPT_BINS)[::_OCTAVE] for numbers in per_bin)
    return _Behaviour(*map(np.ascontiguousarray, windows))


def _bin_points(low: int, high: int) -> tuple[Array, Array]:
    """64 values in each bin from 2^low to 2^high, and the mean square of each bin: (bins, 64), (bins,)."""
    quarters = np.arange(_OCTAVE * low, _OCTAVE * high)
    # One in each 64th of a bin, at golden-ratio places: evenly spaced ones would all lie on the grid of a fine format.
    inside = (quarters % _OCTAVE)[:, None] + (np.arange(64) + (np.arange(1, 65) * _GOLDEN) % 1) / 64
    points = np.ldexp(1 + inside / _OCTAVE, (quarters // _OCTAVE)[:, None])
    return points, np.square(points).mean(1)


_ENERGY = _bin_points(-126, 128)[1]


@dataclass(frozen=True, eq=False)
class Range:
    """One look, read on the CPU: what was measured, and what a format would do at 2^exponent (|exponent| <= 60)."""

    amax: float
    """The largest finite magnitude, over the whole tensor."""
    nonfinite: int
    """Infinities and NaN, over the whole tensor."""
    rms: float
    """Root mean square of the sample."""
    elements: int
    """Size of the sample."""
    counts: Array = field(repr=False)
    """Elements of the sample in each quarter-binade from 2^-126 up; those below count as zeros."""

    @classmethod
    def of(cls, measured: Tensor) -> Self:
        """From a vector of `measure` (waits for the device if it is still there)."""
        (amax, nonfinite, squares), counts = measured[:3].tolist(), measured[3:].cpu().numpy()
        elements = int(counts.sum())
        rms = math.sqrt(squares / elements) if elements else 0.0
        return cls(amax, int(nonfinite), rms, elements, counts[_ZERO_BINS:-_ZERO_BINS])

    def clip_share(self, fmt: FloatFormat, exponent: int) -> float:
        """Share of all elements that saturate."""
        return float(_behaviours(fmt).clip[exponent + MAX_EXPONENT] @ self.counts) / max(self.elements, 1)

    def flush_share(self, fmt: FloatFormat, exponent: int) -> float:
        """Share of the nonzero elements that become zero."""
        return float(_behaviours(fmt).flush[exponent + MAX_EXPONENT] @ self.counts) / max(float(self.counts.sum()), 1)

    def error(self, fmt: FloatFormat, exponent: int) -> float:
        """Predicted RMS of (encoded - x) over the RMS of x, by rounding, clipping and flushing; 0 without values."""
        energy = self.counts * _ENERGY
        return math.sqrt(float(_behaviours(fmt).error[exponent + MAX_EXPONENT] @ energy) / (float(energy.sum()) or 1.0))


class Choice(NamedTuple):
    """The exponent to use from now on; whether the format serves the tensor at all; and why, in a phrase."""

    exponent: int
    serves: bool
    reason: str


def choose(seen: Range, fmt: FloatFormat, exponent: int, flush_limit: float = FLUSH_LIMIT) -> Choice:
    """The exponent for a tensor last `seen` so, now encoded with 2^exponent.

    An exponent is acceptable if its error is within 1.25 of the least that any gives, if at most 2^-20 of the elements
    clip (or as few as the former allow), and if at most `flush_limit` of the nonzero ones are flushed. The present one
    stays while the exponents `MARGIN` octaves to either side are acceptable too; else the middle of the acceptable ones
    is taken, or what leaves the margin towards clipping where they are few: saturation hurts more than the loss of
    small values (2409.12517). As the middle satisfies the condition for staying, a steady tensor never moves twice.

    The maximum takes no part. A few large values count by their share and their energy: as long as both are small they
    saturate, and the scale serves the others; once they carry the energy, they are what must be represented.

    A format does not serve a tensor whose least error exceeds 3 times that of a unit Gaussian, or more than
    `flush_limit` of which is flushed at any acceptable scale: no constant puts both ends in range, and its product
    belongs in BF16. Where small values are small by nature and only their energy counts (the gradient at the logits of
    a confident model spans 30 octaves), the limit is 1. Without nonzero values there is nothing to learn, and the
    exponent stays.
    """
    if not seen.counts.any():
        return Choice(exponent, True, "kept: no nonzero values seen")
    error, clip, flush = _curves(seen, fmt)
    best = float(error.min())
    near = error <= ERROR_SLACK * best
    near &= clip <= max(CLIP_LIMIT, clip[near].min())
    flushed = float(flush[near].min())
    if flushed <= flush_limit:
        near &= flush <= flush_limit
    low, high = _interval(near, int(np.where(near, error, np.inf).argmin()))
    top = max(high - MARGIN, low)
    middle = min((low + high) // 2, top)
    if best > (limit := SERVES_WITHIN * _gaussian_error(fmt)):
        return Choice(middle, False, f"{fmt.name} at its best has an error of {best:.1%} (limit {limit:.1%})")
    if flushed > flush_limit:
        return Choice(middle, False, f"{fmt.name} at its best flushes {flushed:.0%} of the values to zero")
    if min(low + MARGIN, middle) <= exponent <= top:
        return Choice(exponent, True, f"kept: 2^{low}..2^{high} are as good")
    return Choice(middle, True, f"moved from 2^{exponent} to the middle of 2^{low}..2^{high}")


def _curves(seen: Range, fmt: FloatFormat) -> tuple[Array, Array, Array]:
    """Error, clip share and flush share at every exponent from -60 to 60."""
    filled = seen.counts.nonzero()[0]
    part = slice(filled[0], filled[-1] + 1)  # a tenth of the bins, as a rule
    error, clip, flush = (table[:, part] for table in _behaviours(fmt))
    counts, energy = seen.counts[part], seen.counts[part] * _ENERGY[part]
    return np.sqrt(error @ (energy / energy.sum())), clip @ counts / seen.elements, flush @ counts / counts.sum()


def _interval(accepted: NDArray[Any], inside: int) -> tuple[int, int]:
    """Lowest and highest exponent of the unbroken run of accepted ones around an index."""
    low = high = inside
    while low > 0 and accepted[low - 1]:
        low -= 1
    while high + 1 < len(accepted) and accepted[high + 1]:
        high += 1
    return low - MAX_EXPONENT, high - MAX_EXPONENT


@lru_cache
def _gaussian_error(fmt: FloatFormat) -> float:
    """The error of a format on a unit Gaussian at its best scale."""
    quarters = np.arange(-126 * _OCTAVE, 128 * _OCTAVE + 1)
    edges = np.ldexp(1 + (quarters % _OCTAVE) / _OCTAVE, quarters // _OCTAVE)
    below = np.array([math.erf(edge / math.sqrt(2)) for edge in edges.tolist()])
    return float(_curves(Range(0.0, 0, 1.0, 1, np.diff(below)), fmt)[0].min())
