"""`umup transfer-check CONFIG`: does the tuned value stay best at other sizes?"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import Parser, config_parser, parse_with_config
from umup.cli.sweep import check_stack, say
from umup.cli.transfer import add_rules, rules_from
from umup.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import argparse

    from umup.study.transfer_check import CheckPlan

EXIT = {"pass": 0, "fail": 1, "undecided": 4}
AXES = ("width", "depth", "batch", "length")
RANGE = re.compile(r"2\^(-?[\d.]+)\.\.2\^(-?[\d.]+)")


def _parser() -> Parser:
    parser = config_parser(
        "transfer-check",
        "Search a hyperparameter at several sizes and judge whether the optimum stays (exit 0), moves (1), or cannot\n"
        "be told (4). CONFIG is the proxy; other sizes follow from it as umup transfer would make them.\n"
        "Interrupt it and repeat the command: it goes on.",
    )
    parser.add_argument("--axis", default="width", choices=AXES, help="what grows [width]")
    parser.add_argument("--sizes", metavar="A,B,...", help="hidden_size, num_layers, batch_size or steps [x2, x4]")
    parser.add_argument(
        "--hparam", default="lr", metavar="NAME", help="lr, weight_decay, eps or one of the scheme's [lr]"
    )
    parser.add_argument("--grid", metavar="2^A..2^B", help="values at the proxy [2^-2..2^2 times the config's]")
    parser.add_argument("--step", type=float, default=0.5, help="of the grid, in octaves [0.5]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each value near the best [3]")
    parser.add_argument("--drift", type=float, default=0.5, metavar="OCTAVES", help="tolerated drift [0.5]")
    parser.add_argument("--penalty", type=float, default=0.01, metavar="NATS", help="tolerated loss penalty [0.01]")
    parser.add_argument("--workers", type=int, default=2, help="processes [2]")
    parser.add_argument(
        "--stack", type=int, metavar="N", help="runs that a worker trains as one program [16 on a GPU, else 1]"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="journal, figure, numbers [runs/check-<axis>-<CONFIG>]")
    add_rules(parser)
    return parser


def run(arguments: list[str]) -> int:
    """Search a line per size, judge, write figure and numbers; the exit code is the verdict."""
    parser = _parser()
    known, config = parse_with_config(parser, arguments)
    for option in ("seeds", "workers"):
        if getattr(known, option) < 1:
            parser.error(f"--{option} must be 1 or more, not {getattr(known, option)}")
    for option in ("step", "drift", "penalty"):
        if not getattr(known, option) > 0:
            parser.error(f"--{option} must be positive, not {getattr(known, option)}")
    check_stack(parser, known.stack, config)
    out = known.out or Path("runs") / f"check-{known.axis}-{known.config.stem}"

    from umup.study.transfer_check import CheckPlan, default_grid, double_sizes
    from umup.study.verdicts import Tolerance

    plan = CheckPlan(
        proxy=config,
        sizes=double_sizes(config, known.axis) if known.sizes is None else _sizes(known.sizes),
        grid=default_grid(config, known.hparam, known.step) if known.grid is None else _grid(known.grid, known.step),
        axis=known.axis,
        hyperparameter=known.hparam,
        seeds=known.seeds,
        rules=rules_from(known, config),
        tolerance=Tolerance(known.drift, known.penalty),
    )
    return _measure(plan, out, known)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--sizes {text}: expected numbers with commas, such as --sizes 256,512,1024") from None


def _grid(text: str, step: float) -> tuple[float, ...]:
    found = RANGE.fullmatch(text)
    low, high = (float(x) for x in found.groups()) if found else (0.0, 0.0)
    if low >= high:
        raise ConfigError(f"--grid {text}: expected a range of powers of two from low to high, such as 2^-2..2^2")
    return tuple(low + i * step for i in range(round((high - low) / step) + 1))


def _measure(plan: "CheckPlan", out: Path, known: "argparse.Namespace") -> int:
    from umup.checkpoint import write_atomic
    from umup.plots.transfer import draw, write_csv
    from umup.study.transfer_check import transfer_check
    from umup.study.verdicts import as_document

    check = transfer_check(plan, out, known.workers, say, known.stack)
    found = as_document(check)
    write_csv([check], out / "transfer.csv")
    write_atomic(out / "check.json", json.dumps(found, indent=1))
    title = f"{plan.hyperparameter} over {plan.axis}, {plan.proxy.train.steps} steps at the proxy; bars: seeds"
    try:
        draw([check], out / "transfer.png", title)
    except MissingExtraError as error:  # the verdict stands without its figure
        print(f"umup: no figure: {error}", file=sys.stderr)
    if known.json:
        print(json.dumps(found))
    else:
        print("\n".join(found["summary"]))
        print(f"{out}: transfer.png, transfer.csv, check.json")
    return EXIT[check.verdict]
