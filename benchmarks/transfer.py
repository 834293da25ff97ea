"""Whether learning rates transfer: basins over width and depth in SP, muP, u-muP and CompleteP, with drift and penalty.

    python -m benchmarks.transfer --results FILE.jsonl [--schemes sp mup umup completep] [--widths 128 ... 2048]
                                  [--depths 4 16] [--seeds 0 1] [--budget-seconds 500]
    python -m benchmarks.transfer --results FILE.jsonl --report [--out DIR]

Llamas on the bytes of Python source. The proxy (width 256, depth 4) is tuned on a grid of 2^0.5; every other cell is
what the planner makes of it, and is searched around the proxy's best rate until its own best has an octave of grid to
both sides. Cells run in the order of what they decide, so that a budget may end anywhere: the proxies, then the widest,
then depth at the proxy's width, then the widths between, each with further seeds near its best and at the transferred
rate before the next. Each finished trial is one line appended to the file; what is there is not run again. Cells are
compiled once a sitting; one seed means the same batches in the same order in every cell.

Not covered: batch and length, FP8, weight decay, several GPUs. SP keeps its norm gains, which the others go without.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from benchmarks.fp8_quality import default_source, read
from benchmarks.fp8_quality_session import Size
from benchmarks.fp8_quality_trainer import Data, Trainer

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.models.specs import shape_of
from umup.plots.transfer import draw, write_csv
from umup.rules.schemes import scheme as find_scheme
from umup.study.axes import AXES
from umup.study.lines import Line
from umup.study.planner import transfer
from umup.study.verdicts import TransferCheck, summary

STEP = 0.5
REACH = 2  # grid steps that a basin needs to both sides of its best
# log2 of a rate near each scheme's best at the proxy.
START = {"sp": -9.0, "mup": -8.0, "umup": 1.0, "completep": -8.0}
# What an SP network has and the others' transfer asks to leave out.
GAINS = frozenset({"sp"})


class Cell(NamedTuple):
    """A scheme at a size."""

    scheme: str
    width: int
    depth: int


class Trial(NamedTuple):
    """One training run."""

    cell: Cell
    log2_lr: float
    seed: int


Loss = Callable[[Trial], float | None]


@dataclass(frozen=True)
class Session:
    """What the command line asked for; `proxy_width` and the first depth are where rates are tuned."""

    schemes: tuple[str, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    proxy_width: int
    head_dim: int
    size: Size
    steps: int
    source: tuple[str, ...]
    device: torch.device

    def proxy(self, scheme: str) -> RunConfig:
        """The scheme's config where it is tuned."""
        cuda = self.device.type == "cuda"
        body: dict[str, Any] = {
            "model": {"hidden_size": self.proxy_width, "num_layers": self.depths[0], "head_dim": self.head_dim}
            | {"max_seq_len": self.size.seq_len, "norm_gain": scheme in GAINS},
            "parametrization": {"scheme": scheme},
            "schedule": {"name": "cosine", "warmup_steps": self.steps // 10, "final_factor": 0.1},
            "data": {"source": list(self.source), "tokenizer": "bytes"},
            "train": {"steps": self.steps, "batch_size": self.size.batch_size, "eval_every": self.steps},
            "precision": {"recipe": "bf16" if cuda else "fp32"},
        }
        proxy = parse_config(body)
        if not find_scheme(scheme).needs_base:
            return proxy
        inner = shape_of(proxy.model).intermediate_size
        base = {"hidden_size": self.proxy_width, "num_layers": self.depths[0], "head_dim": self.head_dim}
        body["parametrization"]["base"] = {**base, "intermediate_size": inner}
        return parse_config(body)

    def config(self, cell: Cell) -> RunConfig:
        """What the planner makes of the proxy at a cell's size."""
        proxy = self.proxy(cell.scheme)
        sized = AXES["depth"].resize(AXES["width"].resize(proxy, cell.width), cell.depth)
        return transfer(proxy, sized).config

    def run(self, trial: Trial) -> RunConfig:
        """The trial's own config."""
        c = self.config(trial.cell)
        optimizer = c.optimizer.model_copy(update={"lr": 2.0**trial.log2_lr})
        return c.model_copy(update={"optimizer": optimizer, "train": c.train.model_copy(update={"seed": trial.seed})})

    def key(self, trial: Trial, digest: str) -> str:
        """Equal for trials that would repeat one another."""
        body = self.config(trial.cell).model_dump(mode="json", exclude={"data"})
        identity = [body, trial.log2_lr, trial.seed, self.size.eval_batches, digest]
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def home(self, scheme: str, depth: int | None = None) -> Cell:
        """The proxy, or its like at another depth."""
        return Cell(scheme, self.proxy_width, depth or self.depths[0])

    def ranked(self) -> Iterator[Cell]:
        """Cells by what they decide."""
        wide = [w for w in sorted(self.widths, reverse=True) if w != self.proxy_width]
        yield from (self.home(s) for s in self.schemes)
        yield from (Cell(s, w, self.depths[0]) for w in wide[:1] for s in self.schemes)
        yield from (self.home(s, d) for d in self.depths[1:] for s in self.schemes)
        yield from (Cell(s, w, self.depths[0]) for w in wide[1:] for s in self.schemes)
        yield from (Cell(s, w, d) for d in self.depths[1:] for w in wide for s in self.schemes)

    def next(self, loss: Loss) -> Trial | None:
        """The first trial without a loss; None when all are done."""
        for cell in self.ranked():
            for trial in self._wanted(cell, loss):
                if loss(trial) is None:
                    return trial
        return None

    def _wanted(self, cell: Cell, loss: Loss) -> Iterator[Trial]:
        """A basin with the first seed; then its best, the neighbours and the transferred rate with all."""
        proxy = self.home(cell.scheme)
        start = START[cell.scheme] if cell == proxy else self.best(proxy, loss)
        points = [start - STEP, start, start + STEP]
        while True:
            trials = [Trial(cell, x, self.seeds[0]) for x in points]
            yield from trials
            losses = {t.log2_lr: loss(t) or inf for t in trials}
            best = min(losses, key=lambda x: losses[x])
            missing = [best + i * STEP for i in range(-REACH, REACH + 1) if best + i * STEP not in points]
            # A rate beyond one that diverged diverges, too.
            worst = min((x for x in points if losses[x] == inf), default=inf)
            missing = [x for x in missing if x < worst or best == inf]
            if not missing or len(points) > 24:
                break
            points = sorted([*points, *missing])
        handed = self.best(proxy, loss)
        near = {best - STEP, best, best + STEP, handed} | {x for x in points if abs(x - best) <= STEP}
        yield from (Trial(cell, x, seed) for seed in self.seeds for x in sorted(near))

    def best(self, cell: Cell, loss: Loss) -> float:
        """The best rate of a finished cell."""
        line = self.line(cell, loss)
        return START[cell.scheme] if line is None else line.best

    def line(self, cell: Cell, loss: Loss) -> Line | None:
        """What is known of a cell: its grid around START with as many seeds as there are; None without three points."""
        losses: dict[float, tuple[float, ...]] = {}
        for i in range(-40, 41):
            x = START[cell.scheme] + i * STEP
            known = [loss(Trial(cell, x, seed)) for seed in self.seeds]
            runs = tuple(y for y in known[: known.index(None) if None in known else None] if y is not None)
            if runs:
                losses[x] = runs
        return Line(losses) if len(losses) > 2 else None


class Results:
    """Trials in a file, by key."""

    def __init__(self, path: Path, session: Session, digest: str) -> None:
        self.path, self.session, self.digest = path, session, digest
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in read(path)}
        self._keys: dict[Trial, str] = {}

    def key(self, trial: Trial) -> str:
        """The trial's, computed once."""
        if trial not in self._keys:
            self._keys[trial] = self.session.key(trial, self.digest)
        return self._keys[trial]

    def loss(self, trial: Trial) -> float | None:
        """Validation loss; infinity where it diverged, None where it has not run."""
        row = self.rows.get(self.key(trial))
        return None if row is None else inf if row["val_loss"] is None else float(row["val_loss"])

    def add(self, trial: Trial, row: dict[str, Any], seconds: float) -> None:
        """Append a finished trial."""
        where = torch.cuda.get_device_name() if self.session.device.type == "cuda" else "cpu"
        kept = {name: row[name] for name in ("val_loss", "train_loss", "tokens_per_second")}
        named = {**trial.cell._asdict(), "log2_lr": trial.log2_lr, "seed": trial.seed, "seconds": round(seconds, 1)}
        when = {"data": self.digest, "device": where, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        full = {"key": self.key(trial), **named, **kept, "steps": self.session.steps, **when}
        self.rows[full["key"]] = full
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")


def run(session: Session, data: Data, results: Results, budget: float) -> None:
    """Trials until all are done or the next would not fit the budget (seconds)."""
    torch._dynamo.config.recompile_limit = 256  # all cells are one code object
    began, trainers, slowest = perf_counter(), dict[Cell, Trainer](), dict[Cell, float]()
    while (trial := session.next(results.loss)) is not None:
        needed = slowest.get(trial.cell, 2 * max(slowest.values(), default=0.0))
        if perf_counter() - began + needed > budget:
            print(f"{trial} needs {needed:.0f} s; the same command goes on from here")
            return
        start = perf_counter()
        if trial.cell not in trainers:
            trainers = {trial.cell: Trainer(session.config(trial.cell), "bf16", session.device)}
        batches = data.order(trial.seed, session.steps)
        row = trainers[trial.cell].train(session.run(trial), batches, data.held_out)
        seconds = perf_counter() - start
        slowest[trial.cell] = max(slowest.get(trial.cell, 0.0), seconds)
        results.add(trial, row, seconds)
        name = f"{trial.cell.scheme} width {trial.cell.width} depth {trial.cell.depth}"
        print(f"{name} lr 2^{trial.log2_lr:g} seed {trial.seed}: val {row['val_loss']} ({seconds:.0f} s)", flush=True)


def checks(session: Session, loss: Loss) -> Iterator[TransferCheck]:
    """Width at every depth, each with a proxy of that depth, and depth at the proxy's width; for each scheme."""
    for scheme in session.schemes:
        for depth in session.depths:
            cells = {w: Cell(scheme, w, depth) for w in sorted(session.widths)}
            yield from _check(session, loss, f"{scheme}, depth {depth}", cells, session.proxy_width, "width")
        cells = {d: session.home(scheme, d) for d in session.depths}
        yield from _check(session, loss, scheme, cells, session.depths[0], "depth")


def _check(
    session: Session, loss: Loss, title: str, cells: dict[int, Cell], proxy: int, axis: str
) -> Iterator[TransferCheck]:
    """One, if its proxy and another size are known at the rate that the proxy hands on."""
    lines = {size: line for size, cell in cells.items() if (line := session.line(cell, loss)) is not None}
    if proxy in lines:
        known = {size: line for size, line in lines.items() if lines[proxy].best in line.losses}
        if len(known) > 1:
            yield TransferCheck(title, proxy, known, axis=axis)


def report(session: Session, loss: Loss, out: Path | None) -> None:
    """Drift and penalty of every scheme with intervals; figures and numbers in `out`."""
    found = list(checks(session, loss))
    for check in found:
        print("\n".join(summary(check)), end="\n\n")
    for axis in ("width", "depth") if out is not None else ():
        mine = [check for check in found if check.axis == axis]
        if out is not None and mine:
            out.mkdir(parents=True, exist_ok=True)
            write_csv(mine, out / f"transfer-{axis}.csv")
            draw(mine, out / f"transfer-{axis}.png", f"learning rate over {axis}, {session.steps} steps")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file that trials are appended to")
    parser.add_argument("--schemes", nargs="+", choices=START, default=tuple(START))
    parser.add_argument("--widths", nargs="+", type=int, default=(128, 256, 512, 1024, 2048))
    parser.add_argument("--depths", nargs="+", type=int, default=(4, 16), help="the first is the proxy's")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--proxy-width", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-batches", type=int, default=32)
    parser.add_argument("--data", nargs="+", help="files, folders or globs; default: Python source on this machine")
    parser.add_argument("--budget-seconds", type=float, default=inf, help="start no trial that would end later")
    parser.add_argument("--device", default="cuda", help="compiled on cuda, eager on cpu")
    parser.add_argument("--report", action="store_true", help="run nothing; what the file says")
    parser.add_argument("--out", type=Path, help="with --report: folder for figures and CSV")
    args = parser.parse_args(arguments)
    size = Size(0, 0, 0, 0, args.seq_len, args.batch_size, args.eval_batches, args.steps)
    session = Session(
        schemes=tuple(args.schemes),
        widths=tuple(args.widths),
        depths=tuple(args.depths),
        seeds=tuple(args.seeds),
        proxy_width=args.proxy_width,
        head_dim=args.head_dim,
        size=size,
        steps=args.steps,
        source=tuple(args.data or default_source()),
        device=torch.device(args.device),
    )
    # A report needs the text's digest alone, not its tokens on the device.
    at = session if not args.report else replace(session, device=torch.device("cpu"))
    data = Data(at.proxy(at.schemes[0]), size, at.device)
    results = Results(args.results, session, data.digest)
    if not args.report:
        run(session, data, results, args.budget_seconds)
    report(session, results.loss, args.out)


if __name__ == "__main__":
    main()
