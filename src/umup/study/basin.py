"""Where a line's optimum lies, and how well that is known: a parabola in log2 through the points near the best.

    loss[x, seed] = level[seed] + b x + c x^2,  optimum -b / (2c)

Seeds share the slope and the curvature but have levels of their own, so that a lucky seed does not move the optimum.
The fit takes finite points within an octave of the best, or a grid step where that is more. A point more than four
times as high above the best as the higher of its two neighbours is no parabola's, wherever its vertex between grid
points: it stands on the cliff before divergence and is left out. Intervals are a residual bootstrap, residuals drawn
anew for every point and widened for the degrees of freedom that the fit took; the draws are the same in every process.

Not covered: uncertainty of the grid's coarseness where the fit leaves no residuals (one seed and three points): there
the interval is the grid's half step to both sides, and noise is unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from umup.study.lines import Line

OCTAVE = 1.0
CLIFF = 4.0
DRAWS = 2000
LEVEL = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number and the bounds that hold LEVEL of its bootstrap distribution."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Basin:
    """The fit of one line; positions are log2 of the hyperparameter, losses nats per token.

    `noise` is the standard deviation of a single run about the fit, None where the fit left no degree of freedom.
    `draws` are DRAWS bootstrapped optima. Where no parabola opens upward the optimum is the best point.
    """

    line: Line
    optimum: float
    curvature: float
    noise: float | None
    draws: Array

    @property
    def interval(self) -> Interval:
        """The optimum with its bounds."""
        return interval(self.optimum, self.draws)


def interval(value: float, draws: Array) -> Interval:
    """The number with the central LEVEL of its draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def window(line: Line) -> list[float]:
    """The grid points that a parabola is fitted to: see the module."""
    best, step = line.best, line.step
    near = [x for x in line.losses if abs(x - best) <= max(OCTAVE, step) * (1 + 1e-9) and isfinite(line.mean(x))]
    rise = {x: line.mean(x) - line.mean(best) for x in near}
    beside = [rise[x] for x in near if 0 < abs(x - best) <= step * (1 + 1e-9)]
    limit = CLIFF * max(beside, default=inf) * (1 + 1e-9)
    # Ties rise by nothing; noise then decides, and no point is a cliff.
    return [x for x in near if rise[x] <= limit or limit == 0 or abs(x - best) <= step * (1 + 1e-9)]


def fit(line: Line, stream: int = 0) -> Basin:
    """Fit a line. `stream` keeps the bootstraps of different lines independent of each other."""
    points = [(x, seed, y) for x in window(line) for seed, y in enumerate(line.losses[x])]
    step = line.step
    if line.on_edge or not isfinite(line.mean(line.best)) or len({x for x, _, _ in points}) < 3:
        return _unfitted(line, line.best, step)
    seeds = sorted({seed for _, seed, _ in points})
    x = np.array([x - line.best for x, _, _ in points])
    y = np.array([y for _, _, y in points])
    design = np.stack([x, x**2, *((np.array([s for _, s, _ in points]) == seed) * 1.0 for seed in seeds)], axis=1)
    solve = np.linalg.pinv(design)
    fitted = design @ (solve @ y)
    b, c = (float(n) for n in (solve @ y)[:2])
    freedom = len(points) - design.shape[1]
    reach = max(OCTAVE, step)
    vertex = min(max(-b / (2 * c), -reach), reach) if c > 0 else 0.0
    if freedom <= 0:
        return _unfitted(line, line.best + vertex, step, c)
    residuals = (y - fitted) * sqrt(len(points) / freedom)
    random = np.random.default_rng(stream)
    again = fitted + random.choice(residuals, size=(DRAWS, len(points)))
    coefficients = again @ solve.T
    draws = line.best + _lowest(coefficients[:, 0], coefficients[:, 1], reach)
    return Basin(line, line.best + vertex, c, float(np.sqrt(np.mean(residuals**2))), draws)


def _lowest(b: Array, c: Array, reach: float) -> Array:
    """Where parabolas are lowest within `reach` of the best point: at an end where they open downward."""
    opens = c > 0
    return np.clip(np.where(opens, -b / np.where(opens, 2 * c, 1.0), -np.sign(b) * reach), -reach, reach)


def _unfitted(line: Line, optimum: float, step: float, curvature: float = 0.0) -> Basin:
    """No residuals to draw from: all that is known is the grid."""
    return Basin(line, optimum, curvature, None, np.linspace(optimum - step / 2, optimum + step / 2, DRAWS))


def slope(sizes: Sequence[int], basins: Sequence[Basin]) -> Interval:
    """Octaves of drift per doubling of the size: least squares through the optima, bounds from their draws."""
    x = np.log2(np.array(sizes, float))
    x = x - x.mean()
    weights = x / float(x @ x)
    # Unfitted draws are ordered: shuffled they are independent of each other.
    random = np.random.default_rng(len(basins))
    draws = sum(
        (w * random.permutation(basin.draws) for w, basin in zip(weights, basins, strict=True)), np.zeros(DRAWS)
    )
    return interval(float(weights @ np.array([b.optimum for b in basins])), draws)


def difference(a: Basin, b: Basin) -> Interval:
    """Octaves between two optima, a's minus b's."""
    random = np.random.default_rng(1)
    return interval(a.optimum - b.optimum, random.permutation(a.draws) - random.permutation(b.draws))
