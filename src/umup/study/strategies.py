"""Which values a sweep tries, as functions of what is known so far.

A strategy names *all* the points it wants, in order, given the losses of the finished ones; it wants more as they come
in, and is done when it wants nothing new. It keeps no state: any worker on any host computes the same list from the
same journal, so nobody coordinates and a study goes on wherever it was interrupted.

- `independent` (u-muP, 2407.17465): the learning rate's line at the config's other values; then every other
  hyperparameter on its own line at the best rate, all lines in parallel; then all lines' best together. The loss that
  the combination has beyond what the lines' gains promise is the *interaction*, which u-muP keeps small.
- `random` (Cerebras-GPT: 200 draws): log-uniform draws from all axes at once.
- `grid`: the product of the axes.
- `tpe` and `gp` are Optuna's samplers and live in study/ledger.py.

Not covered: noise (a line's best is the lowest mean over the seeds asked for, whatever the margin), pruning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from random import Random

from umup.errors import ConfigError
from umup.study.space import LR, Axis, Number, Space, Values, name_of

GROWTH = 4
GRID_LIMIT = 4096

Losses = Mapping[str, float]


@dataclass(frozen=True)
class Search:
    """What a strategy works on: axes, the config's own values, how many draws, their seed."""

    space: Space
    base: Values
    trials: int
    seed: int


Strategy = Callable[[Search, Losses], Sequence[Values]]


@dataclass(frozen=True)
class LineResult:
    """One finished line of an independent search: its best value, and the nats it gains over the base value's loss."""

    key: str
    losses: Mapping[Number, float]
    best: Number
    gain: float

    @property
    def on_edge(self) -> bool:
        """Whether the optimum may lie beyond the line."""
        return self.best in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Independent:
    """A finished independent search. `promised` is the best rate's loss less all gains; losses in nats."""

    lines: tuple[LineResult, ...]
    combined: Values
    promised: float
    measured: float

    @property
    def interaction(self) -> float:
        """How much worse the combination is than the lines promise; 0 if hyperparameters act independently."""
        return self.measured - self.promised


def independent(search: Search, losses: Losses) -> Sequence[Values]:
    """The lines as far as they can be known now, and the combination once they are finished."""
    base = search.base
    wanted: list[Values] = []
    for axis in search.space:
        if axis.key == LR:
            rates: list[Values] = [{**base, LR: rate} for rate in _grown(axis, base, losses)]
            if not _known(rates, losses):
                return rates
            wanted += rates
            base = min(rates, key=lambda point: losses[name_of(point)])
    wanted.append(base)
    lines = [_line(axis, base) for axis in search.space if axis.key != LR]
    wanted += [point for line in lines for point in line]
    if _known(wanted, losses):
        wanted.append(_combination(search.space, base, losses))
    return list({name_of(point): point for point in wanted}.values())


def independent_result(search: Search, losses: Losses) -> Independent | None:
    """What the lines of a finished independent search say; None before it is finished."""
    wanted = independent(search, losses)
    if not _known(wanted, losses):
        return None
    lines = []
    base = dict(search.base)
    for axis in search.space:
        if axis.key == LR:
            rates = {rate: losses[name_of({**base, LR: rate})] for rate in _grown(axis, base, losses)}
            base[LR] = min(rates, key=rates.__getitem__)
            lines.append(LineResult(LR, rates, base[LR], 0.0))
    start = losses[name_of(base)]
    for axis in search.space:
        if axis.key != LR:
            along = {point[axis.key]: losses[name_of(point)] for point in _line(axis, base)}
            best = min(along, key=along.__getitem__)
            lines.append(LineResult(axis.key, along, best, start - along[best]))
    combined = _combination(search.space, base, losses)
    promised = start - sum(line.gain for line in lines)
    return Independent(tuple(lines), combined, promised, losses[name_of(combined)])


def random_draws(search: Search, losses: Losses) -> Sequence[Values]:
    """The same draws on every host, whatever is finished."""
    rng = Random(search.seed)
    return [{axis.key: _draw(axis, rng) for axis in search.space} for _ in range(search.trials)]


def grid(search: Search, losses: Losses) -> Sequence[Values]:
    """Every combination of the axes' values. Raises ConfigError beyond GRID_LIMIT points."""
    count = 1
    for axis in search.space:
        count *= len(axis.values)
    if count > GRID_LIMIT:
        raise ConfigError(
            f"--strategy grid: {count} points on {len(search.space)} axes; write --space.KEY for the few axes that "
            "matter, or --strategy independent"
        )
    keys = [axis.key for axis in search.space]
    return [dict(zip(keys, point, strict=True)) for point in product(*(axis.values for axis in search.space))]


STRATEGIES: Mapping[str, Strategy] = {"independent": independent, "random": random_draws, "grid": grid}
# Optuna's, by name (ledger.py).
SAMPLERS = ("tpe", "gp")


def _grown(axis: Axis, base: Values, losses: Losses) -> list[Number]:
    """The rates of the line; one more beyond an end that is best, until the best is inside."""
    rates = list(axis.values)
    for _ in range(GROWTH if axis.grows else 0):
        line = [{**base, LR: rate} for rate in rates]
        if not _known(line, losses):
            break
        found = [losses[name_of(point)] for point in line]
        at = found.index(min(found))
        if at == 0:
            rates.insert(0, rates[0] ** 2 / rates[1])
        elif at == len(rates) - 1:
            rates.append(rates[-1] ** 2 / rates[-2])
        else:
            break
    return rates


def _line(axis: Axis, base: Values) -> Sequence[Values]:
    return [{**base, axis.key: value} for value in sorted({*axis.values, base[axis.key]})]


def _combination(space: Space, base: Values, losses: Losses) -> Values:
    combined = dict(base)
    for axis in space:
        if axis.key != LR:
            best = min(_line(axis, base), key=lambda point: losses[name_of(point)])
            combined[axis.key] = best[axis.key]
    return combined


def _known(points: Sequence[Values], losses: Losses) -> bool:
    return all(name_of(point) in losses for point in points)


def _draw(axis: Axis, rng: Random) -> Number:
    if axis.listed:
        return rng.choice(axis.values)
    value = exp(rng.uniform(log(axis.values[0]), log(axis.values[-1])))
    # Six digits, because hosts may disagree on the last bits of exp and log.
    return min(max(float(f"{value:.6g}"), axis.values[0]), axis.values[-1])
