"""The table of a results file of fp8_quality.py: gaps in loss with their intervals, and what these exclude.

    python -m benchmarks.fp8_quality_report FILE.jsonl [--step-ratio umup/fp8/adapt=1.52 ...]

A gap is paired: one seed's loss over the loss of the same scheme's BF16 with the same seed, learning rate and
multipliers, less one. Means come with 95% intervals of Student's t over seeds; an aim is met where the interval lies
inside it, missed where it lies outside.

Speed to equal loss is how much sooner the BF16 run's final training loss is reached. A run that ends with a gap reaches
that loss `gap / slope` steps later, the slope being that with which BF16's loss falls over the last half of its curve
(least squares). So of n steps the speed is

    (BF16's time per step / this one's) * n / (n + gap / slope),

common steps, which are one run, left out. The first factor is that of the trials, or, by `--step-ratio`, that of
another shape, where `umup bench` measured it.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite, log2, sqrt
from pathlib import Path
from statistics import linear_regression, mean, median, stdev
from typing import Any, NamedTuple

Row = dict[str, Any]
Pair = tuple[Row, Row]

# What the recipes promise: the most that the loss may rise over BF16's, in percent.
AIMS = {"umup/fp8/static": 0.3, "umup/fp8/adapt": 0.1, "umup/fp8_partial/static": 0.05, "umup/fp8_partial/adapt": 0.05}
SPEED_AIM = 1.5  # to equal loss, at the step ratio of the 7B shape
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

    def state(self, inside: Callable[[float], bool]) -> str:
        """Whether an aim holds for all of the interval, for none of it, or for a part."""
        return {(True, True): "met", (False, False): "missed"}.get((inside(self.low), inside(self.high)), "undecided")


def interval(values: Sequence[float]) -> Interval:
    """Student's t over values that are independent."""
    middle = mean(values)
    if len(values) == 1:
        return Interval(middle, -inf, inf)
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


class Group(NamedTuple):
    """What the seeds of a group share."""

    variant: str
    lr: float
    hparams: tuple[tuple[str, float], ...]

    @property
    def scheme(self) -> str:
        """sp or umup."""
        return self.variant.split("/")[0]

    @property
    def multipliers(self) -> str:
        """For a person."""
        return ", ".join(f"{name}={value:g}" for name, value in self.hparams) or "every multiplier 1"


Groups = dict[Group, list[Row]]


def report(rows: Sequence[Row], step_ratios: Mapping[str, float] | None = None) -> Iterator[str]:
    """Lines of the table, one block per size, length and corpus, and in it one per set of multipliers."""
    for cohort in dict.fromkeys(tuple(row[field] for field in COHORT) for row in rows):
        chosen = [row for row in rows if tuple(row[field] for field in COHORT) == cohort]
        first = chosen[0]
        length = f"{first['steps'] * first['tokens_per_step']:,} tokens in {first['steps']} steps"
        if first["common"]:
            length += f", the first {first['common']} shared, in BF16"
        machines = ", ".join(sorted({f"{row['device']} with torch {row['torch']}" for row in chosen}))
        yield f"{first['size']}: {first['parameters']:,} parameters, {length}; {machines}"
        yield HEADER
        groups: Groups = {}
        for row in sorted(chosen, key=lambda row: (not row["variant"].startswith("umup"), row["lr"], row["seed"])):
            group = Group(row["variant"], row["lr"], tuple(sorted(row["hparams"].items())))
            groups.setdefault(group, []).append(row)
        sets = dict.fromkeys((group.scheme, group.hparams) for group in groups)
        for scheme, hparams in sets:
            part = {g: found for g, found in groups.items() if (g.scheme, g.hparams) == (scheme, hparams)}
            yield f"{scheme}, {next(iter(part)).multipliers}"
            for group, found in part.items():
                reference = part.get(group._replace(variant=f"{scheme}/bf16"), [])
                yield f"  {summary(group, found)}  {verdict(found, reference, step_ratios or {})}".rstrip()
        yield from schemes(groups)
        yield ""


def summary(group: Group, rows: list[Row]) -> str:
    """A variant at one learning rate, over its seeds."""
    ended = [row for row in rows if row["val_loss"] is not None]
    numbers = f"{'diverged':>8s} {'':7s}"
    if ended:
        speed = median(row["tokens_per_second"] for row in ended) / 1e3
        numbers = f"{mean(row['val_loss'] for row in ended):8.4f} {speed:7.0f}"
    seeds = str(len(rows)) if len(ended) == len(rows) else f"{len(ended)}/{len(rows)}"
    moves, spared = max(row["moves"] for row in rows), max(len(row["spared"]) for row in rows)
    rate = f"2^{log2(group.lr):g}"
    return f"{group.variant:23s} {rate:>7s} {seeds:>5s} {numbers} {moves:5d} {spared:6d}"


def verdict(rows: list[Row], reference: list[Row], step_ratios: Mapping[str, float]) -> str:
    """The gaps of a group to a reference of the same seeds, and what follows."""
    if rows is reference:
        return ""
    pairs = paired(rows, reference)
    if not pairs:
        return "no pair"
    variant, val = rows[0]["variant"], relative(pairs, "val_loss")
    ratios = [row["tokens_per_second"] / base["tokens_per_second"] for row, base in pairs]
    speed = interval([ratio * steps_share(pair) for ratio, pair in zip(ratios, pairs, strict=True)])
    said = [val.text("+.3f", "%"), relative(pairs, "train_loss").text("+.3f", "%"), speed.text(".2f", "x")]
    if (ratio := step_ratios.get(variant)) is not None:
        there = interval([ratio * steps_share(pair) for pair in pairs])
        aim = there.state(lambda x: x >= SPEED_AIM) if len(pairs) > 1 else "undecided"
        said.append(f"{there.text('.3f', 'x')} at a step ratio of {ratio:g}, aim {SPEED_AIM:g}x {aim}")
    if len(pairs) == 1:
        return "; ".join([*said, "one pair excludes nothing"])
    said.append("a loss" if val.low > 0 else "a gain" if val.high < 0 else "neither a loss nor a gain")
    if (limit := AIMS.get(variant)) is not None:
        said.append(f"aim {limit}% {val.state(lambda x: x <= limit)}")
    return "; ".join(said)


def schemes(groups: Groups) -> Iterator[str]:
    """u-muP against SP in BF16, each at the rate where its first seed did best, and which rates lie on an edge."""
    best: dict[tuple[str, tuple[tuple[str, float], ...]], Group] = {}
    for group in groups:
        place = group.scheme, group.hparams
        line = sorted((g for g in groups if g == group._replace(lr=g.lr)), key=lambda g: g.lr)
        if group.variant.endswith("/bf16") and place not in best:
            best[place] = min(line, key=lambda g: groups[g][0]["val_loss"] or inf)
            if len(line) > 1 and best[place] in (line[0], line[-1]):
                yield f"{group.variant}: the best learning rate is the last one tried; its optimum may lie beyond"
    for theirs in (g for g in best.values() if g.scheme == "sp"):
        for ours in (g for g in best.values() if g.scheme == "umup"):
            pairs = paired(groups[ours], groups[theirs])
            if pairs:
                gap, seeds = relative(pairs, "val_loss"), f"{len(pairs)} seed{'s' if len(pairs) > 1 else ''}"
                state = gap.state(lambda x: x <= 0) if len(pairs) > 1 else "one pair excludes nothing"
                yield (
                    f"umup/bf16, {ours.multipliers}, against sp/bf16, each at its best rate, over {seeds}: "
                    f"validation loss {gap.text('+.3f', '%')}; aim of not losing: {state}"
                )


def paired(rows: list[Row], reference: list[Row]) -> list[Pair]:
    """(row, reference row) of each seed at which both ended."""
    ended = {row["seed"]: row for row in reference if row["val_loss"] is not None}
    return [(row, ended[row["seed"]]) for row in rows if row["val_loss"] is not None and row["seed"] in ended]


def relative(pairs: list[Pair], field: str) -> Interval:
    """Gap in percent."""
    return interval([100 * (row[field] / base[field] - 1) for row, base in pairs])


def steps_share(pair: Pair) -> float:
    """n / (n + gap/slope): BF16's steps over those that this run needs to get where BF16 ended."""
    row, base = pair
    points, gap = len(base["curve"]), row["train_loss"] - base["train_loss"]
    late = base["curve"][points // 2 :]
    falls = -linear_regression(range(len(late)), late).slope
    if falls <= 0:  # no number of steps makes up for a gap
        return 0.0 if gap > 0 else 1.0
    return float(points / max(points + gap / falls, 1.0))


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what fp8_quality.py wrote")
    parser.add_argument(
        "--step-ratio", nargs="+", default=(), metavar="VARIANT=RATIO", help="steps per second over BF16's, elsewhere"
    )
    args = parser.parse_args(arguments)
    ratios = {name: float(ratio) for name, _, ratio in (text.rpartition("=") for text in args.step_ratio)}
    lines = args.file.read_text(encoding="utf-8").splitlines()
    for text in report([{"common": 0, "hparams": {}, **json.loads(line)} for line in lines], ratios):
        show(text)


if __name__ == "__main__":
    main()
