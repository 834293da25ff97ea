"""`umup transfer STUDY --target CONFIG`: the target's config, what moved by which rule, and what it will cost."""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import Parser, parse_with_config
from umup.config.load import dump_yaml
from umup.errors import ConfigError, did_you_mean
from umup.rules.catalog import HORIZON

if TYPE_CHECKING:
    from umup.config.sections import RunConfig
    from umup.study.planner import HorizonRules
    from umup.study.transfer_report import TransferPlan


def run(arguments: list[str]) -> int:
    """Plan, write the directory, print."""
    parser = Parser(
        "transfer",
        "Carry a study's best values to a target: its complete config, every move with its rule, warnings and cost.\n"
        "STUDY is the directory of umup sweep or of a finished run; --section.key VALUE overrides the target.",
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="a study's or a finished run's directory")
    parser.add_argument(
        "--target", dest="config", metavar="CONFIG", type=Path, required=True, help="YAML with the target's sizes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="config.yaml, plan.json, transfer.json, report.md go here"
    )
    parser.add_argument("--bench", type=Path, metavar="FILE", help="output of umup bench --shape TARGET --json")
    parser.add_argument(
        "--check", type=Path, action="append", default=[], metavar="DIR", help="a transfer check to quote; repeatable"
    )
    add_rules(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    known, target = parse_with_config(parser, arguments)

    from umup.study.transfer_report import document, plan_text, plan_transfer
    from umup.study.tuned import load_study

    study = load_study(known.study)
    plan = plan_transfer(study, target, rules_from(known, study.proxy), known.bench, known.check)
    if known.out is not None:
        _write(plan, known.out)
    print(json.dumps(document(plan), indent=1) if known.json else plan_text(plan))
    if known.out is not None:
        said = f"{known.out}: config.yaml, plan.json, transfer.json, report.md; umup train {known.out / 'config.yaml'}"
        print(said, file=sys.stderr if known.json else sys.stdout)
    return 0


def add_rules(parser: argparse.ArgumentParser) -> None:
    """The horizon rules as options."""
    for axis, table in HORIZON.items():
        names = ", ".join(table)
        parser.add_argument(f"--{axis}-rule", metavar="NAME", help=f"{names} [the optimizer family's default]")


def rules_from(known: argparse.Namespace, proxy: "RunConfig") -> "HorizonRules":
    """The family's default rules with those that were named. Raises ConfigError for names that do not exist."""
    from umup.study.planner import DEFAULT_RULES

    given = {axis: getattr(known, f"{axis}_rule") for axis in HORIZON}
    for axis, name in given.items():
        if name is not None and name not in HORIZON[axis]:
            raise ConfigError(f"--{axis}-rule: unknown rule {name!r}; {did_you_mean(name, HORIZON[axis])}")
    return replace(DEFAULT_RULES[proxy.optimizer.name], **{axis: name for axis, name in given.items() if name})


def _write(plan: "TransferPlan", out: Path) -> None:
    """Refuses a directory in which a run has begun."""
    from umup.checkpoint import make_directory, write_atomic
    from umup.models.specs import plan_for
    from umup.study.transfer_report import document, figure_name, markdown

    if (out / "metrics.jsonl").exists():
        raise ConfigError(f"--out {out}: a run has begun there; write another directory")
    make_directory(out)
    write_atomic(out / "config.yaml", dump_yaml(plan.transfer.config))
    write_atomic(out / "plan.json", plan_for(plan.transfer.config).to_json())
    write_atomic(out / "transfer.json", json.dumps(document(plan), indent=1))
    write_atomic(out / "report.md", markdown(plan))
    if plan.study.figure is not None:
        shutil.copyfile(plan.study.figure, out / "sweep.png")
    for check in plan.checks:
        if check.figure is not None:
            shutil.copyfile(check.figure, out / figure_name(check))
