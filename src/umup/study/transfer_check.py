"""Does a tuned hyperparameter transfer? One line per size along an axis, searched at once, judged by verdicts.py.

The proxy is re-sized along width, depth, batch or length by the planner's own rules, and at every size the
hyperparameter's *proxy value* is searched on a log2 grid: where the rules are right the optimum stays where it is.

Not covered: several hyperparameters at once; trials over several devices; for a module that is no config's, fill
`Line`s from a loop of your own and judge them as a `TransferCheck`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from math import floor, isfinite, log2
from pathlib import Path
from typing import Any

import umup
from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError, DivergedError, did_you_mean
from umup.models.specs import plan_for
from umup.rules.schemes import scheme as find_scheme
from umup.study.axes import AXES, changed
from umup.study.lines import Line, at, line_of, searched
from umup.study.planner import HorizonRules, transfer
from umup.study.todo import (
    Attempt,
    Observe,
    Point,
    Say,
    ToDo,
    begin_study,
    ignore,
    left_of,
    losses_of,
    rules_of,
    same_study,
)
from umup.study.verdicts import USUAL, Tolerance, TransferCheck

MOST_POINTS = 64


@dataclass(frozen=True)
class CheckPlan:
    """What to measure. `proxy` is the config whose value was tuned, or would be; `sizes` are those beside its own.

    `grid`: log2 values of the hyperparameter at the proxy, evenly spaced, extended where an optimum lies on its edge.
    `seeds`: runs of the best value, its neighbours and the transferred value; all other points have one. Raises
    ConfigError and PlanError for names, grids and sizes that make no check, before anything runs.
    """

    proxy: RunConfig
    sizes: tuple[int, ...]
    grid: tuple[float, ...]
    axis: str = "width"
    hyperparameter: str = "lr"
    seeds: int = 3
    rules: HorizonRules | None = None
    tolerance: Tolerance = USUAL

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ConfigError(f"transfer-check: unknown axis {self.axis!r}; {did_you_mean(self.axis, AXES)}")
        if not 3 <= len(self.grid) <= MOST_POINTS:
            raise ConfigError(
                f"transfer-check: a grid of {len(self.grid)} points encloses no optimum; write 3 to {MOST_POINTS}, "
                "such as --grid 2^-2..2^2 --step 0.5"
            )
        if not set(self.sizes) - {self.home}:
            raise ConfigError(
                f"transfer-check: {self.axis} {self.home} is the config's own; write another, too: "
                f"--sizes {2 * self.home}"
            )
        for size in self.all_sizes:
            plan_for(self.config(size, 2.0 ** self.grid[0], 0))

    @property
    def home(self) -> int:
        """The proxy's size."""
        return AXES[self.axis].size(self.proxy)

    @property
    def key(self) -> str:
        """The hyperparameter's config key."""
        return dotted(self.proxy, self.hyperparameter)

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """The proxy's and the others, small to large."""
        return tuple(sorted({self.home, *self.sizes}))

    def config(self, size: int, value: float, seed: int) -> RunConfig:
        """The run at a size with the hyperparameter's value at the proxy."""
        tuned = parse_config(self.proxy.model_dump(), [(self.key, repr(value)), ("train.seed", str(seed))])
        config = transfer(tuned, AXES[self.axis].resize(tuned, size), self.rules).config
        return changed(config, "train", eval_every=config.train.steps)

    def stage(self, size: int) -> str:
        """The name of a size's line."""
        return f"{self.proxy.parametrization.scheme} {self.axis} {size}"

    def search(self, losses: Mapping[str, float]) -> tuple[list[Point], dict[int, Line]]:
        """All points wanted so far, given losses by the name of the point, and the lines that are complete.

        Every size searches its line by itself; then it wants all seeds at the proxy's best value.
        """
        known = {size: partial(self._loss, losses, size) for size in self.all_sizes}
        points = {size: searched(self.grid, self.seeds, known[size]) for size in self.all_sizes}
        proxy = line_of(points[self.home], known[self.home])
        if proxy is not None:
            points = {size: found | at(proxy.best, self.seeds) for size, found in points.items()}
        lines = {size: line_of(found, known[size]) for size, found in points.items()}
        # The slow ones (large) start first, so that none is left running alone at the end.
        wanted = [self._point(size, x, seed) for size in reversed(self.all_sizes) for x, seed in sorted(points[size])]
        return wanted, {size: line for size, line in lines.items() if line is not None}

    def _loss(self, losses: Mapping[str, float], size: int, x: float, seed: int) -> float | None:
        return losses.get(self._point(size, x, seed).name)

    def _point(self, size: int, x: float, seed: int) -> Point:
        return Point({self.key: 2.0**x}, seed, self.stage(size))


@dataclass(frozen=True)
class Checks:
    """Several checks as one study, so that no worker idles between their lines."""

    plans: tuple[CheckPlan, ...]
    command: None = None

    def to_do(self, attempts: Sequence[Attempt]) -> ToDo:
        """See todo.py."""
        losses = losses_of(attempts)
        return left_of([point for plan in self.plans for point in plan.search(losses)[0]], attempts)

    def config_of(self, point: Point) -> RunConfig:
        """The run that a point stands for."""
        plan, size = {plan.stage(size): (plan, size) for plan in self.plans for size in plan.all_sizes}[point.stage]
        return plan.config(size, point.values[plan.key], point.seed)

    def shown(self, point: Point) -> str:
        """Line, value and seed."""
        (key, value), *_ = point.values.items()
        return f"{point.stage}, {key.rpartition('.')[2]} {value:.4g}, seed {point.seed}"

    def identity(self, corpus: str) -> dict[str, Any]:
        """What makes trials comparable; sizes, grid, seeds and tolerance may change, and what is done counts."""
        rows = []
        for plan in self.plans:
            rest = _without(plan.proxy, plan.key, "train.seed")
            axis = {
                "axis": plan.axis,
                "hyperparameter": plan.hyperparameter,
                "horizon": plan.rules and asdict(plan.rules),
            }
            rows.append({"config": rest.model_dump(mode="json"), "rules": rules_of(rest), **axis})
        return {"version": umup.__version__, "corpus": corpus, "checks": rows}


def _without(config: RunConfig, *keys: str) -> RunConfig:
    """The config with the defaults of some dotted keys."""
    body = config.model_dump()
    for key in keys:
        *path, name = key.split(".")
        reduce(dict.__getitem__, path, body).pop(name, None)
    return parse_config(body)


def transfer_check(
    plan: CheckPlan, out: Path, workers: int = 2, say: Say = ignore, stack: int | None = None
) -> TransferCheck:
    """Measure and judge. Trials are recorded in `out` as they finish; the same call goes on after an interrupt.

    Call it below `if __name__ == "__main__":`, since workers are fresh processes. `say`, a function of a module, hears
    a line per trial; `stack` runs of a line may train as one program (None: see stacks.py). Raises DivergedError where
    every value diverged at the proxy, CheckpointError where `out` holds another study, MissingExtraError without
    optuna.
    """
    return transfer_checks([plan], out, workers, say, stack=stack)[0]


def transfer_checks(
    plans: Sequence[CheckPlan],
    out: Path,
    workers: int,
    say: Say = ignore,
    observe: Observe = ignore,
    stack: int | None = None,
) -> list[TransferCheck]:
    """Several checks as one study; `observe` hears (trials done, trials wanted so far)."""
    from umup.study.worker import Crew  # needs Optuna
    from umup.study.workers import corpus_of, run_study

    checks = Checks(tuple(plans))
    identity = checks.identity(corpus_of(plans[0].proxy))
    if not same_study(out, identity):
        begin_study(out, identity)
    losses = losses_of(run_study(checks, out, Crew(workers, stack), say, observe))
    return [judged(plan, plan.search(losses)[1]) for plan in plans]


def judged(plan: CheckPlan, lines: Mapping[int, Line]) -> TransferCheck:
    """The lines of a finished check. Raises DivergedError where the proxy has nothing to transfer."""
    proxy = lines[plan.home]
    if not isfinite(proxy.mean(proxy.best)):
        low, high = min(proxy.losses), max(proxy.losses)
        raise DivergedError(
            f"transfer-check: every {plan.hyperparameter} from 2^{low:g} to 2^{high:g} diverged at {plan.axis} "
            f"{plan.home}; write --grid 2^{low - 8:g}..2^{low - 1:g}, and look at warmup and data"
        )
    return TransferCheck(plan.proxy.parametrization.scheme, plan.home, lines, plan.tolerance, plan.axis, plan.key)


def dotted(config: RunConfig, hyperparameter: str) -> str:
    """The config key of a hyperparameter of the config's scheme. Raises ConfigError naming the nearest."""
    scheme = find_scheme(config.parametrization.scheme)
    known = {name: f"optimizer.{name}" for name in ("lr", "weight_decay", "eps")}
    known |= {h.name: f"parametrization.hparams.{h.name}" for h in scheme.hparams}
    if hyperparameter not in known:
        raise ConfigError(
            f"transfer-check: scheme {scheme.name!r} has no hyperparameter {hyperparameter!r}; "
            f"{did_you_mean(hyperparameter, known)}"
        )
    return known[hyperparameter]


def default_grid(config: RunConfig, hyperparameter: str, step: float = 0.5) -> tuple[float, ...]:
    """Two octaves to both sides of the config's own value, which is rounded to the grid.

    Raises ConfigError where the config gives no value to begin from.
    """
    key = dotted(config, hyperparameter)
    scheme = find_scheme(config.parametrization.scheme)
    given: Mapping[str, float | None] = {
        **{h.name: h.default for h in scheme.hparams},
        **config.parametrization.hparams,
        **config.optimizer.model_dump(include={"lr", "weight_decay", "eps"}),
    }
    value = given[hyperparameter]
    if not value:
        raise ConfigError(f"transfer-check: {key} is {value} in the config, and no grid lies around it; write --grid")
    middle, count = round(log2(value) / step) * step, floor(2 / step + 1e-9)
    return tuple(middle + i * step for i in range(-count, count + 1))


def double_sizes(config: RunConfig, axis: str) -> tuple[int, ...]:
    """Two and four times the config's own size."""
    home = AXES[axis].size(config)
    return (2 * home, 4 * home)
