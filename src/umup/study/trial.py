"""One trial: in this process, several as one program, or by a command. Divergence is an outcome.

Each leaves metrics.jsonl in its folder. Not covered: checkpoints; a trial that is cut short begins again.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from pathlib import Path
from time import perf_counter

from umup.config.sections import DataConfig, RunConfig
from umup.data.tokens import TokenFiles, prepare
from umup.errors import DivergedError, RunError
from umup.study.dynamics import judge
from umup.study.stacked import run_stacked
from umup.study.todo import Outcome, Point
from umup.train.loop import run_training
from umup.train.metrics import Metrics, append_metrics, final_losses, read_metrics, write_metrics

# What `umup train` says on stderr; other programs tell by a record whose loss is NaN.
DIVERGED = re.compile(r"^umup: step \d+: (loss|gradient norm) became", re.MULTILINE)


def run_here(config: RunConfig, home: Path) -> Outcome:
    """Train in this process."""
    metrics: list[Metrics] = []
    path = home / "metrics.jsonl"

    def observe(m: Metrics) -> None:
        metrics.append(m)
        append_metrics(path, m)

    files = _files(config.data.model_dump_json(), config.model.vocab_size, config.tokens_per_batch)
    try:
        run_training(config, observe=observe, files=files)
    except DivergedError:
        return _outcome(metrics, config, diverged=True)
    return _outcome(metrics, config, diverged=False)


def run_together(configs: Sequence[RunConfig], homes: Sequence[Path]) -> list[Outcome]:
    """`run_here` for several runs as one program; their metrics.jsonl are written when it ends."""
    first = configs[0]
    began = perf_counter()
    runs = run_stacked(configs, _files(first.data.model_dump_json(), first.model.vocab_size, first.tokens_per_batch))
    speed = first.tokens_per_step * first.train.steps / (perf_counter() - began)
    outcomes = []
    for config, home, run in zip(configs, homes, runs, strict=True):
        metrics = run.metrics(config, speed)
        write_metrics(home / "metrics.jsonl", metrics)
        outcomes.append(_outcome(metrics, config, diverged=len(metrics) < config.train.steps))
    return outcomes


def run_command(command: str, config: RunConfig, point: Point, home: Path) -> Outcome:
    """Run a program for a point: it is started once, whatever it starts, so all its ranks have the same values.

    In the command, {values} becomes `--key value ...` (with the seed), {config} the resolved config.yaml and {out} the
    folder in which it must write metrics.jsonl. Raises RunError if it exits otherwise than with 0 and did not diverge.
    """
    values = {**point.values, "train.seed": config.train.seed}
    told = {
        "{values}": " ".join(f"--{key} {value!r}" for key, value in values.items()),
        "{config}": shlex.quote(str((home / "config.yaml").absolute())),
        "{out}": shlex.quote(str(home.absolute())),
    }
    for name, text in told.items():
        command = command.replace(name, text)
    log_path = home / "log.txt"
    with log_path.open("wb") as out:
        process = subprocess.Popen(shlex.split(command), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    said = log_path.read_text(errors="replace")
    if code and not DIVERGED.search(said):
        lines = said.strip().splitlines() or ["it said nothing"]
        raise RunError(f"{shlex.split(command)[0]} exited with {code}: {lines[-1]} ({log_path})")
    metrics = read_metrics(home / "metrics.jsonl")
    if not metrics and not code:
        raise RunError(f"the command wrote no {home / 'metrics.jsonl'}; give it {{out}}, and see {log_path}")
    return _outcome(metrics, config, diverged=bool(code))


def _outcome(metrics: Sequence[Metrics], config: RunConfig, diverged: bool) -> Outcome:
    dynamics = judge(metrics, diverged)
    tokens = len(metrics) * config.tokens_per_step
    if dynamics.diverged:
        return Outcome(inf, inf, dynamics, tokens)
    train, val = final_losses(metrics)
    return Outcome(train if val is None else val, train, dynamics, tokens)


@lru_cache(maxsize=4)
def _files(data: str, vocab_size: int, min_tokens: int) -> TokenFiles:
    return prepare(DataConfig.model_validate_json(data), vocab_size, min_tokens)
