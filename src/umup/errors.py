"""Everything umup raises on purpose.

    UmupError
    ├── InputError            what the user gave is wrong; the command line exits with 2
    │   ├── ConfigError       a config key, value or override
    │   ├── PlanError         a scheme, hyperparameter, role or site that the tables do not answer
    │   ├── DataError         a corpus, token file or tokenizer
    │   ├── CheckpointError   a run directory or checkpoint that cannot be used
    │   └── MissingExtraError an optional dependency that is not installed
    └── RunError              a run that started and failed; the command line exits with 3
        └── DivergedError     the loss became NaN or infinite

A message says what is wrong, where, and what to write instead, in one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UmupError(Exception):
    """Base of everything umup raises on purpose."""


class InputError(UmupError):
    """What the user gave is wrong."""


class ConfigError(InputError):
    """A config key, value or override is wrong."""


class PlanError(InputError):
    """A scheme, hyperparameter, role or site that the tables do not answer."""


class DataError(InputError):
    """A corpus, token file or tokenizer cannot be used."""


class CheckpointError(InputError):
    """A run directory or checkpoint cannot be used."""


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; write: pip install 'umup[{extra}]'")


class RunError(UmupError):
    """A run that started has failed."""


class DivergedError(RunError):
    """The loss became NaN or infinite."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known name, whatever its case, or all of them when none is near."""
    names = {known_name.lower(): known_name for known_name in known}
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    return f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(names.values())}"
