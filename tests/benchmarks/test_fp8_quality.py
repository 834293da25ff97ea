"""The quality benchmark runs end to end at its tiny size, resumes, pairs what it compares and reports it soundly."""

import importlib.util
import json
from dataclasses import replace
from math import inf, log2
from pathlib import Path

import pytest
import torch
from benchmarks.fp8_quality_peers import PlainCast, Torchao
from benchmarks.fp8_quality_session import SIZES, Session, Trial
from benchmarks.fp8_quality_trainer import Data, Trainer

from benchmarks import fp8_quality as quality
from benchmarks import fp8_quality_report as tables
from umup.nn.fp8 import encoded
from umup.nn.modules import Linear, UseScales
from umup.ops.linear import linear

CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(900)))
    return path


def make_session(text, *variants, **changes):
    session = Session(
        size="tiny",
        steps=12,
        variants=variants,
        seeds=(0, 1),
        lrs={"umup": (2.0,), "sp": (2.0**-7,)},
        source=(str(text),),
        common=0,
        device=CPU,
        backend="emulate",
    )
    return replace(session, **changes)


def trainer_and_data(session, trial):
    config = session.config(trial)
    return Trainer(config, trial.products, CPU), Data(config, SIZES["tiny"], CPU)


def test_bf16_from_common_steps_is_bf16_from_scratch(text):
    session, trial = make_session(text, "umup/bf16"), Trial("umup/bf16", 2.0, 1, 12)
    trainer, data = trainer_and_data(session, trial)
    whole = trained(session, trainer, data, trial)
    batches, run = data.order(trial.seed, 12), session.config(trial)
    start = trainer.lead(run, batches, 7)
    parted = trainer.train(run, batches, data.held_out, 7, start)
    assert parted["val_loss"] == whole["val_loss"]
    assert parted["curve"] == whole["curve"][-len(parted["curve"]) :]
    other = trainer.train(run, batches, data.held_out, 7, trainer.lead(run, batches, 6))
    assert other["val_loss"] != whole["val_loss"]


def trained(session, trainer, data, trial):
    return trainer.train(session.config(trial), data.order(trial.seed, trial.steps), data.held_out)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- end to end ---


def test_runs_reports_and_does_not_repeat(text, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    variants = ("umup/bf16", "umup/fp8/adapt", "sp/bf16", "sp/plain")
    command = ["--size", "tiny", "--device", "cpu", "--backend", "emulate", "--data", str(text), "--seeds", "0", "1"]
    command += ["--results", str(results), "--umup-lr", "2", "--sp-lr", "0.0078125", "--variants", *variants]
    quality.main(command)
    rows = quality.read(results)
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, seed) for seed in (0, 1) for v in variants]
    assert all(row["val_loss"] < 5.0 and len(row["curve"]) == 12 for row in rows)
    quality.main(command)
    assert quality.read(results) == rows
    quality.main([*command, "--steps", "13", "--budget-seconds", "0"])
    assert "the same command goes on from here" in capsys.readouterr().out
    assert quality.read(results) == rows
    lines = []
    tables.main([str(results)], lines.append)
    assert lines[0].startswith("tiny: 133,120 parameters, 1,536 tokens in 12 steps; cpu")
    assert any(line.startswith("  umup/fp8/adapt") and "%" in line and "aim 0.1%" in line for line in lines)
    assert any(line.startswith("umup/bf16, every multiplier 1, against sp/bf16") and "%" in line for line in lines)


def test_absent_torchao_is_said_and_skipped(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    results = tmp_path / "results.jsonl"
    command = ["--size", "tiny", "--device", "cpu", "--data", str(text), "--seeds", "0", "--variants", "sp/torchao"]
    quality.main([*command, "--results", str(results)])
    assert "skipping sp/torchao: torchao is not installed" in capsys.readouterr().out
    assert not results.exists()


# --- pairing ---


@pytest.mark.parametrize("variant", ["umup/fp8/adapt", "sp/plain"])
def test_a_trainer_keeps_nothing_from_trial_to_trial(text, variant):
    session = make_session(text, variant)
    trial = Trial(variant, session.lrs[variant.split("/")[0]][0], 1, 12)
    trainer, data = trainer_and_data(session, trial)
    first = trained(session, trainer, data, trial)
    for product in encoded(trainer.model):
        product.matmul.spared = True
        product.matmul.set_exponents(torch.full((3,), 20, dtype=torch.int32))
    trained(session, trainer, data, replace(trial, seed=0, lr=2 * trial.lr, steps=5))
    assert trained(session, trainer, data, trial)["curve"] == first["curve"]


def test_batches_follow_from_the_seed_and_val_does_not(text):
    session = make_session(text, "umup/bf16")
    _, data = trainer_and_data(session, Trial("umup/bf16", 2.0, 0, 12))
    _, again = trainer_and_data(session, Trial("sp/bf16", 2.0, 1, 12))
    assert torch.equal(data.order(3, 5), again.order(3, 5))
    assert not torch.equal(data.order(3, 5), data.order(4, 5))
    assert torch.equal(data.order(3, 5)[:, 0, :, 1:], data.order(3, 5)[:, 1, :, :-1])
    assert data.digest == again.digest
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(data.held_out, again.held_out, strict=True))


def test_keys_tell_trials_apart(text):
    session = make_session(text)
    trial = Trial("umup/fp8/adapt", 2.0, 0, 12)
    changes = {"seed": 1, "lr": 4.0, "variant": "umup/fp8/static", "steps": 13, "common": 5}
    others = [replace(trial, **{name: value}) for name, value in changes.items()]
    keys = {session.key(t, "data") for t in [trial, *others, replace(trial, variant="umup/torchao")]}
    keys |= {session.key(trial, "other data")}
    assert len(keys) == 8
    assert replace(session, source=("elsewhere",), backend="auto").key(trial, "data") in keys


# --- the peers ---


def test_plain_cast_rounds_saturates_and_flushes(text):
    session = make_session(text)
    trainer, _ = trainer_and_data(session, Trial("sp/plain", 1e-3, 0, 12))
    products = {module.matmul for module in trainer.model.modules() if isinstance(module, Linear)}
    plain = [product for product in products if isinstance(product, PlainCast)]
    assert len(plain) == 2 * 4  # qkv, out, gate+up, down in each of two layers
    assert not isinstance(trainer.model.head.matmul, PlainCast)
    x = torch.tensor([[1e4, -0.3, 2.0**-11, 1.0] * 4])
    w = torch.eye(16)
    out = plain[0](x, w)
    assert out.tolist() == [[448.0, -0.3125, 0.0, 1.0] * 4]


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_torchao_takes_our_factors():
    scales = UseScales(0.5, 2.0, 3.0)
    product = Torchao(scales, "emulate")
    x, w = (torch.randn(32, 16, requires_grad=True) for _ in range(2))
    want = torch.autograd.grad(linear(x, w, *scales).square().sum(), (x, w))
    for got, expected in zip(torch.autograd.grad(product(x, w).square().sum(), (x, w)), want, strict=True):
        assert (got - expected).norm() < 0.1 * expected.norm()


# --- the order of trials ---


def play(session, loss, count=100):
    """Trials in order, their losses being `loss`."""
    done = {}
    while len(done) < count and (trial := session.next(done.get)) is not None:
        assert trial not in done
        done[trial] = loss(trial)
    return list(done)


def bowl(best):
    return lambda trial: 3.0 + (log2(trial.lr) - best[trial.variant.split("/")[0]]) ** 2


def test_rates_widen_until_the_best_lies_inside(text):
    session = make_session(text, "umup/bf16", "umup/fp8/adapt", seeds=(5, 6), lrs={"umup": (2.0, 4.0)})
    up = play(session, bowl({"umup": 4}))
    assert [t.lr for t in up[:5]] == [2, 4, 8, 16, 32]
    assert [(t.variant, t.lr, t.seed) for t in up[5:]] == [
        ("umup/fp8/adapt", 16, 5), ("umup/bf16", 16, 6), ("umup/fp8/adapt", 16, 6)
    ]  # fmt: skip
    assert [t.lr for t in play(session, bowl({"umup": -1}))[:5]] == [2, 4, 1, 0.5, 0.25]


def test_a_diverged_rate_is_never_the_best(text):
    session = make_session(text, "umup/bf16", "umup/fp8/adapt", seeds=(0,), lrs={"umup": (2.0, 4.0)})
    order = play(session, lambda trial: inf if trial.lr > 2 else 3.0 - trial.lr)
    assert [t.lr for t in order] == [2, 4, 1, 2]


def test_both_schemes_are_tuned_before_any_pair(text):
    lrs = {"umup": (1.0, 2.0, 4.0), "sp": (0.25, 0.5, 1.0)}
    session = make_session(text, "umup/bf16", "sp/plain", seeds=(0, 1), lrs=lrs)
    order = play(session, bowl({"umup": 1, "sp": -1}))
    assert [t.variant for t in order] == ["umup/bf16"] * 3 + ["sp/bf16"] * 3 + ["sp/plain", "umup/bf16", "sp/plain"]
    assert {t.lr for t in order if t.variant == "sp/plain"} == {0.5}


def test_one_rate_is_taken_as_it_is(text):
    session = make_session(text, "umup/fp8/adapt", seeds=(0,), lrs={"umup": (4.0,)})
    assert play(session, bowl({"umup": 0})) == [Trial("umup/fp8/adapt", 4.0, 0, 12)]


def test_rates_may_be_tried_briefly(text):
    session = make_session(text, "umup/bf16", seeds=(3,), lrs={"umup": (2.0, 4.0)}, steps=12, common=6, tune_steps=5)
    order = play(session, bowl({"umup": 1}))
    assert [(t.lr, t.steps, t.common) for t in order] == [(2, 5, 0), (4, 5, 0), (1, 5, 0), (2, 12, 6)]


def test_later_variants_wait_for_all_seeds(text):
    session = make_session(text, "umup/bf16", then=("sp/plain", "umup/torchao"))
    order = [(t.variant, t.seed) for t in play(session, bowl({"umup": 1, "sp": 1}))]
    later = [(v, seed) for seed in (0, 1) for v in ("sp/plain", "umup/torchao")]
    assert order == [("umup/bf16", 0), ("umup/bf16", 1), *later]
    assert session.every_variant() == ("umup/bf16", "sp/bf16", "sp/plain", "umup/torchao")


def test_common_steps_are_taken_once_in_a_sitting(text, monkeypatch):
    session = make_session(text, "umup/bf16", "umup/fp8/adapt", then=("umup/fp8_head/adapt",), common=7)
    trials = play(session, bowl({"umup": 1}))
    data = Data(session.config(trials[0]), SIZES["tiny"], CPU)
    sitting, led = quality.Sitting(session, data, {}), []
    honest, steps = Trainer.lead, []

    def lead(self, run, *rest):
        led.append(run.train.seed)
        return honest(self, run, *rest)

    monkeypatch.setattr(Trainer, "lead", lead)
    for trial in trials:
        steps.append(sitting.steps(trial))
        assert sitting.run(trial)["common"] == 7
    assert led == [0, 1]
    assert steps == [12, 5, 12, 5, 5, 5]


def test_a_trial_is_the_same_whatever_its_sitting_was_made_for(text):
    long, short = (make_session(text, "umup/bf16", steps=steps) for steps in (12, 6))
    trial = Trial("umup/bf16", 2.0, 0, 6)
    trainer, data = trainer_and_data(long, replace(trial, steps=12))
    trained(long, trainer, data, replace(trial, steps=12))
    again, _ = trainer_and_data(short, trial)
    assert trained(long, trainer, data, trial)["curve"] == trained(short, again, data, trial)["curve"]


def test_the_recorded_results_are_found_again():
    """A change of what a trial is would run everything anew."""
    path = Path(quality.__file__).parent / "results" / "fp8_quality.jsonl"
    for kept in quality.read(path):
        session = make_session("anything", size=kept["size"], backend="auto", umup_hparams=kept.get("hparams", {}))
        trial = Trial(*(kept[name] for name in ("variant", "lr", "seed", "steps")), kept.get("common", 0))
        assert session.key(trial, kept["data"]) == kept["key"], kept["variant"]


# --- the report ---


def row(variant, seed, val, lr=4.0, **changes):
    fields = {
        "size": "35m",
        "steps": 100,
        "common": 0,
        "hparams": {},
        "data": "d",
        "parameters": 1,
        "tokens_per_step": 10,
        "device": "gpu",
    }
    curve = [val + 0.01 * (9 - i) for i in range(10)]
    run = {"moves": 0, "spared": [], "tail": 1, "curve": curve, "seconds": [1.0] * 10, "tokens_per_second": 100}
    losses = {"train_loss": val, "val_loss": val}
    return {**fields, "torch": "2", "variant": variant, "lr": lr, "seed": seed, **run, **losses, **changes}


def verdict_of(rows, variant, step_ratios=None):
    return next(line for line in tables.report(rows, step_ratios) if line.startswith(f"  {variant}"))


def pairs(gaps, variant="umup/fp8/adapt"):
    base = [row("umup/bf16", seed, 2.0 + seed) for seed in range(len(gaps))]
    return base + [row(variant, seed, (2.0 + seed) * (1 + gap / 100)) for seed, gap in enumerate(gaps)]


def test_gaps_are_relative_paired_and_have_a_t_interval():
    # mean 0.2, standard deviation 0.1, 3 seeds: half width 4.303 * 0.1 / sqrt(3)
    assert "+0.200% [-0.048, +0.448]; " in verdict_of(pairs([0.1, 0.2, 0.3]), "umup/fp8/adapt")


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.02, 0.021, 0.022], "a loss; aim 0.1% met"),
        ([0.2, 0.21, 0.22], "a loss; aim 0.1% missed"),
        ([-0.2, -0.21, -0.22], "a gain; aim 0.1% met"),
        ([-0.5, 0.1, 0.6], "neither a loss nor a gain; aim 0.1% undecided"),
        ([0.2], "one pair excludes nothing"),
    ],
)
def test_verdict_says_what_the_interval_excludes(gaps, said):
    assert verdict_of(pairs(gaps), "umup/fp8/adapt").endswith(said)


def test_pairs_need_the_same_seed_rate_and_an_end():
    rows = [row("umup/bf16", 0, 2.0, lr=2.0), row("umup/bf16", 1, 2.0), row("umup/fp8/adapt", 0, 3.0)]
    assert verdict_of(rows, "umup/fp8/adapt").endswith("no pair")
    diverged = row("umup/fp8/adapt", 1, 3.0, val_loss=None, train_loss=None, tokens_per_second=None)
    line = verdict_of([*rows, diverged], "umup/fp8/adapt")
    assert "1/2" in line
    assert line.endswith("no pair")


def test_runs_of_other_data_are_not_compared():
    lines = list(tables.report([*pairs([0.1]), row("umup/fp8/adapt", 0, 9.0, data="other")]))
    assert sum(line.startswith("35m:") for line in lines) == 2
    assert lines[-2].endswith("no pair")


def equal_loss_rows(gaps, speeds=(1.5,), falls=0.02):
    """BF16 whose loss falls by `falls` a point over ten points; runs that end `gap` above it."""
    rows = []
    for seed, gap in enumerate(gaps):
        curve = [5.0 + i % 2 for i in range(5)] + [2.0 + falls * (4 - i) for i in range(5)]
        rows.append(row("umup/bf16", seed, 2.0, curve=curve))
        speed = 100 * speeds[seed % len(speeds)]
        rows.append(row("umup/fp8/adapt", seed, 2.0 + gap, tokens_per_second=speed))
    return rows


def test_speed_to_equal_loss_pays_for_the_gap_in_steps():
    # A gap of 0.02 is one more point than ten: 1.5 * 10/11.
    assert "; 1.36x; one pair" in verdict_of(equal_loss_rows([0.02]), "umup/fp8/adapt")
    assert "; 1.50x; one pair" in verdict_of(equal_loss_rows([0.0]), "umup/fp8/adapt")
    assert "; 1.67x; one pair" in verdict_of(equal_loss_rows([-0.02]), "umup/fp8/adapt")
    assert "; 0.00x; one pair" in verdict_of(equal_loss_rows([0.02], falls=0.0), "umup/fp8/adapt")


@pytest.mark.parametrize(
    ("gaps", "ratio", "said"),
    [
        # 10/11 and 10/10.5 of the ratio: 0.9307 +- 12.706 * 0.0306 / sqrt(2)
        ([0.02, 0.01], 1.6, "1.489x [1.049, 1.929] at a step ratio of 1.6, aim 1.5x undecided"),
        ([0.001, 0.001], 1.6, "1.592x [1.592, 1.592] at a step ratio of 1.6, aim 1.5x met"),
        ([0.001, 0.001], 1.5, "1.493x [1.493, 1.493] at a step ratio of 1.5, aim 1.5x missed"),
        ([0.001], 1.6, "1.592x at a step ratio of 1.6, aim 1.5x undecided"),
    ],
)
def test_another_shapes_step_ratio_takes_the_place_of_the_trials(gaps, ratio, said):
    rows = equal_loss_rows(gaps, speeds=(0.9, 1.1))
    assert f"; {said}; " in verdict_of(rows, "umup/fp8/adapt", {"umup/fp8/adapt": ratio})
    assert "step ratio" not in verdict_of(rows, "umup/fp8/adapt", {"umup/fp8_head/adapt": ratio})


def test_schemes_meet_at_their_best_rates_and_edges_are_told():
    rows = [row("umup/bf16", 0, 2.0 + (lr != 4), lr=lr) for lr in (2.0, 4.0, 8.0)]
    rows += [row("sp/bf16", 0, loss, lr=lr) for lr, loss in ((0.25, 4.0), (0.5, 3.0))]
    lines = list(tables.report(rows))
    (line,) = [line for line in lines if line.startswith("umup/bf16, every multiplier 1, against sp/bf16")]
    assert "-33.333%" in line
    assert line.endswith("one pair excludes nothing")
    assert [line for line in lines if "may lie beyond" in line] == [
        "sp/bf16: the best learning rate is the last one tried; its optimum may lie beyond"
    ]


@pytest.mark.parametrize(
    ("losses", "state"),
    [([1.99, 1.989, 1.991], "met"), ([2.01, 2.009, 2.011], "missed"), ([1.9, 2.1, 2.0], "undecided")],
)
def test_not_losing_to_sp_is_decided_over_seeds(losses, state):
    rows = [row("umup/bf16", seed, loss) for seed, loss in enumerate(losses)]
    rows += [row("sp/bf16", seed, 2.0, lr=0.5) for seed in range(3)]
    (line,) = [line for line in tables.report(rows) if "against sp/bf16" in line]
    assert f", over {len(losses)} seeds: validation loss " in line
    assert line.endswith(f"aim of not losing: {state}")


def test_runs_of_other_multipliers_are_not_paired_and_each_meets_sp():
    given = {"alpha_attn_softmax": 8.0, "alpha_loss_softmax": 2.0}
    rows = [row("umup/bf16", 0, 2.0), row("umup/fp8/adapt", 0, 1.0, hparams=given), row("sp/bf16", 0, 2.0, lr=0.5)]
    lines = list(tables.report(rows))
    assert "umup, alpha_attn_softmax=8, alpha_loss_softmax=2" in lines
    assert verdict_of(rows, "umup/fp8/adapt").endswith("no pair")
    lines = list(tables.report([*rows, row("umup/bf16", 0, 1.0, hparams=given)]))
    against = [line.split(", against")[0] for line in lines if "against sp/bf16" in line]
    assert against == ["umup/bf16, every multiplier 1", "umup/bf16, alpha_attn_softmax=8, alpha_loss_softmax=2"]


def test_results_are_one_json_object_per_line(tmp_path):
    path = tmp_path / "r.jsonl"
    assert quality.read(path) == []
    path.write_text("".join(json.dumps(row("umup/bf16", seed, 2.0)) + "\n" for seed in range(2)))
    assert [r["seed"] for r in quality.read(path)] == [0, 1]


def test_multipliers_are_umups_and_part_of_what_a_trial_is(text):
    plain, given = (make_session(text, "umup/bf16", umup_hparams=h) for h in ({}, {"alpha_attn_softmax": 8.0}))
    umup, sp = Trial("umup/bf16", 1.0, 0, 12), Trial("sp/bf16", 1.0, 0, 12)
    assert given.config(umup).parametrization.hparams == {"alpha_attn_softmax": 8.0}
    assert given.key(umup, "x") != plain.key(umup, "x")
    assert given.key(sp, "x") == plain.key(sp, "x")
