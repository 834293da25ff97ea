"""Does a tuned hyperparameter transfer? One line per size along an axis, searched at once, judged by verdicts.py.

The proxy is re-sized along width, depth, batch or length by the planner's own rules, and at every size the
hyperparameter's *proxy value* is searched on a log2 grid: where the rules are right the optimum stays where it is.

Not covered: several hyperparameters at once; trials over several devices; for a module that is no config's, fill
`Line`s from a loop of your own and judge them as a `TransferCheck`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite, log2
from pathlib import Path

from umup.checkpoint import make_directory
from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.data.tokens import prepare
from umup.errors import ConfigError, DivergedError, did_you_mean
from umup.models.specs import plan_for
from umup.rules.schemes import scheme as find_scheme
from umup.study.axes import AXES
from umup.study.journal import Journal
from umup.study.planner import HorizonRules, transfer
from umup.study.search import Line, MakeConfig, Observe, Runner, evaluate, search_lines, worker_pool
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
        for make in self.makers.values():
            plan_for(make(2.0 ** self.grid[0], 0))

    @property
    def home(self) -> int:
        """The proxy's size."""
        return AXES[self.axis].size(self.proxy)

    @property
    def makers(self) -> dict[int, MakeConfig]:
        """(value at the proxy, seed) -> config, by size, small to large."""
        return {size: self._maker(size) for size in sorted({self.home, *self.sizes})}

    def _maker(self, size: int) -> MakeConfig:
        key = dotted(self.proxy, self.hyperparameter)

        def make(value: float, seed: int) -> RunConfig:
            tuned = parse_config(self.proxy.model_dump(), [(key, repr(value)), ("train.seed", str(seed))])
            config = transfer(tuned, AXES[self.axis].resize(tuned, size), self.rules).config
            train = config.train.model_copy(update={"eval_every": config.train.steps})
            return config.model_copy(update={"train": train})

        return make


def transfer_check(
    plan: CheckPlan, out: Path, workers: int = 2, observe: Observe = lambda done, asked: None
) -> TransferCheck:
    """Measure and judge. Trials go into `out`/trials.jsonl as they finish; the same call goes on after an interrupt.

    Call it below `if __name__ == "__main__":`, since workers are fresh processes. `observe` hears (trials finished,
    trials asked for). Raises DivergedError where every value diverged at the proxy.
    """
    make_directory(out)
    p = plan.proxy
    record = prepare(p.data, p.model.vocab_size, p.tokens_per_batch).record
    corpus = "/".join(record[part]["sha256"] for part in ("train", "val"))
    with worker_pool(workers) as pool:
        return run_check(plan, Runner(Journal(out / "trials.jsonl", corpus), pool, observe))


def run_check(plan: CheckPlan, runner: Runner) -> TransferCheck:
    """The same by a runner of the caller's."""
    makers = {str(size): make for size, make in plan.makers.items()}
    home = str(plan.home)
    lines = measure(
        runner, makers, {label: list(plan.grid) for label in makers}, plan.seeds, dict.fromkeys(makers, home)
    )
    at_home = lines[home]
    if not isfinite(at_home.mean(at_home.best)):
        low, high = min(at_home.losses), max(at_home.losses)
        raise DivergedError(
            f"transfer-check: every {plan.hyperparameter} from 2^{low:g} to 2^{high:g} diverged at {plan.axis} {home}; "
            f"write --grid 2^{low - 8:g}..2^{low - 1:g}, and look at warmup and data"
        )
    by_size = {int(label): line for label, line in lines.items()}
    key, scheme = dotted(plan.proxy, plan.hyperparameter), plan.proxy.parametrization.scheme
    return TransferCheck(scheme, plan.home, by_size, plan.tolerance, plan.axis, key)


def measure(
    runner: Runner,
    makers: Mapping[str, MakeConfig],
    grid: Mapping[str, list[float]],
    seeds: int,
    proxies: Mapping[str, str],
) -> dict[str, Line]:
    """Search all lines at once, then give each the missing seeds at the best value of its proxy (a label)."""
    lines = search_lines(runner, makers, grid, seeds)
    points = {label: {(x, s) for x, ys in line.losses.items() for s in range(len(ys))} for label, line in lines.items()}
    for label, proxy in proxies.items():
        points[label] |= {(lines[proxy].best, seed) for seed in range(seeds)}
    return evaluate(runner, makers, points)


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
