"""`umup ranges RUN`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import Parser

if TYPE_CHECKING:
    from umup.study.ranges import History, RangeReport


def run(arguments: list[str]) -> int:
    """Print what the operands of a run's FP8 products did, what to spare, and draw it."""
    parser = Parser("ranges", "What a run's FP8 scales saw, and which products to spare; draws RUN/ranges.png.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    known = parser.parse_strictly(arguments)

    from umup.plots.ranges import draw
    from umup.study.ranges import read_report

    report = read_report(known.run)
    picture = known.run / "ranges.png"
    if known.json:
        print(json.dumps({**report.json(), "figure": str(picture)}, indent=1))
    else:
        print(_text(report))
    draw(report, picture, f"operand ranges of {known.run.name}")
    if not known.json:
        print(f"figure: {picture}")
    return 0


def _text(report: "RangeReport") -> str:
    from umup.rules.explain import table
    from umup.study.ranges import collapse

    head = ("product", "operand", "format", "RMS first", "last", "max", "clipped", "flushed", "scale", "moves")
    rows = [(name, *_cells(group)) for name, group in collapse(report.histories)]
    steps = [look.step for h in report.histories for look in h.looks]
    looks = f"{len(set(steps))} looks, before steps {min(steps)} to {max(steps)}; max and shares are the largest of any"
    return "\n".join([looks, "", table([head, *rows]), "", _advice(report)])


def _cells(group: "list[History]") -> tuple[str, ...]:
    first = group[0].used[-1]
    used = [look for h in group for look in h.used]
    moved = [h.moves[-1][0].step for h in group if h.moves]
    moves = f"{len(group[0].moves)}, last after the look at step {max(moved)}" if moved else "none"
    moves = "follows" if first.operand == "w" else moves
    exponents = sorted({h.used[-1].exponent for h in group})
    spared = [h.spared_at for h in group if h.spared_at is not None]
    return (
        first.operand,
        first.format,
        _span([h.first.rms for h in group]),
        _span([h.last.rms for h in group]),
        f"{max(look.max for h in group for look in h.looks):.3g}",
        _share(max(look.clip for look in used)),
        _share(max(look.flush for look in used)),
        "..".join(f"2^{e}" for e in dict.fromkeys((exponents[0], exponents[-1]))),
        moves + (f"; spared from step {min(spared)}" if spared else ""),
    )


def _span(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.2g}", f"{max(numbers):.2g}"
    return low if low == high else f"{low}..{high}"


def _share(share: float) -> str:
    return "-" if share == 0 else f"{share:.2g}"


def _advice(report: "RangeReport") -> str:
    if not report.faults:
        return "nothing to spare: a constant serves every operand"
    entries = ", ".join(f"'{pattern}': {name}" for pattern, name in report.spare.items())
    reasons = [f"  {product}: {reason}" for product, reason in report.faults.items()]
    return "\n".join(["spare", *reasons, "", f"precision: {{overrides: {{{entries}}}}}"])
