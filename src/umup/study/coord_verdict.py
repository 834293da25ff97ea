"""Rows of sizes -> slopes with intervals -> which of them are wrong. Pure arithmetic, no torch.

A slope is that of log2(size) against log2(width), or another axis, one per seed, of the mean over the steps after the
first; its interval is the mean over seeds +- t * s/sqrt(seeds), s being pooled over all names of a kind: noise is alike
there, and three seeds alone say little of it. A size that should not depend on the width has slope 0; one that a plan
scales is divided by the plan's number first. Status of a judged slope:

    pass       the whole interval lies within +- limit          fail   the whole interval lies beyond it
    undecided  the limit lies inside: more seeds or widths would tell

Coordinates (what the network does) have a wider limit than numbers (what was initialised and applied), whose noise is
small; updates under a raised epsilon, which follow single gradients, have the widest. A mistake shows with a
slope of 1/2 or 1. Known transients are excused by name: sizes that may shrink and not grow.

Over depth L a name stands for the mean over its layers, and coordinates may shrink but not grow: the residual stream
and how far it moves, the logits, and of a branch that enters the stream with weight c (2310.02244, 2505.01618)

    c sqrt(L) RMS(output)       initial branches add up like noise
    c L RMS(effective update)   updates of all layers point the same way and simply add up

which depth_mup and u-muP (c and rates of 1/sqrt(L)) and CompleteP (c of 1/L) hold, and a scheme without a rule lets
grow with L. What branches pass on (W dx) is of order c, adds up like noise, and is not judged.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, log2, sqrt
from statistics import linear_regression, mean, median, variance
from typing import Literal

from umup.rules.precision import LAYER
from umup.study.coordinates import Point, Row

Status = Literal["pass", "fail", "undecided"]
COORDINATE_LIMIT, NUMBER_LIMIT, RAISED_LIMIT = 0.35, 0.2, 0.5
SEEDLESS_ERROR = 0.1
"""Half an interval where one seed says nothing of noise."""
NO_GRADIENT = 1e-4
"""Gradients this far below the median are rounding: those of key biases, which softmax ignores."""
INIT_TOLERANCE = 0.25
"""|log2| of a parameter's initial RMS over the plan's std."""

COORDINATES = ("output", "change", "effective", "propagating", "logits")
NUMBERS = ("weight", "update", "decay", "scale")
CONSTANTS = ("multiplier", "logit_factor", "branch", "skip", "output_factor", "lr", "eps", "weight_decay")
# What may shrink for a while: changes that early layers pass on, and attention logits, which align late.
GROWTH_ONLY = {"change": "shrinking change", "propagating": "shrinking change", "logits": "shrinking attention logits"}
READOUTS = ("readout", "tied_readout")
# It starts from a random part that falls with width.
READOUT_EXCUSE = "shrinking readout"
LESS_WITH_DEPTH = "shrinking with depth"
# Of each axis, the kinds that are judged there.
JUDGED = {
    "width": (*COORDINATES, "weight", "update", "scale"),
    "raised": ("weight", "update", "decay"),
    "head size": ("scale", "weight"),
    "key heads": ("weight",),
    "layers": ("update", "weight"),
    "depth": ("output", "change", "effective", "logits", "update", "weight"),
}
SIZES: Mapping[str, Callable[[Point], int]] = {
    **dict.fromkeys(("width", "raised", "key heads"), lambda point: point.width),
    "head size": lambda point: point.head_dim,
    **dict.fromkeys(("layers", "depth"), lambda point: point.depth),
}
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Slope:
    """How a size grows along an axis: log2 per log2, mean and interval over seeds.

    `phase`: "start" (step 0) or "trained". `excuse`: why shrinking is no fault; "" where it would be one. `planned`:
    whether a plan said what to divide by; numbers are judged only then.
    """

    axis: str
    name: str
    kind: str
    phase: str
    role: str
    slope: float
    low: float
    high: float
    excuse: str = ""
    planned: bool = False

    @property
    def limit(self) -> float:
        """The largest slope that passes."""
        if self.axis == "raised":
            return RAISED_LIMIT
        return NUMBER_LIMIT if self.kind in NUMBERS else COORDINATE_LIMIT

    @property
    def judged(self) -> bool:
        """Whether the kind is judged on this axis, or only shown."""
        if self.axis == "depth" and self.kind == "change" and "*." in self.name:
            return False  # inside of a layer; what the stream does is told by whole layers and what follows them
        return self.kind in JUDGED[self.axis] and (self.planned or self.kind in COORDINATES)

    @property
    def status(self) -> Status:
        """See the module's docstring."""
        low, high = (max(self.low, 0.0), max(self.high, 0.0)) if self.excuse else (self.low, self.high)
        if not self.judged or max(-low, high) <= self.limit:
            return "pass"
        return "fail" if min(abs(low), abs(high)) > self.limit and low * high > 0 else "undecided"


@dataclass(frozen=True)
class Mismatch:
    """A number of the network or its optimizer that is not the plan's, at the largest size where it is not."""

    axis: str
    name: str
    kind: str
    role: str
    size: int
    found: float
    wanted: float


def slopes(axis: str, rows: Sequence[Row], roles: Mapping[str, str]) -> list[Slope]:
    """The slope of every (name, kind, phase) of an axis that has two sizes."""
    dead, planned = _without_gradient(rows), set()
    # By seed, by size, by step: the layers of one name.
    sizes: dict[tuple[str, str, str, int], dict[int, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row.kind in CONSTANTS or row.value <= 0 or row.name in dead:
            continue
        if axis == "depth" and row.kind in NUMBERS and row.step > 1:
            continue  # later updates depend on where in the network a layer lies
        if row.expected is not None:
            planned.add((row.name, row.kind))
        name = LAYER.sub("*", row.name) if axis == "depth" and row.kind in COORDINATES else row.name
        key = (name, row.kind, "start" if row.step == 0 else "trained", row.point.seed)
        sizes[key][SIZES[axis](row.point)][row.step].append(log2(row.value / (row.expected or 1.0)))
    by_name: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (name, kind, phase, _), along in sizes.items():
        if len(along) > 1:
            # Changes of the stream are largest where it ends; of what is alike in all layers the mean has less noise.
            layers: Callable[[list[float]], float] = max if kind == "change" else mean
            heights = [mean(map(layers, steps.values())) for steps in along.values()]
            line = linear_regression([log2(x) for x in along], heights)
            by_name[name, kind, phase].append(line.slope)
    errors = _errors(by_name)
    roles = {**{LAYER.sub("*", name): role for name, role in roles.items()}, **roles}
    return [
        Slope(
            axis,
            *key,
            roles.get(key[0], ""),
            m,
            m - errors[key[1:]],
            m + errors[key[1:]],
            _excuse(axis, key, roles),
            key[:2] in planned,
        )
        for key, found in by_name.items()
        for m in [mean(found)]
    ]


def _errors(by_name: Mapping[tuple[str, str, str], list[float]]) -> dict[tuple[str, str], float]:
    """(kind, phase) -> half an interval, from the variance over seeds pooled over names."""
    pools: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for (_, kind, phase), found in by_name.items():
        pools[kind, phase].append(found)
    errors = {}
    for key, pool in pools.items():
        many = [found for found in pool if len(found) > 1]
        if not many:
            errors[key] = SEEDLESS_ERROR
            continue
        freedom = sum(len(found) - 1 for found in many)
        t = T_975[freedom - 1] if freedom <= len(T_975) else 2.0
        errors[key] = t * sqrt(mean(variance(found) / len(found) for found in many))
    return errors


def _excuse(axis: str, key: tuple[str, str, str], roles: Mapping[str, str]) -> str:
    name, kind, _ = key
    if axis == "depth" and kind in COORDINATES:
        return LESS_WITH_DEPTH
    if kind == "output" and roles.get(name) in READOUTS:
        return READOUT_EXCUSE
    return GROWTH_ONLY.get(kind, "")


def _without_gradient(rows: Sequence[Row]) -> set[str]:
    """Parameters whose updates are rounding, at any size."""
    gradients: dict[object, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.kind == "gradient":
            gradients[row.point][row.name] = row.value
    return {
        name for found in gradients.values() for name, g in found.items() if g < NO_GRADIENT * median(found.values())
    }


def mismatches(axis: str, rows: Sequence[Row], roles: Mapping[str, str], absolute_init: bool) -> list[Mismatch]:
    """Numbers that are not the plan's, one entry per (name, kind); `absolute_init`: the plan knows initial stds."""
    found = {}
    for row in sorted(rows, key=lambda r: SIZES[axis](r.point)):
        if row.expected is None:
            continue
        wrong = row.kind in CONSTANTS and not isclose(row.value, row.expected, rel_tol=1e-4)
        if absolute_init and row.kind == "weight":
            wrong = row.value <= 0 or abs(log2(row.value / row.expected)) > INIT_TOLERANCE
        if wrong:
            role, size = roles.get(row.name, ""), SIZES[axis](row.point)
            found[row.name, row.kind] = Mismatch(axis, row.name, row.kind, role, size, row.value, row.expected)
    return list(found.values())
