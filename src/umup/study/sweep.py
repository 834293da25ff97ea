"""A hyperparameter search as a directory: what is searched, what is done, what to do next.

    DIR/study.json     config, axes, strategy, corpus, umup's version; written once, and a study keeps to it
    DIR/best.json      the choice, for the planner
    DIR/report.md      the ranking, with the dynamics, and why the choice was made

beside what every study has (todo.py). `Sweep.to_do` is the whole logic: from the attempts so far, which points are
wanted and open. It is a function of the journal, so workers may come, go and be killed.

With a shortlist, the ten best of the proxy are run again on another config (an intermediate size, at 20 tokens per
parameter) and ranked there: what wins at a small size and short training is not always what wins later.

Not covered: pruning of trials, several objectives.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite, prod
from pathlib import Path
from statistics import mean
from typing import Any

import umup
from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.errors import CheckpointError, ConfigError, RunError
from umup.models.specs import plan_for
from umup.study.dynamics import Dynamics, worst
from umup.study.space import LR, Axis, Space, Values, apply_values, base_values, check_space, name_of
from umup.study.strategies import SAMPLERS, STRATEGIES, Independent, Search, independent_result
from umup.study.todo import (
    PROXY,
    TRIES,
    Ask,
    Attempt,
    Point,
    ToDo,
    begin_study,
    given_up,
    left_of,
    rules_of,
    same_study,
)

TOKENS_PER_PARAMETER = 20
SHORTLIST = "shortlist"
AMONG = 3
WITHIN = 0.01


@dataclass(frozen=True)
class Sweep:
    """What a study is, fixed at its beginning. `corpus` identifies the data; "" where a command brings its own.

    `seeds` runs per point, from the config's seed upwards. `command` is a program to run instead of umup's own loop.
    `intermediate` is the shortlist's config, `keep` how many points it gets.
    """

    config: RunConfig
    space: Space
    strategy: str = "independent"
    trials: int = 200
    seeds: int = 1
    command: str | None = None
    intermediate: RunConfig | None = None
    keep: int = 10
    corpus: str = ""

    def __post_init__(self) -> None:
        if self.strategy not in (*STRATEGIES, *SAMPLERS):
            raise ConfigError(f"--strategy: {self.strategy!r} is not one of {', '.join((*STRATEGIES, *SAMPLERS))}")

    @property
    def search(self) -> Search:
        """What its strategy works on."""
        return Search(self.space, base_values(self.config, self.space), self.trials, self.config.train.seed)

    def config_of(self, point: Point) -> RunConfig:
        """The run that a point stands for."""
        owner = self.config if point.stage == PROXY or self.intermediate is None else self.intermediate
        config = apply_values(owner, point.values)
        return config.model_copy(
            update={"train": config.train.model_copy(update={"seed": config.train.seed + point.seed})}
        )

    def shown(self, point: Point) -> str:
        """The rate and what differs from the config's own values, keys without their sections."""
        told = {key: v for key, v in point.values.items() if key == LR or v != self.search.base[key]}
        values = " ".join(f"{key.rpartition('.')[2]}={v:.4g}" for key, v in told.items()) or "as configured"
        return f"{values}{f' seed {point.seed}' * bool(point.seed)}{' (shortlist)' * (point.stage != PROXY)}"

    def to_do(self, attempts: Sequence[Attempt]) -> ToDo:
        """From all attempts so far. Raises RunError once every point of a stage has diverged or was given up."""
        values, ask = _wanted(self, attempts)
        left = left_of([Point(v, seed) for v in values for seed in range(self.seeds)], attempts)
        # What someone has claimed and no strategy wants any more must still end, or its worker would outlive the study.
        if left.open or left.running or ask:
            return replace(left, ask=ask)
        ranked = candidates(self, attempts)
        if not any(isfinite(c.loss) for c in ranked):
            raise RunError(_hopeless(self, ranked, [a.error for a in attempts if a.error]))
        if self.intermediate is None:
            return left
        best = [c.values for c in ranked[: self.keep] if isfinite(c.loss)]
        left = left_of([Point(v, seed, SHORTLIST) for v in best for seed in range(self.seeds)], attempts)
        if left.finished and not any(isfinite(c.loss) for c in candidates(self, attempts, SHORTLIST)):
            raise RunError(
                f"all {len(best)} of the shortlist diverged or failed on its config; begin a study whose --shortlist "
                "is nearer to the proxy, or has a longer schedule.warmup_steps"
            )
        return left

    def json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return {
            "version": umup.__version__,
            "rules": rules_of(self.config),
            "config": self.config.model_dump(mode="json"),
            "space": [axis.__dict__ for axis in self.space],
            "strategy": self.strategy,
            "trials": self.trials,
            "seeds": self.seeds,
            "command": self.command,
            "intermediate": self.intermediate and self.intermediate.model_dump(mode="json"),
            "keep": self.keep,
            "corpus": self.corpus,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Sweep":
        """Of `json`'s data."""
        rest = {key: row[key] for key in ("strategy", "trials", "seeds", "command", "keep", "corpus")}
        space = tuple(Axis(**{**axis, "values": tuple(axis["values"])}) for axis in row["space"])
        second = row["intermediate"]
        return cls(parse_config(row["config"]), space, intermediate=second and parse_config(second), **rest)


@dataclass(frozen=True)
class Candidate:
    """A finished point: mean loss over its seeds (infinity if one diverged or was given up), worst dynamics."""

    values: Values
    stage: str
    losses: tuple[float, ...]
    dynamics: Dynamics
    attempts: tuple[int, ...]
    given_up: bool = False

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return mean(self.losses)


def twenty_tokens(config: RunConfig) -> RunConfig:
    """The config with as many steps as give its model 20 tokens per parameter."""
    parameters = sum(prod(p.spec.shape) for p in plan_for(config).stored.values())
    steps = ceil(TOKENS_PER_PARAMETER * parameters / config.tokens_per_step)
    return parse_config(config.model_dump(), [("train.steps", str(steps)), ("train.eval_every", str(steps))])


def open_study(folder: Path, sweep: Sweep) -> None:
    """Make the study, or see that it is this one. Raises InputError for bad axes and for another study's directory."""
    if same_study(folder, sweep.json()):
        return
    check_space(sweep.config, sweep.space)
    second = sweep.intermediate
    if second is not None:
        if second.parametrization.scheme != sweep.config.parametrization.scheme:
            raise ConfigError(
                f"--shortlist: its scheme is {second.parametrization.scheme!r} and the proxy's is "
                f"{sweep.config.parametrization.scheme!r}; write the same"
            )
        check_space(second, sweep.space)
    if sweep.strategy in STRATEGIES:
        STRATEGIES[sweep.strategy](sweep.search, {})
    begin_study(folder, sweep.json())


def load_study(folder: Path) -> Sweep:
    """The study of a directory. Raises CheckpointError where there is none."""
    try:
        return Sweep.from_json(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"study {folder}: it has no study.json; begin it with umup sweep CONFIG") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / 'study.json'}: not a study; choose another --out") from None


def candidates(sweep: Sweep, attempts: Sequence[Attempt], stage: str = PROXY) -> list[Candidate]:
    """The points of a stage whose seeds are all finished, best first, equal losses by their first attempt."""
    by_values: dict[str, dict[int, list[Attempt]]] = {}
    for a in attempts:
        if a.point.stage == stage:
            by_values.setdefault(name_of(a.point.values), {}).setdefault(a.point.seed, []).append(a)
    found = [_candidate(seeds, sweep.seeds) for seeds in by_values.values()]
    return sorted((c for c in found if c is not None), key=lambda c: (c.loss, c.attempts))


def _candidate(by_seed: Mapping[int, Sequence[Attempt]], seeds: int) -> Candidate | None:
    chosen = [next((a for a in tries if a.outcome), None) for tries in by_seed.values()]
    done = [a for a in chosen if a is not None]
    finished = [a is not None or given_up(tries) for a, tries in zip(chosen, by_seed.values(), strict=True)]
    if len(finished) < seeds or not all(finished):
        return None
    first = next(iter(by_seed.values()))[0]
    losses = tuple(a.outcome.val_loss if a is not None and a.outcome else inf for a in chosen)
    dynamics = worst([a.outcome.dynamics for a in done if a.outcome]) if done else Dynamics()
    numbers = tuple(a.number for a in done) or (first.number,)
    return Candidate(first.point.values, first.point.stage, losses, dynamics, numbers, len(done) < len(finished))


def _wanted(sweep: Sweep, attempts: Sequence[Attempt]) -> tuple[Sequence[Values], Ask | None]:
    """The proxy's points, and what a sampler is to be asked for another."""
    if sweep.strategy in STRATEGIES:
        losses = {name_of(c.values): c.loss for c in candidates(sweep, attempts)}
        return STRATEGIES[sweep.strategy](sweep.search, losses), None
    asked = {name_of(a.point.values): a.point.values for a in attempts if a.point.stage == PROXY}
    ask = Ask(sweep.strategy, sweep.space, sweep.config.train.seed)
    return list(asked.values()), ask if len(asked) < sweep.trials else None


def _hopeless(sweep: Sweep, ranked: Sequence[Candidate], errors: Sequence[str]) -> str:
    failed = sum(c.given_up for c in ranked)
    if failed:
        return f"no trial ended: {failed} of {len(ranked)} points failed {TRIES} times; the last: {errors[-1]}"
    rates = [c.values[LR] for c in ranked if LR in c.values]
    lowest = min(rates, default=sweep.config.optimizer.lr)
    return (
        f"all {len(ranked)} trials diverged, at {LR} {lowest:g} to {max(rates, default=lowest):g}; "
        f"write --space.{LR} {lowest / 2**10:g}..{lowest:g}, or a longer schedule.warmup_steps"
    )


def pick(ranked: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The choice and why: the best, or a clean one of the AMONG best whose loss is within WITHIN of it."""
    best = ranked[0]
    if best.dynamics.clean:
        return best, "lowest loss, and clean dynamics"
    for rank, c in enumerate(ranked[1:AMONG], 2):
        if c.dynamics.clean and c.loss <= best.loss * (1 + WITHIN):
            return c, (
                f"rank {rank}: the lowest loss ({best.loss:.4f}) has {best.dynamics.faults}; this one is clean and "
                f"{c.loss - best.loss:.4f} nats worse"
            )
    return best, f"lowest loss, with {best.dynamics.faults}: no clean one among the {AMONG} best is within {WITHIN:.0%}"


def independent_of(sweep: Sweep, attempts: Sequence[Attempt]) -> Independent | None:
    """What the lines of an independent search say, once they are finished."""
    if sweep.strategy != "independent":
        return None
    return independent_result(sweep.search, {name_of(c.values): c.loss for c in candidates(sweep, attempts)})
