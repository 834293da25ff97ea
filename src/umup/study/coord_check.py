"""The coordinate check: is the training of this network the same at every width? PASS, FAIL or UNDECIDED, and why.

    report = umup.coord_check(make_model, loss_fn, batches, widths=[64, 128, 256], scheme="mup", lr=3e-3)
    print(report.text())

A few training steps at each width; every size must come out flat (coordinates.py measures, coord_verdict.py judges,
coord_suspects.py names the mistake). What those steps cannot show is looked at in further runs of one step:

    raised      epsilon as large as the gradients and decay as large as the weights, so that their rules show
    key heads   queries grow alone, where they share keys: numbers only, since chance sums hide the gradient's limit
    head size   heads grow instead of becoming more: the softmax scale
    depth       layers are added: depth factors of branches and rates, where the scheme has a depth rule

and every factor, rate, epsilon and decay found in the network and its optimizer is held against the plan.

The runs are not batched over seeds with vmap: a width takes few seconds, most of it in the widest model's products,
and the scaled operations' own backward passes have no vmap rule.
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
from umup.study.coord_verdict import COORDINATE_LIMIT, NUMBER_LIMIT, RAISED_LIMIT, Mismatch, Slope, mismatches, slopes
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
NOT_INDEPENDENT = "{0} is not width-independent: it has one rate for all parameters at every width"


@dataclass(frozen=True)
class CoordReport:
    """What was measured and what it means. `rows`: by axis. `seconds`: of wall time."""

    scheme: str
    widths: tuple[int, ...]
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
        head = f"{self.verdict}: {self.scheme} over widths {', '.join(map(str, self.widths))}"
        lines = [f"{head} ({self.seeds} seeds, {self.steps} steps, {self.seconds:.0f} s)"]
        lines += [f"suspect: {s}" for s in self.suspects]
        cells = [
            (s.axis, LAYER.sub("*", s.name), s.kind, s.phase, f"{s.slope:+.2f}", _interval(s), s.status, s.excuse)
            for s in self.worst[:WORST]
        ]
        lines += ["", table([("axis", "module", "size", "when", "slope", "interval", "", "excused"), *cells]), ""]
        lines.append(
            "a slope is that of log size against log width (or axis), with its 95% interval over seeds; it passes "
            f"within {COORDINATE_LIMIT} (what the network does), {NUMBER_LIMIT} (inits and updates against the plan's) "
            f"or {RAISED_LIMIT} (epsilon and decay raised); where an interval holds its limit the verdict is "
            "UNDECIDED: more --seeds or wider --widths tell"
        )
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """One document: verdict, suspects, slopes with status, numbers that are not the plan's."""
        judged = [{**asdict(s), "status": s.status, "limit": s.limit} for s in self.slopes if s.judged]
        return {
            "verdict": self.verdict,
            "scheme": self.scheme,
            "widths": self.widths,
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
    """Sizes of a check. `further`: axis -> points of one step each (see the module's docstring).

    `decay`: the raised one. `absolute_init`: whether the plan knows initial stds, and not only how they scale.
    """

    scheme: str
    points: Sequence[Point]
    steps: int
    further: Mapping[str, Sequence[Point]]
    decay: float
    absolute_init: bool


def coord_check(
    make_model: Callable[[int], nn.Module],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    widths: Sequence[int],
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

    `umup.plan` with the narrowest width as base gives init and rates. With make_optimizer(model) the model and its
    optimizer are taken as they come, `scheme` is but a name, and only coordinates are judged.
    Few tokens (of the order of 32) and a large lr, near where training still works, show most.
    Raises PlanError for what `umup.plan` refuses, ConfigError for fewer than two widths or an unknown optimizer.
    """
    _check_sizes(widths, seeds, steps)
    if make_optimizer is None:
        _check_optimizer(optimizer)
    base = min(widths)
    planned = {"scheme": scheme, "optimizer": optimizer, "overrides": overrides}
    numbers = OptimizerConfig(name=optimizer, lr=lr, weight_decay=weight_decay, eps=eps)
    make = module_subject(make_model, loss_fn, numbers, make_optimizer, base, planned)
    points = [Point(w, 1, 1, seed) for w in sorted(widths) for seed in range(seeds)]
    further = {} if make_optimizer else {"raised": points}
    return check(make, Runs(scheme, points, steps, further, RAISED_DECAY, False), lambda point: batches)


def check_config(config: RunConfig, widths: Sequence[int], steps: int = 4, seeds: int = 3) -> CoordReport:
    """Check a config's network, scheme and optimizer on random tokens, its sizes reduced to `widths`.

    Raises ConfigError where widths do not divide, and for optimizers that `umup train` does not run.
    """
    _check_sizes(widths, seeds, steps)
    _check_optimizer(config.optimizer.name)
    return check(
        lambda p: config_subject(sized(config, p)), config_runs(config, widths, steps, seeds), batches_of(config)
    )


def config_runs(config: RunConfig, widths: Sequence[int], steps: int, seeds: int) -> Runs:
    """The points of a config's check."""
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
        further["depth"] = [Point(first, layers, m.head_dim, 0) for layers in (depth, 2 * depth, 4 * depth)]
    decay = RAISED_DECAY / (1.0 if config.optimizer.independent_weight_decay else config.optimizer.lr)
    return Runs(scheme, points, steps, further, decay, True)


def has_depth_rule(scheme: str) -> bool:
    """Whether rates or branches of a scheme depend on the number of layers."""
    found = find_scheme(scheme)
    return found.needs_base_depth or bool(found.on_residual)


def default_widths(config: RunConfig) -> tuple[int, ...]:
    """Three widths, each twice the one before, from the config's own or 128 (two heads at least)."""
    first = min(config.model.hidden_size, max(128, 2 * config.model.head_dim))
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
    measured: dict[str, list[Row]] = {"width": []}
    for point in runs.points:
        subject = make(point)
        roles |= subject.roles
        measured["width"] += measure(subject, point, batches(point), runs.steps)
    eps = _raised_eps(measured["width"])
    for axis, points in runs.further.items():
        for p in points:
            point = replace(p, eps=eps, weight_decay=runs.decay) if axis == "raised" else p
            subject = make(point)
            roles |= subject.roles
            measured.setdefault(axis, []).extend(measure(subject, point, batches(point), 1))
    found = [s for axis, rows in measured.items() for s in slopes(axis, rows, roles)]
    wrong = [m for axis, rows in measured.items() for m in mismatches(axis, rows, roles, runs.absolute_init)]
    named = suspects(found, wrong, roles)
    if named and not wrong and find_scheme(runs.scheme).one_rate:
        named = [Suspect(NOT_INDEPENDENT.format(runs.scheme), named[0].where, named[0].evidence), *named]
    widths = tuple(dict.fromkeys(p.width for p in runs.points))
    seeds = len({p.seed for p in runs.points})
    seconds = perf_counter() - began
    return CoordReport(
        runs.scheme, widths, seeds, runs.steps, tuple(found), tuple(wrong), tuple(named), measured, seconds
    )


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


def _check_sizes(widths: Sequence[int], seeds: int, steps: int) -> None:
    if len(set(widths)) < 2 or min(seeds, steps) < 1:
        raise ConfigError(
            f"coord-check: {len(set(widths))} widths, {seeds} seeds, {steps} steps; write at least 2 widths, and 1 of "
            "the others"
        )


def _severity(s: Slope) -> tuple[int, float]:
    beyond = max(abs(s.low), abs(s.high)) / s.limit
    return {"fail": 2, "undecided": 1, "pass": 0}[s.status], beyond if not s.excuse else max(s.high, 0.0) / s.limit


def _interval(s: Slope) -> str:
    return f"[{s.low:+.2f}, {s.high:+.2f}]"
