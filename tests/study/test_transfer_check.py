"""Basins with a known optimum, noise, edges and divergence: fit, drift, penalty, verdict; and the search."""

import csv
import json
from math import inf, log2

import numpy as np
import pytest

from umup.config.load import parse_config
from umup.errors import ConfigError, DivergedError
from umup.plots.transfer import draw, write_csv
from umup.study.basin import difference, fit, slope, window
from umup.study.lines import Line
from umup.study.transfer_check import CheckPlan, Checks, default_grid, dotted, double_sizes, judged
from umup.study.verdicts import Tolerance, TransferCheck, as_document, summary

GRID = [i / 2 for i in range(-6, 7)]


def basin(center, curvature=0.2, noise=0.0, seeds=3, grid=GRID, stream=0, cliff=inf):
    """A parabola with a level per seed; from `cliff` on everything diverges."""
    random = np.random.default_rng(stream)
    losses = {}
    for x in grid:
        runs = [2 + 0.3 * s + curvature * (x - center) ** 2 + noise * random.standard_normal() for s in range(seeds)]
        losses[x] = (inf,) * seeds if x >= cliff else tuple(runs)
    return Line(losses)


# --- the fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [-1.2, -0.25, 0.0, 0.1, 1.7])
def test_the_fit_finds_a_known_optimum_exactly(center):
    found = fit(basin(center))
    assert found.optimum == pytest.approx(center)
    assert found.curvature == pytest.approx(0.2)
    assert found.noise == pytest.approx(0, abs=1e-9)
    assert found.interval.low == pytest.approx(found.interval.high)


def test_a_lucky_seed_moves_nothing():
    """After a search points have unequal numbers of seeds, here more of the high ones on the right."""
    line = Line({x: tuple(2 + 0.02 * s + 0.2 * (x - 0.2) ** 2 for s in range(4 if x > -0.6 else 1)) for x in GRID})
    assert fit(line).optimum == pytest.approx(0.2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits, widths = 0, []
    for stream in range(200):
        found = fit(basin(0.2, noise=0.01, stream=stream), stream).interval
        hits += found.low <= 0.2 <= found.high
        widths.append(found.high - found.low)
    assert 0.85 < hits / 200 <= 1.0
    quiet = [fit(basin(0.2, noise=0.002, stream=s), s).interval for s in range(20)]
    assert np.mean([q.high - q.low for q in quiet]) < 0.4 * np.mean(widths)


def test_noise_is_that_of_a_single_run():
    found = [fit(basin(0.2, noise=0.01, stream=s), s).noise for s in range(50)]
    assert np.mean(found) == pytest.approx(0.01, rel=0.15)


def test_a_cliff_and_divergence_do_not_tilt_the_parabola():
    line = basin(0.1, cliff=1.5)
    assert fit(line).optimum == pytest.approx(0.1)
    steep = Line({x: ys if x < 1 else tuple(y + 3 for y in ys) for x, ys in basin(0.1).losses.items()})
    assert 1.0 not in window(steep)
    assert fit(steep).optimum == pytest.approx(0.1)


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.2, 0.249])
def test_no_point_of_a_true_parabola_is_taken_for_a_cliff(offset):
    assert window(basin(offset)) == [-1, -0.5, 0, 0.5, 1]


def test_without_degrees_of_freedom_the_grid_is_all_that_is_known():
    found = fit(basin(0.1, seeds=1, grid=[-1.0, 0.0, 1.0]))
    assert found.noise is None
    assert (found.interval.low, found.interval.high) == pytest.approx((-0.4, 0.6), abs=0.03)


def test_the_slope_is_the_drift_per_doubling():
    sizes = [128, 256, 512, 1024]
    found = slope(sizes, [fit(basin(-0.25 * i), i) for i in range(4)])
    assert found.value == pytest.approx(-0.25)
    assert (found.low, found.high) == pytest.approx((-0.25, -0.25))


def test_a_difference_is_as_uncertain_as_both():
    line = basin(0.25, noise=0.02, stream=1)
    noisy, exact = fit(line, 1), fit(basin(0.0), 2)
    both = difference(noisy, fit(line, 3))
    one = difference(noisy, exact)
    assert both.high - both.low > 1.2 * (one.high - one.low)


# --- the verdict --------------------------------------------------------------------------------------------------


def check(wide, narrow=None, **more):
    return TransferCheck("umup", 32, {32: narrow or basin(0.0), 128: wide}, **more)


@pytest.mark.parametrize(
    ("wide", "verdict"),
    [
        (basin(0.0), "pass"),
        (basin(0.2), "pass"),
        (basin(0.4, curvature=0.03), "pass"),
        (basin(1.0), "fail"),
        (basin(-2.0), "fail"),
        (basin(0.4, curvature=2.0), "fail"),
        (basin(1.0, curvature=0.005), "fail"),
        (basin(-1.0, curvature=0.005), "fail"),
        (basin(0.0, noise=0.2, stream=4), "undecided"),
        (basin(3.0), "fail"),
        (basin(3.0, curvature=0.0001), "undecided"),
        (basin(-1.0, cliff=-0.2), "fail"),
        (basin(0.5, seeds=1, grid=[-1.0, 0.0, 1.0, 2.0]), "undecided"),
    ],
    ids=[
        *(
            "same",
            "half a step",
            "a step, flat",
            "two steps",
            "four steps",
            "a step, but steep",
            "up, flat",
            "down, flat",
            "noise",
        ),
        *("an edge, but dear", "an edge", "diverged", "one seed"),
    ],
)
def test_the_verdict(wide, verdict):
    assert check(wide).verdict == verdict


def test_one_bad_size_fails_and_one_unknown_leaves_it_open():
    lines = {32: basin(0.0), 64: basin(0.0), 128: basin(1.5)}
    assert TransferCheck("sp", 32, lines).verdict == "fail"
    unknown = {**lines, 128: basin(0.0, noise=0.2, stream=4)}
    assert TransferCheck("sp", 32, unknown).verdict == "undecided"


def test_tolerances_are_the_callers():
    wide = basin(0.9)
    assert check(wide, tolerance=Tolerance(1.0, 1.0)).verdict == "pass"
    assert check(wide, tolerance=Tolerance(0.5, 1.0)).verdict == "fail"
    assert check(wide, tolerance=Tolerance(1.0, 0.01)).verdict == "fail"


def test_a_proxy_without_an_optimum_decides_nothing():
    assert check(basin(3.0), narrow=basin(3.0)).verdict == "undecided"


def test_drift_and_penalty_are_the_known_ones():
    found = check(basin(0.75))
    assert found.drift(128) == pytest.approx(0.75)
    assert found.penalty(128) == pytest.approx((0.2 * (0.75**2 - 0.25**2),) * 3)
    assert found.penalty(32) == (0.0,) * 3
    assert found.drift_per_doubling.value == pytest.approx(0.375)


def test_a_diverged_transfer_costs_infinity_even_where_all_diverged():
    gone = Line(dict.fromkeys(GRID, (inf, inf)))
    assert check(gone).penalty(128) == (inf, inf)
    assert check(gone).verdict == "fail"


def test_the_summary_and_the_document_say_the_numbers():
    found = check(basin(0.75))
    text = "\n".join(summary(found))
    assert "width 128: optimum 2^0.75 [0.75, 0.75]" in text
    assert "drift +0.75 [+0.75, +0.75] octaves, penalty +0.1000" in text
    assert text.splitlines()[-1].startswith("FAIL: ")
    assert "diverged" in "\n".join(summary(check(Line(dict.fromkeys(GRID, (inf,))))))
    assert "on the edge" in "\n".join(summary(check(basin(3.0))))
    body = json.loads(json.dumps(as_document(check(basin(-1.0, cliff=-0.2))), allow_nan=False))
    assert body["verdict"] == "fail"
    assert body["sizes"]["128"]["penalty"] == [None, None, None]


def test_the_figure_has_its_numbers_beside_it(tmp_path):
    found = check(basin(0.75, noise=0.01, cliff=2.5), axis="depth", hyperparameter="parametrization.hparams.alpha_res")
    write_csv([found], tmp_path / "a.csv")
    draw([found], tmp_path / "a.png", "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(GRID)
    assert {row["depth"] for row in rows} == {"32", "128"}
    best = {(row["depth"], float(row["log2_alpha_res"])) for row in rows if row["best"] == "1"}
    assert best == {(str(size), line.best) for size, line in found.lines.items()}


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run():
    """Search and judge with a loss that is a function of the config; (the check, the configs that ran)."""

    def go(plan, loss):
        checks, losses, ran = Checks((plan,)), {}, []
        while left := [p for p in plan.search(losses)[0] if p.name not in losses]:
            ran += (configs := [checks.config_of(p) for p in left])
            losses |= {p.name: loss(c) for p, c in zip(left, configs, strict=True)}
        return judged(plan, plan.search(losses)[1]), ran

    return go


def proxy(**sections):
    body = {
        "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "norm_gain": False},
        "train": {"steps": 64, "batch_size": 8},
    }
    return parse_config({**body, **sections})


def noise(seed):
    return 0.0005 * ((seed * 7) % 3 - 1)


def test_a_drifting_width_is_found_and_its_grid_extended(run):
    def loss(c):
        return 2 + 0.1 * (log2(c.optimizer.lr) + log2(c.model.hidden_size / 32)) ** 2 + noise(c.train.seed)

    plan = CheckPlan(proxy(), (64, 128), grid=(-1.0, -0.5, 0.0, 0.5, 1.0))
    found, ran = run(plan, loss)
    assert list(found.lines) == [32, 64, 128]
    assert [found.drift(w) for w in (64, 128)] == pytest.approx([-1, -2], abs=0.05)
    assert min(found.lines[128].losses) <= -2.5
    assert found.verdict == "fail"
    assert len({c.model_dump_json() for c in ran}) == len(ran)
    assert all(len(line.losses[found.rate]) == 3 for line in found.lines.values())
    assert all(c.train.eval_every == c.train.steps for c in ran)


@pytest.mark.parametrize(
    ("axis", "sizes", "seen"),
    [
        ("depth", (2, 4), lambda c: (c.model.num_layers, c.train.batch_size, c.train.steps)),
        ("batch", (16, 32), lambda c: (c.model.num_layers, c.train.batch_size, c.train.steps)),
        ("length", (128, 256), lambda c: (c.model.num_layers, c.train.batch_size, c.train.steps)),
    ],
)
def test_other_axes_grow_and_move_by_the_planners_rules(run, axis, sizes, seen):
    """The optimum of the value *at the proxy* stays where the horizon rules say; the run's own rate is moved."""

    def loss(c):
        ideal = (c.train.batch_size / 8) ** 0.5 * (c.tokens_per_step * c.train.steps / (64 * 8 * 256)) ** -0.32
        return 2 + 0.1 * log2(c.optimizer.lr / ideal) ** 2 + noise(c.train.seed)

    found, ran = run(CheckPlan(proxy(), sizes, grid=(-1.0, -0.5, 0.0, 0.5, 1.0), axis=axis), loss)
    grown = {"depth": {(n, 8, 64) for n in (1, 2, 4)}, "batch": {(1, 8, 64), (1, 16, 32), (1, 32, 16)}}
    assert {seen(c) for c in ran} == grown.get(axis, {(1, 8, n) for n in (64, 128, 256)})
    assert found.verdict == "pass"
    assert found.drift(sizes[-1]) == pytest.approx(0, abs=0.05)


def test_a_hyperparameter_of_the_scheme_is_searched(run):
    def loss(c):
        return 2 + 0.1 * (log2(c.parametrization.hparams["alpha_res"]) - 1) ** 2 + noise(c.train.seed)

    grid = default_grid(proxy(), "alpha_res")
    found, _ = run(CheckPlan(proxy(), (64,), grid=grid, hyperparameter="alpha_res"), loss)
    assert (found.rate, found.verdict, found.hyperparameter) == (1, "pass", "parametrization.hparams.alpha_res")


def test_all_diverged_is_said_with_a_range(run):
    with pytest.raises(DivergedError, match=r"every lr from 2\^-\S+ to 2\^1 diverged at width 32; write --grid 2\^-"):
        run(CheckPlan(proxy(), (64,), grid=(0.0, 0.5, 1.0)), lambda c: inf)


def test_the_default_grid_lies_around_the_configs_value():
    tuned = proxy(optimizer={"lr": 2.9, "weight_decay": 0.0})
    assert default_grid(tuned, "lr") == tuple(1.5 + i / 2 for i in range(-4, 5))
    assert default_grid(tuned, "lr", 1.0) == (0, 1, 2, 3, 4)
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay is 0.0 .* write --grid"):
        default_grid(tuned, "weight_decay")
    assert double_sizes(tuned, "depth") == (2, 4)


GOOD = {"sizes": (64,), "grid": (-1.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (0.0,)}, "a grid of 1 points .* write 3 to"),
        ({"sizes": (40,)}, "hidden_size 40 is not a multiple of model.head_dim 16"),
        ({"sizes": (32,)}, "width 32 is the config's own"),
        ({"axis": "widht"}, "did you mean 'width'"),
        ({"hyperparameter": "alpha_rse"}, "scheme 'umup' has no hyperparameter 'alpha_rse'; did you mean 'alpha_res'"),
        ({"axis": "batch", "sizes": (24,)}, "no whole number of its steps"),
        ({"axis": "depth", "sizes": (0,)}, "num_layers"),
    ],
    ids=str,
)
def test_bad_checks_are_refused_before_anything_runs(change, words):
    with pytest.raises(ConfigError, match=words):
        CheckPlan(proxy(), **{**GOOD, **change})


def test_every_scheme_knows_its_own_hyperparameters():
    assert dotted(proxy(), "lr") == "optimizer.lr"
    assert dotted(proxy(parametrization={"scheme": "sp"}), "sigma_init") == "parametrization.hparams.sigma_init"
