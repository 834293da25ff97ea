"""What lines over sizes say: the optimum's drift, what not re-tuning costs, and a verdict.

    drift     octaves between the optimum at a size and the proxy's (fits of basin.py)
    penalty   nats lost at a size by the proxy's best grid value against the size's own, over paired seeds

Each is judged by its 95% interval, so that a verdict is not noise: pass where all intervals lie within the tolerance,
fail where one lies outside of it, undecided otherwise and where an optimum is not enclosed by its grid.

Not covered: the size's own best is the lowest of several means, which biases the penalty up by a share of the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite, sqrt
from statistics import mean
from typing import Any, Literal

from umup.study.basin import Basin, Interval, difference, fit, slope
from umup.study.lines import Line

Verdict = Literal["pass", "fail", "undecided"]
# Two standard deviations of a difference of means; the bootstrap's LEVEL for a normal.
Z = 1.96


@dataclass(frozen=True)
class Tolerance:
    """What still counts as transferring: `drift` in octaves over the tested range, `penalty` in nats at any size.

    The defaults are one step of the usual grid and the noise of a well-run line (2407.17465: under 0.005 nats).
    """

    drift: float = 0.5
    penalty: float = 0.01


USUAL = Tolerance()


@dataclass(frozen=True)
class TransferCheck:
    """Lines over sizes, and what they say. `proxy` is the size where values are tuned; everything is measured."""

    scheme: str
    proxy: int
    lines: Mapping[int, Line]
    tolerance: Tolerance = USUAL
    axis: str = "width"
    hyperparameter: str = "optimizer.lr"

    @cached_property
    def basins(self) -> Mapping[int, Basin]:
        """The fit at every size."""
        return {size: fit(line, stream) for stream, (size, line) in enumerate(self.lines.items())}

    @property
    def rate(self) -> float:
        """The proxy's best log2 value on the grid: what is transferred."""
        return self.lines[self.proxy].best

    def drift(self, size: int) -> float:
        """Octaves between the optimum at `size` and the proxy's."""
        return self.drift_interval(size).value

    def drift_interval(self, size: int) -> Interval:
        """The same with its bounds."""
        if size == self.proxy:
            return Interval(0.0, 0.0, 0.0)
        return difference(self.basins[size], self.basins[self.proxy])

    @cached_property
    def drift_per_doubling(self) -> Interval:
        """Octaves per doubling of the size, by least squares over all sizes."""
        return slope(list(self.lines), list(self.basins.values()))

    def penalty(self, size: int) -> tuple[float, ...]:
        """Loss at the transferred value minus loss at the size's own best, per seed that both have.

        A diverged seed costs infinity.
        """
        line = self.lines[size]
        pairs = zip(line.losses[self.rate], line.losses[line.best], strict=False)
        return tuple(a - b if isfinite(a) else inf for a, b in pairs)

    def mean_penalty(self, size: int) -> float:
        """The mean of `penalty`."""
        return mean(self.penalty(size))

    def penalty_interval(self, size: int) -> Interval:
        """The mean with bounds from the noise of single runs, the size's own or else the proxy's.

        Unknown noise bounds nothing.
        """
        value, line = self.mean_penalty(size), self.lines[size]
        if self.rate == line.best or not isfinite(value):
            return Interval(value, value, value)
        noise = self.basins[size].noise or self.basins[self.proxy].noise
        half = inf if noise is None else Z * noise * sqrt(2 / len(self.penalty(size)))
        return Interval(value, value - half, value + half)

    @property
    def unenclosed(self) -> tuple[int, ...]:
        """Sizes whose best value is on the edge of its grid, or where nothing converged."""
        return tuple(s for s, line in self.lines.items() if line.on_edge or not isfinite(line.mean(line.best)))

    def verdict_at(self, size: int) -> Verdict:
        """One size's verdict. A transferred value that diverges fails, wherever the optimum is."""
        cost, moved = self.penalty_interval(size), self.drift_interval(size)
        if cost.low > self.tolerance.penalty:
            return "fail"
        if {size, self.proxy} & set(self.unenclosed):
            return "undecided"
        if moved.low > self.tolerance.drift or moved.high < -self.tolerance.drift:
            return "fail"
        within = max(moved.high, -moved.low) <= self.tolerance.drift and cost.high <= self.tolerance.penalty
        return "pass" if within else "undecided"

    @property
    def verdict(self) -> Verdict:
        """fail if any size fails, pass if all pass. A proxy whose own optimum is unknown has nothing to transfer."""
        if self.proxy in self.unenclosed:
            return "undecided"
        found = {self.verdict_at(size) for size in self.lines if size != self.proxy}
        return "fail" if "fail" in found else "undecided" if "undecided" in found else "pass"


def summary(check: TransferCheck) -> list[str]:
    """What was measured and the verdict, in plain words."""
    name = check.hyperparameter.rsplit(".", 1)[-1]
    lines = [f"{check.scheme}, {name} over {check.axis}: tuned at {check.proxy}, best 2^{check.rate:g}"]
    for size, line in check.lines.items():
        edge = " (on the edge of its grid)" if size in check.unenclosed else ""
        best = f"  {check.axis} {size}: optimum {_with_bounds(check.basins[size].interval, '.2f', '2^')}{edge}"
        best += f", loss {line.mean(line.best):.4f}"
        if size != check.proxy:
            best += f"; drift {_with_bounds(check.drift_interval(size), '+.2f')} octaves, penalty {_cost(check, size)}"
            best += f": {check.verdict_at(size)}"
        lines.append(best)
    lines.append(f"  drift per doubling: {_with_bounds(check.drift_per_doubling, '+.3f')} octaves")
    t = check.tolerance
    lines.append(
        f"{check.verdict.upper()}: tolerated at any {check.axis}: {t.drift:g} octaves of drift, {t.penalty:g} nats"
    )
    return lines


def _with_bounds(found: Interval, form: str, before: str = "") -> str:
    value, low, high = (format(round(x, 6) + 0.0, form) for x in (found.value, found.low, found.high))
    return f"{before}{value} [{low}, {high}]"


def _cost(check: TransferCheck, size: int) -> str:
    if not isfinite(check.mean_penalty(size)):
        return "infinite (diverged)"
    if check.rate == check.lines[size].best:
        return "0 (the same value)"
    return f"{_with_bounds(check.penalty_interval(size), '+.4f')} nats"


def as_document(check: TransferCheck) -> dict[str, Any]:
    """Everything as JSON; what is infinite or unknown is null."""

    def bounds(found: Interval) -> list[float | None]:
        return [x if isfinite(x) else None for x in (found.value, found.low, found.high)]

    sizes = {
        str(size): {
            "optimum": bounds(check.basins[size].interval),
            "best": line.best,
            "loss": line.mean(line.best) if isfinite(line.mean(line.best)) else None,
            "on_edge": line.on_edge,
            "drift": bounds(check.drift_interval(size)),
            "penalty": bounds(check.penalty_interval(size)),
            "verdict": None if size == check.proxy else check.verdict_at(size),
        }
        for size, line in check.lines.items()
    }
    return {
        "umup_transfer_check": 1,
        "scheme": check.scheme,
        "axis": check.axis,
        "hyperparameter": check.hyperparameter,
        "proxy": check.proxy,
        "tolerance": {"drift": check.tolerance.drift, "penalty": check.tolerance.penalty},
        "sizes": sizes,
        "drift_per_doubling": bounds(check.drift_per_doubling),
        "verdict": check.verdict,
        "summary": summary(check),
    }
