"""`umup train CONFIG`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from umup.cli.arguments import config_parser, parse_with_config

if TYPE_CHECKING:
    from umup.train.metrics import Metrics


def run(arguments: list[str]) -> int:
    """Train, with a progress bar on a terminal and a last line anywhere."""
    parser = config_parser("train", "Train a config. The same command goes on where a run was interrupted.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory [runs/<name of CONFIG>]")
    known, config = parse_with_config(parser, arguments)
    out = known.out or Path("runs") / known.config.stem

    from umup.train.loop import run_training

    with progress(f"{out}", config.train.steps) as observe:
        result = run_training(config, out, observe, notice=lambda line: print(line, file=sys.stderr))
    if known.json:
        print(json.dumps({**result.__dict__, "out": str(result.out)}))
    else:
        print(
            f"{result.steps} steps, train loss {result.train_loss:.4f}, val loss {result.val_loss:.4f}, "
            f"{result.tokens_per_second:,.0f} tokens/s, in {out}"
        )
    return 0


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[["Metrics"], None]]:
    """One rich progress bar on stderr with loss, tokens/s and time left; nothing off a terminal."""
    if not sys.stderr.isatty():
        yield lambda metrics: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=steps, loss="-", speed="-")

        def observe(metrics: "Metrics") -> None:
            loss = f"{metrics.train_loss:.3f}"
            if metrics.val_loss is not None:
                loss += f" (val {metrics.val_loss:.3f})"
            bar.update(task, completed=metrics.step, loss=loss, speed=f"{metrics.tokens_per_second:,.0f}")

        yield observe
