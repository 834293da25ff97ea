"""Looks at tensors whose distribution is known, and the policy over them."""

import math

import numpy as np
import pytest
import torch

from umup.numerics.formats import BF16, E4M3, E5M2, FP16, find_format, quantise
from umup.numerics.ranges import MARGIN, Range, choose, measure

ROWS, COLUMNS = 512, 256


def look(x, **options):
    return Range.of(measure(x, **options))


def gaussian(octave=0, dtype=torch.float32):
    return (torch.randn(ROWS, COLUMNS) * 2.0**octave).to(dtype)


def actual_error(x, fmt, exponent):
    wide = x.double()
    encoded = quantise(wide * 2.0**exponent, fmt) * 2.0**-exponent
    return ((encoded - wide).norm() / wide.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_look_measures_what_there_is(dtype):
    x = gaussian(dtype=dtype)
    x[3, 4] = -9.5
    seen = look(x)
    assert seen.amax == 9.5
    assert seen.nonfinite == 0
    assert seen.elements == ROWS * COLUMNS == sum(seen.counts)
    assert seen.rms == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-12)
    magnitudes = x.abs().double().flatten().numpy()
    edges = [2.0**octave * (1 + quarter / 4) for octave in range(-126, 128) for quarter in range(4)] + [math.inf]
    assert np.histogram(magnitudes, edges)[0].tolist() == list(seen.counts)


def test_zeros_and_what_float32_hardly_holds_are_counted_as_zeros():
    seen = look(torch.tensor([0.0, -0.0, 1e-40, 2.0**-126, 1.0]))
    assert seen.elements == 5
    assert sum(seen.counts) == 2


def test_non_finite_values_are_counted_and_do_no_harm():
    x = gaussian()
    clean = look(x)
    x[0, 0], x[7, 1], x[9, 9] = math.inf, -math.inf, math.nan
    seen = look(x)
    assert seen.nonfinite == 3
    assert seen.elements == clean.elements
    assert sum(seen.counts) == sum(clean.counts) - 3
    assert math.isfinite(seen.rms)
    assert seen.amax == x[x.isfinite()].abs().max().item()
    assert choose(seen, E4M3, 0) == choose(clean, E4M3, 0)


def test_a_large_tensor_is_sampled_by_rows_except_for_its_maximum():
    x = torch.ones(64, 10)
    x[1, 3] = 100.0  # not in the sample
    x[2, 3] = math.nan
    seen = look(x, limit=160)
    assert (seen.amax, seen.nonfinite) == (100.0, 1)
    assert seen.elements == 130  # every fifth row: the quotient is four, and the stride is odd
    assert seen.rms == 1.0
    assert look(x, limit=5).elements == 10


def test_the_sample_takes_every_position_of_a_sequence():
    position = torch.arange(64.0).exp2().repeat(64)[:, None].expand(-1, 4)
    counts = [n for n in look(position, limit=4096).counts if n]
    assert len(counts) == 64
    assert max(counts) - min(counts) <= 4


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0, 4)])
def test_any_shape(shape):
    seen = look(torch.ones(shape))
    assert seen.elements == math.prod(shape)
    assert seen.rms == (1.0 if seen.elements else 0.0)
    assert look(torch.ones(6, 5).t()[1:]).elements == 24


def test_measuring_waits_for_nothing():
    """The meta device has no data: any step that needed a value would raise."""
    assert measure(torch.empty(100, 30, device="meta")).device.type == "meta"
    assert measure(torch.ones(3, requires_grad=True)).requires_grad is False


@pytest.mark.parametrize("fmt", [E4M3, E5M2, find_format("E3M2")], ids=lambda f: f.name)
@pytest.mark.parametrize("exponent", [-21, -9, 0, 7, 8, 15, 20])
def test_shares_are_those_of_the_encoding(fmt, exponent):
    x = gaussian() * gaussian(2).exp2()
    x[::7] = 0.0
    seen = look(x)
    scaled = x.double() * 2.0**exponent
    flushed = (quantise(scaled, fmt) == 0) & (x != 0)
    assert seen.clip_share(fmt, exponent) == (scaled.abs() > fmt.max).sum().item() / x.numel()
    assert seen.flush_share(fmt, exponent) == pytest.approx((flushed.sum() / (x != 0).sum()).item(), rel=1e-6)


def test_the_conventions_at_the_edges():
    assert look(torch.tensor([447.9, 448.0])).clip_share(E4M3, 0) == 0.5
    assert look(torch.tensor([2.0**-10, 2.0**-10.01])).flush_share(E4M3, 0) == 0.5
    assert look(torch.linspace(60000, 65535, 9999)).clip_share(FP16, 0) < 0.02  # 65504: interpolated in its bin


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, find_format("E3M2")], ids=lambda f: f.name)
@pytest.mark.parametrize("octave", [-20, -3, 0, 20])
def test_the_predicted_error_is_the_actual_one(fmt, octave):
    x = gaussian(octave)
    seen = look(x)
    for exponent in range(-octave - 22, -octave + 23, 4):
        if 0 < seen.clip_share(fmt, exponent) < 1e-4:
            continue  # a dozen values at the edge decide, and bins know them to a quarter of an octave only
        assert seen.error(fmt, exponent) == pytest.approx(actual_error(x, fmt, exponent), rel=0.1)


@pytest.mark.parametrize("octave", range(-20, 21, 5))
@pytest.mark.parametrize(("fmt", "error"), [(E4M3, 0.0265), (E5M2, 0.053)], ids=["E4M3", "E5M2"])
def test_the_exponent_follows_a_gaussian(fmt, error, octave):
    x = gaussian(octave)
    seen = look(x)
    for start in (-50, 0, 50):
        choice = choose(seen, fmt, start)
        assert choice.serves, choice.reason
        assert seen.error(fmt, choice.exponent) == pytest.approx(error, rel=0.02)
        assert actual_error(x, fmt, choice.exponent) == pytest.approx(error, rel=0.02)
        assert seen.clip_share(fmt, choice.exponent + MARGIN) == 0


def test_a_unit_gaussian_in_e4m3_needs_no_scale():
    choice = choose(look(gaussian()), E4M3, 0)
    assert (choice.exponent, choice.serves) == (0, True)
    assert choice.reason == "kept: 2^-5..2^6 are as good"
    assert "moved from 2^30" in choose(look(gaussian()), E4M3, 30).reason


@pytest.mark.parametrize("fmt", [E4M3, E5M2, find_format("E2M1"), find_format("E3M2")], ids=lambda f: f.name)
def test_one_move_is_enough(fmt):
    """Also for formats whose acceptable interval is narrower than the two margins."""
    seen = look(gaussian(4))
    moved = {choose(seen, fmt, start).exponent for start in range(-60, 61)}
    for exponent in moved:
        again = choose(look(gaussian(4)), fmt, exponent)
        assert again.exponent == exponent
        assert again.reason.startswith("kept")


def test_inside_the_band_nothing_moves():
    kept = [e for e in range(-20, 20) if choose(look(gaussian()), E4M3, e).reason.startswith("kept")]
    assert kept == list(range(-5 + MARGIN, 6 - MARGIN + 1))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("direction", [1, -1])
def test_drift_is_followed_without_clipping(fmt, direction):
    """The exponent in use always comes from the look before: twice, even four times as much must still fit."""
    exponent = 0
    moves = 0
    for octave in range(0, direction * 30, direction):
        chosen = choose(look(gaussian(octave)), fmt, exponent).exponent
        moves += chosen != exponent
        exponent = chosen
        for growth in (1, 2):
            later = look(gaussian(octave + growth * direction))
            assert later.clip_share(fmt, exponent) == 0
            assert later.error(fmt, exponent) < 1.3 * later.error(fmt, choose(later, fmt, exponent).exponent)
    assert 1 <= moves <= 8


def test_a_few_values_without_energy_do_not_move_the_scale():
    x = torch.randn(2**10, 2**10) * 2.0**6  # at the edge of clipping, so that a larger value clips
    plain = choose(look(x), E4M3, 0)
    x[5, 5] = 10 * 2.0**6
    assert look(x).clip_share(E4M3, 0) == 2.0**-20
    assert look(x).amax == 640
    assert choose(look(x), E4M3, 0) == plain
    for outlier in (15.0, 20.0, 30.0, 40.0):  # of the maximum, 40 deviations would ask for three octaves
        x[5, 5] = outlier * 2.0**6
        assert abs(choose(look(x), E4M3, 0).exponent - plain.exponent) <= 1


def test_what_clips_more_than_a_millionth_is_not_acceptable_whatever_its_error():
    seen = look(gaussian() * 112)  # 448 is four deviations
    assert 2**-20 < seen.clip_share(E4M3, 0) < 2**-12
    assert seen.error(E4M3, 0) < 1.01 * seen.error(E4M3, -1)
    assert choose(seen, E4M3, 0).reason.endswith("..2^-1")


def test_small_values_are_not_flushed_where_both_ends_fit():
    x = torch.tensor([1.1 * 2**6, 1.1 * 2**-10]).expand(100, -1)  # in E4M3, both fit at exponents from 0 to 2
    choice = choose(look(x), E4M3, -6)
    assert choice == (0, True, "moved from 2^-6 to the middle of 2^0..2^2")
    assert look(x).flush_share(E4M3, choice.exponent) == 0
    assert look(x).error(E4M3, -6) < 1.01 * look(x).error(E4M3, 0)


def test_values_that_carry_the_energy_are_represented():
    x = gaussian()
    x[:, 3] = 2.0**12
    choice = choose(look(x), E4M3, 0)
    assert choice.serves
    assert look(x).clip_share(E4M3, choice.exponent + MARGIN) == 0
    assert actual_error(x, E4M3, choice.exponent) < 0.03


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_two_scales_in_one_tensor_are_not_served(fmt):
    x = gaussian()
    x[::2] *= 2.0**-30
    x[1::2] *= 2.0**10
    choice = choose(look(x), fmt, 0)
    assert not choice.serves
    assert choice.reason == f"{fmt.name} at its best flushes 50% of the values to zero"
    assert look(x).clip_share(fmt, choice.exponent) == 0
    assert choose(look(x), BF16, 0).serves


def test_energy_spread_beyond_a_format_is_not_served():
    x = torch.ones(2**20)
    x[:16] = 2.0**8  # as much energy as all the others
    choice = choose(look(x), find_format("E2M1"), 0)
    assert not choice.serves
    assert "at its best has an error of" in choice.reason
    assert choose(look(x), E4M3, 0).serves


@pytest.mark.parametrize("x", [torch.zeros(4, 4), torch.zeros(0, 4), torch.full((4,), math.nan)])
def test_without_values_the_exponent_stays(x):
    for exponent in (-7, 0, 12):
        assert choose(look(x), E4M3, exponent) == (exponent, True, "kept: no nonzero values seen")
    assert look(x).error(E4M3, 0) == look(x).clip_share(E4M3, 0) == look(x).flush_share(E4M3, 0) == 0
