"""The coordinate plot: log size against log width or depth, a line per module, a panel per kind; its numbers as CSV."""

import csv
from collections import defaultdict
from math import ceil, floor, log2
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from umup.errors import MissingExtraError
from umup.rules.precision import LAYER
from umup.study.coord_check import CoordReport
from umup.study.coord_verdict import SIZES

PANELS = {
    "output": "output",
    "effective": "effective update (dW x)",
    "propagating": "propagating update (W dx)",
    "logits": "attention logits",
}
# What they are multiplied by over depth: c is a branch's weight, L the depth (coord_verdict.py).
IN_BRANCHES = {"output": ", of branches times c sqrt(L)", "effective": ", in branches times c L"}


def write_csv(report: CoordReport, path: Path) -> None:
    """One row per measured size, on every axis; `expected` is what the plan says the value is proportional to."""
    fields = ("width", "depth", "head_dim", "seed")
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["axis", *fields, "step", "name", "kind", "value", "expected"])
        for axis, found in report.rows.items():
            for r in found:
                point = (r.point.width, r.point.depth, r.point.head_dim, r.point.seed)
                rows.writerow(
                    [
                        axis,
                        *point,
                        r.step,
                        r.name,
                        r.kind,
                        f"{r.value:.6g}",
                        "" if r.expected is None else f"{r.expected:.6g}",
                    ]
                )


def draw(report: CoordReport, path: Path) -> None:
    """The last step's sizes as a PNG; what fails is red. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a figure") from None
    figure = Figure(figsize=(3.6 * len(PANELS), 3.8), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for ax, (kind, title) in zip(axes, PANELS.items(), strict=True):
        _panel(ax, report, kind)
        ax.set_title(title + IN_BRANCHES.get(kind, "") * (report.axis == "depth"), fontsize=9)
    axes[0].set_ylabel(f"RMS after {report.steps} steps")
    figure.suptitle(f"{report.scheme}: {report.verdict}", fontsize=10)
    figure.savefig(path)


def _panel(ax: Any, report: CoordReport, kind: str) -> None:
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in report.rows[report.axis]:
        if row.kind == kind and row.step == report.steps and row.value > 0:
            value = row.value / (row.expected or 1.0) if report.axis == "depth" else row.value
            lines[LAYER.sub("*", row.name)][SIZES[report.axis](row.point)].append(value)
    failing = {LAYER.sub("*", s.name) for s in report.slopes if s.kind == kind and s.status == "fail"}
    for name, at in lines.items():
        bad = name in failing
        colour, width = ("#D55E00", 1.6) if bad else ("0.55", 0.9)
        ax.plot(list(at), [geometric_mean(ys) for ys in at.values()], "o-", color=colour, linewidth=width, markersize=3)
        if bad:
            ax.annotate(name, (max(at), geometric_mean(at[max(at)])), fontsize=5, color=colour)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    # Whole octaves: a flat line looks flat, and there is a tick to read it by.
    low, high = ax.get_ylim()
    ax.set_ylim(2.0 ** floor(log2(low)), 2.0 ** ceil(log2(high)))
    ax.set_xlabel(report.axis)
    ax.grid(alpha=0.25)
