"""The coordinate check: is the training of this network the same at every width? PASS, FAIL or UNDECIDED, and why.

    report = umup.coord_check(make_model, loss_fn, batches, widths=[64, 128, 256], scheme="mup", lr=3e-3)
    print(report.text())

A few training steps at each width; every size must come out flat (coordinates.py measures, coord_verdict.py judges,
coord_suspects.py names the mistake). What those steps cannot show is looked at in further runs of one step:

    raised      epsilon as large as the gradients and decay as large as the weights, so that their rules show
    key heads   queries grow alone, where they share keys: numbers only, since chance sums hide the gradient's limit
    head size   heads grow instead of becoming more: the softmax scale
    layers      they become more: depth factors of branches and rates, where the scheme has a depth rule

and every factor, rate, epsilon and decay found in the network and its optimizer is held against the plan. With depths
instead of widths layers are added, and nothing that the network does may grow with their number.

The runs are not batched over seeds with vmap: the scaled operations define their backward passes, and of a plain twin
8 members took 0.97 (width 32) and 0.88 times as fast as one by one on a CPU thread (benchmarks/stacked_sweep.py).
Not covered: a coordinate check that passes does not prove that learning rates transfer; only transfer itself does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umup.config.sections import OptimizerConfig, RunConfig
from umup.errors import ConfigError
from umup.models.specs import shape_of
from umup.optim.adamw import TORCH
from umup.rules.explain import table
from umup.rules.precision import LAYER
from umup.rules.schemes import scheme as find_scheme
from umup.study.coord_subjects import BATCH, LENGTH, config_subject, module_subject, sized
from umup.study.coord_suspects import Suspect, suspects
from umup.study.coord_verdict import (
    COORDINATE_LIMIT,
    NUMBER_LIMIT,
    RAISED_LIMIT,
    SIZES,
    Mismatch,
    Slope,
    mismatches,
    slopes,
)
from umup.study.coordinates import Make, Point, Row, measure

Verdict = Literal["PASS", "FAIL", "UNDECIDED"]
RAISED_DECAY = 0.1
"""Of a weight, per step."""
RAISED_EPS = 3.0
"""Over the median gradient at the narrowest width."""
DEPTH = 2
"""Layers that are trained: mistakes of a width rule show in the first, those of a depth rule on the axis of depth."""
WORST = 10
"""Rows of the printed table."""
NO_RULE = {
    "width": "{0} is not width-independent: it has one rate for all parameters at every width",
    "depth": "{0} is not depth-independent: it has no rule of depth, and what all layers add grows with their number",
}


@dataclass(frozen=True)
class CoordReport:
    """What was measured and what it means, over `sizes` of `axis`. `rows`: by axis. `seconds`: of wall time."""

    scheme: str
    axis: str
    sizes: tuple[int, ...]
    seeds: int
    steps: int
    slopes: tuple[Slope, ...]
    mismatches: tuple[Mismatch, ...]
    suspects: tuple[Suspect, ...]
    rows: Mapping[str, Sequence[Row]]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """FAIL if any slope fails or any number is not the plan's; UNDECIDED if a slope's interval holds its limit."""
        states = {s.status for s in self.slopes}
        if "fail" in states or self.mismatches:
            return "FAIL"
        return "UNDECIDED" if "undecided" in states else "PASS"

    @property
    def worst(self) -> list[Slope]:
        """Judged slopes, furthest beyond what passes first; of layers that say the same, the worst."""
        found: dict[tuple[str, ...], Slope] = {}
        for s in sorted(self.slopes, key=_severity, reverse=True):
            if s.judged:
                found.setdefault((s.axis, LAYER.sub("*", s.name), s.kind, s.phase), s)
        return list(found.values())

    def text(self) -> str:
        """The verdict, its suspects, the worst modules, and the thresholds it was judged by."""
        head = f"{self.verdict}: {self.scheme} over {self.axis}s {', '.join(map(str, self.sizes))}"
        lines = [f"{head} ({self.seeds} seeds, {self.steps} steps, {self.seconds:.0f} s)"]
        lines += [f"suspect: {s}" for s in self.suspects]
        cells = [
            (s.axis, LAYER.sub("*", s.name), s.kind, s.phase, f"{s.slope:+.2f}", _interval(s), s.status, s.excuse)
            for s in self.worst[:WORST]
        ]
        lines += ["", table([("axis", "module", "size", "when", "slope", "interval", "", "excused"), *cells]), ""]
        lines.append(
            f"a slope is that of log size against log {self.axis} (or axis), with its 95% interval over seeds; it "
            f"passes within {COORDINATE_LIMIT} (what the network does), {NUMBER_LIMIT} (inits and updates against the "
            f"plan's) or {RAISED_LIMIT} (epsilon and decay raised); where an interval holds its limit the verdict is "
            f"UNDECIDED: more --seeds or a larger range of --{self.axis}s tell"
        )
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """One document: verdict, suspects, slopes with status, numbers that are not the plan's."""
        judged = [{**asdict(s), "status": s.status, "limit": s.limit} for s in self.slopes if s.judged]
        return {
            "verdict": self.verdict,
            "scheme": self.scheme,
            "axis": self.axis,
            "sizes": self.sizes,
            "seeds": self.seeds,
            "steps": self.steps,
            "limits": {"coordinates": COORDINATE_LIMIT, "numbers": NUMBER_LIMIT, "raised": RAISED_LIMIT},
            "suspects": [asdict(s) for s in self.suspects],
            "mismatches": [asdict(m) for m in self.mismatches],
            "slopes": judged,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Runs:
    """Sizes of a check along an axis. `further`: axis -> points of one step each (see the module's docstring).

    `decay`: the raised one. `absolute_init`: whether the plan knows initial stds, and not only how they scale.
    `no_rule`: what to say first of a scheme that cannot pass, "" of others.
    """

    scheme: str
    axis: str
    points: Sequence[Point]
    steps: int
    further: Mapping[str, Sequence[Point]]
    decay: float
    absolute_init: bool
    no_rule: str = ""


def coord_check(
    make_model: Callable[[int], nn.Module],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    lr: float = 1e-3,
    scheme: str = "mup",
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    eps: float | None = None,
    steps: int = 4,
    seeds: int = 3,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> CoordReport:
    """Check any module: make_model(width) -> a fresh Module, loss_fn(model, batch) -> scalar.

    With depths instead of widths make_model is given a number of layers. `umup.plan` with the smallest size as base
    gives init and rates. With make_optimizer(model) the model and its optimizer are taken as they come, `scheme` is but
    a name, and only coordinates are judged.
    Few tokens (of the order of 32) and a large lr, near where training still works, show most.
    Raises PlanError for what `umup.plan` refuses, ConfigError for fewer than two sizes or an unknown optimizer.
    """
    if widths and depths:
        raise ConfigError("coord-check: widths and depths; write one of them, and check the other by itself")
    axis, sizes = ("depth", depths) if depths else ("width", widths)
    _check_sizes(axis, sizes, seeds, steps)
    if make_optimizer is None:
        _check_optimizer(optimizer)
    planned = {"scheme": scheme, "optimizer": optimizer, "overrides": overrides}
    numbers = OptimizerConfig(name=optimizer, lr=lr, weight_decay=weight_decay, eps=eps)
    make = module_subject(make_model, loss_fn, numbers, make_optimizer, axis, min(sizes), planned)
    points = [
        Point(**{"width": 1, "depth": 1, axis: n}, head_dim=1, seed=s) for n in sorted(sizes) for s in range(seeds)
    ]
    further = {"raised": points} if make_optimizer is None and axis == "width" else {}
    no_rule = _no_rule(scheme, axis) if make_optimizer is None else ""
    runs = Runs(scheme, axis, points, steps, further, RAISED_DECAY, False, no_rule)
    return check(make, runs, lambda point: batches)


def check_config(
    config: RunConfig, sizes: Sequence[int], steps: int = 4, seeds: int = 3, axis: str = "width"
) -> CoordReport:
    """Check a config's network, scheme and optimizer on random tokens, at several widths or depths.

    Raises ConfigError where widths do not divide, and for optimizers that `umup train` does not run.
    """
    _check_sizes(axis, sizes, seeds, steps)
    _check_optimizer(config.optimizer.name)
    runs = RUNS[axis](config, sizes, steps, seeds)
    return check(lambda p: config_subject(sized(config, p)), runs, batches_of(config))


def width_runs(config: RunConfig, widths: Sequence[int], steps: int, seeds: int) -> Runs:
    """The points of a config's check over widths."""
    m, scheme = config.model, config.parametrization.scheme
    depth, first = min(m.num_layers, DEPTH), min(widths)
    points = [Point(w, depth, m.head_dim, seed) for w in sorted(widths) for seed in range(seeds)]
    once = [p for p in points if p.seed == 0]
    further = {
        "raised": once,
        "head size": [replace(p, head_dim=m.head_dim * p.width // first) for p in once],
    }
    if m.num_kv_heads is not None:
        further["key heads"] = [replace(p, num_kv_heads=_kv_heads(config, first)) for p in once]
    if has_depth_rule(scheme):
        further["layers"] = [Point(first, layers, m.head_dim, 0) for layers in (depth, 2 * depth, 4 * depth)]
    decay = RAISED_DECAY / (1.0 if config.optimizer.independent_weight_decay else config.optimizer.lr)
    return Runs(scheme, "width", points, steps, further, decay, True, _no_rule(scheme, "width"))


def depth_runs(config: RunConfig, depths: Sequence[int], steps: int, seeds: int) -> Runs:
    """The points of a config's check over depths, at the narrowest default width."""
    width, scheme = default_widths(config)[0], config.parametrization.scheme
    points = [Point(width, n, config.model.head_dim, seed) for n in sorted(depths) for seed in range(seeds)]
    return Runs(scheme, "depth", points, steps, {}, RAISED_DECAY, True, _no_rule(scheme, "depth"))


RUNS = {"width": width_runs, "depth": depth_runs}


def _no_rule(scheme: str, axis: str) -> str:
    independent = not find_scheme(scheme).one_rate if axis == "width" else has_depth_rule(scheme)
    return "" if independent else NO_RULE[axis].format(scheme)


def has_depth_rule(scheme: str) -> bool:
    """Whether rates or branches of a scheme depend on the number of layers."""
    found = find_scheme(scheme)
    return found.needs_base_depth or bool(found.on_residual)


def default_widths(config: RunConfig) -> tuple[int, ...]:
    """Three widths, each twice the one before, from the config's own or 128 (two heads at least)."""
    first = min(config.model.hidden_size, max(128, 2 * config.model.head_dim))
    return (first, 2 * first, 4 * first)


def default_depths(config: RunConfig) -> tuple[int, ...]:
    """Three depths, each twice the one before, from the config's own or 2."""
    first = min(config.model.num_layers, DEPTH)
    return (first, 2 * first, 4 * first)


def batches_of(config: RunConfig) -> Callable[[Point], Sequence[Any]]:
    """Seed -> one batch of random (inputs, targets), the same at every size."""
    length = min(config.model.max_seq_len, LENGTH)

    def batches(point: Point) -> Sequence[Any]:
        generator = torch.Generator().manual_seed(point.seed)
        ids = torch.randint(config.model.vocab_size, (BATCH, length + 1), generator=generator)
        return [(ids[:, :-1], ids[:, 1:])]

    return batches


def check(make: Make, runs: Runs, batches: Callable[[Point], Sequence[Any]]) -> CoordReport:
    """Measure all points of all axes, judge them, name suspects."""
    began = perf_counter()
    roles: dict[str, str] = {}
    measured: dict[str, list[Row]] = {runs.axis: []}
    for point in runs.points:
        subject = make(point)
        roles |= subject.roles
        measured[runs.axis] += measure(subject, point, batches(point), runs.steps)
    eps = _raised_eps(measured[runs.axis])
    for axis, points in runs.further.items():
        for p in points:
            point = replace(p, eps=eps, weight_decay=runs.decay) if axis == "raised" else p
            subject = make(point)
            roles |= subject.roles
            measured.setdefault(axis, []).extend(measure(subject, point, batches(point), 1))
    found = [s for axis, rows in measured.items() for s in slopes(axis, rows, roles)]
    wrong = [m for axis, rows in measured.items() for m in mismatches(axis, rows, roles, runs.absolute_init)]
    named = suspects(found, wrong, roles)
    if named and not wrong and runs.no_rule:
        named = [Suspect(runs.no_rule, named[0].where, named[0].evidence), *named]
    sizes = tuple(dict.fromkeys(map(SIZES[runs.axis], runs.points)))
    seeds = len({p.seed for p in runs.points})
    results = tuple(found), tuple(wrong), tuple(named)
    return CoordReport(runs.scheme, runs.axis, sizes, seeds, runs.steps, *results, measured, perf_counter() - began)


def _raised_eps(rows: Sequence[Row]) -> float | None:
    """An epsilon, at the plan's factor 1, that is as large as gradients at the narrowest width."""
    narrow = min(r.point.width for r in rows)
    factors = {r.name: r.expected for r in rows if r.expected and r.kind == "eps" and r.point.width == narrow}
    gradients = {r.name: r.value for r in rows if r.kind == "gradient" and r.point.width == narrow}
    if not factors:
        return None
    smallest = max(factors.values())
    return min(0.9, RAISED_EPS * median(gradients[n] / (f / smallest) for n, f in factors.items()))


def _kv_heads(config: RunConfig, width: int) -> int:
    shape = shape_of(config.model)
    return max(1, shape.num_kv_heads * width // shape.hidden_size)


def _check_optimizer(name: str) -> None:
    if name not in TORCH:
        raise ConfigError(
            f"coord-check: optimizer.name: trains with {', '.join(TORCH)}; for {name!r} write umup.coord_check(..., "
            "make_optimizer=...)"
        )


def _check_sizes(axis: str, sizes: Sequence[int], seeds: int, steps: int) -> None:
    if len(set(sizes)) < 2 or min(seeds, steps, *sizes) < 1:
        raise ConfigError(
            f"coord-check: {axis}s {', '.join(map(str, sizes)) or 'none'}, {seeds} seeds, {steps} steps; write at "
            f"least 2 {axis}s, and 1 of the others"
        )


def _severity(s: Slope) -> tuple[int, float]:
    beyond = max(abs(s.low), abs(s.high)) / s.limit
    return {"fail": 2, "undecided": 1, "pass": 0}[s.status], beyond if not s.excuse else max(s.high, 0.0) / s.limit


def _interval(s: Slope) -> str:
    return f"[{s.low:+.2f}, {s.high:+.2f}]"
