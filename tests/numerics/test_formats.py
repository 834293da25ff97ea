"""Formats against torch's own casts, over every 16-bit pattern, and against an enumerated grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umup.errors import ConfigError
from umup.numerics.formats import BF16, E4M3, E5M2, FORMATS, FP16, encode, find_format, quantise

SIMULATED = ["E2M0", "E2M1", "E3M2", "E2M3", "E5M0", "E6M1", "E5M3", "E3M10"]
STORED = [E4M3, E5M2, FP16, BF16]


def patterns(dtype):
    """Every value of a 16-bit dtype, in float32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()


def grid(fmt):
    """The non-negative values of a format, written out; not by the code under test."""
    top = 2**fmt.exponent_bits - (1 if fmt.name != "E4M3" else 0)
    values = []
    for exponent in range(top):
        for mantissa in range(2**fmt.mantissa_bits):
            fraction = mantissa / 2**fmt.mantissa_bits
            values.append(2.0 ** (exponent - fmt.bias) * (1 + fraction) if exponent else fraction * fmt.min_normal)
    return np.array(values[:-1] if fmt.name == "E4M3" else values)  # the last pattern of E4M3 is its NaN


def nearest_even(x, fmt):
    """Reference: search the grid; of two equally near values the one with the even pattern (its index).

    Without mantissa bits every nonzero value is odd, and IEEE 754 takes the larger.
    """
    values = grid(fmt)
    above = np.searchsorted(values, np.abs(x)).clip(0, len(values) - 1)
    below = (above - 1).clip(0)
    high, low = values[above] - np.abs(x), np.abs(x) - values[below]
    even = above % 2 == 0 if fmt.mantissa_bits else below > 0
    index = np.where((high < low) | ((high == low) & even), above, below)
    index = np.where(np.abs(x) >= values[-1], len(values) - 1, index)
    return np.copysign(values[index], x)


def same(a, b):
    """Equal to the sign of zero; any NaN equals any NaN."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num().view(torch.int64), b.nan_to_num().view(torch.int64)
    )


def ties(fmt):
    """Every midpoint of neighbouring values, both signs, with the float32 just below and just above it."""
    values = torch.from_numpy(grid(fmt))
    middle = ((values[1:] + values[:-1]) / 2).float()
    assert torch.equal(middle.double() * 2, values[1:] + values[:-1])
    inf = torch.tensor(math.inf)
    three = torch.cat([middle, middle.nextafter(inf), middle.nextafter(-inf)])
    return torch.cat([three, -three])


@pytest.mark.parametrize(
    ("name", "largest", "normal", "subnormal"),
    [
        ("E4M3", 448.0, 2**-6, 2**-9),
        ("E5M2", 57344.0, 2**-14, 2**-16),
        ("E2M1", 3.0, 1.0, 0.5),
        ("E3M2", 14.0, 0.25, 0.0625),
    ],
)
def test_fields(name, largest, normal, subnormal):
    fmt = find_format(name)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (largest, normal, subnormal)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_stored_formats_have_torch_s_numbers(fmt):
    info = torch.finfo(fmt.dtype)
    assert (fmt.max, fmt.min_normal) == (info.max, info.smallest_normal)
    assert fmt.min_subnormal == info.smallest_normal * 2.0**-fmt.mantissa_bits
    assert fmt == find_format(fmt.name)


@pytest.mark.parametrize("name", ["e4m3", "E1M3", "E9M2", "E4M11", "E4M3FN", "fp8", "E04M3", "xE4M3", ""])
def test_unknown_formats_are_refused_in_one_line(name):
    with pytest.raises(ConfigError, match="ExMy") as caught:
        find_format(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", STORED, ids=lambda f: f.name)
def test_every_16_bit_value_rounds_as_torch_rounds_it(fmt, source):
    x = patterns(source)
    inside = x[x.abs() <= fmt.max]
    assert len(inside) > 30_000
    cast = inside.to(fmt.dtype).float()
    assert same(quantise(inside, fmt), cast)
    assert same(encode(inside, 1.0, fmt).float(), cast)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_every_16_bit_value_by_the_policy(fmt, source):
    x = patterns(source)
    by_policy = torch.where(x.isfinite(), x.clamp(-fmt.max, fmt.max).to(fmt.dtype).float(), math.nan)
    assert (x.isfinite() & (x.abs() > fmt.max)).any()
    for dtype in (torch.float32, torch.float64, source):
        assert quantise(x.to(dtype), fmt).dtype == dtype
        assert same(quantise(x.to(dtype), fmt), by_policy)
        assert same(encode(x.to(dtype), torch.tensor(1.0), fmt).float(), by_policy)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_ties_and_their_neighbours(fmt):
    x = ties(fmt)
    assert same(quantise(x, fmt), nearest_even(x.double().numpy(), fmt))
    assert same(encode(x, 1.0, fmt).float(), quantise(x, fmt))
    assert same(quantise(x.double(), fmt), quantise(x, fmt))


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_formats_against_their_grid(name):
    fmt = find_format(name)
    assert fmt.max == grid(fmt)[-1]
    random = torch.randn(4096) * torch.randn(4096).mul(6).exp2() * fmt.min_normal
    x = torch.cat([ties(fmt), random, torch.linspace(-1.5, 1.5, 999) * fmt.max])
    assert same(quantise(x, fmt), nearest_even(x.double().numpy(), fmt))
    assert same(encode(x, 1.0, fmt), quantise(x, fmt))


@pytest.mark.parametrize("name", ["E8M2", "E8M0", "bf16"])
def test_formats_with_the_exponents_of_float32(name):
    fmt = find_format(name)
    x = torch.tensor([1.0, 1.4, 3e38, -3.39e38, fmt.min_subnormal, 0.6 * fmt.min_subnormal, 0.4 * fmt.min_subnormal])
    assert same(quantise(x.double(), fmt), nearest_even(x.double().numpy(), fmt))
    assert same(quantise(x, fmt), nearest_even(x.double().numpy(), fmt))


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    exponent_bits=st.integers(2, 8),
    mantissa_bits=st.integers(0, 5),
)
def test_any_float64_in_any_format(value, exponent_bits, mantissa_bits):
    fmt = find_format(f"E{exponent_bits}M{mantissa_bits}")
    x = torch.tensor([value, value * 2.0**-900, math.fmod(value, 4 * fmt.min_normal)], dtype=torch.float64)
    assert same(quantise(x, fmt), nearest_even(x.numpy(), fmt))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, BF16, find_format("E3M2")], ids=lambda f: f.name)
def test_beyond_the_range_finite_values_saturate_and_others_are_nan(fmt):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan])
    expected = [fmt.max, -fmt.max, math.nan, math.nan, math.nan]
    assert same(quantise(x, fmt), expected)
    assert same(encode(x, 1.0, fmt).double(), expected)
    assert same(encode(x, 2.0**60, fmt).double(), expected)  # the product overflows float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", [E4M3, E5M2, find_format("E4M2")], ids=lambda f: f.name)
def test_the_scale_multiplies_in_float32(fmt, dtype):
    x = torch.randn(1000).to(dtype) * 2.0**-10
    assert same(encode(x, torch.tensor(2.0**18), fmt).float(), quantise(x.double() * 2.0**18, fmt))
    assert encode(x, 1.0, fmt).dtype == (fmt.dtype or torch.float32)


@pytest.mark.parametrize("scale", [float, torch.tensor])
def test_products_that_fp16_does_not_hold(scale):
    large, above_half = torch.tensor([40960.0]).half(), torch.tensor([1 + 2**-10]).half()
    assert encode(large, scale(4.0), find_format("E6M3")).item() == 4 * 40960
    assert encode(above_half, scale(2.0**-17), E5M2).item() == 2**-16


def test_stochastic_rounding_is_unbiased_and_stays_on_neighbours():
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([1.03, -1.03, 300.0, 0.7 * 2**-9, -0.1 * 2**-9, 2.0, 447.9])
    draws = 40_000
    drawn = quantise(x.expand(draws, -1), E4M3, "stochastic", generator).double()
    for column, value in zip(drawn.T, x.double(), strict=True):
        low = quantise(value, E4M3, "nearest")
        neighbours = column.unique()
        assert len(neighbours) <= 2
        width = (neighbours[-1] - neighbours[0]).item()
        assert neighbours[0] <= value <= neighbours[-1]
        assert low in neighbours
        # The standard deviation of the mean is at most width/2/sqrt(draws); five of them.
        assert abs(column.mean() - value) <= 5 * width / 2 / math.sqrt(draws)
    special = torch.tensor([math.inf, 1e9, -1e9, -0.0, -1e-30])
    assert same(quantise(special, E5M2, "stochastic"), [math.nan, 57344.0, -57344.0, -0.0, -0.0])


def test_stochastic_rounding_repeats_with_its_generator():
    x = torch.randn(1000)
    first, second = (quantise(x, E5M2, "stochastic", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, quantise(x, E5M2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
def test_encode_compiles_to_the_same_values():
    """In one graph: infinities above all, whose test a compiler may take for dead code."""

    def both(x, x16, scale):
        return [encode(y, scale, fmt) for y in (x, x16) for fmt in (E4M3, E5M2)]

    special = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 448.0, -57345.0, -0.0, 2**-10, 1e-30])
    x = torch.cat([special, torch.randn(2000) * torch.randn(2000).mul(8).exp2()])
    compiled = torch.compile(both, fullgraph=True)
    for scale in (torch.tensor(1.0), torch.tensor(2.0**12)):
        inputs = x, x.bfloat16(), scale  # cast outside: inside, the compiler would keep the float32 values
        for fast, eager in zip(compiled(*inputs), both(*inputs), strict=True):
            assert fast.dtype == eager.dtype
            assert same(fast.float(), eager.float())
            assert fast.float()[:3].isnan().all()
            assert eager.float()[:5].tolist()[3:] == [torch.finfo(fast.dtype).max, -torch.finfo(fast.dtype).max]
