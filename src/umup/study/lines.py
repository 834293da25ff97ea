"""Lines: loss against log2 of a hyperparameter on a grid, and which points a line wants next.

A line wants one seed everywhere; while its best is on its edge the grid grows by a step there; then the best value and
its neighbours want all seeds, until the best by mean has them. `searched` is a function of what is known, as the
strategies of strategies.py are, so that a search goes on wherever it was interrupted and repeats nothing.

Not covered: several hyperparameters at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import mean

ROUNDS = 8

# (log2 value, seed) -> loss, infinity where the run diverged, None where it has not ended.
Known = Callable[[float, int], float | None]
Points = frozenset[tuple[float, int]]


@dataclass(frozen=True)
class Line:
    """A line: validation losses by log2 of the value, one per seed; a diverged seed is infinity."""

    losses: Mapping[float, tuple[float, ...]]

    def mean(self, x: float) -> float:
        """Mean loss over the seeds at a value."""
        return mean(self.losses[x])

    @property
    def best(self) -> float:
        """The log2 value of the lowest mean loss."""
        return min(self.losses, key=self.mean)

    @property
    def step(self) -> float:
        """The grid's spacing, in octaves."""
        grid = sorted(self.losses)
        return min(b - a for a, b in pairwise(grid))

    @property
    def optimum(self) -> float:
        """The vertex of the parabola through the best point and its neighbours, at most half a step from it."""
        grid = sorted(self.losses)
        i = grid.index(self.best)
        if not 0 < i < len(grid) - 1:
            return self.best
        low, mid, high = (self.mean(grid[j]) for j in (i - 1, i, i + 1))
        if not (isfinite(low) and isfinite(high)) or low + high <= 2 * mid:
            return self.best
        offset = 0.5 * self.step * (low - high) / (low - 2 * mid + high)
        return self.best + min(max(offset, -self.step / 2), self.step / 2)

    @property
    def on_edge(self) -> bool:
        """Whether the best value is the grid's first or last, so that the optimum may lie outside."""
        return self.best in (min(self.losses), max(self.losses))


def line_of(points: Iterable[tuple[float, int]], known: Known) -> Line | None:
    """The line of these points; None until all are known."""
    losses: dict[float, tuple[float, ...]] = {}
    for x, seed in sorted(points):
        loss = known(x, seed)
        if loss is None:
            return None
        losses[x] = (*losses.get(x, ()), loss)
    return Line(losses)


def searched(grid: Sequence[float], seeds: int, known: Known) -> Points:
    """All points that a line wants as far as it is known; it is complete when they are.

    `grid`: evenly spaced log2 values. After ROUNDS rounds a line may still end on its edge: `on_edge` tells.
    """
    points = frozenset((x, 0) for x in grid)
    for _ in range(ROUNDS):
        line = line_of(points, known)
        if line is None or _wanted(line, seeds) <= points:
            break
        points |= _wanted(line, seeds)
    while (line := line_of(points, known)) is not None and not at(line.best, seeds) <= points:
        points |= at(line.best, seeds)
    return points


def at(x: float, seeds: int) -> Points:
    """All seeds at a value."""
    return frozenset((x, seed) for seed in range(seeds))


def _wanted(line: Line, seeds: int) -> Points:
    """What a line needs: a point beyond its edge, or else seeds around its best."""
    if line.on_edge:
        return frozenset({(line.best - line.step if line.best == min(line.losses) else line.best + line.step, 0)})
    grid = sorted(line.losses)
    i = grid.index(line.best)
    return Points().union(*(at(x, seeds) for x in grid[i - 1 : i + 2]))
