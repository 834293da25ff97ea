"""A run that is killed, interrupted or damaged goes on to the same losses, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from time import sleep

import pytest

from umup.cli.main import main
from umup.config.load import dump_yaml

STEPS, CHECKPOINT_EVERY = 90, 8


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Everything that has state: dropout, accumulation, schedule, both moments, decay, clipping."""
    made = tiny(
        model={"num_layers": 2, "dropout": 0.1},
        optimizer={"lr": 0.5, "weight_decay": 0.1},
        schedule={"name": "cosine", "warmup_steps": 20},
        train={
            "steps": STEPS,
            "batch_size": 2,
            "grad_accum": 2,
            "grad_clip": 50.0,
            "eval_every": 3,
            "eval_batches": 2,
            "checkpoint_every": CHECKPOINT_EVERY,
        },
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_yaml(made))
    return path


def start(config, out):
    command = [sys.executable, "-m", "umup.cli.main", "train", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(run directory, what the command printed) of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(config, out)
    printed, complaints = process.communicate(timeout=120)
    assert (process.returncode, complaints) == (0, "")
    return out, printed


def losses(run):
    """Step -> losses as the file's own digits."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_float=str) for line in lines]
    return [(row["step"], row["train/loss"], row.get("val/loss")) for row in rows]


def steps_done(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def when(process, condition, delay=0.0):
    """Wait until the condition holds, then a little longer; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        sleep(0.0005)
    sleep(delay)
    return process.poll() is None


def test_sigkill_at_random_moments_changes_no_loss(config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    rng = random.Random(20)
    kills = 0
    for moment in ("starting", "step", "writing a checkpoint", "step", "writing a checkpoint"):
        process = start(config, run)
        ahead = steps_done(run) + rng.randrange(3, 2 * CHECKPOINT_EVERY)
        reached = {
            "starting": lambda: (run / "config.yaml").exists(),
            "step": lambda ahead=ahead: steps_done(run) >= ahead,
            "writing a checkpoint": lambda ahead=ahead: (
                steps_done(run) >= ahead and any((run / "checkpoints").glob(".step-*"))
            ),
        }[moment]
        if when(process, reached, rng.random() * 0.01):
            process.kill()
        process.communicate(timeout=120)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 4, "the run is too short to be killed"
    process = start(config, run)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert "resuming" in complaints
    assert losses(run) == losses(uninterrupted[0])
    assert (run / "model.safetensors").read_bytes() == (uninterrupted[0] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def interrupted(config, tmp_path_factory):
    """The directory of a run that SIGINT stopped after it had written a checkpoint, and the last step it did."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    process = start(config, run)
    assert when(process, lambda: steps_done(run) >= CHECKPOINT_EVERY + 3)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 130
    assert complaints.count("\n") == 1
    assert complaints.startswith("umup: interrupted")
    return run, steps_done(run)


@pytest.fixture
def stopped(interrupted, tmp_path):
    run, step = interrupted
    return shutil.copytree(run, tmp_path / "run"), step


def test_sigint_leaves_a_checkpoint_of_the_last_step_and_resumes_bit_identically(
    config, uninterrupted, stopped, capsys
):
    run, step = stopped
    assert CHECKPOINT_EVERY < step < STEPS
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (run / "model.safetensors").exists()
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert capsys.readouterr().err == f"resuming {run} after step {step}\n"
    assert losses(run) == losses(uninterrupted[0])


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_ends_the_same(
    config, uninterrupted, stopped, capsys, name
):
    run, _ = stopped
    before, newest = sorted((run / "checkpoints").iterdir())
    os.truncate(newest / name, (newest / name).stat().st_size - 100)
    assert main(["train", str(config), "--out", str(run)]) == 0
    refused, resumed = capsys.readouterr().err.splitlines()
    assert refused.startswith("refused")
    assert str(newest) in refused
    assert name in refused
    assert resumed == f"resuming {run} after step {int(before.name.removeprefix('step-'))}"
    assert losses(run) == losses(uninterrupted[0])


def test_a_torn_line_of_metrics_is_dropped(config, uninterrupted, stopped):
    run, step = stopped
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": ' + str(step + 1) + ', "train/lo')
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert losses(run) == losses(uninterrupted[0])


def test_lines_after_the_checkpoint_are_done_again(config, uninterrupted, stopped):
    """As a SIGKILL between two checkpoints leaves them, only with other numbers."""
    run, step = stopped
    with (run / "metrics.jsonl").open("a") as file:
        row = {"step": step + 1, "train/loss": 0.5, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0}
        file.write(json.dumps(row) + "\n")
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert losses(run) == losses(uninterrupted[0])


def test_a_run_goes_on_with_other_evaluation_and_cache_settings(config, uninterrupted, stopped, tmp_path):
    run, _ = stopped
    changes = ["--train.eval_every", "1000", "--train.keep_checkpoints=1", "--data.cache_dir", str(tmp_path / "cache")]
    assert main(["train", str(config), "--out", str(run), *changes]) == 0
    assert [(step, loss) for step, loss, _ in losses(run)] == [(s, loss) for s, loss, _ in losses(uninterrupted[0])]
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_a_finished_run_returns_its_result_and_trains_nothing(config, uninterrupted, tmp_path, capsys, monkeypatch):
    finished, printed = uninterrupted
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr("umup.train.loop.train_step", lambda *_: pytest.fail("it trained"))
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert capsys.readouterr().out.replace(str(run), "RUN") == printed.replace(str(finished), "RUN")
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
