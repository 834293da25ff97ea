"""What a scheme exposes: hyperparameters to tune and contested choices to name.

A hyperparameter is a number that a search may move and that transfers with the model (or does not: `transfers`
says so). An option is a choice on which public sources disagree; its default and every alternative name theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from umup.errors import PlanError, did_you_mean
from umup.rules.monomial import Monomial
from umup.rules.opscales import OpRule
from umup.rules.roles import OpKind, Role


@dataclass(frozen=True)
class HParam:
    """A tunable number of a scheme; `low` and `high` bound a log-uniform search, `largest` is the largest allowed."""

    name: str
    default: float
    low: float
    high: float
    transfers: str
    doc: str
    source: str
    largest: float = 1e6


@dataclass(frozen=True)
class Cell:
    """One formula of a table and where it comes from."""

    formula: Monomial
    source: str

    def __mul__(self, other: "Cell") -> "Cell":
        sources = dict.fromkeys([*self.source.split("; "), *other.source.split("; ")])
        return Cell(self.formula * other.formula, "; ".join(sources))


# Where a factor acts: inside which kind of residual branch (None: wherever the role stands), on which role, quantity.
Place = tuple[OpKind | None, Role, str]


@dataclass(frozen=True)
class Choice:
    """One alternative of an option: what it changes in the table.

    `cells` replace cells, `factors` multiply them; `on_residual` and `ops` replace the scheme's entries of that name;
    `depth_per_layer` is what a layer counts in `depth`; `hparams` exist under this choice alone, and searches leave
    them out unless they are named.
    """

    doc: str
    source: str
    depth_per_layer: float = 1.0
    hparams: tuple[HParam, ...] = ()
    factors: Mapping[Place, Cell] = field(default_factory=dict)
    cells: Mapping[tuple[Role, str], Cell] = field(default_factory=dict)
    on_residual: Mapping[str, Cell] = field(default_factory=dict)
    ops: Mapping[OpKind, OpRule] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """A contested choice of a scheme."""

    name: str
    default: str
    choices: Mapping[str, Choice]


def resolve_hparams(scheme: str, known: tuple[HParam, ...], given: Mapping[str, float]) -> dict[str, float]:
    """Defaults overlaid with what the user gave; an unknown name is a PlanError that names the nearest."""
    values = {h.name: h.default for h in known}
    largest = {h.name: h.largest for h in known}
    for name, value in given.items():
        if name not in values:
            tail = did_you_mean(name, values)
            raise PlanError(f"parametrization.hparams: scheme {scheme!r} has no hyperparameter {name!r}; {tail}")
        if not isinstance(value, Real):
            raise PlanError(f"parametrization.hparams.{name}: must be a number, not {type(value).__name__} {value!r}")
        if not 1e-6 <= value <= largest[name]:
            allowed = f"1e-6 to {largest[name]:g}"
            raise PlanError(f"parametrization.hparams.{name}: must be a positive number, not {value} ({allowed})")
        values[name] = float(value)
    return values


def resolve_options(scheme: str, known: tuple[Option, ...], given: Mapping[str, str | float]) -> dict[str, str]:
    """Default choices overlaid with what the user gave, as names or numbers; unknown ones are PlanErrors."""
    options = {o.name: o for o in known}
    chosen = {o.name: o.default for o in known}
    for name, value in given.items():
        choice = choice_name(value)
        if name not in options:
            tail = did_you_mean(name, options) if options else "it has none"
            raise PlanError(f"parametrization.options: scheme {scheme!r} has no option {name!r}; {tail}")
        if choice not in options[name].choices:
            tail = did_you_mean(choice, options[name].choices)
            raise PlanError(f"parametrization.options.{name}: unknown choice {choice!r}; {tail}")
        chosen[name] = choice
    return chosen


def choice_name(value: str | float) -> str:
    """An option's choice as the tables spell it: 0.5 is "0.5", 1 and 1.0 are "1"."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
