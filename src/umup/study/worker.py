"""A worker of a study: take a turn, claim a point, run it, record it, until nothing is left.

Workers know each other only through the study directory. Each touches `workers/<name>` every few seconds. One whose
process is gone (same host) or whose file has not been touched for SILENCE seconds (any host) is dead, and whoever takes
the next turn gives its attempt back; should it live after all, its result is dropped. A host whose last FAILURES
attempts all failed is quarantined, so that one broken machine does not eat a study: it leaves, and is refused until
`quarantine/<host>` is deleted.

A diverged run is a result. A run that ends in an error of the machine (out of memory, a crash) is a failure and is
tried again, here or elsewhere. An error of the input is everyone's, and ends the worker.

Not covered: choosing a GPU for a worker (set CUDA_VISIBLE_DEVICES, or give --command a launcher that does).
"""

import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import inf, log
from pathlib import Path
from uuid import uuid4

from umup.checkpoint import make_directory, write_atomic
from umup.config.load import dump_yaml
from umup.config.sections import DataConfig, RunConfig
from umup.data.tokens import TokenFiles, prepare
from umup.errors import DivergedError, InputError, RunError
from umup.study.dynamics import judge
from umup.study.ledger import Ledger
from umup.study.todo import Attempt, Observe, Outcome, Point, Say, State, Study, ToDo, ignore
from umup.train.metrics import Metrics, append_metrics, final_losses, read_metrics

BEAT = 5.0
SILENCE = 60.0
FAILURES = 3
PAUSE = 0.5
# What `umup train` says on stderr; other programs tell by a record whose loss is NaN.
DIVERGED = re.compile(r"^umup: step \d+: (loss|gradient norm) became", re.MULTILINE)


def work(study: Study, folder: Path, say: Say = ignore, observe: Observe = ignore) -> None:
    """Work on the study in `folder` until it is finished.

    `say` hears a line per trial, `observe` (trials done, trials wanted so far) at every turn. Raises RunError if all
    diverged or this host is quarantined, OSError if the disk is full (what is recorded stays), KeyboardInterrupt after
    a Ctrl-C, the attempt given back.
    """
    ledger = Ledger(folder)
    with _alive(folder) as name:
        worker = _Worker(folder, study, ledger, name, say)
        while True:
            left = worker.turn()
            observe(left.done, left.wanted)
            if left.finished:
                return


class _Worker:
    def __init__(self, folder: Path, study: Study, ledger: Ledger, name: str, say: Say) -> None:
        self.folder, self.study, self.ledger, self.name, self.say = folder, study, ledger, name, say
        self.host = socket.gethostname()

    def turn(self) -> ToDo:
        """Claim and run one point, or wait a little; what was left before."""
        with self.ledger.turn():
            self._bury()
            attempts = self.ledger.attempts()
            self._quarantine(attempts)
            left = self.study.to_do(attempts)
            point = left.open[0] if left.open else Point(self.ledger.suggest(left.ask)) if left.ask else None
            number = None if point is None else self.ledger.claim(point, self.name, self.host)
        if point is not None and number is not None:
            self._run(number, point)
        elif not left.finished:
            time.sleep(PAUSE)
        return left

    def _bury(self) -> None:
        for a in self.ledger.attempts():
            if a.state == State.RUNNING and _dead(self.folder, a.worker, a.host, self.name):
                self.ledger.fail(a.number, f"worker {a.worker} died")
                self.say(f"trial {a.number}: its worker died; the trial is tried again")

    def _quarantine(self, attempts: Sequence[Attempt]) -> None:
        """`quarantine/<host>` stands while the host is out; the journal's last failures alone do not keep it out."""
        mark = self.folder / "quarantine" / self.host
        ended = [a for a in attempts if a.host == self.host and a.state in (State.DONE, State.FAILED)]
        last = ended[-FAILURES:]
        if len(last) == FAILURES and all(a.state == State.FAILED for a in last) and last[-1].worker == self.name:
            make_directory(mark.parent)
            write_atomic(mark, f"{last[-1].error}\n")
        if mark.exists():
            raise RunError(
                f"host {self.host} failed {FAILURES} trials in a row and is quarantined; the last: "
                f"{mark.read_text().strip()}; mend it, delete {mark} and repeat the command"
            )

    def _run(self, number: int, point: Point) -> None:
        home = self.folder / "trials" / str(number)
        try:
            config = self.study.config_of(point)
            home.mkdir(parents=True, exist_ok=True)
            write_atomic(home / "config.yaml", dump_yaml(config))
            command = self.study.command
            outcome = run_here(config, home) if command is None else run_command(command, config, point, home)
        except (KeyboardInterrupt, InputError) as error:
            self.ledger.fail(number, f"{type(error).__name__}: {error}", released=True)
            raise
        except OSError as error:  # a full disk, and nothing that another try would change here
            self.ledger.fail(number, str(error), released=True)
            raise
        except (RunError, RuntimeError, MemoryError) as error:
            line = " ".join(str(error).split())[:500] or type(error).__name__
            self.ledger.fail(number, line)
            self.say(f"trial {number}: failed: {line}")
            return
        if self.ledger.finish(number, outcome, min(outcome.val_loss, 2 * log(config.model.vocab_size))):
            what = self.study.shown(point)
            self.say(f"trial {number}: {what}: loss {outcome.val_loss:.4f}, {outcome.dynamics.faults}")
        else:
            self.say(f"trial {number}: it was given to another worker meanwhile; this result is dropped")


def run_here(config: RunConfig, home: Path) -> Outcome:
    """Train in this process; only metrics.jsonl is kept. Divergence is an outcome."""
    from umup.train.loop import run_training

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


@contextmanager
def _alive(folder: Path) -> Iterator[str]:
    """A name among the workers, and a file that is touched as long as this process lives."""
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
    make_directory(folder / "workers")
    path, over = folder / "workers" / name, threading.Event()
    path.touch()

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                path.touch()
            except OSError:  # a full or absent disk: the run itself will say so
                continue

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield name
    finally:
        over.set()
        path.unlink(missing_ok=True)


def _dead(folder: Path, worker: str, host: str, me: str) -> bool:
    """Ages are differences between times of one file system, so that clocks of hosts need not agree."""
    path = folder / "workers" / worker
    if not path.exists():
        return True
    if host == socket.gethostname() and not _process_exists(int(worker.rsplit("-", 2)[1])):
        return True
    mine = folder / "workers" / me
    mine.touch()
    return mine.stat().st_mtime - path.stat().st_mtime > SILENCE


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
