"""Batch-size and training-length rules: numbers worked by hand, what each rule conserves, and refusals by name."""

import re
from dataclasses import replace
from itertools import product
from math import inf, sqrt

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from umup.errors import PlanError
from umup.rules.horizon import (
    BATCH_RULES,
    DECAY_PER_STEP,
    DECAY_RULES,
    EPS,
    LENGTH_RULES,
    LR,
    ONE_MINUS_BETA,
    Evidence,
    Horizon,
    Settings,
    move,
    timescale,
)

SETTINGS = Settings(1e-3, 0.1, (0.9, 0.95), 1e-8, independent_weight_decay=False)
HOME = Horizon(2**17, 2e9, 1e8)
ALL = list(product(BATCH_RULES, LENGTH_RULES, DECAY_RULES))
many = hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
# Ratios small enough that 1-beta stays below 1: at most 2*2 times 0.1.
horizons = st.builds(Horizon, st.floats(2**16, 2**18), st.floats(1e9, 4e9), st.floats(1e7, 1e9))


def numbers(settings):
    return [settings.lr, settings.weight_decay, *settings.betas, settings.eps]


def moved(settings=SETTINGS, *, batch_by=1, tokens_by=1, parameters_by=1, batch="none", length="none", decay="none"):
    target = Horizon(HOME.batch_tokens * batch_by, HOME.tokens * tokens_by, HOME.parameters * parameters_by)
    return move(settings, HOME, target, batch=batch, length=length, decay=decay)[0]


# --- numbers worked by hand -------------------------------------------------------------------------------------


def test_batch_none_keeps_everything():
    assert moved(batch_by=4) == SETTINGS


def test_batch_linear():
    sgd = replace(SETTINGS, lr=0.1, betas=(0.9,))
    assert numbers(moved(sgd, batch_by=4, batch="linear")) == pytest.approx([0.4, 0.1, 0.9, 1e-8])


def test_batch_linear_with_unit_scaled_gradients():
    """These grow as sqrt(batch), so that sqrt(batch) on the rate makes the step grow as batch."""
    assert moved(replace(SETTINGS, unit_scaled=True), batch_by=4, batch="linear").lr == pytest.approx(2e-3)


def test_batch_sqrt():
    assert numbers(moved(batch_by=4, batch="sqrt")) == pytest.approx([2e-3, 0.1, 0.9, 0.95, 1e-8])


def test_batch_sde():
    assert numbers(moved(batch_by=4, batch="sde")) == pytest.approx([2e-3, 0.1, 0.6, 0.8, 5e-9])


def test_batch_sde_with_unit_scaled_gradients_keeps_epsilon():
    unit = replace(SETTINGS, unit_scaled=True)
    assert numbers(moved(unit, batch_by=4, batch="sde")) == pytest.approx([2e-3, 0.1, 0.6, 0.8, 1e-8])
    assert moved(unit, tokens_by=16, length="sde").eps == pytest.approx(4e-8)


def test_length_sde():
    assert numbers(moved(tokens_by=16, length="sde")) == pytest.approx([2.5e-4, 0.1, 0.99375, 0.996875, 4e-8])


def test_length_power():
    """10^-0.32 = 0.478630."""
    assert numbers(moved(tokens_by=10, length="power")) == pytest.approx([4.7863e-4, 0.1, 0.9, 0.95, 1e-8], rel=1e-5)


def test_decay_timescale_coupled_divides_by_what_the_rate_gained():
    """batch/tokens = 4/8 and lr * 2, so 0.1 * 0.5 / 2."""
    assert moved(batch_by=4, tokens_by=8, batch="sqrt", decay="timescale").weight_decay == pytest.approx(0.025)


def test_decay_timescale_independent_ignores_the_rate():
    independent = replace(SETTINGS, independent_weight_decay=True)
    settings = moved(independent, batch_by=4, tokens_by=8, batch="sqrt", decay="timescale")
    assert settings.weight_decay == pytest.approx(0.05)


def test_decay_tpp():
    """batch * 4, tokens * 50, parameters * 10: tau falls by 5^-0.527 = 1/2.33538; 4/50 * 2.33538 = 0.186830."""
    by = {"batch_by": 4, "tokens_by": 50, "parameters_by": 10, "batch": "sqrt", "decay": "tpp"}
    assert moved(**by).weight_decay == pytest.approx(0.1 * 0.186830 / 2, rel=1e-5)
    independent = replace(SETTINGS, independent_weight_decay=True)
    assert moved(independent, **by).weight_decay == pytest.approx(0.1 * 0.186830, rel=1e-5)


def test_decay_tpp_follows_parameters_alone():
    assert moved(parameters_by=4, decay="tpp").weight_decay == pytest.approx(0.1 * 4**-0.527)


@pytest.mark.parametrize(("independent", "factor"), [(False, sqrt(1 / 16)), (True, 1 / 16)])
def test_timescale_gives_the_decay_rules_of_2512_22382(independent, factor):
    """wd ~ steps^-1/2 under coupled decay; ~ lr^2 under independent decay."""
    settings = moved(
        replace(SETTINGS, independent_weight_decay=independent), tokens_by=16, length="sde", decay="timescale"
    )
    assert settings.weight_decay == pytest.approx(0.1 * factor)


def test_timescale_of_a_run():
    """2^14 steps, 0.1 * 1e-3 per step: 10000 steps of memory."""
    run = Horizon(2**17, 2**31)
    assert timescale(SETTINGS, run) == pytest.approx(10000 / 2**14)
    assert timescale(replace(SETTINGS, independent_weight_decay=True), run) == pytest.approx(10 / 2**14)
    assert timescale(replace(SETTINGS, weight_decay=0.0), run) == inf


# --- what the rules conserve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_scaled", [False, True])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("batch", "length", "decay"), ALL)
def test_the_same_horizon_changes_no_bit(batch, length, decay, independent, unit_scaled):
    for betas in ((0.9, 0.999), (0.1, 0.3), (0.0, 0.95), ()):
        given_settings = Settings(3e-3, 0.1, betas, 1e-9, independent, unit_scaled)
        after, entries = move(given_settings, HOME, HOME, batch=batch, length=length, decay=decay)
        assert after == given_settings
        assert all(e.old == e.new and e.rules == () for e in entries)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("batch", "length", "decay"), ALL)
@many
@given(there=horizons)
def test_there_and_back_is_the_identity(batch, length, decay, independent, there):
    rules = {"batch": batch, "length": length, "decay": decay}
    before = replace(SETTINGS, independent_weight_decay=independent)
    out, _ = move(before, HOME, there, **rules)
    back, _ = move(out, there, HOME, **rules)
    assert numbers(back) == pytest.approx(numbers(before), rel=1e-9)


@pytest.mark.parametrize(("batch", "length", "decay"), ALL)
@many
@given(way=horizons, there=horizons)
def test_a_stop_on_the_way_changes_nothing(batch, length, decay, way, there):
    rules = {"batch": batch, "length": length, "decay": decay}
    direct, _ = move(SETTINGS, HOME, there, **rules)
    stopped, _ = move(move(SETTINGS, HOME, way, **rules)[0], way, there, **rules)
    assert numbers(stopped) == pytest.approx(numbers(direct), rel=1e-9)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("batch", "length"), list(product(BATCH_RULES, LENGTH_RULES)))
@many
@given(there=horizons)
def test_timescale_keeps_tau_under_every_rate(batch, length, independent, there):
    before = replace(SETTINGS, independent_weight_decay=independent)
    after, _ = move(before, HOME, there, batch=batch, length=length, decay="timescale")
    assert timescale(after, there) == pytest.approx(timescale(before, HOME), rel=1e-9)


@many
@given(there=horizons)
def test_tpp_moves_tau_by_its_power_law(there):
    after, _ = move(SETTINGS, HOME, there, batch="sde", length="power", decay="tpp")
    growth = (there.tokens / there.parameters) / (HOME.tokens / HOME.parameters)
    assert timescale(after, there) / timescale(SETTINGS, HOME) == pytest.approx(growth**-0.527, rel=1e-9)


def equation(settings, horizon):
    """Adam's stochastic differential equation (2205.10287, definition 4.1): (c1, c2, eps0, time), and its noise.

    Unit-scaled gradients are sqrt(batch) times those of the mean loss, and so is the epsilon beside them.
    """
    eps = settings.eps / (sqrt(horizon.batch_tokens) if settings.unit_scaled else 1)
    c1, c2 = ((1 - beta) / settings.lr**2 for beta in settings.betas)
    return [c1, c2, eps * settings.lr, horizon.steps * settings.lr**2], settings.lr / sqrt(horizon.batch_tokens)


@pytest.mark.parametrize("unit_scaled", [False, True])
@many
@given(batch=st.floats(2**15, 2**19))
def test_batch_sde_keeps_the_equation(unit_scaled, batch):
    before, there = replace(SETTINGS, unit_scaled=unit_scaled), Horizon(batch, HOME.tokens)
    after, _ = move(before, HOME, there, batch="sde", length="none", decay="none")
    (old, noise), (new, new_noise) = equation(before, HOME), equation(after, there)
    assert [*new, new_noise] == pytest.approx([*old, noise], rel=1e-9)


@pytest.mark.parametrize("unit_scaled", [False, True])
@many
@given(tokens=st.floats(4e8, 1e12))
def test_length_sde_keeps_the_equation_and_lowers_its_noise(unit_scaled, tokens):
    before, there = replace(SETTINGS, unit_scaled=unit_scaled), Horizon(HOME.batch_tokens, tokens)
    after, _ = move(before, HOME, there, batch="none", length="sde", decay="none")
    (old, noise), (new, new_noise) = equation(before, HOME), equation(after, there)
    assert new == pytest.approx(old, rel=1e-9)
    assert new_noise == pytest.approx(noise * sqrt(HOME.tokens / tokens), rel=1e-9)


def test_no_average_stays_none():
    """RMSProp is Adam with beta1 = 0, whatever the batch."""
    rmsprop = replace(SETTINGS, betas=(0.0, 0.95))
    assert moved(rmsprop, batch_by=4, batch="sde").betas == pytest.approx((0.0, 0.8))
    assert moved(rmsprop, batch_by=0.25, batch="sde").betas[0] == 0.0


@pytest.mark.parametrize("rule", ["linear", "sqrt", "sde"])
def test_a_larger_batch_takes_larger_steps(rule):
    rates = [moved(batch_by=by, batch=rule).lr for by in (0.25, 0.5, 1, 2, 4)]
    assert rates == sorted(set(rates))


@pytest.mark.parametrize("rule", ["sde", "power"])
def test_a_longer_run_takes_smaller_steps(rule):
    rates = [moved(tokens_by=by, length=rule).lr for by in (0.25, 0.5, 1, 10, 1000)]
    assert rates == sorted(set(rates), reverse=True)


# --- the account of it ------------------------------------------------------------------------------------------


def test_every_quantity_has_one_entry_that_says_what_moved_it():
    rules = {"batch": "sde", "length": "power", "decay": "tpp"}
    after, entries = move(SETTINGS, HOME, Horizon(2**19, 2e10, 1e9), **rules)
    assert [e.quantity for e in entries] == ["lr", "beta1", "beta2", "eps", "weight_decay"]
    assert [e.old for e in entries] == [1e-3, 0.9, 0.95, 1e-8, 0.1]
    assert [e.new for e in entries] == [after.lr, *after.betas, after.eps, after.weight_decay]
    assert entries[0].formula == "sqrt(batch)/tokens^(8/25)"
    assert [rule.name for rule in entries[0].rules] == ["sde", "power"]
    assert [rule.name for rule in entries[4].rules] == ["tpp", "sde", "power"]
    assert entries[0].evidence is Evidence.EMPIRICAL


def test_independent_decay_owes_nothing_to_the_rules_of_the_rate():
    independent = replace(SETTINGS, independent_weight_decay=True)
    _, entries = move(independent, HOME, Horizon(2**18, 2e9), batch="sde", length="none", decay="timescale")
    assert [rule.name for rule in entries[4].rules] == ["timescale"]


def test_only_rules_whose_axis_changed_answer_for_it():
    _, entries = move(SETTINGS, HOME, Horizon(2**18, 2e9), batch="sde", length="none", decay="none")
    assert [str(e) for e in entries] == [
        "lr: 0.001 -> 0.00141421, lr * sqrt(batch) [theory: 2205.10287]",
        "beta1: 0.9 -> 0.8, 1-beta1 * batch [theory: 2205.10287]",
        "beta2: 0.95 -> 0.9, 1-beta2 * batch [theory: 2205.10287]",
        "eps: 1e-08 -> 7.07107e-09, eps * 1/sqrt(batch) [theory: 2205.10287]",
        "weight_decay: 0.1 kept [contested: torch.optim.AdamW]",
    ]


def test_evidence_is_that_of_the_weakest_rule():
    _, entries = move(SETTINGS, HOME, Horizon(2**18, 4e9), batch="sde", length="none", decay="none")
    assert entries[0].evidence is Evidence.CONTESTED
    assert entries[0].source == "2205.10287; 2203.03466; 2407.17465"
    _, entries = move(SETTINGS, HOME, HOME, batch="sde", length="none", decay="none")
    assert (entries[0].evidence, entries[0].source, str(entries[0])) == (None, "", "lr: 0.001 kept")


@pytest.mark.parametrize(
    ("table", "symbols", "quantities"),
    [
        (BATCH_RULES, {"batch"}, {LR, ONE_MINUS_BETA, EPS}),
        (LENGTH_RULES, {"tokens"}, {LR, ONE_MINUS_BETA, EPS}),
        (DECAY_RULES, {"batch", "tokens", "parameters"}, {DECAY_PER_STEP}),
    ],
    ids=["batch", "length", "decay"],
)
def test_the_tables_stay_on_their_axis_and_name_their_sources(table, symbols, quantities):
    assert "none" in table
    for name, rule in table.items():
        assert rule.name == name
        assert rule.doc
        assert re.search(r"\d{4}\.\d{4,5}", rule.source) or (table is DECAY_RULES and name == "none")
        assert rule.evidence in Evidence
        assert rule.moves.keys() <= quantities
        assert rule.unit_moves.keys() <= rule.moves.keys()
        for formula in (*rule.moves.values(), *rule.unit_moves.values()):
            assert formula.coefficient == 1.0
            assert dict(formula.powers).keys() <= symbols


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"batch": "sqr"}, "horizon.batch: unknown rule 'sqr'; did you mean 'sqrt'?"),
        ({"length": "powr"}, "horizon.length: unknown rule 'powr'; did you mean 'power'?"),
        ({"decay": "timescal"}, "horizon.decay: unknown rule 'timescal'; did you mean 'timescale'?"),
        ({"decay": "xyz"}, "horizon.decay: unknown rule 'xyz'; known: none, timescale, tpp"),
    ],
)
def test_unknown_rules_are_refused_by_name(rules, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        moved(**rules)


@pytest.mark.parametrize(("here", "there"), [(None, 1e9), (1e9, None), (None, None)])
def test_tpp_needs_both_parameter_counts(here, there):
    with pytest.raises(PlanError, match=r"rule 'tpp' needs both parameter counts; write Horizon\(..., parameters=N\)"):
        move(SETTINGS, Horizon(1, 9, here), Horizon(1, 9, there), batch="none", length="none", decay="tpp")


@pytest.mark.parametrize("by", [{"batch_by": 16, "batch": "sde"}, {"tokens_by": 1 / 16, "length": "sde"}])
def test_betas_that_would_leave_the_unit_interval_are_refused(by):
    message = (
        "horizon: beta1 = 0.9 would become -0.6, as 1-beta1 grows 16 times; "
        "stay below 10 times, or write the rules that keep betas: batch 'sqrt', length 'power'"
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        moved(**by)


def test_betas_are_judged_at_the_target_not_between_the_stages():
    """A batch of 16 times over 16 times the tokens: as many steps, the same betas."""
    settings = moved(batch_by=16, tokens_by=16, batch="sde", length="sde")
    assert settings.betas == SETTINGS.betas
    assert settings.lr == SETTINGS.lr


@pytest.mark.parametrize("sizes", [(0, 10), (-1, 10), (20, 10), (1, inf), (float("nan"), 1)])
def test_a_horizon_has_at_least_one_step(sizes):
    with pytest.raises(PlanError, match="write tokens per step and tokens of the run, at least one step"):
        Horizon(*sizes)


def test_a_horizon_of_no_parameters_is_refused():
    with pytest.raises(PlanError, match="parameters 0; write the model's number of parameters"):
        Horizon(1, 10, 0)


def test_steps_are_tokens_over_batch():
    assert Horizon(4, 100).steps == 25
