"""The record of a study: Optuna's journal file, which many processes and hosts append to, and whose turn it is.

A trial of the journal is one *attempt* at a point. A worker takes a turn (a lock file beside the journal) in which it
reads what everyone has done, decides, and claims a point; it trains outside of the turn. What an attempt stands for is
in its user attributes, so that Optuna's own tools can read the file and this module is the only one that knows Optuna.

The journal differs from Optuna's own backend in one thing: an append first cuts off a line that a kill or a full disk
left unfinished, and takes itself back if it fails, so that one broken write never hides what comes after it.

Not covered: databases, Redis, Optuna's pruners.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from umup.errors import CheckpointError, MissingExtraError
from umup.study.dynamics import Dynamics
from umup.study.space import Number, Values
from umup.study.todo import Ask, Attempt, Outcome, Point, State

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock, JournalStorage
    from optuna.trial import FrozenTrial, TrialState, create_trial
except ImportError:
    raise MissingExtraError("optuna", "sweep", "a study of many trials") from None

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

STUDY = "sweep"


class Ledger:
    """The attempts of a study directory. `recovered` says what was cut off the journal's end, "" if nothing.

    Raises CheckpointError for a line of the journal that is no record and not the last.
    """

    def __init__(self, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / "journal.log"
        self._turn = JournalFileOpenLock(str(folder / "turn"))
        with self.turn():
            with _held(JournalFileOpenLock(str(path))):
                self.recovered = _mend(path)
            self._storage = JournalStorage(_Backend(path))
            if not self._storage.get_all_studies():
                optuna.create_study(storage=self._storage, study_name=STUDY)
        self._study = self._storage.get_study_id_from_name(STUDY)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone among all workers; a lock whose holder was killed is broken after 30 s."""
        with _held(self._turn):
            yield

    def attempts(self) -> list[Attempt]:
        """All, by number."""
        trials = self._storage.get_all_trials(self._study, deepcopy=False)
        return [_attempt(trial) for trial in trials if "point" in trial.user_attrs]

    def claim(self, point: Point, worker: str, host: str, program: str) -> int:
        """Begin an attempt; returns its number."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(point.values),
            distributions={key: _around(value) for key, value in point.values.items()},
            user_attrs={"point": asdict(point), "worker": worker, "host": host, "program": program},
        )
        return self._storage.get_trial_number_from_id(self._storage.create_new_trial(self._study, trial))

    def suggest(self, ask: Ask) -> Values:
        """What an Optuna sampler would try next, given all attempts. Raises MissingExtraError without its packages."""
        finished = self._storage.get_all_trials(self._study)
        # A study in memory: what is asked there is not yet an attempt here.
        study = optuna.create_study(sampler=_sampler(ask.sampler, ask.seed + len(finished)))
        distributions = {axis.key: _distribution(axis.values, axis.listed) for axis in ask.space}
        for trial in finished:
            if set(trial.params) == set(distributions) and trial.state != TrialState.FAIL:
                study.add_trial(_as_known(trial, distributions))
        params = study.ask(distributions).params
        return {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in params.items()}

    def finish(self, number: int, outcome: Outcome, told: float) -> bool:
        """Record an outcome; `told` is the finite loss that samplers see.

        False if the attempt was taken for dead meanwhile and someone else has the point; nothing is recorded then.
        """
        row = {**asdict(outcome), "val_loss": _plain(outcome.val_loss), "train_loss": _plain(outcome.train_loss)}
        identity = self._id(number)
        try:
            self._storage.set_trial_user_attr(identity, "outcome", row)
            self._storage.set_trial_state_values(identity, TrialState.COMPLETE, [told])
        except UpdateFinishedTrialError:
            return False
        return True

    def fail(self, number: int, error: str, released: bool = False) -> None:
        """Record a failure, or that the attempt was given back; nothing if it had ended."""
        identity = self._id(number)
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(identity, "released" if released else "error", error)
            self._storage.set_trial_state_values(identity, TrialState.FAIL)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study, number)


def _attempt(trial: FrozenTrial) -> Attempt:
    said: Mapping[str, Any] = trial.user_attrs
    states = {
        TrialState.COMPLETE: State.DONE,
        TrialState.FAIL: State.RELEASED if "released" in said else State.FAILED,
    }
    outcome = None
    if trial.state == TrialState.COMPLETE:
        row = dict(said["outcome"])
        losses = {key: inf if row.pop(key) is None else said["outcome"][key] for key in ("val_loss", "train_loss")}
        outcome = Outcome(**losses, dynamics=Dynamics(**row["dynamics"]), tokens=row["tokens"])
    return Attempt(
        trial.number,
        Point(**said["point"]),
        states.get(trial.state, State.RUNNING),
        said["worker"],
        said["host"],
        said["program"],
        outcome,
        said.get("error", ""),
    )


def _plain(loss: float) -> float | None:
    """JSON has no infinity."""
    return None if loss == inf else loss


def _around(value: Number) -> FloatDistribution:
    return FloatDistribution(value, value) if value <= 0 else FloatDistribution(value / 2, value * 2, log=True)


def _distribution(values: tuple[Number, ...], listed: bool) -> BaseDistribution:
    return CategoricalDistribution(values) if listed else FloatDistribution(values[0], values[-1], log=True)


def _as_known(trial: FrozenTrial, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """As if it had been drawn from these distributions; one that still runs counts, so that no two are alike."""
    return create_trial(state=trial.state, params=trial.params, distributions=distributions, values=trial.values)


def _sampler(name: str, seed: int) -> "BaseSampler":
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if find_spec("scipy") is None:
        raise MissingExtraError("scipy", "sweep", "--strategy gp")
    return optuna.samplers.GPSampler(seed=seed)


class _Backend(BaseJournalBackend):
    """Optuna's journal file, with appends that never follow an unfinished line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))
        self._lock = JournalFileOpenLock(str(path))

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        yield from self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with _held(self._lock), self._path.open("r+b", buffering=0) as file:
            _append(file, text.encode())


def _append(file: IO[bytes], data: bytes) -> None:
    end = _whole(file)
    file.truncate(end)
    file.seek(end)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def _whole(file: IO[bytes]) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _mend(path: Path) -> str:
    """Cut a broken last line off; returns what to say about it."""
    if not path.exists():
        return ""
    lines = path.read_bytes().splitlines(keepends=True)
    good = _records(lines)
    if good < len(lines) - 1:
        raise CheckpointError(f"{path}, line {good + 1}: not a record; delete the line")
    if good == len(lines):
        return ""
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[:good])))
    return f"{path}: its last line was cut short and is dropped; {good} records are kept"


def _records(lines: Iterable[bytes]) -> int:
    """How many lines from the first on are records."""
    number = 0
    for line in lines:
        try:
            if not (line.endswith(b"\n") and isinstance(json.loads(line), dict)):
                break
        except ValueError:
            break
        number += 1
    return number


@contextmanager
def _held(lock: JournalFileOpenLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
