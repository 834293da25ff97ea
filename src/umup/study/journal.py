"""The history of a study: one JSON line per finished trial, appended and never rewritten.

A trial is identified by its whole config, so that a study goes on where it was interrupted, never repeats a finished
trial, and never mistakes one config's result for another's.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from umup.config.sections import RunConfig


@dataclass(frozen=True)
class Trial:
    """A finished trial; a diverged one has loss infinity."""

    key: str
    val_loss: float
    train_loss: float


def key_of(config: RunConfig) -> str:
    """The config as canonical JSON."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


class Journal:
    """Trials by key, backed by a file. A last line cut short by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trials: dict[str, Trial] = {}
        if path.exists():
            whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
            if torn:
                path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
            for line in filter(None, whole.split("\n")):
                trial = Trial(**json.loads(line))
                self._trials[trial.key] = trial

    def get(self, config: RunConfig) -> Trial | None:
        """The config's trial, if it is finished."""
        return self._trials.get(key_of(config))

    def add(self, trial: Trial) -> None:
        """Record a finished trial."""
        self._trials[trial.key] = trial
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.__dict__) + "\n")
