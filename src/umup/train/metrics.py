"""Metrics as typed records, one JSON object per line of metrics.jsonl."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umup.checkpoint import write_atomic
from umup.errors import CheckpointError


@dataclass(frozen=True)
class Metrics:
    """One optimizer step: `step` steps are done. Losses in nats per token, taken before the step's update.

    `val_loss` is measured after the update, on the steps that evaluate.
    """

    step: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    val_loss: float | None = None

    def row(self) -> dict[str, Any]:
        """The record under the names that dashboards expect."""
        named = {
            "step": self.step,
            "train/loss": self.train_loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens_per_second,
        }
        return named if self.val_loss is None else {**named, "val/loss": self.val_loss}


def append_metrics(path: Path, metrics: Metrics) -> None:
    """Add one line; it is on its way to disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics.row()) + "\n")


def read_metrics(path: Path) -> list[Metrics]:
    """Every complete line; a last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def rewind_metrics(path: Path, step: int) -> list[Metrics]:
    """Drop what came after `step`, which a resumed run will do again; returns what stays."""
    kept = [m for m in read_metrics(path) if m.step <= step]
    write_metrics(path, kept)
    return kept


def write_metrics(path: Path, metrics: Iterable[Metrics]) -> None:
    """All lines at once, in place of what is there."""
    write_atomic(path, "".join(json.dumps(m.row()) + "\n" for m in metrics))


def final_losses(metrics: Iterable[Metrics]) -> tuple[float, float | None]:
    """(mean of the last tenth of the training losses, last validation loss)."""
    rows = list(metrics)
    tail = rows[-max(1, len(rows) // 10) :]
    val = [m.val_loss for m in rows if m.val_loss is not None]
    return sum(m.train_loss for m in tail) / len(tail), val[-1] if val else None


def _record(line: str, where: str) -> Metrics:
    try:
        row = json.loads(line)
        numbers = (row["step"], row["train/loss"], row["lr"], row["grad_norm"], row["tokens_per_second"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{where}: not a record of a run; choose another --out") from None
    return Metrics(*numbers, val_loss=row.get("val/loss"))
