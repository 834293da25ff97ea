"""The transfer benchmark runs the deciding cells first, encloses every optimum, resumes, and finds a known drift."""

import importlib.util
import json
import sys
from dataclasses import replace
from math import inf, log2
from pathlib import Path

import pytest
import torch

from umup.study.stacked import StackedRun

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    spec = importlib.util.spec_from_file_location("transfer_benchmark", ROOT / "benchmarks" / "transfer.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "transfer_benchmark", module)
    spec.loader.exec_module(module)
    return module


def session(bench, **more):
    sizes = {"widths": (16, 32, 64), "depths": (1, 2), "proxy_width": 16, "head_dim": 8, "members": 10}
    runs = {"seq_len": 16, "batch_size": 2, "eval_batches": 2, "steps": 12, "seeds": (0, 1)}
    where = {"source": ("x",), "device": torch.device("cpu")}
    return bench.Session(**{"schemes": ("sp", "mup"), **sizes, **runs, **where, **more})


def losses_of(trial):
    """SP drifts by an octave per doubling of the width, muP not; rates far above the best diverge."""
    best = -8.0 if trial.cell.scheme == "mup" else -9.0 - log2(trial.cell.width / 16)
    x = trial.log2_lr - best
    return inf if x > 1.6 else 2 + 0.2 * x**2 + 0.01 * trial.seed


class Memory:
    """Results without a file."""

    def __init__(self):
        self.done, self.failures = {}, []

    def loss(self, trial):
        return self.done.get(trial)

    def add(self, trial, run, members, seconds):
        assert trial not in self.done
        self.done[trial] = run.val_loss

    def fail(self, cell, why):
        self.failures.append((cell, why))


@pytest.fixture
def sit(bench, monkeypatch):
    """Sit down to a session whose stacks take no time; (results, the cells in their order, the stacks)."""

    def sit(s, budget=inf, loss=losses_of, broken=lambda cell, members: None, results=None):
        stacks, results = [], results or Memory()

        def run_stacked(configs, files):
            scheme, m = configs[0].parametrization.scheme, configs[0].model
            cell = bench.Cell(scheme, m.hidden_size, m.num_layers)
            assert len({c.model_dump_json(exclude={"optimizer", "train"}) for c in configs}) == 1
            broken(cell, len(configs))
            trials = [bench.Trial(cell, log2(c.optimizer.lr), c.train.seed) for c in configs]
            stacks.append(trials)
            return [StackedRun(loss(t), loss(t), (), (), {}) for t in trials]

        monkeypatch.setattr(bench, "run_stacked", run_stacked)
        sitting = bench.Sitting(s, results, None, budget)
        sitting.run()
        return results, list(dict.fromkeys(stack[0].cell for stack in stacks)), stacks

    return sit


def test_cells_come_by_what_they_decide_and_the_known_drift_is_found(bench, sit):
    s = session(bench)
    results, cells, stacks = sit(s)
    assert [(c.scheme, c.width, c.depth) for c in cells[:6]] == [
        *(("sp", 16, 1), ("mup", 16, 1)),
        *(("sp", 64, 1), ("mup", 64, 1)),
        *(("sp", 16, 2), ("mup", 16, 2)),
    ]
    assert len(cells) == 12
    assert {len(stack) for stack in stacks} == {10}
    found = {(c.scheme, c.axis): c for c in bench.checks(s, results.loss)}
    drifted, kept = found["sp, depth 1", "width"], found["mup, depth 1", "width"]
    assert drifted.drift_per_doubling.value == pytest.approx(-1, abs=0.01)
    assert (drifted.verdict, kept.verdict, found["mup", "depth"].verdict) == ("fail", "pass", "pass")
    assert all(len(line.losses[drifted.rate]) == 2 for line in drifted.lines.values())
    # An optimum that is where it was expected takes one stack: an octave to both sides, both seeds.
    assert sum(stack[0].cell == bench.Cell("mup", 64, 1) for stack in stacks) == 1
    assert {(t.log2_lr, t.seed) for t in stacks[1]} == {(-8 + x / 2, seed) for x in range(-2, 3) for seed in (0, 1)}


@pytest.mark.parametrize("members", [1, 2, 3, 10])
def test_stacks_of_any_size_enclose_every_optimum(bench, sit, members):
    s = session(bench, schemes=("sp",), members=members)
    results, cells, stacks = sit(s)
    assert {len(stack) for stack in stacks} == {min(members, 2) if members < 2 else members}
    for cell in cells:
        line = s.line(cell, results.loss)
        best = -9.0 - log2(cell.width / 16)
        assert line.best == best
        assert all(best + i / 2 in line.losses for i in range(-2, 3))
        assert all(len(line.losses[best + i / 2]) == 2 for i in (-1, 0, 1))
        assert len(line.losses[-9.0]) == 2


def test_where_all_diverge_lower_rates_are_tried(bench, sit):
    s = session(bench, schemes=("sp",), widths=(16,), depths=(1,))
    results, _, _ = sit(s, loss=lambda t: inf if t.log2_lr > -12 else 2 + (t.log2_lr + 13) ** 2)
    assert s.line(s.home("sp"), results.loss).best == -13


def test_large_cells_have_small_stacks(bench):
    s = session(bench, widths=(256, 512, 1024, 2048), depths=(4, 16), proxy_width=256, head_dim=64, members=16)
    s = replace(s, seq_len=256, batch_size=32)
    sizes = {(w, 4): s.stack_size(bench.Cell("umup", w, 4)) for w in s.widths}
    assert sizes == {(256, 4): 16, (512, 4): 5, (1024, 4): 2, (2048, 4): 2}
    assert s.stack_size(bench.Cell("umup", 256, 16)) == 5


def test_a_failed_cell_loses_no_other_and_too_little_memory_halves_its_stacks(bench, sit):
    def broken(cell, members):
        if cell == bench.Cell("sp", 64, 1):
            raise TypeError("the compiler\nis confused")
        if cell.width == 32 and members > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    s = session(bench)
    results, cells, stacks = sit(s, broken=broken)
    assert results.failures == [(bench.Cell("sp", 64, 1), "TypeError: the compiler is confused")]
    assert len(cells) == 11
    assert {len(stack) for stack in stacks if stack[0].cell.width == 32} == {2}
    _, cells, _ = sit(s, results=results)
    assert cells == [bench.Cell("sp", 64, 1)]


def test_without_its_proxy_a_scheme_waits(bench, sit):
    def broken(cell, members):
        if cell == bench.Cell("sp", 16, 1):
            raise RuntimeError("no")

    _, cells, _ = sit(session(bench), broken=broken)
    assert {c.scheme for c in cells} == {"mup"}


def test_a_budget_ends_before_what_does_not_fit_and_goes_on_with_what_does(bench, sit, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "perf_counter", lambda: next(clock))
    _, cells, _ = sit(session(bench), budget=12)
    assert 2 <= len(cells) < 12
    assert cells[:2] == [bench.Cell("sp", 16, 1), bench.Cell("mup", 16, 1)]


def test_it_runs_resumes_and_reports(bench, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(900)))
    sizes = "--widths 16 32 --depths 1 --proxy-width 16 --head-dim 8 --steps 12 --batch-size 2 --seq-len 16"
    arguments = ["--results", str(tmp_path / "r.jsonl"), "--schemes", "umup", *sizes.split(), "--eval-batches", "1"]
    arguments += ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--seeds", "0"]
    bench.main(arguments)
    whole = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) >= 2 * 5
    (tmp_path / "r.jsonl").write_text("".join(whole[:3]) + '{"failed": {"scheme": "umup"}, "why": "no memory"}\n')
    bench.main(arguments)
    capsys.readouterr()
    ended = (tmp_path / "r.jsonl").read_text()
    assert ended.splitlines(keepends=True)[:3] == whole[:3]
    first, second = (
        {(row["key"], row["val_loss"]) for row in map(json.loads, lines) if "key" in row}
        for lines in (whole, ended.splitlines())
    )
    assert first <= second
    bench.main([*arguments, "--report", "--out", str(tmp_path / "out")])
    assert (tmp_path / "r.jsonl").read_text() == ended
    assert "umup, depth 1, lr over width: tuned at 16" in capsys.readouterr().out
    assert (tmp_path / "out" / "transfer-width.png").exists()
