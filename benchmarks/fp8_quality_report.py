"""The table of a results file of fp8_quality.py: gaps in loss with their intervals, and what these exclude.

    python benchmarks/fp8_quality_report.py FILE.jsonl

A gap is paired: one seed's loss over the loss of the same scheme's BF16 with the same seed and learning rate, less one.
Means come with 95% intervals of Student's t over seeds; an aim is met where the interval lies below it, missed where it
lies above. Speed to equal loss compares the times that two runs took to the worse of their two final training losses.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from math import inf, isfinite, log2, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

Row = dict[str, Any]
Pair = tuple[Row, Row]

# What the recipes promise: the most that the loss may rise over BF16's, in percent.
AIMS = {"umup/fp8/static": 0.3, "umup/fp8/adapt": 0.1, "umup/fp8_partial/static": 0.05, "umup/fp8_partial/adapt": 0.05}
# Two-sided 95% quantiles of Student's t, by degrees of freedom from 1; the last serves for more.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COHORT = ("size", "steps", "common", "data")
HEADER = (
    f"{'variant':23s} {'lr':>7s} {'seeds':>5s} {'val loss':>8s} {'ktok/s':>7s} {'moves':>5s} {'spared':>6s}  "
    "gap to its BF16: validation loss; training loss; speed to equal loss; verdict"
)


class Interval(NamedTuple):
    """A mean and its 95% interval, unbounded for a single value."""

    mean: float
    low: float
    high: float

    def text(self, spec: str, unit: str) -> str:
        """The mean, and the interval where there is one."""
        bounds = f" [{self.low:{spec}}, {self.high:{spec}}]" if isfinite(self.low) else ""
        return f"{self.mean:{spec}}{unit}{bounds}"


def interval(values: Sequence[float]) -> Interval:
    """Student's t over values that are independent."""
    middle = mean(values)
    if len(values) == 1:
        return Interval(middle, -inf, inf)
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the table, one block per size, length and corpus."""
    for cohort in dict.fromkeys(tuple(row[field] for field in COHORT) for row in rows):
        chosen = [row for row in rows if tuple(row[field] for field in COHORT) == cohort]
        first = chosen[0]
        length = f"{first['steps'] * first['tokens_per_step']:,} tokens in {first['steps']} steps"
        if first["common"]:
            length += f", the first {first['common']} shared, in BF16"
        machines = ", ".join(sorted({f"{row['device']} with torch {row['torch']}" for row in chosen}))
        yield f"{first['size']}: {first['parameters']:,} parameters, {length}; {machines}"
        yield HEADER
        groups: dict[tuple[str, float], list[Row]] = {}
        for row in sorted(chosen, key=lambda row: (scheme_of(row) != "umup", row["lr"], row["seed"])):
            groups.setdefault((row["variant"], row["lr"]), []).append(row)
        for (_, lr), group in groups.items():
            reference = groups.get((f"{scheme_of(group[0])}/bf16", lr), [])
            yield f"{summary(group)}  {verdict(group, reference)}".rstrip()
        yield from schemes(list(groups.values()))
        yield ""


def scheme_of(row: Row) -> str:
    """sp or umup."""
    return str(row["variant"]).split("/")[0]


def summary(group: list[Row]) -> str:
    """A variant at one learning rate, over its seeds."""
    ended = [row for row in group if row["val_loss"] is not None]
    numbers = f"{'diverged':>8s} {'':7s}"
    if ended:
        speed = median(row["tokens_per_second"] for row in ended) / 1e3
        numbers = f"{mean(row['val_loss'] for row in ended):8.4f} {speed:7.0f}"
    seeds = str(len(group)) if len(ended) == len(group) else f"{len(ended)}/{len(group)}"
    moves, spared = max(row["moves"] for row in group), max(len(row["spared"]) for row in group)
    rate = f"2^{log2(group[0]['lr']):g}"
    return f"{group[0]['variant']:23s} {rate:>7s} {seeds:>5s} {numbers} {moves:5d} {spared:6d}"


def verdict(group: list[Row], reference: list[Row]) -> str:
    """The gaps of a group to a reference of the same seeds, and what follows."""
    if group is reference:
        return ""
    pairs = paired(group, reference)
    if not pairs:
        return "no pair"
    val, train = (relative(pairs, field) for field in ("val_loss", "train_loss"))
    speed = interval([seconds_to(target, b) / seconds_to(target, a) for a, b, target in map(common_target, pairs)])
    gaps = f"{val.text('+.3f', '%')}; {train.text('+.3f', '%')}; {speed.text('.2f', 'x')}"
    if len(pairs) == 1:
        return f"{gaps}; one pair excludes nothing"
    sign = "a loss" if val.low > 0 else "a gain" if val.high < 0 else "neither a loss nor a gain"
    aim = AIMS.get(group[0]["variant"])
    if aim is None:
        return f"{gaps}; {sign}"
    state = "met" if val.high <= aim else "missed" if val.low > aim else "undecided"
    return f"{gaps}; {sign}; aim {aim}% {state}"


def schemes(groups: list[list[Row]]) -> Iterator[str]:
    """u-muP against SP in BF16, each at the rate where its first seed did best, and which rates lie on an edge."""
    best: dict[str, list[Row]] = {}
    for name in ("umup/bf16", "sp/bf16"):
        line = sorted((g for g in groups if g[0]["variant"] == name), key=lambda group: group[0]["lr"])
        if line:
            best[name] = min(line, key=lambda group: group[0]["val_loss"] or inf)
            if len(line) > 1 and best[name] in (line[0], line[-1]):
                yield f"{name}: the best learning rate is the last one tried; its optimum may lie beyond"
    if len(best) == 2:
        yield f"umup/bf16 against sp/bf16, each at its best rate: {verdict(best['umup/bf16'], best['sp/bf16'])}"


def paired(group: list[Row], reference: list[Row]) -> list[Pair]:
    """(row, reference row) of each seed at which both ended."""
    ended = {row["seed"]: row for row in reference if row["val_loss"] is not None}
    return [(row, ended[row["seed"]]) for row in group if row["val_loss"] is not None and row["seed"] in ended]


def relative(pairs: list[Pair], field: str) -> Interval:
    """Gap in percent."""
    return interval([100 * (row[field] / base[field] - 1) for row, base in pairs])


def common_target(pair: Pair) -> tuple[Row, Row, float]:
    """A pair and the loss that both reach."""
    return *pair, max(row["train_loss"] for row in pair)


def seconds_to(target: float, row: Row) -> float:
    """Time until the curve, averaged over as many points as the final loss is, falls to the target."""
    curve, width = row["curve"], row["tail"]
    smooth = [mean(curve[end - width : end]) for end in range(width, len(curve) + 1)]
    reached = next((i for i, loss in enumerate(smooth) if loss <= target), len(smooth) - 1)
    return float(sum(row["seconds"][: reached + width]))


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what fp8_quality.py wrote")
    lines = parser.parse_args(arguments).file.read_text(encoding="utf-8").splitlines()
    for text in report([{"common": 0, **json.loads(line)} for line in lines]):
        show(text)


if __name__ == "__main__":
    main()
