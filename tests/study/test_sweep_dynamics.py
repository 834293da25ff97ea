"""What counts as a spike, an explosion, late instability: on curves that are made up."""

from math import inf, nan
from random import Random

import pytest

from umup.study.dynamics import SHORTEST, Dynamics, judge, worst
from umup.train.metrics import Metrics


def curve(steps=200, noise=0.02, seed=0, spikes=(), explosions=(), rise=0.0):
    """A loss that falls from 5.5 towards 3, with `spikes` and `explosions` at the steps named."""
    rng = Random(seed)
    rows = []
    for i in range(steps):
        loss = 3 + 2.5 / (1 + i / 10) + rng.gauss(0, noise) + 1.0 * (i in spikes)
        loss += rise * max(0, i - 0.8 * steps) / (0.2 * steps)
        norm = (1 + rng.random()) * (100 if i in explosions else 1)
        rows.append(Metrics(i + 1, loss, 1.0, norm, 1000.0))
    return rows


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_a_run_that_falls_with_noise_is_clean(noise, seed, steps):
    assert judge(curve(steps, noise, seed)) == Dynamics()


def test_spikes_and_explosions_are_counted_in_episodes():
    found = judge(curve(spikes=(60, 61, 62, 150), explosions=(100,)))
    assert (found.spikes, found.explosions, found.late_rise) == (2, 1, 0)
    assert found.faults == "2 loss spikes, 1 gradient explosion"
    assert not found.clean


def test_a_rise_at_the_end_is_late_instability():
    found = judge(curve(rise=0.5))
    assert found.late_rise == pytest.approx(0.35, abs=0.1)
    assert found.spikes == 0
    assert "rose by" in found.faults
    assert judge(curve(rise=0.01)).clean


@pytest.mark.parametrize("number", [nan, inf])
def test_what_is_no_number_has_diverged(number):
    rows = curve(30)
    assert judge([*rows, Metrics(31, number, 1.0, 1.0, 1.0)]).diverged
    assert judge([*rows, Metrics(31, 3.0, 1.0, number, 1.0)]).diverged
    assert judge(rows, diverged=True).faults == "diverged"
    assert judge([], diverged=True).diverged


def test_short_runs_are_not_judged():
    assert judge(curve(SHORTEST - 1, spikes=(30,))).clean
    assert not judge(curve(SHORTEST, spikes=(30,))).clean


def test_the_worst_of_several_seeds():
    assert worst([Dynamics(2, 0, 0.1), Dynamics(1, 3, 0.0)]) == Dynamics(2, 3, 0.1)
    assert worst([Dynamics(), Dynamics(diverged=True)]).diverged
