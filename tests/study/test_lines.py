"""Lines, their search, the demo's study, summary and figure, on losses that are made up; how a width moves."""

import csv
from math import inf, log2

import pytest

from umup.config.load import parse_config
from umup.errors import ConfigError, InputError
from umup.models.specs import base_shape_of, plan_for, shape_of
from umup.plots.transfer import draw, write_csv
from umup.rules.schemes import SCHEMES
from umup.study.axes import AXES, changed
from umup.study.demo import FAST, FULL, check_of, final_config, proxy_config, summary
from umup.study.lines import ROUNDS, Line, line_of, searched
from umup.study.planner import transfer
from umup.study.transfer_check import Checks, judged
from umup.study.verdicts import TransferCheck


def line(losses):
    """Rate -> losses, where a bare number is one seed."""
    return Line({x: y if isinstance(y, tuple) else (y,) for x, y in losses.items()})


def parabola(center, rates, curvature=0.1):
    return line({x: 2 + curvature * (x - center) ** 2 for x in rates})


def test_best_is_the_lowest_mean():
    assert line({-1: 3.0, 0: 2.0, 1: 2.5}).best == 0
    assert line({-1: (2.2, 2.4), 0: (2.1, 2.7), 1: 2.35}).best == -1


def test_diverged_rates_are_never_best_while_another_is_finite():
    assert line({-1: 3.0, 0: inf, 1: inf}).best == -1
    assert line({-1: (3.0, 3.1), 0: (2.0, inf)}).best == -1


@pytest.mark.parametrize("center", [-0.4, 0.0, 0.3])
def test_the_optimum_of_a_parabola_is_its_vertex(center):
    assert parabola(center, range(-2, 3)).optimum == pytest.approx(center)
    assert parabola(center / 2, [x / 2 for x in range(-4, 5)]).optimum == pytest.approx(center / 2)


def test_the_optimum_is_the_best_rate_where_no_parabola_can_be_trusted():
    assert parabola(-5, range(-2, 3)).optimum == -2
    assert line({-1: 3.0, 0: 2.0, 1: inf}).optimum == 0
    assert line({-1: 2.0, 0: 2.0, 1: 2.0}).optimum == -1
    assert line({0: 2.0}).optimum == 0
    assert line({-1: inf, 0: inf, 1: inf}).optimum == -1


@pytest.mark.parametrize("low", [2.0 + 1e-12, 2.1, 9.0, 1e6])
def test_the_optimum_stays_within_half_a_step_of_the_best(low):
    assert 0 <= line({-1: low, 0: 2.0, 1: 2.0 + 1e-12}).optimum <= 0.5
    assert -0.5 <= line({-1: 2.0 + 1e-12, 0: 2.0, 1: low}).optimum <= 0


@pytest.mark.parametrize(("center", "edge"), [(-3, True), (-2, True), (0, False), (2, True), (9, True)])
def test_on_edge(center, edge):
    assert parabola(center, range(-2, 3)).on_edge is edge


def config(lr=1.0, seed=0, **model):
    body = {"model": {"hidden_size": 32, "head_dim": 16, **model}, "optimizer": {"lr": lr}, "train": {"seed": seed}}
    return parse_config(body)


def noise(seed):
    return 0.001 * ((seed * 7) % 3 - 1)


class Searching:
    """A line whose trials take no time; `ran` are those that ran, each once."""

    def __init__(self, loss):
        self.loss, self.done = loss, {}

    def known(self, x, seed):
        return self.done.get((x, seed))

    def __call__(self, grid, seeds, trials=10**6):
        """Search until nothing is wanted, or some trials have run; the line."""
        while left := sorted(searched(grid, seeds, self.known) - set(self.done)):
            for point in left[: max(0, trials - len(self.done))]:
                self.done[point] = self.loss(*point)
            if len(self.done) == trials:
                return None
        return line_of(searched(grid, seeds, self.known), self.known)


def quadratic(center):
    return lambda x, seed: 2 + 0.1 * (x - center) ** 2 + noise(seed)


GRID = [-2.0, -1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("center", "seeds"),
    [
        (0, {-2: 1, -1: 3, 0: 3, 1: 3, 2: 1}),
        (-1, {-2: 3, -1: 3, 0: 3, 1: 1, 2: 1}),
        # The best lay on the edge, so the grid grew by a step.
        (-2, {-3: 3, -2: 3, -1: 3, 0: 1, 1: 1, 2: 1}),
        (3, {-2: 1, -1: 1, 0: 1, 1: 1, 2: 3, 3: 3, 4: 3}),
    ],
)
def test_a_search_finds_the_optimum_and_seeds_only_around_it(center, seeds):
    found = Searching(quadratic(center))(GRID, 3)
    assert (found.best, found.optimum) == (center, pytest.approx(center))
    assert {x: len(s) for x, s in found.losses.items()} == seeds


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_grid_stops_growing_after_some_rounds_and_says_so(sign):
    search = Searching(lambda x, seed: 99 + sign * x)
    found = search(GRID, 1)
    far = -sign * (2 + ROUNDS)
    assert sorted(found.losses) == list(range(min(far, -2), max(far, 2) + 1))
    assert (found.best, found.on_edge) == (far, True)
    assert len(search.done) == 5 + ROUNDS


def test_the_best_of_a_line_has_all_seeds_even_on_an_edge():
    """The last rate that was tried is the best of the first seed, and by no other."""
    end = 2.0 + ROUNDS
    found = Searching(lambda x, seed: 99 - x + 5 * (x == end) * seed)(GRID, 3)
    assert found.best == end - 1
    assert len(found.losses[end - 1]) == len(found.losses[end]) == 3


def test_a_lucky_single_seed_is_tried_again_before_it_is_believed():
    """Seed 0 likes a rate where the others are bad."""
    found = Searching(lambda x, seed: 1.9 if (x, seed) == (1.0, 0) else quadratic(0)(x, seed))(GRID, 5)
    assert found.best == 0
    assert len(found.losses[0]) == len(found.losses[1]) == 5


def test_a_line_that_diverges_on_one_side_is_searched_on_the_other():
    found = Searching(lambda x, seed: inf if x > -1.7 else 2 + (x + 3) ** 2)(GRID, 2)
    assert (found.best, found.optimum) == (-3, -3)
    assert found.losses[1] == (inf,)


def test_a_search_is_the_same_wherever_it_was_interrupted():
    whole = Searching(quadratic(-2))
    line = whole(GRID, 3)
    for trials in range(1, len(whole.done)):
        search = Searching(quadratic(-2))
        assert search(GRID, 3, trials) is None
        assert search(GRID, 3) == line
        assert search.done.keys() == whole.done.keys()


def test_a_line_is_known_once_all_its_points_are():
    points = {(1.0, 2), (1.0, 0), (0.0, 1), (1.0, 1), (0.0, 0)}
    assert line_of(points, lambda x, seed: 10 * x + seed) == Line({0.0: (0, 1), 1.0: (10, 11, 12)})
    assert line_of(points, lambda x, seed: None if (x, seed) == (1.0, 2) else 1.0) is None


def finished(checks, loss):
    """The checks, once every point that they want has run."""
    plans, losses = checks.plans, {}
    while left := [p for plan in plans for p in plan.search(losses)[0] if p.name not in losses]:
        losses |= {p.name: loss(checks.config_of(p)) for p in left}
    return [judged(plan, plan.search(losses)[1]) for plan in plans]


@pytest.mark.parametrize("demo", [FULL, FAST], ids=["full", "fast"])
def test_the_demos_checks_measure_drift_and_the_cost_of_transferring_with_paired_seeds(demo):
    def loss(c):
        drift = 1.0 if c.parametrization.scheme == "sp" else 0.0
        x = log2(c.optimizer.lr) + 6 * drift + drift * log2(c.model.hidden_size / demo.proxy)
        return 2 + 0.1 * x**2 + noise(c.train.seed)

    sp, umup = finished(Checks(tuple(check_of(demo, scheme) for scheme in demo.grids)), loss)
    widest = demo.widths[-1]
    octaves = log2(widest / demo.proxy)
    assert (sp.scheme, sp.rate, umup.scheme, umup.rate) == ("sp", -6, "umup", 0)
    assert (sp.drift(widest), umup.drift(widest)) == (pytest.approx(-octaves), 0)
    assert sp.penalty(widest) == pytest.approx((0.1 * octaves**2,) * demo.seeds)
    assert umup.penalty(widest) == (0.0,) * demo.seeds
    final = final_config(demo, umup)
    assert (final.model.hidden_size, final.optimizer.lr, final.train.steps) == (widest, 1.0, demo.final_steps)


def test_penalty_pairs_the_seeds_that_both_rates_have():
    own = line({-1: (2.0, 2.2, 2.4), 0: (2.5, 2.6)})
    assert TransferCheck("sp", 32, {32: parabola(0, range(-1, 2)), 64: own}).penalty(64) == pytest.approx((0.5, 0.4))


def transfer_width(proxy, lr, hidden_size):
    tuned = changed(proxy, "optimizer", lr=lr)
    return transfer(tuned, AXES["width"].resize(tuned, hidden_size))


def moves(transfer):
    return {m.field: (m.before, m.after) for m in transfer.moved}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transfer_moves_the_width_and_copies_the_rate(scheme):
    proxy = parse_config({"model": {"hidden_size": 32, "head_dim": 16}, "parametrization": {"scheme": scheme}})
    moved = transfer_width(proxy, 0.25, 128)
    target = moved.config
    assert (target.model.hidden_size, target.model.head_dim, target.optimizer.lr) == (128, 16, 0.25)
    assert moves(moved)["model.hidden_size"] == (32, 128)
    rule = next(m.rule for m in moved.moved if m.field == "optimizer.lr")
    assert ("has no width rule" in rule) == (scheme in ("sp", "ntp", "unit"))
    if SCHEMES[scheme].needs_base:
        assert target.parametrization.base.hidden_size == 32
        assert moves(moved)["parametrization.base"] == (None, 32)
    else:
        assert target.parametrization == proxy.parametrization


def test_transfer_keeps_a_base_and_the_mlps_ratio():
    proxy = parse_config(
        {
            "model": {"hidden_size": 32, "head_dim": 16, "intermediate_size": 80},
            "parametrization": {"scheme": "mup", "base": {"hidden_size": 16}},
        }
    )
    moved = transfer_width(proxy, 1.0, 64)
    assert moved.config.parametrization.base.hidden_size == 16
    assert moved.config.model.intermediate_size == 160
    assert moves(moved)["model.intermediate_size"] == (80, 160)


@pytest.mark.parametrize(("width", "kv"), [(40, None), (0, None), (-32, None), (16, 1)])
def test_a_width_that_makes_no_model_is_refused(width, kv):
    with pytest.raises(ConfigError, match=r"hidden_size|num_kv_heads"):
        transfer_width(config(num_kv_heads=kv), 1.0, width)


def test_the_demos_configs_differ_by_scheme_and_width_alone():
    narrow, wide = (check_of(FULL, "umup").config(width, 0.5, 2) for width in (32, 128))
    assert narrow.train == wide.train
    assert (narrow.train.seed, narrow.optimizer.lr) == (2, 0.5)
    assert proxy_config(FULL, "sp").train == proxy_config(FULL, "umup").train
    with pytest.raises((KeyError, InputError)):
        proxy_config(FULL, "spp")


def seeded(center, gap, rates=range(-2, 3)):
    return line({x: tuple(2 + gap * (x - center) ** 2 + s * 0.01 for s in range(3)) for x in rates})


def both(sp_wide, umup_wide):
    narrow = seeded(0, 0.1)
    return [
        TransferCheck("sp", 32, {32: narrow, 128: sp_wide}),
        TransferCheck("umup", 32, {32: narrow, 128: umup_wide}),
    ]


def test_the_summary_states_the_numbers():
    text = "\n".join(summary(both(seeded(-2, 0.1, range(-4, 3)), seeded(0, 0.2))))
    assert text.startswith("sp: tuned at width 32, best rate 2^0, loss 2.010 (seeds 2.000 to 2.020)\n")
    assert text.index("sp: ") < text.index("width 128: own best rate 2^-2, loss 2.010") < text.index("umup: ")
    assert "optimum moved by -2.00 octaves; not re-tuning costs +0.400 nats (seeds +0.400 to +0.400)" in text
    assert text.index("transfer check: FAIL") < text.index("transfer check: PASS")
    assert "optimum moved by +0.00 octaves; not re-tuning costs nothing: it is the same rate" in text
    assert "transferring cost sp 0.400 nats more than umup, in every seed" in text
    assert text.endswith("sp -2.00, umup +0.00")


def test_the_summary_says_when_umup_lost_more():
    text = summary(both(seeded(0, 0.1), seeded(1, 0.1)))[-1]
    assert "transferring cost umup 0.100 nats more than sp, in every seed" in text


def test_the_summary_says_when_nothing_can_be_told():
    assert "the seeds do not separate" in summary(both(seeded(0, 0.1), seeded(0, 0.1)))[-1]
    mixed = line({-2: (2.9,) * 3, -1: (2.0, 2.0, 2.0), 0: (2.2, 1.9, 2.1), 1: (3.0,) * 3})
    other = line({-2: (2.9,) * 3, -1: (2.0, 2.0, 2.0), 0: (2.0, 2.0, 2.3), 1: (3.0,) * 3})
    text = summary(both(mixed, other))
    assert any("costs +0.067 nats (seeds -0.100 to +0.200)" in row for row in text)
    assert "the seeds do not separate" in text[-1]


def test_the_summary_says_where_a_best_rate_lies_on_the_edge():
    edge, inside = "(on the edge of the grid", seeded(0, 0.1)
    assert edge not in "".join(summary(both(inside, inside)))
    assert edge in "".join(summary(both(seeded(2, 0.1), inside)))


def diverging():
    return line({-2: (2.0,) * 3, -1: (2.1,) * 3, 0: (2.2, inf, 2.1), 1: (inf,) * 3, 2: (inf,) * 3})


@pytest.mark.parametrize(("schemes", "sides"), [("sp", (diverging, None)), ("sp and umup", (diverging, diverging))])
def test_the_summary_says_what_diverged(schemes, sides):
    text = summary(both(*(side() if side else seeded(0, 0.1) for side in sides)))
    assert sum("not re-tuning diverges" in row for row in text) == len(schemes.split(" and "))
    assert f"the transferred rate diverged under {schemes};" in text[-1]
    assert "inf" not in text[-1]
    assert "nan" not in text[-1]


@pytest.mark.parametrize(
    "transfers",
    [both(seeded(-2, 0.1, range(-4, 3)), seeded(0, 0.2)), both(diverging(), seeded(0, 0.1))],
    ids=["finite", "diverging"],
)
def test_the_figure_and_its_numbers_are_written(transfers, tmp_path):
    write_csv(transfers, tmp_path / "a.csv")
    draw(transfers, tmp_path / "a.png", "a title")
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = [
        (t.scheme, w, x, seed, loss)
        for t in transfers
        for w, made in t.lines.items()
        for x, losses in made.losses.items()
        for seed, loss in enumerate(losses)
    ]
    assert len(rows) == len(runs)
    for row, (scheme, width, x, seed, loss) in zip(rows, runs, strict=True):
        assert (row["scheme"], int(row["width"]), float(row["log2_lr"]), int(row["seed"])) == (scheme, width, x, seed)
        assert float(row["val_loss"]) == pytest.approx(loss, abs=1e-6)
    assert {(r["scheme"], r["width"]): float(r["log2_lr"]) for r in rows if r["best"] == "1"} == {
        (t.scheme, str(w)): made.best for t in transfers for w, made in t.lines.items()
    }


def test_a_transferred_mup_config_has_the_whole_proxy_as_its_base():
    proxy = parse_config(
        {
            "model": {"hidden_size": 64, "num_layers": 1, "head_dim": 16, "num_kv_heads": 2},
            "parametrization": {"scheme": "mup"},
        }
    )
    target = transfer_width(proxy, 1.0, 320).config
    assert (target.model.num_kv_heads, shape_of(target.model).num_heads) == (10, 20)
    shape, base = shape_of(proxy.model), target.parametrization.base
    assert base_shape_of(shape_of(target.model), base) == shape
    assert plan_for(target).params["layers.0.mlp.down.weight"]["lr"] == 176 / 848
