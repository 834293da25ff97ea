"""`umup sweep CONFIG`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umup.cli.arguments import Parser, config_parser, parse_with_config
from umup.config.load import load_config, read_yaml
from umup.config.sections import RunConfig
from umup.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import argparse

    from umup.study.sweep import Sweep
    from umup.study.sweep_report import Finding

PREFIX = "--space."
DESCRIPTION = """\
Search hyperparameters on a small proxy. The same command goes on where a study was interrupted, and more processes and
hosts may work on it: umup sweep CONFIG --join DIR. The choice is DIR/best.json, the reasons DIR/report.md.

What is searched: optimizer.lr over 2^-3..2^3 of the config's and every hyperparameter of its scheme, or your own axes:
--space.optimizer.lr 2^-3..2^3, --space.model.dropout [0.01, 0.1]; or --space FILE.yaml with such lines."""


def run(arguments: list[str]) -> int:
    """Open or join a study, work on it, report."""
    plain, axes = _split_axes(arguments)
    parser = _parser()
    known, config = parse_with_config(parser, plain)
    _check(parser, known, bool(axes))
    check_stack(parser, known.stack, config)
    folder: Path = known.join or known.out or Path("runs") / f"{known.config.stem}-sweep"

    from umup.study.sweep import load_study, open_study
    from umup.study.sweep_report import summary
    from umup.study.sweep_run import check_joins, find
    from umup.study.worker import Crew

    if known.join is not None:
        check_joins(folder, load_study(folder), config)
    else:
        open_study(folder, _sweep(known, config, axes))
    finding = find(folder, Crew(known.workers, known.stack), say)
    files = _write(folder, finding)
    if known.json:
        print(json.dumps({**finding.json(), "out": str(folder)}))
    else:
        print(f"{summary(finding)}\n{folder}: {', '.join(files)}")
    return 0


def _write(folder: Path, finding: "Finding") -> list[str]:
    """Report, values, figure with its numbers; the names of the files."""
    from umup.plots.sweep import draw, write_csv
    from umup.study.sweep_report import write_report

    files = ["report.md", "best.json", "sweep.csv"]
    write_report(folder, finding)  # the choice is there, whatever becomes of its figure
    write_csv(finding, folder / "sweep.csv")
    try:
        draw(finding, folder / "sweep.png")
    except MissingExtraError as error:
        say(f"umup: no figure: {error}")
        return files
    write_report(folder, finding, "sweep.png")
    return [*files, "sweep.png"]


def say(line: str) -> None:
    """To stderr; worker processes use it, too."""
    print(line, file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = config_parser("sweep", DESCRIPTION)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="the study [runs/<name of CONFIG>-sweep]")
    add("--join", type=Path, metavar="DIR", help="work on a study that exists, with its axes and strategy")
    add("--strategy", default="independent", help="independent, random, grid, tpe or gp [independent]")
    add("--space", type=Path, metavar="FILE", help="axes as YAML: {optimizer.lr: 2^-3..2^3, ...}")
    add("--trials", type=int, help="points of random, tpe and gp [200]")
    add("--seeds", type=int, default=1, help="runs per point [1]")
    add("--workers", type=int, default=1, help="processes of this command [1]")
    add("--stack", type=int, metavar="N", help="runs that a worker trains as one program [16 on a GPU, else 1]")
    add("--command", help="a program per run instead of umup's loop; {values} {config} {out} are filled in")
    add("--shortlist", type=Path, metavar="CONFIG", help="rank the best again on this config, at 20 tokens a parameter")
    add("--keep", type=int, help="how many the shortlist gets [10]")
    return parser


def _check(parser: Parser, known: "argparse.Namespace", axes: bool) -> None:
    """Every option must have an effect."""
    for name in ("workers", "trials", "seeds", "keep"):
        if getattr(known, name) is not None and getattr(known, name) < 1:
            parser.error(f"--{name} must be 1 or more, not {getattr(known, name)}")
    if known.join is not None:
        names = ("out", "strategy", "space", "trials", "seeds", "command", "shortlist", "keep")
        given = [f"--{n}" for n in names if getattr(known, n) != parser.get_default(n)] + [f"{PREFIX}KEY"] * axes
        if given:
            parser.error(f"--join takes the study's own {', '.join(given)}; leave that out")
    if known.trials is not None and known.strategy in ("independent", "grid"):
        parser.error(f"--trials has no effect on --strategy {known.strategy}; write --strategy random, or leave it out")
    if known.stack is not None and known.command is not None:
        parser.error("--stack has no effect on --command; leave it out")
    if known.keep is not None and known.shortlist is None:
        parser.error("--keep is of a shortlist; write --shortlist CONFIG, too")


def check_stack(parser: Parser, stack: int | None, config: RunConfig) -> None:
    """Complain of a number that is none, and of a config whose runs cannot share a program."""
    if stack is not None and stack < 1:
        parser.error(f"--stack must be 1 or more, not {stack}")
    if stack is not None and stack > 1:
        from umup.study.stacked import unstackable

        if reason := unstackable(config):
            parser.error(f"--stack: {reason}, or leave --stack out")


def _sweep(known: "argparse.Namespace", config: RunConfig, axes: dict[str, Any]) -> "Sweep":
    from umup.study.space import parse_space, table_space
    from umup.study.sweep import Sweep, twenty_tokens
    from umup.study.workers import corpus_of

    given = {**_file_axes(known.space), **axes} if known.space is not None else axes
    second = None if known.shortlist is None else twenty_tokens(load_config(known.shortlist))
    return Sweep(
        config,
        parse_space(given) if axes or known.space is not None else table_space(config),
        known.strategy,
        known.trials or 200,
        known.seeds,
        known.command,
        second,
        known.keep or 10,
        "" if known.command is not None else corpus_of(config),
    )


def _file_axes(path: Path) -> dict[str, Any]:
    try:
        axes = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--space {path}: cannot be read ({error})") from None
    if axes is not None and not isinstance(axes, dict):
        raise ConfigError(f"--space {path}: expected lines such as optimizer.lr: 2^-3..2^3")
    return axes or {}


def _split_axes(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`--space.KEY SPEC` apart from the rest, which would take it for a config override."""
    plain: list[str] = []
    axes: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith(PREFIX):
            plain.append(argument)
            continue
        if not equals:
            try:
                value = next(rest)
            except StopIteration:
                raise ConfigError(f"{name} has no range; write {name} 2^-3..2^3") from None
        axes[name.removeprefix(PREFIX)] = value
    return plain, axes
