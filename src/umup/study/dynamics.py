"""How a run trained, beside where it ended: spikes of the loss, exploding gradients, late instability, divergence.

A proxy that ends lowest with a spike on the way is a worse choice than its clean neighbour, for the large model has
more steps in which to spike. So a ranking shows both, and the second or third best may be chosen (the recipe of
Cerebras-GPT, 2304.03208).

Every step is compared with the median of the `window` steps before it (a twentieth of the run, at least 8), which
follows the fall of the loss; the noise of single steps is measured over the whole run. The thresholds are constants
below, not options, and were set by eye on small runs.

Not covered: instability that shows only in activations; in runs of under SHORTEST steps only divergence counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from statistics import mean, median, stdev

from umup.train.metrics import Metrics

WINDOW_SHARE = 20
WINDOW_MIN = 8
SPIKE_SIGMAS = 6.0
SPIKE_SHARE = 0.03
EXPLOSION = 10.0
LATE_ERRORS = 3.0
LATE_SHARE = 0.005
SHORTEST = 40


@dataclass(frozen=True)
class Dynamics:
    """What a run did wrong: episodes of too large a loss or gradient norm, nats lost after its lowest, divergence.

    `spikes`: the loss is over the window's median by 6 robust standard deviations of a step (from the median difference
    of neighbours) and by 3%. `explosions`: the gradient norm is over 10 times the window's median. `late_rise`: the
    last tenth's mean loss over the lowest tenth's, where that is more than 3 standard errors and 0.5%; else 0.
    """

    spikes: int = 0
    explosions: int = 0
    late_rise: float = 0.0
    diverged: bool = False

    @property
    def clean(self) -> bool:
        """Nothing to hold against it."""
        return self == Dynamics()

    @property
    def faults(self) -> str:
        """In words, "clean" where there are none."""
        if self.diverged:
            return "diverged"
        said = [
            f"{self.spikes} loss spike{'s' * (self.spikes > 1)}" * bool(self.spikes),
            f"{self.explosions} gradient explosion{'s' * (self.explosions > 1)}" * bool(self.explosions),
            f"loss rose by {self.late_rise:.3f} at the end" * bool(self.late_rise),
        ]
        return ", ".join(filter(None, said)) or "clean"


def judge(metrics: Sequence[Metrics], diverged: bool = False) -> Dynamics:
    """The dynamics of a run from its records, one per step; a loss that is no number is a divergence."""
    losses, norms = [m.train_loss for m in metrics], [m.grad_norm for m in metrics]
    if diverged or not all(map(isfinite, [*losses, *norms])):
        return Dynamics(diverged=True)
    if len(losses) < SHORTEST:
        return Dynamics()
    window = max(WINDOW_MIN, len(losses) // WINDOW_SHARE)
    return Dynamics(_spikes(losses, window), _explosions(norms, window), _late_rise(losses))


def worst(several: Sequence[Dynamics]) -> Dynamics:
    """Of several seeds: the worst in each respect."""
    return Dynamics(
        max(d.spikes for d in several),
        max(d.explosions for d in several),
        max(d.late_rise for d in several),
        any(d.diverged for d in several),
    )


def _spikes(losses: Sequence[float], window: int) -> int:
    before = _medians(losses, window)
    excess = [loss - middle for loss, middle in zip(losses[window:], before, strict=True)]
    # From differences of neighbours, which the fall of the loss hardly enters; each has the noise of two steps.
    sigma = 1.4826 * median(abs(b - a) for a, b in pairwise(losses)) / sqrt(2)
    return _episodes([e > max(SPIKE_SIGMAS * sigma, SPIKE_SHARE * m) for e, m in zip(excess, before, strict=True)])


def _explosions(norms: Sequence[float], window: int) -> int:
    before = _medians(norms, window)
    return _episodes([norm > EXPLOSION * middle for norm, middle in zip(norms[window:], before, strict=True)])


def _medians(series: Sequence[float], window: int) -> list[float]:
    """Of the `window` values before each, from the first that has so many."""
    return [median(series[i - window : i]) for i in range(window, len(series))]


def _episodes(high: Sequence[bool]) -> int:
    """Steps in a row are one episode."""
    return sum(now and not before for before, now in pairwise([False, *high]))


def _late_rise(losses: Sequence[float]) -> float:
    tenth = len(losses) // 10
    parts = [losses[i * tenth : (i + 1) * tenth] for i in range(9)] + [losses[-tenth:]]
    lowest, last = min(parts[:-1], key=mean), parts[-1]
    rise = mean(last) - mean(lowest)
    error = sqrt((stdev(last) ** 2 + stdev(lowest) ** 2) / tenth)
    return rise if rise > max(LATE_ERRORS * error, LATE_SHARE * mean(lowest)) else 0.0
