"""`umup coord-check CONFIG`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import config_parser, parse_with_config
from umup.errors import ConfigError

if TYPE_CHECKING:
    from umup.study.coord_check import CoordReport

EXIT_CODES = {"PASS": 0, "FAIL": 1, "UNDECIDED": 4}


def run(arguments: list[str]) -> int:
    """Check that training is the same at every width: 0 it is, 1 it is not, 4 undecided."""
    parser = config_parser(
        "coord-check",
        "Train a config's network for a few steps at several widths and compare every size: PASS (exit code 0), FAIL "
        "(1) or UNDECIDED (4), with the mistake that explains it.",
    )
    parser.add_argument(
        "--widths", metavar="N,N,...", help="hidden sizes; default: three, from 128 or the config's own"
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per run [4]")
    parser.add_argument("--seeds", type=int, default=3, help="runs per width [3]")
    parser.add_argument("--out", type=Path, help="a directory for coordinates.csv, report.json and coordinates.png")
    known, config = parse_with_config(parser, arguments)

    from umup.study.coord_check import check_config, default_widths

    widths = default_widths(config) if known.widths is None else _widths(known.widths)
    report = check_config(config, widths, known.steps, known.seeds)
    print(json.dumps(report.json(), indent=1) if known.json else report.text())
    if known.out is not None:
        _write(report, known.out)
    return EXIT_CODES[report.verdict]


def _widths(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"--widths {text}: expected whole numbers with commas; write --widths 64,128,256")
    return tuple(int(part) for part in text.split(","))


def _write(report: "CoordReport", out: Path) -> None:
    from umup.plots.coordinates import draw, write_csv

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.json(), indent=1), encoding="utf-8")
    write_csv(report, out / "coordinates.csv")
    draw(report, out / "coordinates.png")
