"""*The* figure: loss against log2 lr, one curve per width, scheme beside scheme; and its numbers as CSV."""

import csv
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umup.errors import MissingExtraError
from umup.study.planner import WidthTransfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, dark to light by width: distinct for the colour-blind and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def write_csv(transfers: Sequence[WidthTransfer], path: Path) -> None:
    """One row per run: scheme, width, log2_lr, seed, val_loss (nats per token; inf diverged), best."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["scheme", "width", "log2_lr", "seed", "val_loss", "best"])
        for transfer in transfers:
            for width, line in transfer.lines.items():
                for x, losses in line.losses.items():
                    for seed, loss in enumerate(losses):
                        rows.writerow([transfer.scheme, width, x, seed, f"{loss:.6f}", int(x == line.best)])


def draw(transfers: Sequence[WidthTransfer], path: Path, title: str) -> None:
    """The figure as a PNG. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a figure") from None
    figure = Figure(figsize=(4.6 * len(transfers), 4.2), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(transfers), sharey=True, squeeze=False)[0]
    for ax, transfer in zip(axes, transfers, strict=True):
        _panel(ax, transfer)
    axes[0].set_ylabel("validation loss (nats per byte)")
    low, high = _range(transfers)
    axes[0].set_ylim(low, high)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _panel(ax: "Axes", transfer: WidthTransfer) -> None:
    from matplotlib.ticker import MultipleLocator

    for (width, line), colour, marker in zip(transfer.lines.items(), COLOURS, MARKERS, strict=False):
        grid = [x for x in line.losses if isfinite(line.mean(x))]
        label = f"width {width}" + (" (proxy)" if width == transfer.proxy else "")
        ax.plot(
            grid, [line.mean(x) for x in grid], color=colour, marker=marker, markersize=4, linewidth=1.5, label=label
        )
        for x in grid:
            seeds = line.losses[x]
            if len(seeds) > 1:
                ax.plot([x] * len(seeds), seeds, "_", color=colour, markersize=9, alpha=0.7)
        ax.plot(line.best, line.mean(line.best), marker="*", color=colour, markersize=15, markeredgecolor="white")
    ax.axvline(transfer.rate, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.set_title(transfer.scheme)
    ax.set_xlabel("log2 learning rate")
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)


def _range(transfers: Sequence[WidthTransfer]) -> tuple[float, float]:
    """All optima and what lies a little above them; diverging tails leave the frame."""
    best = [line.mean(line.best) for t in transfers for line in t.lines.values()]
    finite = [loss for loss in best if isfinite(loss)] or [0.0]
    low, high = min(finite), max(finite)
    margin = max(high - low, 0.2)
    return low - 0.15 * margin, high + 1.2 * margin
