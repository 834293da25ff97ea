"""`umup coord-check CONFIG`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import config_parser, parse_with_config
from umup.errors import ConfigError

if TYPE_CHECKING:
    from umup.study.coord_check import CoordReport

AXES = ("width", "depth")
EXIT_CODES = {"PASS": 0, "FAIL": 1, "UNDECIDED": 4}


def run(arguments: list[str]) -> int:
    """Check that training is the same at every width or depth: 0 it is, 1 it is not, 4 undecided."""
    parser = config_parser(
        "coord-check",
        "Train a config's network for a few steps at several widths, or depths, and compare every size: PASS (exit\n"
        "code 0), FAIL (1) or UNDECIDED (4), with the mistake that explains it.",
    )
    parser.add_argument("--axis", choices=AXES, help="what grows [width, or what --depths says]")
    parser.add_argument("--widths", metavar="N,N,...", help="hidden sizes [three, from 128 or the config's own]")
    parser.add_argument("--depths", metavar="N,N,...", help="layers [three, from 2 or the config's own]")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per run [4]")
    parser.add_argument("--seeds", type=int, default=3, help="runs per size [3]")
    parser.add_argument("--out", type=Path, help="a directory for coordinates.csv, report.json and coordinates.png")
    known, config = parse_with_config(parser, arguments)

    given = {axis: getattr(known, f"{axis}s") for axis in AXES}
    axis = known.axis or ("depth" if known.depths is not None else "width")
    if wrong := [f"--{name}s" for name, sizes in given.items() if sizes is not None and name != axis]:
        parser.error(f"{wrong[0]} has no effect on a check over {axis}; check one axis at a time")

    from umup.study.coord_check import check_config, default_depths, default_widths

    default = {"width": default_widths, "depth": default_depths}[axis](config)
    sizes = default if given[axis] is None else _sizes(axis, given[axis])
    report = check_config(config, sizes, known.steps, known.seeds, axis)
    print(json.dumps(report.json(), indent=1) if known.json else report.text())
    if known.out is not None:
        _write(report, known.out)
    return EXIT_CODES[report.verdict]


def _sizes(axis: str, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        example = {"width": "64,128,256", "depth": "2,4,8"}[axis]
        raise ConfigError(f"--{axis}s {text}: expected whole numbers with commas; write --{axis}s {example}")
    return tuple(int(part) for part in text.split(","))


def _write(report: "CoordReport", out: Path) -> None:
    from umup.plots.coordinates import draw, write_csv

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.json(), indent=1), encoding="utf-8")
    write_csv(report, out / "coordinates.csv")
    draw(report, out / "coordinates.png")
