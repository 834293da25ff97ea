"""What a study is to its workers: points to run, attempts at them, what is left to do.

A study names all points that it wants as a function of the attempts so far, and the config of each. It keeps no state:
what was done is in the ledger (ledger.py), so any worker on any host finds the same work left. Points whose attempt
failed or whose worker died are open again, up to TRIES times. Two kinds exist: `umup sweep`'s (sweep.py) and
`umup transfer-check`'s (transfer_check.py).

    DIR/study.json     what the study is; another one is refused in its directory
    DIR/journal.log    every attempt
    DIR/trials/<n>/    config.yaml and metrics.jsonl of attempt n (and log.txt of a command)
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any, Protocol

from umup.checkpoint import make_directory, write_atomic
from umup.config.sections import RunConfig
from umup.errors import CheckpointError
from umup.models.specs import plan_for
from umup.study.dynamics import Dynamics
from umup.study.space import Space, Values, name_of

TRIES = 5
PROXY = "proxy"

Say = Callable[[str], None]
# (points done, points wanted so far)
Observe = Callable[[int, int], None]


def ignore(*_: object) -> None:
    """For those who want to hear nothing."""


@dataclass(frozen=True)
class Point:
    """What can be run: values, the seed's number, and the stage or line of its study, by name."""

    values: Values
    seed: int = 0
    stage: str = PROXY

    @property
    def name(self) -> str:
        """What makes two points the same."""
        return f"{self.stage}/{self.seed}/{name_of(self.values)}"


@dataclass(frozen=True)
class Outcome:
    """A finished run: nats per token (infinity if it diverged), what it did on the way, the tokens it trained on."""

    val_loss: float
    train_loss: float
    dynamics: Dynamics
    tokens: int


class State(StrEnum):
    """Of an attempt. `released`: given back by a worker that was interrupted, no failure."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    RELEASED = "released"


@dataclass(frozen=True)
class Attempt:
    """One trial of the ledger; `outcome` if it is done, `error` if it failed. Those of one `program` ran as one."""

    number: int
    point: Point
    state: State
    worker: str
    host: str
    program: str = ""
    outcome: Outcome | None = None
    error: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ask:
    """A question for an Optuna sampler (by name): the next values of a space."""

    sampler: str
    space: Space
    seed: int


@dataclass(frozen=True)
class ToDo:
    """What is left: points that a worker may claim now, in order; points that someone is at; a sampler to ask.

    `done` counts the points that are finished. With nothing open, running or to ask the study is finished.
    """

    open: tuple[Point, ...]
    running: int
    done: int
    ask: Ask | None = None

    @property
    def wanted(self) -> int:
        """All points that are wanted so far."""
        return self.done + self.running + len(self.open)

    @property
    def finished(self) -> bool:
        """Nothing is left."""
        return not (self.open or self.running or self.ask)


class Study(Protocol):
    """What workers need to know; frozen and picklable. `command`: a program to run instead of umup's own loop."""

    @property
    def command(self) -> str | None:
        """None: trials run in the worker."""

    def to_do(self, attempts: Sequence[Attempt]) -> ToDo:
        """From all attempts so far. Raises RunError where they leave no hope."""

    def config_of(self, point: Point) -> RunConfig:
        """The run that a point stands for."""

    def shown(self, point: Point) -> str:
        """A point in a few words."""


def left_of(points: Sequence[Point], attempts: Sequence[Attempt]) -> ToDo:
    """What is left of wanted points."""
    tries = _tries(attempts)
    known = {p.name: tries.get(p.name, []) for p in points}
    running = {n for n, of in known.items() if any(a.state == State.RUNNING for a in of)}
    done = {n for n, of in known.items() if any(a.outcome for a in of) or given_up(of)} - running
    return ToDo(tuple(p for p in points if p.name not in done | running), len(running), len(done))


def given_up(tries: Sequence[Attempt]) -> bool:
    """Whether a point failed too often to be tried again."""
    return sum(a.state == State.FAILED for a in tries) >= TRIES


def losses_of(attempts: Sequence[Attempt]) -> Mapping[str, float]:
    """Loss by the name of the point: of its first finished attempt, infinity where it was given up."""
    found: dict[str, float] = {}
    for name, of in _tries(attempts).items():
        losses = [a.outcome.val_loss for a in of if a.outcome]
        if losses or given_up(of):
            found[name] = losses[0] if losses else inf
    return found


def _tries(attempts: Sequence[Attempt]) -> Mapping[str, list[Attempt]]:
    by_point: dict[str, list[Attempt]] = {}
    for a in attempts:
        by_point.setdefault(a.point.name, []).append(a)
    return by_point


def same_study(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the directory holds this study, by what its study.json says. Raises CheckpointError for another's."""
    try:
        before = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise CheckpointError(f"{folder / 'study.json'}: not a study; choose another --out")
    changed = list(_differences(before, identity))
    if changed:
        raise CheckpointError(f"study {folder} was made otherwise: {'; '.join(changed[:3])}; choose another --out")
    return True


def rules_of(config: RunConfig) -> str:
    """A digest of the plan that umup's rules make of a config: trials under other rules are another study's."""
    return sha256(plan_for(config).to_json().encode()).hexdigest()[:16]


def begin_study(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the directory."""
    make_directory(folder)
    write_atomic(folder / "study.json", json.dumps(identity, indent=1))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in before:
        old, new = before[key], after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif json.dumps(old) != json.dumps(new) and prefix + key != "version":
            # Axes and configs as a whole are too long for a line.
            short = not isinstance(old or new, list | Mapping)
            yield f"{prefix}{key} was {old} and is now {new}" if short else f"{prefix}{key} differs"
