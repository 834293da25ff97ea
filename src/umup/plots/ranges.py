"""A run's operands over its steps: their RMS as it is, and as their format sees it, between the format's limits."""

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umup.errors import MissingExtraError
from umup.numerics.formats import find_format
from umup.study.ranges import History, RangeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: one per kind of product.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TITLES = {"x": "inputs (x)", "g": "output gradients (g)", "w": "weights (w)"}


def draw(report: RangeReport, path: Path, title: str) -> None:
    """The figure as a PNG: operands side by side. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a figure") from None
    figure = Figure(figsize=(13, 7.4), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, len(TITLES), sharex=True, sharey="row")
    kinds = list(dict.fromkeys(h.kind for h in report.histories))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    for (operand, name), above, below in zip(TITLES.items(), *axes, strict=True):
        mine = [h for h in report.histories if h.first.operand == operand]
        above.set_title(name, fontsize=10)
        _raw(above, mine, colours)
        _encoded(below, mine, colours)
        below.set_xlabel("step")
    axes[0][0].set_ylabel("log2 RMS")
    axes[1][0].set_ylabel("log2 RMS as encoded: times 2^scale")
    _legend(figure, colours)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _raw(ax: "Axes", histories: Sequence[History], colours: dict[str, str]) -> None:
    for h in histories:
        shown = [look for look in h.looks if look.rms > 0]
        ax.plot([look.step for look in shown], [log2(look.rms) for look in shown], **_style(h, colours))
        # A weight's scale follows it at every step: marks would cover the line.
        if h.first.operand != "w":
            _marks(ax, h, colours, 0)
    ax.axhline(0, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    ax.grid(alpha=0.2)


def _marks(ax: "Axes", h: History, colours: dict[str, str], by: int) -> None:
    """Triangles where the scale moved, pointing its way; a cross where no scale served."""
    for before, after in h.moves:
        if before.rms > 0:
            up = after.exponent > before.exponent
            y = log2(before.rms) + by * before.exponent
            ax.plot(before.step, y, marker="^" if up else "v", color=colours[h.kind], markersize=6, zorder=3)
    for look in h.unserved[:1]:
        if look.rms > 0:
            y = log2(look.rms) + by * look.exponent
            ax.plot(look.step, y, marker="X", color=colours[h.kind], markersize=9, markeredgecolor="white", zorder=4)


def _encoded(ax: "Axes", histories: Sequence[History], colours: dict[str, str]) -> None:
    for h in histories:
        shown = [look for look in h.used if look.rms > 0]
        heights = [log2(look.rms) + look.exponent for look in shown]
        ax.plot([look.step for look in shown], heights, **_style(h, colours))
        if h.first.operand != "w":
            _marks(ax, h, colours, 1)
    # Left and right, so that the words of two formats do not cover each other.
    for side, name in zip((0.01, 0.99), dict.fromkeys(h.first.format for h in histories), strict=False):
        _limits(ax, name, side)
    ax.grid(alpha=0.2)


def _limits(ax: "Axes", name: str, side: float) -> None:
    form = find_format(name)
    for number, what in (
        (form.max, "largest"),
        (form.min_normal, "smallest normal"),
        (form.min_subnormal / 2, "flushed below"),
    ):
        ax.axhline(log2(number), color="0.35", linewidth=1, linestyle="--", zorder=1)
        ax.text(
            side,
            log2(number),
            f"{name}: {what}",
            transform=ax.get_yaxis_transform(),
            fontsize=7.5,
            color="0.35",
            horizontalalignment="left" if side < 0.5 else "right",
            verticalalignment="bottom",
        )


def _style(h: History, colours: dict[str, str]) -> dict[str, Any]:
    return {"color": colours[h.kind], "linewidth": 1.1, "alpha": 0.75}


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in colours.items()]
    for marker, label in (("^", "scale raised"), ("v", "scale lowered"), ("X", "no constant serves")):
        handles.append(Line2D([], [], color="0.3", marker=marker, linestyle="none", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
