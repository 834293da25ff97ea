"""A study as a directory: the journal, what is to do, workers that die, fail and are interrupted, the choice."""

import csv
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from math import inf
from statistics import median

import pytest
import torch

from umup.config.load import dump_yaml, parse_config
from umup.errors import CheckpointError, ConfigError, RunError
from umup.plots.sweep import _panel, draw, write_csv
from umup.study import ledger as ledger_module
from umup.study import stacks as stacks_module
from umup.study import worker as worker_module
from umup.study.dynamics import Dynamics
from umup.study.ledger import Ledger
from umup.study.space import parse_space
from umup.study.stacked import member_bytes
from umup.study.sweep import Candidate, Sweep, candidates, load_study, open_study, pick, twenty_tokens
from umup.study.sweep_report import conclude, report, summary, write_report
from umup.study.sweep_run import find
from umup.study.todo import TRIES, Attempt, Outcome, Point, State
from umup.study.worker import ALONE, FAILURES, Crew, work
from umup.train.metrics import read_metrics

SPACE = parse_space({"optimizer.lr": "0.5..4"})
HOST = socket.gethostname()


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(3):
        (corpus / f"{i}.py").write_text("\n".join(f"def f{j}(x):\n    return {i} * x + {j}" for j in range(60)))
    return parse_config(
        {
            "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16, "norm_gain": False},
            "data": {"source": str(corpus), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2},
            "train": {"steps": 4, "batch_size": 2, "eval_batches": 1, "device": "cpu"},
        }
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


@pytest.fixture
def losses(monkeypatch):
    """Runs that take no time: a list of what was run, and the loss as a function of the config, to be set."""

    class Runs(list):
        def loss(self, config):
            return 2 + abs(config.optimizer.lr - 1)

    runs = Runs()

    def run_here(config, home):
        runs.append(config)
        loss = runs.loss(config)
        return Outcome(loss, loss, Dynamics(diverged=loss == inf), 100)

    monkeypatch.setattr(worker_module, "run_here", run_here)
    return runs


def quiet(line):
    pass


def worked(folder, sweep, say=quiet):
    open_study(folder, sweep)
    return find(folder, ALONE, say)


# the directory


def test_a_study_is_read_back_as_it_was_made(config, folder):
    sweep = Sweep(config, SPACE, "random", 7, 2, "run {values}", twenty_tokens(config), 3, "abc")
    open_study(folder, sweep)
    assert load_study(folder) == sweep
    open_study(folder, sweep)


def test_another_configs_study_is_refused_and_named(config, folder):
    open_study(folder, Sweep(config, SPACE))
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.5})})
    with pytest.raises(CheckpointError, match=r"config.optimizer.weight_decay was 0.0 and is now 0.5; choose another"):
        open_study(folder, Sweep(other, SPACE))
    with pytest.raises(CheckpointError, match="strategy was independent and is now grid"):
        open_study(folder, Sweep(config, SPACE, "grid"))
    with pytest.raises(CheckpointError, match="corpus was  and is now 1"):
        open_study(folder, Sweep(config, SPACE, corpus="1"))


def test_bad_studies_leave_nothing_behind(config, folder):
    with pytest.raises(ConfigError, match="is not one of independent, random, grid, tpe, gp"):
        Sweep(config, SPACE, "simulated annealing")
    with pytest.raises(ConfigError, match=r"--space\.optimizer\.lr -1"):
        open_study(folder, Sweep(config, parse_space({"optimizer.lr": "[-1, 1]"})))
    sp = parse_config({**config.model_dump(), "parametrization": {"scheme": "sp"}})
    with pytest.raises(ConfigError, match="--shortlist: its scheme is 'sp' and the proxy's is 'umup'"):
        open_study(folder, Sweep(config, SPACE, intermediate=sp))
    assert not folder.exists()
    with pytest.raises(CheckpointError, match=r"no study.json; begin it with umup sweep"):
        load_study(folder)


def test_twenty_tokens_per_parameter(config):
    parameters = 2 * 256 * 32 + 4 * 32 * 32 + 3 * 32 * round(32 * 8 / 3)
    tokens = twenty_tokens(config).train.steps * config.tokens_per_step
    assert tokens == pytest.approx(20 * parameters, rel=0.05)


# the journal


def outcome(loss=2.5, **faults):
    return Outcome(loss, loss, Dynamics(**faults), 100)


def test_a_ledger_remembers_across_processes(folder):
    folder.mkdir()
    ledger = Ledger(folder)
    point = Point({"optimizer.lr": 0.1 + 0.2, "a": 3}, 1, "shortlist")
    numbers = [ledger.claim(point, "w", "h", "p") for _ in range(5)]
    assert numbers == [0, 1, 2, 3, 4]
    ledger.finish(0, outcome(inf, diverged=True), 9.0)
    ledger.finish(1, outcome(2.25, spikes=2, late_rise=0.5), 2.25)
    ledger.fail(2, "broken")
    ledger.fail(3, "stopped", released=True)
    for reader in (ledger, Ledger(folder)):
        assert reader.attempts() == [
            Attempt(0, point, State.DONE, "w", "h", "p", outcome(inf, diverged=True)),
            Attempt(1, point, State.DONE, "w", "h", "p", outcome(2.25, spikes=2, late_rise=0.5)),
            Attempt(2, point, State.FAILED, "w", "h", "p"),
            Attempt(3, point, State.RELEASED, "w", "h", "p"),
            Attempt(4, point, State.RUNNING, "w", "h", "p"),
        ]
        assert reader.attempts()[2].error == "broken"


def test_what_has_ended_does_not_end_again(folder):
    folder.mkdir()
    ledger = Ledger(folder)
    ledger.claim(Point({"a": 1.0}), "w", "h", "p")
    other = Ledger(folder)
    other.fail(0, "its worker died")
    assert not ledger.finish(0, outcome(), 2.5)
    ledger.fail(0, "late")
    assert ledger.attempts()[0].error == "its worker died"


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_torn_tail_is_cut_off_and_said(folder, cut):
    folder.mkdir()
    ledger = Ledger(folder)
    for i in range(2):
        ledger.claim(Point({"a": float(i)}), "w", "h", "p")
        ledger.finish(i, outcome(), 2.5)
    path = folder / "journal.log"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Ledger(folder)
    assert "last line was cut short and is dropped" in again.recovered
    assert [a.state for a in again.attempts()] == [State.DONE, State.RUNNING]
    again.finish(1, outcome(), 2.5)
    assert [a.state for a in Ledger(folder).attempts()] == [State.DONE, State.DONE]
    assert Ledger(folder).recovered == ""


def test_a_living_worker_cuts_off_what_another_left(folder):
    folder.mkdir()
    ledger = Ledger(folder)
    ledger.claim(Point({"a": 1.0}), "w", "h", "p")
    with (folder / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 6, "trial')
    ledger.finish(0, outcome(), 2.5)
    for reader in (ledger, Ledger(folder)):
        assert [a.state for a in reader.attempts()] == [State.DONE]


def test_a_broken_line_inside_is_named(folder):
    folder.mkdir()
    Ledger(folder).claim(Point({"a": 1.0}), "w", "h", "p")
    path = folder / "journal.log"
    path.write_bytes(b"".join([path.read_bytes(), b"no record\n", path.read_bytes().splitlines(keepends=True)[-1]]))
    with pytest.raises(CheckpointError, match=r"journal.log, line \d+: not a record; delete the line"):
        Ledger(folder)


def test_a_full_disk_loses_nothing_that_is_recorded(folder, monkeypatch):
    folder.mkdir()
    ledger = Ledger(folder)
    ledger.claim(Point({"a": 1.0}), "w", "h", "p")
    before = (folder / "journal.log").read_bytes()
    real = ledger_module._append

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: len(data) // 2])

    monkeypatch.setattr(ledger_module, "_append", lambda file, data: real(Full(file), data))
    with pytest.raises(OSError, match="No space left"):
        ledger.finish(0, outcome(), 2.5)
    assert (folder / "journal.log").read_bytes() == before
    monkeypatch.undo()
    assert Ledger(folder).attempts()[0].state == State.RUNNING


# what is to do


def attempt(number, point, loss=None, state=State.DONE, **faults):
    return Attempt(number, point, state, "w", "h", str(number), None if loss is None else outcome(loss, **faults))


def test_what_is_claimed_is_not_open_and_what_failed_is(config):
    sweep = Sweep(config, SPACE, "grid")
    points = [Point({"optimizer.lr": axis}) for axis in SPACE[0].values]
    assert sweep.to_do([]).open == tuple(points)
    attempts = [
        attempt(0, points[0], 2.0),
        attempt(1, points[1], state=State.RUNNING),
        attempt(2, points[2], state=State.FAILED),
        attempt(3, points[3], state=State.RELEASED),
    ]
    left = sweep.to_do(attempts)
    assert left.open == (points[2], points[3])
    assert left.running == 1
    assert not left.finished
    attempts += [attempt(4 + i, points[2], state=State.FAILED) for i in range(TRIES - 1)]
    assert sweep.to_do(attempts).open == (points[3],)
    attempts += [attempt(90, points[3], state=State.RELEASED) for _ in range(TRIES)]
    assert sweep.to_do(attempts).open == (points[3],)


def test_every_seed_is_run_and_the_mean_ranks(config):
    sweep = Sweep(config, SPACE, "grid", seeds=2)
    attempts = []
    for lr, pair in zip(SPACE[0].values, [(2.0, 2.6), (2.2, 2.3), (1.0, inf), (3.0, 3.0)], strict=True):
        for seed, loss in enumerate(pair):
            attempts.append(attempt(len(attempts), Point({"optimizer.lr": lr}, seed), loss))
    assert [c.values["optimizer.lr"] for c in candidates(sweep, attempts)] == [1, 0.5, 4, 2]
    assert len(candidates(sweep, attempts[:-1])) == 3
    assert sweep.to_do(attempts[:-1]).open == (Point({"optimizer.lr": 4}, 1),)
    assert sweep.config_of(Point({"optimizer.lr": 4}, 1)).train.seed == 1


def test_when_all_diverged_it_says_so_and_suggests_a_range(config, folder, losses):
    losses.loss = lambda config: inf
    open_study(folder, Sweep(config, SPACE))
    with pytest.raises(RunError, match=r"all 4 trials diverged, at optimizer.lr 0.5 to 4; write --space.optimizer.lr"):
        find(folder, ALONE, quiet)


# workers


def test_a_finished_trial_is_never_run_again(config, folder, losses):
    sweep = Sweep(config, SPACE)
    first = worked(folder, sweep)
    assert len(losses) == 4
    assert first.choice.values == {"optimizer.lr": 1}
    again = worked(folder, sweep)
    assert len(losses) == 4
    assert again == first


def test_independent_runs_its_stages(config, folder, losses):
    losses.loss = lambda c: 2 + abs(c.optimizer.lr - 2) + abs(c.parametrization.hparams["alpha_res"] - 4)
    space = parse_space({"optimizer.lr": "0.5..4", "parametrization.hparams.alpha_res": "0.5..8"})
    found = worked(folder, Sweep(config, space))
    assert found.choice.values == {"optimizer.lr": 2, "parametrization.hparams.alpha_res": 4}
    assert found.lines.interaction == pytest.approx(0)
    assert "better than all bests together" not in report(found)
    assert "interaction: combining the lines' best costs +0.0000" in summary(found)
    assert "| `parametrization.hparams.alpha_res` | 4 | 3.0000 |  |" in report(found)


def test_lines_that_do_not_add_up_are_said(config, folder, losses):
    """Either multiplier helps, both together do not."""

    def loss(c):
        a, b = (c.parametrization.hparams[name] for name in ("alpha_res", "alpha_ffn_act"))
        return 3 - 0.5 * (a == 8) - 0.2 * (b == 8) + 2 * (a * b == 64)

    losses.loss = loss
    keys = [f"parametrization.hparams.{name}" for name in ("alpha_res", "alpha_ffn_act")]
    found = worked(folder, Sweep(config, parse_space(dict.fromkeys(keys, "1..8"))))
    assert found.choice.values == {keys[0]: 8, keys[1]: 1}
    assert found.lines.interaction == pytest.approx(2)
    assert found.json()["edges"] == [keys[0]]
    assert "A point of a line is better than all bests together" in report(found)


def test_tpe_learns(config, folder, losses):
    losses.loss = lambda c: 2 + abs(c.optimizer.lr - 2.5)
    space = parse_space({"optimizer.lr": "2^-6..2^6", "optimizer.weight_decay": "[0.0, 0.1]"})
    found = worked(folder, Sweep(config, space, "tpe", trials=30))
    assert found.trials == 30
    assert len({c.optimizer.lr for c in losses}) == 30
    early, late = (median(losses.loss(c) for c in part) for part in (losses[:10], losses[20:]))
    assert late < early - 0.2
    assert {c.optimizer.weight_decay for c in losses} == {0.0, 0.1}


def test_the_shortlist_decides(config, folder, losses):
    second = twenty_tokens(config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 64})}))

    def loss(c):
        return 2 + abs(c.optimizer.lr - (1 if c.model.hidden_size == 32 else 2))

    losses.loss = loss
    found = worked(folder, Sweep(config, SPACE, "grid", intermediate=second, keep=2))
    widths = [c.model.hidden_size for c in losses]
    assert widths == [32] * 4 + [64] * 2
    assert [c.values["optimizer.lr"] for c in found.proxies][:2] == [1, 0.5]
    assert found.choice.values == {"optimizer.lr": 1}
    assert found.choice.loss == 3
    assert found.json()["config"]["model"]["hidden_size"] == 32
    assert found.json()["stage"] == "shortlist"
    assert "Ranking of the shortlist" in report(found)
    assert losses[-1].train.steps == second.train.steps


def test_a_shortlist_that_diverges_is_said(config, folder, losses):
    second = twenty_tokens(config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 64})}))
    losses.loss = lambda c: 2.0 if c.model.hidden_size == 32 else inf
    open_study(folder, Sweep(config, SPACE, "grid", intermediate=second, keep=2))
    with pytest.raises(RunError, match="all 2 of the shortlist diverged"):
        find(folder, ALONE, quiet)


def test_a_failure_is_tried_again(config, folder, losses):
    failed = []

    def loss(c):
        if c.optimizer.lr == 1 and len(failed) < 2:
            failed.append(c)
            raise RuntimeError("CUDA error: an illegal memory access")
        return 2 + abs(c.optimizer.lr - 1)

    losses.loss = loss
    said = []
    found = worked(folder, Sweep(config, SPACE), said.append)
    assert found.choice.loss == 2
    assert found.trials == 4
    assert len(losses) == 6
    assert sum("failed: CUDA error" in line for line in said) == 2
    assert "illegal memory access" in report(found)


def test_a_bad_node_is_quarantined_until_its_mark_is_deleted(config, folder, losses):
    def broken(c):
        raise RuntimeError("CUDA error: device lost")

    def find_again():
        return find(folder, ALONE, quiet)

    good, losses.loss = losses.loss, broken
    open_study(folder, Sweep(config, SPACE))
    with pytest.raises(RunError, match=f"failed {FAILURES} trials in a row and is quarantined; the last: CUDA error"):
        find_again()
    assert len(losses) == FAILURES
    losses.loss = good
    with pytest.raises(RunError, match="quarantined"):
        find_again()
    assert len(losses) == FAILURES
    (folder / "quarantine" / HOST).unlink()
    assert find_again().choice.loss == 2


def test_another_hosts_quarantine_is_its_own(config, folder, losses):
    open_study(folder, Sweep(config, SPACE))
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "elsewhere").write_text("device lost\n")
    assert find(folder, ALONE, quiet).choice.loss == 2


def test_ctrl_c_gives_the_trial_back(config, folder, losses):
    def interrupted(c):
        raise KeyboardInterrupt

    good, losses.loss = losses.loss, interrupted
    open_study(folder, Sweep(config, SPACE))
    for _ in range(TRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            work(load_study(folder), folder)
    assert {a.state for a in Ledger(folder).attempts()} == {State.RELEASED}
    assert list((folder / "workers").iterdir()) == []
    losses.loss = good
    assert find(folder, ALONE, quiet).trials == 4


def test_a_full_disk_ends_the_worker(config, folder, losses):
    def full(c):
        raise OSError(errno.ENOSPC, "No space left on device")

    good, losses.loss = losses.loss, full
    open_study(folder, Sweep(config, SPACE))
    with pytest.raises(OSError, match="No space left"):
        work(load_study(folder), folder)
    losses.loss = good
    assert find(folder, ALONE, quiet).trials == 4


def stale(folder, name, age):
    (folder / "workers").mkdir(exist_ok=True)
    path = folder / "workers" / name
    path.touch()
    os.utime(path, (time.time() - age,) * 2)


def test_another_hosts_worker_is_dead_once_it_is_silent(config, folder, losses):
    open_study(folder, Sweep(config, SPACE))
    ledger = Ledger(folder)
    for lr, name, age in ((0.5, "far-1-aa", 10), (1, "far-2-bb", 1000)):
        stale(folder, name, age)
        ledger.claim(Point({"optimizer.lr": lr}), name, "far", name)
    with worker_module._alive(folder) as name:
        me = worker_module._Worker(folder, load_study(folder), ledger, name, quiet)
        for _ in range(3):
            assert not me.turn().finished
    states = {a.number: a.state for a in ledger.attempts()}
    assert states[0] == State.RUNNING
    assert states[1] == State.FAILED
    assert {c.optimizer.lr for c in losses} == {1, 2, 4}


SLOW = """
import sys, time
from pathlib import Path
from umup.study import worker
from umup.study.dynamics import Dynamics
from umup.study.sweep import load_study
from umup.study.todo import Outcome
def slow(config, home):
    print("running", flush=True)
    time.sleep(60)
worker.run_here = slow
folder = Path(sys.argv[1])
worker.work(load_study(folder), folder, print)
"""


def test_a_killed_workers_trial_is_tried_again(config, folder, losses):
    open_study(folder, Sweep(config, SPACE))
    doomed = subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True)
    assert doomed.stdout.readline() == "running\n"
    assert [a.state for a in Ledger(folder).attempts()] == [State.RUNNING]
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    said = []
    began = time.perf_counter()
    found = find(folder, ALONE, said.append)
    assert time.perf_counter() - began < 5
    assert said[0] == "trial 0: its worker died; the trial is tried again"
    assert found.trials == 4
    assert [a.state for a in Ledger(folder).attempts()][:2] == [State.FAILED, State.DONE]
    assert found.choice.attempts == (2,)


def test_real_runs_in_two_processes(config, folder):
    """The real trainer, a divergence included; every point runs once."""
    space = parse_space({"optimizer.lr": "[0.5, 1, 2, 1e20]"})
    open_study(folder, Sweep(config, space, "grid"))
    found = find(folder, Crew(2), quiet)
    write_report(folder, found)
    attempts = Ledger(folder).attempts()
    assert len(attempts) == found.trials == 4
    assert found.ranked[-1].values == {"optimizer.lr": 1e20}
    assert found.ranked[-1].dynamics.diverged
    assert found.ranked[-1].loss == inf
    for a in attempts:
        if a.outcome.val_loss < inf:
            lines = (folder / "trials" / str(a.number) / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == 4
            assert json.loads(lines[-1])["val/loss"] == a.outcome.val_loss
    best = json.loads((folder / "best.json").read_text())
    assert best["config"]["optimizer"]["lr"] == best["values"]["optimizer.lr"]
    assert best["tokens"] == sum(a.outcome.tokens for a in attempts) >= 3 * 4 * 32
    assert best["trials"] == 4
    assert "| 4 | inf |  | diverged | 1e+20 |" in (folder / "report.md").read_text()


# stacks


class Together(list):
    """Stacks that take no time: a list of lists of what was run; `most` of them fit."""

    most = 99

    def __call__(self, configs, homes):
        self.append([c.optimizer.lr for c in configs])
        if len(configs) > self.most:
            raise RuntimeError("CUDA out of memory")
        return [outcome(2 + abs(c.optimizer.lr - 1)) for c in configs]


@pytest.fixture
def together(monkeypatch):
    stacks = Together()
    monkeypatch.setattr(worker_module, "run_together", stacks)
    return stacks


WIDE = parse_space({"optimizer.lr": "2^-4..2^5", "optimizer.weight_decay": "[0.0, 0.1]"})


def test_points_of_one_program_run_together_and_others_alone(config, folder, losses, together):
    """Rates, decays and seeds may differ in a stack; multipliers may not."""
    space = parse_space({"optimizer.lr": "[1, 2]", "parametrization.hparams.alpha_res": "[1, 2]"})
    open_study(folder, Sweep(config, space, "grid", seeds=2))
    find(folder, Crew(stack=99), quiet)
    assert together == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert losses == []


@pytest.mark.parametrize(("crew", "sizes"), [(Crew(), []), (Crew(stack=1), []), (Crew(stack=6), [6, 6, 6, 2])])
def test_a_stack_is_as_large_as_asked_and_by_default_one_on_a_cpu(config, folder, losses, together, crew, sizes):
    open_study(folder, Sweep(config, WIDE, "grid"))
    find(folder, crew, quiet)
    assert [len(stack) for stack in together] == sizes
    assert len(losses) == 20 - sum(sizes)


def test_on_a_gpu_sixteen_are_stacked_or_as_many_as_its_free_memory_should_hold(config, folder, together, monkeypatch):
    open_study(folder, Sweep(config, WIDE, "grid"))
    monkeypatch.setattr(stacks_module, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    for free, members in ((2**40, 16), (5 * member_bytes(config), 4), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        sweep = load_study(folder)
        assert len(stacks_module.Stacks(sweep, None).choose(sweep.to_do([]).open, (), 99)) == members


def test_what_cannot_be_stacked_runs_alone(config, folder, losses, together):
    sgd = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": "sgd"})})
    open_study(folder, Sweep(sgd, SPACE, "grid"))
    find(folder, Crew(stack=4), quiet)
    assert (together, len(losses)) == ([], 4)


def test_workers_leave_each_other_their_share(config, folder, losses, together):
    open_study(folder, Sweep(config, WIDE, "grid"))
    with worker_module._alive(folder), worker_module._alive(folder) as me:
        stale(folder, "far-1-aa", 10)
        stale(folder, "far-2-bb", 1000)
        worker = worker_module._Worker(folder, load_study(folder), Ledger(folder), me, quiet, Crew(2, 99))
        worker.turn()
        assert len(together[0]) == 7  # of 20, among two here and one that is far
        worker.crew = Crew(10, 99)
        worker.turn()
    assert len(together[1]) == 2  # of 13, for ten who may not have come yet


def test_a_stack_that_does_not_fit_is_halved_and_its_points_have_not_failed(config, folder, losses, together):
    together.most, said = 5, []
    open_study(folder, Sweep(config, WIDE, "grid"))
    found = find(folder, Crew(stack=16), said.append)
    assert [len(stack) for stack in together] == [16, 8, 4, 4, 4, 4, 4]
    assert said[0] == "trials 0 to 15: failed as one program: CUDA out of memory; now 8 at once"
    assert found.failures == ()
    assert found.trials == 20


def test_where_not_even_two_fit_a_failure_is_one(config, folder, losses, together):
    together.most = 1
    losses.loss = lambda c: 2.0 if c.optimizer.lr != 4 else (_ for _ in ()).throw(RuntimeError("CUDA error"))
    open_study(folder, Sweep(config, SPACE, "grid"))
    with pytest.raises(RunError, match="quarantined; the last: CUDA error"):
        find(folder, Crew(stack=4), quiet)
    states = [a.state for a in Ledger(folder).attempts()]
    assert states == [State.RELEASED] * 6 + [State.DONE] * 3 + [State.FAILED] * 3


def test_points_of_a_killed_stack_run_alone_and_it_counts_as_one_failure_of_the_host(config, folder, losses, together):
    open_study(folder, Sweep(config, WIDE, "grid"))
    ledger = Ledger(folder)
    for lr in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        ledger.claim(Point({"optimizer.lr": lr, "optimizer.weight_decay": 0.0}), f"{HOST}-1-gone", HOST, "one")
    failed = []

    def broken_once(c):
        if not failed:
            failed.append(c)
            raise RuntimeError("CUDA error")
        return 2.0

    losses.loss = broken_once
    found = find(folder, Crew(stack=99), quiet)
    assert [c.optimizer.lr for c in losses] == [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert [len(stack) for stack in together] == [16]
    assert found.trials == 20


STACKED = """
import sys, time
from pathlib import Path
from umup.study import worker
from umup.study.sweep import load_study
def slow(configs, homes):
    print("running", len(configs), flush=True)
    time.sleep(60)
worker.run_together = slow
folder = Path(sys.argv[1])
worker.work(load_study(folder), folder, print, crew=worker.Crew(stack=4))
"""


@pytest.mark.parametrize(("how", "state"), [(signal.SIGKILL, State.FAILED), (signal.SIGINT, State.RELEASED)])
def test_all_points_of_a_stack_are_tried_again(config, folder, losses, together, how, state):
    open_study(folder, Sweep(config, SPACE, "grid"))
    doomed = subprocess.Popen(
        [sys.executable, "-c", STACKED, str(folder)], stdout=subprocess.PIPE, stderr=-3, text=True
    )
    assert doomed.stdout.readline() == "running 4\n"
    doomed.send_signal(how)
    doomed.communicate()
    assert find(folder, Crew(stack=4), quiet).trials == 4
    assert [a.state for a in Ledger(folder).attempts()] == [state] * 4 + [State.DONE] * 4
    assert [len(stack) for stack in together] == ([4] if state == State.RELEASED else [])


def test_a_stacked_sweep_is_the_sweep(config, folder, tmp_path):
    """The real trainer, a divergence included: losses, curves, dynamics and the choice."""
    t = config.train.model_copy(update={"eval_every": 2})
    sweep = Sweep(config.model_copy(update={"train": t}), parse_space({"optimizer.lr": "[0.5, 1, 2, 1e20]"}), seeds=2)
    found = []
    for home, crew in ((folder, ALONE), (tmp_path / "stacked", Crew(stack=8))):
        open_study(home, sweep)
        found.append(find(home, crew, quiet))
        attempts = Ledger(home).attempts()
        assert len(attempts) == 8
        curves = [read_metrics(home / "trials" / str(a.number) / "metrics.jsonl") for a in attempts]
        programs = {a.program for a in attempts}
    apart, stacked = found
    assert len(programs) == 1
    assert [c.values for c in stacked.ranked] == [c.values for c in apart.ranked]
    assert stacked.ranked[-1].dynamics.diverged
    for one, other in zip(apart.ranked, stacked.ranked, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
        assert other.dynamics == one.dynamics
        assert other.attempts == one.attempts
    assert (stacked.choice.values, stacked.tokens) == (apart.choice.values, apart.tokens)
    for number, curve in enumerate(curves):
        alone = read_metrics(folder / "trials" / str(number) / "metrics.jsonl")
        assert [m.step for m in curve] == [m.step for m in alone]
        assert [m.train_loss for m in curve] == pytest.approx([m.train_loss for m in alone], rel=1e-4)
        assert [m.val_loss or 0 for m in curve] == pytest.approx([m.val_loss or 0 for m in alone], rel=1e-4)


# commands

WRITER = """
import json, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
lr = float(arguments["--optimizer.lr"])
assert arguments["--train.seed"] == "0"
if lr == 4:
    print("umup: step 3: loss became nan; first in", file=sys.stderr)
    sys.exit(3)
if lr == 2 and "bad" in sys.argv[0]:
    sys.exit("no GPU")
with open(sys.argv[1] + "/metrics.jsonl", "w") as file:
    for step in range(1, 4):
        loss = 2 + abs(lr - 1) if lr != 0.5 else float("nan")
        row = {"step": step, "train/loss": loss, "lr": lr, "grad_norm": 1.0, "tokens_per_second": 1.0}
        file.write(json.dumps(row) + "\\n")
"""


def written(path, text=WRITER):
    path.write_text(text)
    return f"{sys.executable} {path} {{out}} {{values}}"


def test_a_command_is_a_trial(config, folder, tmp_path):
    found = worked(folder, Sweep(config, SPACE, "grid", command=written(tmp_path / "good.py")))
    assert [(c.values["optimizer.lr"], c.loss) for c in found.ranked] == [(1, 2), (2, 3), (0.5, inf), (4, inf)]
    assert found.ranked[2].dynamics.diverged
    assert found.ranked[3].dynamics.diverged


def test_a_commands_failure_says_its_last_line(config, folder, tmp_path):
    said = []
    open_study(
        folder, Sweep(config, parse_space({"optimizer.lr": "[1, 2]"}), "grid", command=written(tmp_path / "bad"))
    )
    with pytest.raises(RunError, match=r"quarantined; the last: .* exited with 1: no GPU"):
        find(folder, ALONE, said.append)


def test_a_command_without_metrics_is_told_how(config, folder, tmp_path):
    open_study(folder, Sweep(config, SPACE, "grid", command=written(tmp_path / "mute.py", "")))
    with pytest.raises(RunError, match=r"wrote no .*metrics.jsonl; give it \{out\}"):
        find(folder, ALONE, quiet)


# the choice


def candidate(loss, **faults):
    return Candidate({"optimizer.lr": loss}, "proxy", (loss,), Dynamics(**faults), (0,))


def test_the_best_is_chosen_if_it_is_clean():
    chosen, why = pick([candidate(2.0), candidate(2.1)])
    assert chosen.loss == 2.0
    assert why == "lowest loss, and clean dynamics"


def test_a_clean_third_is_chosen_over_two_with_spikes():
    chosen, why = pick([candidate(2.0, spikes=1), candidate(2.001, explosions=1), candidate(2.01), candidate(2.02)])
    assert chosen.loss == 2.01
    assert why == "rank 3: the lowest loss (2.0000) has 1 loss spike; this one is clean and 0.0100 nats worse"


@pytest.mark.parametrize("others", [[candidate(2.1)], [candidate(2.0, spikes=3)] * 2 + [candidate(2.0)], []])
def test_not_one_that_is_much_worse_or_far_down(others):
    chosen, why = pick([candidate(2.0, spikes=1), *others])
    assert chosen.dynamics.spikes == 1
    assert why.startswith("lowest loss, with 1 loss spike: no clean one")


def test_the_report_names_the_choice_and_its_reason(config):
    sweep = Sweep(config, SPACE, "grid")
    losses = zip(SPACE[0].values, [2.5, 2.0, 2.01, 4.0], [0, 1, 0, 0], strict=True)
    attempts = [attempt(i, Point({"optimizer.lr": x}), y, spikes=s) for i, (x, y, s) in enumerate(losses)]
    text = report(conclude(sweep, attempts))
    assert "| 2 **chosen** | 2.0100 |  | clean | 2 | 2 |" in text
    assert "rank 2: the lowest loss (2.0000) has 1 loss spike" in text
    assert "optimum may lie beyond" not in text


def studied(sweep):
    """A finished sweep of made-up losses, of which high rates spike and then diverge."""
    attempts = []
    while left := sweep.to_do(attempts).open:
        for point in left:
            x = point.values["optimizer.lr"]
            loss = inf if x > 16 else 2 + 0.01 * (x - 2) ** 2 + 0.1 * point.values.get("model.dropout", 0)
            loss -= point.stage == "shortlist"
            attempts.append(attempt(len(attempts), point, loss, spikes=int(x > 4), diverged=x > 16))
    return conclude(sweep, attempts)


KINDS = {
    "a line": {"space": {"optimizer.lr": "0.5..32"}},
    "lines": {"space": {"optimizer.lr": "0.5..32", "model.dropout": "[0.0, 0.1]"}},
    "a grid": {"space": {"optimizer.lr": "0.5..32", "model.dropout": "[0.0, 0.1]"}, "strategy": "grid"},
    "draws": {"space": {"optimizer.lr": "0.5..32", "train.grad_clip": "1..2"}, "strategy": "random", "trials": 9},
    "a shortlist": {"space": {"optimizer.lr": "0.5..32"}, "strategy": "grid", "keep": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_figure_has_its_numbers_beside_it(config, tmp_path, kind):
    given = dict(KINDS[kind])
    space = parse_space(given.pop("space"))
    found = studied(Sweep(config, space, intermediate=config if "keep" in given else None, **given))
    write_csv(found, tmp_path / "a.csv")
    draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.proxies) + 2 * ("keep" in given) == found.trials
    assert [float(r["loss"]) for r in rows if r["stage"] == "proxy"] == pytest.approx([c.loss for c in found.proxies])
    assert {r["dynamics"] for r in rows if r["loss"] == "inf"} <= {"diverged"}
    assert {r["dynamics"] for r in rows} >= {"clean"}
    for row in (r for r in rows if r["chosen"] == "1"):
        assert {axis.key: float(row[axis.key]) for axis in space} == found.choice.values


def test_what_is_clean_faulty_and_diverged_differs_in_shape(config, tmp_path, monkeypatch):
    """Without colour: a filled circle, a hollow square, a hollow triangle, a star."""
    drawn = []

    class Axes:
        def get_ylim(self):
            return 1.9, 2.5

        def plot(self, x, y, marker=None, **style):
            drawn.append((x, marker, style.get("markerfacecolor")))

        def __getattr__(self, name):
            return lambda *_, **__: None

    found = studied(Sweep(config, parse_space(KINDS["a line"]["space"])))
    _panel(Axes(), "optimizer.lr", found.proxies, {}, found.choice)
    shapes = {x: (marker, fill) for x, marker, fill in drawn[1:] if marker != "*"}
    assert {x: m for x, m, _ in drawn[1:] if m == "*"} == {2: "*"}
    assert shapes[1] == shapes[4]
    assert [shapes[x][0] for x in (1, 8, 32)] == ["o", "s", "^"]
    assert [shapes[x][1] for x in (1, 8, 32)] == ["#0072B2", "white", "none"]


def test_configs_are_kept_with_their_trials(config, folder, losses):
    worked(folder, Sweep(config, SPACE, "grid"))
    kept = (folder / "trials" / "2" / "config.yaml").read_text()
    assert kept == dump_yaml(losses[2])
