"""What a planner starts from, read back from disk: a finished study or run, and transfer checks to quote.

A study is a directory with best.json, which `umup sweep` writes, or the directory of a finished run.
Not covered: tokens of trials at other sizes than the proxy's (a shortlist's) count as the proxy's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umup.config.load import load_config, parse_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError, InputError
from umup.models.specs import plan_for
from umup.study.evidence import tokens
from umup.train.metrics import read_metrics


@dataclass(frozen=True)
class Study:
    """What was tuned: the proxy with its best values, its loss, what tuning took in trials and tokens, its figure."""

    proxy: RunConfig
    values: Mapping[str, float]
    loss: float | None
    trials: int
    tokens: int
    figure: Path | None = None


def load_study(path: Path) -> Study:
    """Read best.json, or a finished run. Raises ConfigError where neither is there or does not fit together."""
    best = path / "best.json"
    if best.exists():
        return _from_best(best)
    if (path / "model.safetensors").exists() and (path / "config.yaml").exists():
        proxy = load_config(path / "config.yaml")
        losses = [m.val_loss for m in read_metrics(path / "metrics.jsonl") if m.val_loss is not None]
        loss = losses[-1] if losses else None
        return Study(proxy, {"optimizer.lr": proxy.optimizer.lr}, loss, 1, tokens(proxy))
    if (path / "config.yaml").exists():
        raise ConfigError(f"study {path}: a run that has not finished; the same umup train command goes on")
    raise ConfigError(
        f"study {path}: no best.json, which umup sweep writes when its study is done, and no finished run; write the "
        "directory of one of them"
    )


def _from_best(path: Path) -> Study:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        values = {str(key): float(value) for key, value in body["values"].items()}
        proxy, spent = body["config"], (int(body["trials"]), int(body["tokens"]))
        loss = float(body["loss"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a study's best.json ({error!r}); run umup sweep again on it") from None
    try:
        tuned = parse_config(proxy, [(key, repr(value)) for key, value in values.items()])
        plan_for(tuned)
    except InputError as error:
        raise ConfigError(f"{path}: {error}") from None
    figure = path.parent / "sweep.png"
    return Study(tuned, values, loss, *spent, figure if figure.exists() else None)


@dataclass(frozen=True)
class CheckSummary:
    """A transfer check on disk: its axis, verdict, what it said, and its figure where there is one."""

    axis: str
    scheme: str
    verdict: str
    lines: tuple[str, ...]
    figure: Path | None


def read_check(path: Path) -> CheckSummary:
    """The check.json of a transfer check's directory. Raises ConfigError where it is none."""
    try:
        body = json.loads((path / "check.json").read_text(encoding="utf-8"))
        figure = path / "transfer.png"
        known = figure if figure.exists() else None
        return CheckSummary(body["axis"], body["scheme"], body["verdict"], tuple(body["summary"]), known)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--check {path}: no check.json of umup transfer-check there; write its --out directory"
        ) from None
