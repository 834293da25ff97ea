"""A worker of a study: take a turn, claim a point, run it, record it, until nothing is left.

Workers know each other only through the study directory. Each touches `workers/<name>` every few seconds. One whose
process is gone (same host) or whose file has not been touched for SILENCE seconds (any host) is dead, and whoever takes
the next turn gives its attempt back; should it live after all, its result is dropped. A host whose last FAILURES
attempts all failed is quarantined, so that one broken machine does not eat a study: it leaves, and is refused until
`quarantine/<host>` is deleted.

Points whose configs may share a program are claimed and trained together (stacks.py says which and how many), up to a
worker's share of what is open. A stack that fails, for want of memory say, is given back and tried again with half as
many; a point that has failed runs alone, so that one which kills its worker takes no other with it twice.

A diverged run is a result. A run that ends in an error of the machine (out of memory, a crash) is a failure and is
tried again, here or elsewhere. An error of the input is everyone's, and ends the worker.

Not covered: choosing a GPU for a worker (set CUDA_VISIBLE_DEVICES, or give --command a launcher that does).
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from math import ceil, log
from pathlib import Path
from uuid import uuid4

from umup.checkpoint import make_directory, write_atomic
from umup.config.load import dump_yaml
from umup.config.sections import RunConfig
from umup.errors import InputError, RunError
from umup.study.ledger import Ledger
from umup.study.stacks import Stacks
from umup.study.todo import Attempt, Observe, Outcome, Point, Say, State, Study, ToDo, ignore
from umup.study.trial import run_command, run_here, run_together

BEAT = 5.0
SILENCE = 60.0
FAILURES = 3
PAUSE = 0.5


@dataclass(frozen=True)
class Crew:
    """How many processes one command works with, and how many runs each may stack (None: see stacks.py)."""

    workers: int = 1
    stack: int | None = None


ALONE = Crew()


def work(study: Study, folder: Path, say: Say = ignore, observe: Observe = ignore, crew: Crew = ALONE) -> None:
    """Work on the study in `folder` until it is finished.

    `say` hears a line per trial, `observe` (trials done, trials wanted so far) at every turn. Raises RunError if all
    diverged or this host is quarantined, OSError if the disk is full (what is recorded stays), KeyboardInterrupt after
    a Ctrl-C, the attempt given back.
    """
    ledger = Ledger(folder)
    with _alive(folder) as name:
        worker = _Worker(folder, study, ledger, name, say, crew)
        while True:
            left = worker.turn()
            observe(left.done, left.wanted)
            if left.finished:
                return


@dataclass(frozen=True)
class _Claim:
    """An attempt that this worker has begun."""

    number: int
    point: Point
    config: RunConfig
    home: Path


class _Worker:
    def __init__(self, folder: Path, study: Study, ledger: Ledger, name: str, say: Say, crew: Crew = ALONE) -> None:
        self.folder, self.study, self.ledger, self.name, self.say = folder, study, ledger, name, say
        self.host = socket.gethostname()
        self.stacks = Stacks(study, crew.stack)
        self.crew = crew

    def turn(self) -> ToDo:
        """Claim and run a point, or several as one program, or wait a little; what was left before."""
        with self.ledger.turn():
            self._bury()
            attempts = self.ledger.attempts()
            self._quarantine(attempts)
            left = self.study.to_do(attempts)
            points = self._choose(left, attempts)
            program = uuid4().hex[:8]
            claims = [self._claim(point, program) for point in points]
        if claims:
            self._run(claims)
        elif not left.finished:
            time.sleep(PAUSE)
        return left

    def _claim(self, point: Point, program: str) -> _Claim:
        config = self.study.config_of(point)
        number = self.ledger.claim(point, self.name, self.host, program)
        return _Claim(number, point, config, self.folder / "trials" / str(number))

    def _choose(self, left: ToDo, attempts: Sequence[Attempt]) -> list[Point]:
        if not left.open:
            return [Point(self.ledger.suggest(left.ask))] if left.ask else []
        failed = {a.point.name for a in attempts if a.state == State.FAILED}
        names = [path.name for path in (self.folder / "workers").iterdir()]
        living = sum(not _dead(self.folder, name, name.rsplit("-", 2)[0], self.name) for name in names)
        return self.stacks.choose(left.open, failed, ceil(len(left.open) / max(living, self.crew.workers)))

    def _bury(self) -> None:
        for a in self.ledger.attempts():
            if a.state == State.RUNNING and _dead(self.folder, a.worker, a.host, self.name):
                self.ledger.fail(a.number, f"worker {a.worker} died")
                self.say(f"trial {a.number}: its worker died; the trial is tried again")

    def _quarantine(self, attempts: Sequence[Attempt]) -> None:
        """`quarantine/<host>` stands while the host is out; the journal's last failures alone do not keep it out."""
        mark = self.folder / "quarantine" / self.host
        ended = [a for a in attempts if a.host == self.host and a.state in (State.DONE, State.FAILED)]
        last = list(takewhile(lambda a: a.state == State.FAILED, reversed(ended)))
        # A stack fails as one.
        if len({a.program for a in last}) >= FAILURES and last[0].worker == self.name:
            make_directory(mark.parent)
            write_atomic(mark, f"{last[0].error}\n")
        if mark.exists():
            raise RunError(
                f"host {self.host} failed {FAILURES} trials in a row and is quarantined; the last: "
                f"{mark.read_text().strip()}; mend it, delete {mark} and repeat the command"
            )

    def _run(self, claims: Sequence[_Claim]) -> None:
        try:
            for c in claims:
                c.home.mkdir(parents=True, exist_ok=True)
                write_atomic(c.home / "config.yaml", dump_yaml(c.config))
            outcomes = self._outcomes(claims)
        except (KeyboardInterrupt, InputError) as error:
            self._give_back(claims, f"{type(error).__name__}: {error}")
            raise
        except OSError as error:  # a full disk, and nothing that another try would change here
            self._give_back(claims, str(error))
            raise
        except (RunError, RuntimeError, MemoryError) as error:
            self._failed(claims, " ".join(str(error).split())[:500] or type(error).__name__)
            return
        for c, outcome in zip(claims, outcomes, strict=True):
            what = f"{self.study.shown(c.point)}: loss {outcome.val_loss:.4f}, {outcome.dynamics.faults}"
            if not self.ledger.finish(c.number, outcome, min(outcome.val_loss, 2 * log(c.config.model.vocab_size))):
                what = "it was given to another worker meanwhile; this result is dropped"
            self.say(f"trial {c.number}: {what}")

    def _outcomes(self, claims: Sequence[_Claim]) -> list[Outcome]:
        (first, *others), command = claims, self.study.command
        if others:
            return run_together([c.config for c in claims], [c.home for c in claims])
        if command is not None:
            return [run_command(command, first.config, first.point, first.home)]
        return [run_here(first.config, first.home)]

    def _failed(self, claims: Sequence[_Claim], why: str) -> None:
        """That of a stack is no failure of its points: they are tried again in smaller ones."""
        first, last = claims[0], claims[-1]
        if first is last:
            self.ledger.fail(first.number, why)
            self.say(f"trial {first.number}: failed: {why}")
            return
        self._give_back(claims, why)
        half = self.stacks.halve(first.config, len(claims))
        self.say(f"trials {first.number} to {last.number}: failed as one program: {why}; now {half} at once")

    def _give_back(self, claims: Sequence[_Claim], why: str) -> None:
        for c in claims:
            self.ledger.fail(c.number, why, released=True)


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
