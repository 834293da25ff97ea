"""Strategies against losses that are functions of the values: how many points, which, and what is concluded."""

from math import inf, log2, prod

import pytest

from umup.errors import ConfigError
from umup.study.space import LR, Axis, name_of
from umup.study.strategies import GROWTH, Search, grid, independent, independent_result, random_draws

A, B = "parametrization.hparams.a", "parametrization.hparams.b"
OCTAVES = (0.25, 0.5, 1.0, 2.0, 4.0)


def search(grows=True, lr=1.0, trials=20, keys=(A, B)):
    rates = tuple(lr * x for x in OCTAVES)
    space = (Axis(LR, rates, grows=grows), *(Axis(key, OCTAVES) for key in keys))
    return Search(space, {LR: lr, **dict.fromkeys(keys, 1.0)}, trials, 0)


def bowl(lr=1.0, a=1.0, b=1.0, coupling=0.0):
    """A loss in log2: the optimum, and how far A and B act on each other."""

    def loss(point):
        x, y, z = log2(point[LR] / lr), log2(point.get(A, a) / a), log2(point.get(B, b) / b)
        return 2 + 0.1 * x * x + 0.05 * y * y + 0.02 * z * z + coupling * y * z

    return loss


def play(strategy, what, loss):
    """Run a strategy to its end; returns the losses by name, in the order in which they were wanted."""
    known = {}
    for _ in range(50):
        new = [point for point in strategy(what, known) if name_of(point) not in known]
        if not new:
            return known
        known.update({name_of(point): loss(point) for point in new})
    raise AssertionError("it never ends")


def test_independent_finds_the_optimum_of_independent_hyperparameters():
    known = play(independent, search(), bowl(lr=2.0, a=0.5, b=4.0))
    found = independent_result(search(), known)
    assert found.combined == {LR: 2.0, A: 0.5, B: 4.0}
    assert found.measured == pytest.approx(2)
    assert found.interaction == pytest.approx(0)
    assert len(known) == 5 + 4 + 4 + 1  # a line's middle is a point of the rate's line
    assert {line.key: line.gain for line in found.lines} == pytest.approx({LR: 0, A: 0.05, B: 0.08})
    assert [line.on_edge for line in found.lines] == [False, False, True]


def test_an_interaction_is_reported():
    known = play(independent, search(), bowl(a=2.0, b=2.0, coupling=0.01))
    found = independent_result(search(), known)
    assert found.combined == {LR: 1.0, A: 2.0, B: 2.0}
    # the lines, each at the other's base value, are tilted by the coupling
    assert found.interaction == pytest.approx(found.measured - found.promised)
    assert found.interaction == pytest.approx(0.01)


def test_lines_wait_for_the_rate_and_the_combination_for_the_lines():
    s, loss = search(), bowl()
    first = independent(s, {})
    assert [point[LR] for point in first] == list(OCTAVES)
    known = {name_of(point): loss(point) for point in first}
    del known[name_of(first[2])]
    assert independent(s, known) == first
    known[name_of(first[2])] = loss(first[2])
    assert len(independent(s, known)) == 5 + 8
    assert independent_result(s, known) is None


@pytest.mark.parametrize(("optimum", "rates"), [(16.0, 5 + 3), (1 / 32, 5 + 4), (2.0**20, 5 + GROWTH)])
def test_the_rates_line_goes_on_beyond_its_end(optimum, rates):
    known = play(independent, search(keys=()), bowl(lr=optimum))
    assert len(known) == rates


def test_a_users_line_does_not():
    assert len(play(independent, search(grows=False, keys=()), bowl(lr=64.0))) == 5


def test_diverged_points_are_never_best():
    known = play(independent, search(), lambda p: inf if p[LR] > 1 or p[A] > 1 else bowl(lr=4.0, a=4.0)(p))
    assert independent_result(search(), known).combined == {LR: 1.0, A: 1.0, B: 1.0}


def test_without_a_rate_axis_the_lines_start_at_the_configs():
    s = Search((Axis(A, OCTAVES), Axis(B, OCTAVES)), {A: 1.0, B: 1.0}, 1, 0)
    known = play(independent, s, lambda p: bowl(a=2.0, b=0.5)({LR: 1.0, **p}))
    assert independent_result(s, known).combined == {A: 2.0, B: 0.5}


def test_random_draws_are_the_same_everywhere_and_log_uniform():
    s = search(trials=400)
    draws = random_draws(s, {})
    assert draws == random_draws(search(trials=400), {"anything": 1.0})
    assert draws[:20] == random_draws(search(trials=20), {})
    for key in (LR, A, B):
        logs = [log2(point[key]) for point in draws]
        assert -2 <= min(logs) < -1.9
        assert 1.9 < max(logs) <= 2
        assert sum(logs) / 400 == pytest.approx(0, abs=0.15)


def test_random_draws_from_a_list_take_its_values():
    s = Search((Axis(A, (1, 5, 7), listed=True),), {A: 1}, 60, 3)
    assert {point[A] for point in random_draws(s, {})} == {1, 5, 7}


def test_a_grid_is_the_product_and_has_a_limit():
    points = grid(search(), {})
    assert len({name_of(p) for p in points}) == prod([5, 5, 5])
    with pytest.raises(ConfigError, match="15625 points on 6 axes; write --space"):
        grid(search(keys=(A, B, "c", "d", "e")), {})
