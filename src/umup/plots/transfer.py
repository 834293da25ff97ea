"""*The* figure: loss against log2 of a hyperparameter, one curve per size, scheme beside scheme; its numbers as CSV.

Stars are the best grid points, bars at the foot the fitted optima with their 95% intervals, and the dotted line is
the value that the proxy hands on.
"""

import csv
from collections.abc import Sequence
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umup.errors import MissingExtraError
from umup.study.verdicts import TransferCheck

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, dark to light by width: distinct for the colour-blind and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
NAMES = {"lr": "learning rate", "weight_decay": "weight decay"}


def write_csv(checks: Sequence[TransferCheck], path: Path) -> None:
    """One row per run: scheme, size, log2 value, seed, val_loss (nats per token; inf diverged), best.

    The second column has the axis' name and the third log2_ and the hyperparameter's; all checks share them.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["scheme", checks[0].axis, f"log2_{_name(checks[0])}", "seed", "val_loss", "best"])
        for check in checks:
            for size, line in check.lines.items():
                for x, losses in line.losses.items():
                    for seed, loss in enumerate(losses):
                        rows.writerow([check.scheme, size, x, seed, f"{loss:.6f}", int(x == line.best)])


def draw(checks: Sequence[TransferCheck], path: Path, title: str) -> None:
    """The figure as a PNG. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a figure") from None
    figure = Figure(figsize=(max(6.0, 4.6 * len(checks)), 4.4), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(checks), sharey=True, squeeze=False)[0]
    low, high = _range(checks)
    axes[0].set_ylim(low, high)
    for ax, check in zip(axes, checks, strict=True):
        _panel(ax, check)
        _optima(ax, check, low, high)
    axes[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _panel(ax: "Axes", check: TransferCheck) -> None:
    from matplotlib.ticker import MultipleLocator

    for (size, line), colour, marker in zip(check.lines.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        grid = [x for x in line.losses if isfinite(line.mean(x))]
        label = f"{check.axis} {size}" + (" (proxy)" if size == check.proxy else "")
        means = [line.mean(x) for x in grid]
        ax.plot(grid, means, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        for x in grid:
            seeds = line.losses[x]
            if len(seeds) > 1:
                ax.plot([x] * len(seeds), seeds, "_", color=colour, markersize=9, alpha=0.7)
        if grid:
            ax.plot(line.best, line.mean(line.best), marker="*", color=colour, markersize=15, markeredgecolor="white")
    ax.axvline(check.rate, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.set_title(f"{check.scheme}: {check.verdict}")
    ax.set_xlabel(f"log2 {NAMES.get(_name(check), _name(check))}" + " at the proxy" * (check.axis != "width"))
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)


def _optima(ax: "Axes", check: TransferCheck, low: float, high: float) -> None:
    """Fitted optima at the foot of the panel, the first size lowest."""
    for i, (basin, colour) in enumerate(zip(check.basins.values(), cycle(COLOURS), strict=False)):
        found, y = basin.interval, low + (0.02 + 0.02 * i) * (high - low)
        ax.plot([found.low, found.high], [y, y], color=colour, linewidth=1.5)
        ax.plot(found.value, y, marker="|", color=colour, markersize=7)


def _name(check: TransferCheck) -> str:
    return check.hyperparameter.rsplit(".", 1)[-1]


def _range(checks: Sequence[TransferCheck]) -> tuple[float, float]:
    """All optima and what lies a little above them; diverging tails leave the frame."""
    best = [line.mean(line.best) for t in checks for line in t.lines.values()]
    finite = [loss for loss in best if isfinite(loss)] or [0.0]
    low, high = min(finite), max(finite)
    margin = max(high - low, 0.2)
    return low - 0.15 * margin, high + 1.2 * margin
