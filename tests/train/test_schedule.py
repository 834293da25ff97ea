"""The schedules' end points and shapes."""

import pytest

from umup.config.sections import ScheduleConfig
from umup.optim.schedule import factor


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_warmup_peak_and_end(name, warmup):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, final_factor=0.1)
    factors = [factor(schedule, step, 100) for step in range(100)]
    assert factors[:warmup] == pytest.approx([(i + 1) / 10 for i in range(warmup)])
    assert factors[warmup] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(b <= a + 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def test_cosine_and_linear_are_halfway_in_the_middle():
    for name in ("cosine", "linear"):
        assert factor(ScheduleConfig(name=name, final_factor=0.0), 50, 101) == pytest.approx(0.5)


def test_wsd_is_flat_before_its_decay():
    schedule = ScheduleConfig(name="wsd", decay_fraction=0.2, final_factor=0.0)
    assert [factor(schedule, step, 100) for step in range(79)] == [1.0] * 79
    assert factor(schedule, 89, 100) == pytest.approx(0.5)
