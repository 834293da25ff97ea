"""The history of a study: one JSON line per finished trial, appended and never rewritten.

A trial is identified by its whole config, the plan that the rules make of it, and the corpus, so that a study goes on
where it was interrupted, never repeats a finished trial, and never mistakes one's result for another's.
"""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from umup.config.sections import RunConfig
from umup.errors import CheckpointError
from umup.models.specs import plan_for


@dataclass(frozen=True)
class Trial:
    """A finished trial; a diverged one has loss infinity."""

    key: str
    val_loss: float
    train_loss: float
    corpus: str = ""


def key_of(config: RunConfig) -> str:
    """The config and a digest of its plan as canonical JSON."""
    plan = sha256(plan_for(config).to_json().encode()).hexdigest()[:16]
    return json.dumps({**config.model_dump(mode="json"), "plan": plan}, sort_keys=True)


class Journal:
    """Trials by key, backed by a file; `corpus` names the data, and trials on other data do not count.

    A last line cut short by a kill is dropped. Raises CheckpointError for a line that is no trial.
    """

    def __init__(self, path: Path, corpus: str = "") -> None:
        self.path, self.corpus = path, corpus
        self._trials: dict[str, Trial] = {}
        if path.exists():
            whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
            if torn:
                path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
            for number, line in enumerate(whole.split("\n") if whole else [], 1):
                try:
                    trial = Trial(**json.loads(line))
                except (ValueError, TypeError):
                    raise CheckpointError(f"{path}, line {number}: not a trial; delete the line") from None
                if trial.corpus == corpus:
                    self._trials[trial.key] = trial

    def get(self, config: RunConfig) -> Trial | None:
        """The config's trial, if it is finished."""
        return self._trials.get(key_of(config))

    def add(self, trial: Trial) -> None:
        """Record a finished trial."""
        trial = replace(trial, corpus=self.corpus)
        self._trials[trial.key] = trial
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.__dict__) + "\n")
