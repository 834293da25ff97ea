"""`umup demo`: the whole story, on a CPU, in minutes."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from umup.cli.arguments import Parser
from umup.errors import DivergedError

if TYPE_CHECKING:
    from umup.study.demo import DemoPlan
    from umup.study.verdicts import TransferCheck

PROMPT = "def "


def run(arguments: list[str]) -> int:
    """Sweep, transfer, train, check, generate, plot, and say what was measured."""
    parser = Parser(
        "demo",
        "Tune the learning rate of a small proxy, carry it to wider models, in SP and in u-muP, on the text of this\n"
        "Python's own library; check that it held, train the widest, let it write, draw the figure.\n"
        "Interrupt it and repeat the command: it goes on.",
    )
    parser.add_argument("--fast", action="store_true", help="a smaller story, under a minute")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where all of it goes")
    parser.add_argument("--workers", type=int, default=2, help="processes of the sweep [2]")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    known = parser.parse_strictly(arguments)
    if known.workers < 1:
        parser.error(f"--workers must be 1 or more, not {known.workers}")
    out = known.out / "fast" if known.fast else known.out
    return _story(out, known.fast, known.workers, known.json)


def _story(out: Path, fast: bool, workers: int, as_json: bool) -> int:
    from umup.checkpoint import make_directory, write_atomic
    from umup.data.tokens import prepare
    from umup.plots.transfer import draw, write_csv
    from umup.study.demo import FAST, FULL, check_of, proxy_config, summary
    from umup.study.transfer_check import transfer_checks

    def say(text: str = "") -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    began = perf_counter()
    demo = FAST if fast else FULL
    make_directory(out)
    first = proxy_config(demo, next(iter(demo.grids)))
    files = prepare(first.data, first.model.vocab_size, first.tokens_per_batch)
    say(f"text: {len(files.train):,} bytes of this Python's library to train on, {len(files.val):,} held out")
    say(
        f"1. sweep: widths {', '.join(map(str, demo.widths))}, schemes {', '.join(demo.grids)}, {demo.steps} steps each"
    )
    with trials_bar("   trials") as observe:
        transfers = transfer_checks([check_of(demo, scheme) for scheme in demo.grids], out, workers, observe=observe)
    write_csv(transfers, out / "transfer.csv")
    title = f"tuned at width {demo.proxy}; two layers, {demo.steps} steps of 1024 bytes of Python; bars: seeds"
    draw(transfers, out / "transfer.png", title)
    measured = summary(transfers)
    write_atomic(out / "summary.txt", "\n".join(measured) + "\n")
    say(f"2. transfer and train: width {demo.widths[-1]} at the proxy's rate, {demo.final_steps} steps")
    losses = _train_and_write(demo, transfers, out, say)
    say("4. the check, and what was measured here:")
    for line in measured:
        say(f"   {line}")
    say(f"figure {out / 'transfer.png'}, numbers {out / 'transfer.csv'}; {perf_counter() - began:.0f} s")
    if as_json:
        rates = {t.scheme: {w: line.best for w, line in t.lines.items()} for t in transfers}
        print(
            json.dumps(
                {
                    "best_log2_lr": rates,
                    "val_loss": losses,
                    "verdict": {t.scheme: t.verdict for t in transfers},
                    "summary": measured,
                    "out": str(out),
                }
            )
        )
    return 0


def _train_and_write(
    demo: "DemoPlan", transfers: list["TransferCheck"], out: Path, say: Callable[[str], None]
) -> dict[str, float]:
    """Train the widest in each scheme and print a sample of each; returns the losses of those that did not diverge."""
    from umup.cli.train import progress
    from umup.inference.completion import load_run
    from umup.inference.generate import Sampling
    from umup.study.demo import final_config
    from umup.train.loop import run_training

    losses, samples = {}, {}
    for t in transfers:
        home = out / f"{t.scheme}-{demo.widths[-1]}"
        with progress(f"   {t.scheme}", demo.final_steps) as watch:
            try:
                losses[t.scheme] = run_training(final_config(demo, t), home, watch).val_loss
            except DivergedError as error:
                say(f"   {t.scheme:5s} rate 2^{t.rate:g}: diverged at {error}")
                continue
        samples[t.scheme] = load_run(home).complete(PROMPT, 56, Sampling(temperature=0.7)).text
        say(f"   {t.scheme:5s} rate 2^{t.rate:g}: validation loss {losses[t.scheme]:.3f}")
    say("3. what they write:")
    for scheme, text in samples.items():
        say(f"   {scheme:5s} {(PROMPT + text)!r}")
    return losses


@contextmanager
def trials_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for trials whose number grows; nothing off a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Trials take seconds: the default window of 30 s holds too few of them to tell the time left.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
