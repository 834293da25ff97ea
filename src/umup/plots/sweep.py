"""What a sweep found: loss against every hyperparameter, a panel each; its numbers as CSV.

Points are runs (means over seeds): filled circles with clean dynamics, hollow squares with faults, triangles on the
frame where the loss lies above it or diverged. A line joins those that differ in the panel's hyperparameter alone: the
lines of an independent search, of a grid those through the choice. The star is the choice.
"""

import csv
from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from umup.errors import MissingExtraError
from umup.study.sweep import Candidate
from umup.study.sweep_report import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, FEW = 4, 6
INK, ACCENT, FAULT = "#0072B2", "#D55E00", "#555555"
LEAST = 0.02
"""Nats that the frame shows at least."""


def write_csv(found: Finding, path: Path) -> None:
    """One row per point: stage, loss (nats per token; inf diverged), dynamics, chosen, and its values."""
    keys = [axis.key for axis in found.sweep.space]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["stage", "loss", "dynamics", "chosen", *keys])
        for c in _points(found):
            chosen = int(c.values == found.choice.values)
            rows.writerow([c.stage, f"{c.loss:.6f}", c.dynamics.faults, chosen, *(c.values[key] for key in keys)])


def draw(found: Finding, path: Path) -> None:
    """The figure as a PNG; a shortlist has rows of its own. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a figure") from None
    keys = [axis.key for axis in found.sweep.space]
    stages = [found.proxies] if found.sweep.intermediate is None else [found.proxies, found.ranked]
    columns = min(len(keys), COLUMNS)
    rows = ceil(len(keys) / columns)
    figure = Figure(figsize=(max(5.0, 3.2 * columns), 3.0 * rows * len(stages) + 0.6), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows * len(stages), columns, squeeze=False)
    for i, candidates in enumerate(stages):
        panels = axes[i * rows : (i + 1) * rows].flatten()
        low, high = _range(candidates)
        for n, ax in enumerate(panels):
            if n >= len(keys):
                ax.set_axis_off()
                continue
            ax.set_ylim(low, high)
            line = _lines(found, keys[n]) if i == 0 else {}
            shown = _on(line, keys[n], candidates) if found.lines is not None and i == 0 else candidates
            _panel(ax, keys[n], shown, line, found.choice)
            ax.tick_params(labelleft=n % columns == 0)
            if n % columns == 0:
                ax.set_ylabel("shortlist: " * (i == 1) + "validation loss (nats)")
    _legend(figure, columns)
    c = found.sweep.config
    figure.suptitle(
        f"{found.sweep.strategy}, {c.parametrization.scheme}, width {c.model.hidden_size}, {c.train.steps} steps",
        fontsize=10,
    )
    figure.savefig(path)


def _points(found: Finding) -> Sequence[Candidate]:
    return found.proxies if found.sweep.intermediate is None else (*found.proxies, *found.ranked)


def _lines(found: Finding, key: str) -> Mapping[float, float]:
    """Value -> loss of the points that a line joins: an independent search's, or the grid's through the choice."""
    if found.lines is not None:
        return next(line.losses for line in found.lines.lines if line.key == key)
    if found.sweep.strategy != "grid":
        return {}
    rest = {k: v for k, v in found.choice.values.items() if k != key}
    alike = [c for c in found.proxies if all(c.values[k] == v for k, v in rest.items())]
    return {c.values[key]: c.loss for c in sorted(alike, key=lambda c: c.values[key])}


def _on(line: Mapping[float, float], key: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those on a line; the others differ in other hyperparameters and have lines of their own."""
    return [c for c in candidates if line.get(c.values[key]) == c.loss]


def _panel(
    ax: "Axes", key: str, candidates: Sequence[Candidate], line: Mapping[float, float], choice: Candidate
) -> None:
    low, high = ax.get_ylim()
    joined = [(x, y) for x, y in sorted(line.items()) if isfinite(y)]
    ax.plot([x for x, _ in joined], [y for _, y in joined], color=INK, linewidth=1.3, zorder=1)
    for c in candidates:
        beyond, clean = not c.loss <= high, c.dynamics.clean
        marker, fill = ("^", "none") if beyond else ("o", INK) if clean else ("s", "white")
        style: dict[str, Any] = {"markerfacecolor": fill, "markeredgecolor": INK if clean and not beyond else FAULT}
        style["alpha"] = 1.0 if not line or line.get(c.values[key]) == c.loss else 0.3
        y = high - 0.02 * (high - low) if beyond else c.loss
        ax.plot(c.values[key], y, marker, markersize=5, linestyle="none", zorder=2, **style)
    for c in candidates:
        if c.values == choice.values and c.loss <= high:
            ax.plot(c.values[key], c.loss, "*", color=ACCENT, markersize=15, markeredgecolor="white", zorder=3)
    values = sorted({c.values[key] for c in candidates})
    if values[0] > 0:
        ax.set_xscale("log", base=2)
    elif len(values) <= FEW:
        ax.set_xticks(values)
    ax.set_xlabel(key.removeprefix("parametrization.hparams."), fontsize=9)
    ax.grid(alpha=0.25)


def _range(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """The lower three quarters of the losses and a little above them; the tail leaves the frame."""
    losses = sorted(c.loss for c in candidates if isfinite(c.loss))
    low = losses[0]
    high = quantiles(losses, n=4)[-1] if len(losses) > 1 else low
    reach = max(high - low, LEAST)
    return low - 0.12 * reach, low + 1.3 * reach


def _legend(figure: Any, columns: int) -> None:
    from matplotlib.lines import Line2D

    styles = (
        ("o", INK, INK, "clean"),
        ("s", "white", FAULT, "spikes, explosions or a late rise"),
        ("^", "none", FAULT, "above the frame, or diverged"),
        ("*", ACCENT, "white", "chosen"),
    )
    handles = [
        Line2D(
            [], [], marker=m, markerfacecolor=f, markeredgecolor=e, linestyle="none", markersize=11 if m == "*" else 5
        )
        for m, f, e, _ in styles
    ]
    labels = [label for *_, label in styles]
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False, fontsize=8)
