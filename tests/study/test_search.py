"""Lines, search, journal, planner, summary and figure, on losses that are made up."""

import csv
from concurrent.futures import Future
from math import inf, log2

import pytest

from umup.config.load import parse_config
from umup.errors import CheckpointError, ConfigError, InputError
from umup.models.specs import base_shape_of, plan_for, shape_of
from umup.plots.transfer import draw, write_csv
from umup.rules.schemes import SCHEMES
from umup.study.demo import FAST, FULL, at, final_config, proxy_config, summary, sweep
from umup.study.journal import Journal, Trial, key_of
from umup.study.planner import transfer_width
from umup.study.search import ROUNDS, Line, Runner, evaluate, search_lines
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


def test_a_journal_remembers_across_processes(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl")
    assert journal.get(config()) is None
    journal.add(Trial(key_of(config()), 2.5, 2.4))
    journal.add(Trial(key_of(config(lr=8.0)), inf, inf))
    for reader in (journal, Journal(tmp_path / "trials.jsonl")):
        assert reader.get(config()) == Trial(key_of(config()), 2.5, 2.4)
        assert reader.get(config(lr=8.0)).val_loss == inf


def test_a_journal_never_takes_one_config_for_another(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl")
    journal.add(Trial(key_of(config()), 2.5, 2.4))
    for other in (config(lr=1.0000000000000002), config(seed=1), config(num_layers=3)):
        assert journal.get(other) is None


def test_a_torn_last_line_is_dropped_and_the_next_is_whole(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    for seed in (0, 1):
        journal.add(Trial(key_of(config(seed=seed)), 2.5 + seed, 2.4))
    path.write_text(path.read_text()[:-9])
    again = Journal(path)
    assert again.get(config(seed=0)) is not None
    assert again.get(config(seed=1)) is None
    again.add(Trial(key_of(config(seed=2)), 2.0, 2.0))
    last = Journal(path)
    assert [last.get(config(seed=s)) is not None for s in (0, 1, 2)] == [True, False, True]


def test_a_journal_of_one_torn_line_is_empty(tmp_path):
    (tmp_path / "trials.jsonl").write_text('{"key": "')
    journal = Journal(tmp_path / "trials.jsonl")
    journal.add(Trial(key_of(config()), 1.0, 1.0))
    assert Journal(tmp_path / "trials.jsonl").get(config()) is not None


class Instant:
    """A pool whose trials take no time: the loss is a function of the config."""

    def __init__(self, loss):
        self.loss, self.ran = loss, []

    def submit(self, _, config):
        self.ran.append(config)
        future = Future()
        try:
            loss = self.loss(config)
        except KeyboardInterrupt as stop:
            future.set_exception(stop)
        else:
            future.set_result(Trial(key_of(config), loss, loss))
        return future


def noise(seed):
    return 0.001 * ((seed * 7) % 3 - 1)


def quadratic(config):
    """The optimum lies at log2 lr = -log2(width / 32)."""
    x = log2(config.optimizer.lr) + log2(config.model.hidden_size / 32)
    return 2 + 0.1 * x**2 + noise(config.train.seed)


@pytest.fixture
def searching(tmp_path):
    def make(loss):
        seen = []
        pool = Instant(loss)
        return pool, seen, Runner(Journal(tmp_path / "trials.jsonl"), pool, lambda *n: seen.append(n))

    return make


LINES = {str(w): lambda lr, seed, w=w: config(lr, seed, hidden_size=w) for w in (32, 64, 128)}
GRID = {label: [-2.0, -1.0, 0.0, 1.0, 2.0] for label in LINES}


def test_a_search_finds_every_lines_optimum_and_seeds_only_around_it(searching):
    pool, seen, runner = searching(quadratic)
    found = search_lines(runner, LINES, GRID, seeds=3)
    assert {label: f.best for label, f in found.items()} == {"32": 0, "64": -1, "128": -2}
    assert {label: f.optimum for label, f in found.items()} == pytest.approx({"32": 0, "64": -1, "128": -2})
    assert {x: len(s) for x, s in found["32"].losses.items()} == {-2: 1, -1: 3, 0: 3, 1: 3, 2: 1}
    assert {x: len(s) for x, s in found["64"].losses.items()} == {-2: 3, -1: 3, 0: 3, 1: 1, 2: 1}
    # The best of the widest lay on the edge, so its grid grew by one step.
    assert {x: len(s) for x, s in found["128"].losses.items()} == {-3: 3, -2: 3, -1: 3, 0: 1, 1: 1, 2: 1}
    assert len(pool.ran) == len({key_of(c) for c in pool.ran}) == 11 + 11 + 12
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_grid_stops_growing_after_some_rounds_and_says_so(searching, sign):
    pool, _, runner = searching(lambda c: 99 + sign * log2(c.optimizer.lr))
    found = search_lines(runner, {"32": LINES["32"]}, {"32": GRID["32"]}, seeds=1)["32"]
    far = -sign * (2 + ROUNDS)
    assert sorted(found.losses) == list(range(min(far, -2), max(far, 2) + 1))
    assert found.best == far
    assert found.on_edge
    assert len(pool.ran) == 5 + ROUNDS


def test_a_lucky_single_seed_is_tried_again_before_it_is_believed(searching):
    """Seed 0 likes a rate where the others are bad."""
    _, _, runner = searching(lambda c: quadratic(c) if (c.optimizer.lr, c.train.seed) != (2.0, 0) else 1.9)
    found = search_lines(runner, {"32": LINES["32"]}, {"32": GRID["32"]}, seeds=5)["32"]
    assert found.best == 0
    assert len(found.losses[0]) == len(found.losses[1]) == 5


def test_a_line_that_diverges_on_one_side_is_searched_on_the_other(searching):
    _, _, runner = searching(lambda c: inf if c.optimizer.lr > 0.3 else 2 + (log2(c.optimizer.lr) + 3) ** 2)
    found = search_lines(runner, {"32": LINES["32"]}, {"32": GRID["32"]}, seeds=2)["32"]
    assert (found.best, found.optimum) == (-3, -3)
    assert found.losses[1] == (inf,)


def test_an_interrupted_search_goes_on_and_repeats_nothing(searching, tmp_path):
    def interrupted(c):
        if c.optimizer.lr == 2.0 and c.model.hidden_size == 64:
            raise KeyboardInterrupt
        return quadratic(c)

    pool, _, runner = searching(interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_lines(runner, LINES, GRID, seeds=3)
    kept = {key for key in map(key_of, pool.ran) if key in (tmp_path / "trials.jsonl").read_text().replace("\\", "")}
    pool, _, runner = searching(quadratic)
    found = search_lines(runner, LINES, GRID, seeds=3)
    assert {label: f.best for label, f in found.items()} == {"32": 0, "64": -1, "128": -2}
    assert not kept & set(map(key_of, pool.ran))
    assert len(kept) + len(pool.ran) == 11 + 11 + 12
    pool, _, runner = searching(quadratic)
    assert search_lines(runner, LINES, GRID, seeds=3) == found
    assert pool.ran == []


def test_seeds_come_back_in_their_order(searching):
    _, _, runner = searching(lambda c: 10 * log2(c.optimizer.lr) + c.train.seed)
    points = {"32": {(1.0, 2), (1.0, 0), (0.0, 1), (1.0, 1), (0.0, 0)}}
    assert evaluate(runner, {"32": LINES["32"]}, points) == {"32": Line({0.0: (0, 1), 1.0: (10, 11, 12)})}


@pytest.mark.parametrize("demo", [FULL, FAST], ids=["full", "fast"])
def test_the_demos_sweep_measures_drift_and_the_cost_of_transferring_with_paired_seeds(searching, demo):
    def loss(c):
        drift = 1.0 if c.parametrization.scheme == "sp" else 0.0
        x = log2(c.optimizer.lr) + 6 * drift + drift * log2(c.model.hidden_size / demo.proxy)
        return 2 + 0.1 * x**2 + noise(c.train.seed)

    _, _, runner = searching(loss)
    sp, umup = sweep(demo, runner)
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


def moves(transfer):
    return {m.field: (m.before, m.after) for m in transfer.moved}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transfer_moves_the_width_and_copies_the_rate(scheme):
    proxy = parse_config({"model": {"hidden_size": 32, "head_dim": 16}, "parametrization": {"scheme": scheme}})
    transfer = transfer_width(proxy, 0.25, 128)
    target = transfer.config
    assert (target.model.hidden_size, target.model.head_dim, target.optimizer.lr) == (128, 16, 0.25)
    assert moves(transfer)["model.hidden_size"] == (32, 128)
    rule = next(m.rule for m in transfer.moved if m.field == "optimizer.lr")
    assert ("has no width rule" in rule) == (scheme in ("sp", "ntp", "unit"))
    if SCHEMES[scheme].needs_base:
        assert target.parametrization.base.hidden_size == 32
        assert moves(transfer)["parametrization.base"] == (None, 32)
    else:
        assert target.parametrization == proxy.parametrization


def test_transfer_keeps_a_base_and_the_mlps_ratio():
    proxy = parse_config(
        {
            "model": {"hidden_size": 32, "head_dim": 16, "intermediate_size": 80},
            "parametrization": {"scheme": "mup", "base": {"hidden_size": 16}},
        }
    )
    transfer = transfer_width(proxy, 1.0, 64)
    assert transfer.config.parametrization.base.hidden_size == 16
    assert transfer.config.model.intermediate_size == 160
    assert moves(transfer)["model.intermediate_size"] == (80, 160)


@pytest.mark.parametrize(("width", "kv"), [(40, None), (0, None), (-32, None), (16, 1)])
def test_a_width_that_makes_no_model_is_refused(width, kv):
    with pytest.raises(ConfigError, match=r"hidden_size|num_kv_heads"):
        transfer_width(config(num_kv_heads=kv), 1.0, width)


def test_the_demos_configs_differ_by_scheme_and_width_alone():
    narrow, wide = at(FULL, "umup", 32)(0.5, 2), at(FULL, "umup", 128)(0.5, 2)
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


def test_other_data_and_other_rules_are_other_trials(tmp_path, monkeypatch):
    path = tmp_path / "trials.jsonl"
    Journal(path, corpus="a").add(Trial(key_of(config()), 1.0, 1.0))
    assert Journal(path, corpus="a").get(config()) is not None
    assert Journal(path, corpus="b").get(config()) is None
    monkeypatch.setattr("umup.study.journal.plan_for", lambda c: plan_for(c).shift({"head.weight": 2.0}))
    assert Journal(path, corpus="a").get(config()) is None


def test_a_damaged_journal_line_is_named(tmp_path):
    (tmp_path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"trials\.jsonl, line 1"):
        Journal(tmp_path / "trials.jsonl")
