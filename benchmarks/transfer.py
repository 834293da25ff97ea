"""Whether learning rates transfer: basins over width and depth in SP, muP, u-muP and CompleteP, with drift and penalty.

    python -m benchmarks.transfer --results FILE.jsonl [--schemes sp mup umup completep] [--widths 128 ... 2048]
                                  [--depths 4 16] [--seeds 0 1] [--steps 500] [--budget-seconds 350]
    python -m benchmarks.transfer --results FILE.jsonl --report [--out DIR]

Llamas on the bytes of Python source. The proxy (width 256, depth 4) is tuned on a grid of 2^0.5; every other cell is
what the planner makes of it, and is searched around the proxy's best rate until its own best has an octave of grid to
both sides. Cells run in the order of what they decide, so that a budget may end anywhere: the proxies, then the widest,
then depth at the proxy's width, then the widths between, each with further seeds near its best and at the transferred
rate before the next. Each finished trial is one line appended to the file; what is there is not run again. A cell that
fails is a line, too, and is left for the next sitting. One seed means the same batches in the same order in every cell.

The rates and seeds of a cell train as stacks (study/stacked.py) of one size, as many at a time as fill a GPU, so that a
cell is compiled once a sitting. Schemes do not wait for each other: a process for each, at once and into one file, has
one compile while others train:

    for s in sp mup umup completep; do python -m benchmarks.transfer --results FILE.jsonl --schemes $s ... & done; wait

Not covered: batch and length, FP8, weight decay, several GPUs. SP keeps its norm gains, which the others go without.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from math import ceil, inf, isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from benchmarks.fp8_quality import default_source, read

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.data.tokens import TokenFiles, prepare
from umup.models.specs import shape_of
from umup.plots.transfer import draw, write_csv
from umup.rules.schemes import scheme as find_scheme
from umup.study.axes import AXES, changed
from umup.study.cost import flops_per_token
from umup.study.lines import Line
from umup.study.planner import transfer
from umup.study.stacked import StackedRun, members_that_fit, run_stacked
from umup.study.verdicts import TransferCheck, summary

STEP = 0.5
REACH = 2  # grid steps that a basin needs to both sides of its best
MOST_RATES = 24
# log2 of a rate near each scheme's best at the proxy.
START = {"sp": -9.0, "mup": -8.0, "umup": 1.0, "completep": -8.0}
# FLOPs of a step that keep an H200 busy: 16 networks of width 256 and depth 4 on 8192 tokens each.
FULL = 2.8e12
# Seconds that a layer takes to compile, about; a guess of what a new cell will need.
COMPILE = 5.0
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
    seq_len: int
    batch_size: int
    eval_batches: int
    steps: int
    members: int
    source: tuple[str, ...]
    device: torch.device

    def proxy(self, scheme: str) -> RunConfig:
        """The scheme's config where it is tuned."""
        cuda = self.device.type == "cuda"
        body: dict[str, Any] = {
            "model": {"hidden_size": self.proxy_width, "num_layers": self.depths[0], "head_dim": self.head_dim}
            | {"max_seq_len": self.seq_len, "norm_gain": scheme in GAINS},
            "parametrization": {"scheme": scheme},
            "schedule": {"name": "cosine", "warmup_steps": self.steps // 10, "final_factor": 0.1},
            "data": {"source": list(self.source), "tokenizer": "bytes"},
            "train": {"steps": self.steps, "batch_size": self.batch_size, "eval_every": self.steps}
            | {"eval_batches": self.eval_batches, "device": self.device.type, "compile": cuda},
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

    def run_of(self, trial: Trial) -> RunConfig:
        """A trial's config."""
        config = changed(self.config(trial.cell), "optimizer", lr=2.0**trial.log2_lr)
        return changed(config, "train", seed=trial.seed)

    def key(self, trial: Trial, digest: str) -> str:
        """Equal for trials that would repeat one another."""
        body = self.config(trial.cell).model_dump(mode="json", exclude={"data"})
        del body["train"]["compile"]
        identity = [body, trial.log2_lr, trial.seed, digest]
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

    def flops(self, cell: Cell) -> float:
        """Of one step of one member."""
        config = self.config(cell)
        return flops_per_token(config) * config.tokens_per_step

    def stack_size(self, cell: Cell) -> int:
        """As many members as fill a GPU: more would only wait for each other, and know less of what to try."""
        return min(self.members, max(len(self.seeds), ceil(FULL / self.flops(cell))))

    def wishes(self, cell: Cell, loss: Loss) -> tuple[list[Trial], list[Trial]]:
        """Trials that the cell needs now, and others that will tell something, both by what they decide.

        Needed are, with the first seed, an octave of grid around its best, then with all seeds the best, its neighbours
        and the transferred rate. With nothing needed the cell is finished.
        """
        proxy = self.home(cell.scheme)
        start = START[cell.scheme] if cell == proxy else self.best(proxy, loss)
        first = {x: y for x in self.grid(cell) if (y := loss(Trial(cell, x, self.seeds[0]))) is not None}
        best = min(first, key=lambda x: (first[x], x), default=start)
        # A rate beyond one that diverged diverges, too.
        worst = min((x for x, y in first.items() if y == inf), default=inf)
        around = [best + i * STEP for i in (0, -1, 1, *(s * i for i in range(2, REACH + 3) for s in (-1, 1)))]
        around = [x for x in around if x < worst or x in first]
        basin = [Trial(cell, x, self.seeds[0]) for x in around if abs(x - best) <= REACH * STEP]
        if len(first) > MOST_RATES or all(t.log2_lr in first for t in basin):
            near = [x for x in around if abs(x - best) <= STEP]
            basin += [Trial(cell, x, seed) for x in dict.fromkeys([*near, start]) for seed in self.seeds]
        others = [Trial(cell, x, seed) for x in around for seed in self.seeds]
        needed = [t for t in dict.fromkeys(basin) if loss(t) is None]
        return needed, [t for t in dict.fromkeys(others) if loss(t) is None and t not in needed]

    def grid(self, cell: Cell) -> list[float]:
        """All rates that may come up."""
        return [START[cell.scheme] + i * STEP for i in range(-40, 41)]

    def best(self, cell: Cell, loss: Loss) -> float:
        """The best rate of a finished cell."""
        line = self.line(cell, loss)
        return START[cell.scheme] if line is None else line.best

    def line(self, cell: Cell, loss: Loss) -> Line | None:
        """What is known of a cell, with as many seeds as there are; None without three points."""
        losses: dict[float, tuple[float, ...]] = {}
        for x in self.grid(cell):
            known = [loss(Trial(cell, x, seed)) for seed in self.seeds]
            runs = tuple(y for y in known[: known.index(None) if None in known else None] if y is not None)
            if runs:
                losses[x] = runs
        return Line(losses) if len(losses) > 2 else None


class Results:
    """Trials in a file, by key."""

    def __init__(self, path: Path, session: Session, digest: str) -> None:
        self.path, self.session, self.digest = path, session, digest
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in read(path) if "key" in row}
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

    def add(self, trial: Trial, run: StackedRun, members: int, seconds: float) -> None:
        """Append a finished trial; `seconds` are of its whole stack."""
        losses = {"val_loss": run.val_loss, "train_loss": run.train_loss}
        s = self.session
        row = {
            "key": self.key(trial),
            **trial.cell._asdict(),
            "log2_lr": trial.log2_lr,
            "seed": trial.seed,
            **{name: loss if isfinite(loss) else None for name, loss in losses.items()},
            "steps": s.steps,
            "members": members,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(members * s.steps * s.batch_size * s.seq_len / seconds),
        }
        self.rows[row["key"]] = row
        self._append(row)

    def fail(self, cell: Cell, why: str) -> None:
        """Append that a cell failed; it has no key, and nothing counts as done."""
        self._append({"failed": cell._asdict(), "why": why})

    def _append(self, row: dict[str, Any]) -> None:
        where = torch.cuda.get_device_name() if self.session.device.type == "cuda" else "cpu"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        # One write, for other processes append to the file as well.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "data": self.digest, "device": where, "date": when}) + "\n")


@dataclass
class Sitting:
    """One process' work on the cells: what it has learned of their cost, and which to leave for another sitting."""

    session: Session
    results: Results
    files: TokenFiles
    budget: float
    left: set[Cell] = field(default_factory=set)
    sizes: dict[Cell, int] = field(default_factory=dict)
    seconds: dict[Cell, float] = field(default_factory=dict)
    slowest: float = 0.0  # seconds per FLOP
    began: float = field(default_factory=lambda: perf_counter())

    def run(self) -> None:
        """Stacks until all cells are done, failed or would not fit the budget."""
        while (found := self.next()) is not None:
            cell, trials = found
            needed = self.guess(cell)
            if perf_counter() - self.began + needed > self.budget:
                print(f"{cell} would need {needed:.0f} s more; the same command goes on from here", flush=True)
                self.left.add(cell)
                continue
            self.train(cell, trials)

    def next(self) -> tuple[Cell, list[Trial]] | None:
        """The first cell that needs something, and a stack's worth of its trials; None when none is left."""
        for cell in self.session.ranked():
            home = self.session.home(cell.scheme)
            open_home = home != cell and self.session.wishes(home, self.results.loss)[0]
            needed, others = self.session.wishes(cell, self.results.loss)
            if needed and not open_home and cell not in self.left:
                return cell, [*needed, *others][: self.size(cell)]
        return None

    def size(self, cell: Cell) -> int:
        """Members of the cell's stacks, the same throughout, so that they share a program."""
        if cell not in self.sizes:
            fit = members_that_fit(self.session.config(cell), self.session.device)
            self.sizes[cell] = min(fit, self.session.stack_size(cell))
        return self.sizes[cell]

    def guess(self, cell: Cell) -> float:
        """Seconds that the cell's next stack will take."""
        if cell in self.seconds:
            return self.seconds[cell]
        work = self.session.flops(cell) * self.size(cell) * self.session.steps
        return self.compiling(cell) + work * self.slowest

    def compiling(self, cell: Cell) -> float:
        """Seconds before a new cell's first step."""
        return COMPILE * cell.depth if self.session.device.type == "cuda" else 0.0

    def train(self, cell: Cell, trials: list[Trial]) -> None:
        """One stack. What does not fit is tried again with half as many; another failure leaves the cell."""
        size = self.size(cell)
        padded = [*trials, *[trials[0]] * (size - len(trials))]
        start = perf_counter()
        try:
            runs = run_stacked([self.session.run_of(trial) for trial in padded], self.files)
        except (RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError, AssertionError) as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if "memory" in line and size > 1:
                self.sizes[cell] = size // 2
                print(f"{cell} does not fit {size} at a time; now {size // 2}", flush=True)
                return
            self.results.fail(cell, line)
            self.left.add(cell)
            print(f"{cell} failed: {line}", flush=True)
            return
        seconds = perf_counter() - start
        first = cell not in self.seconds
        # Never under what was seen without compiling.
        self.seconds[cell] = seconds if first else max(seconds, self.seconds[cell] - self.compiling(cell))
        work = self.session.flops(cell) * size * self.session.steps
        self.slowest = max(self.slowest, max(seconds - self.compiling(cell) * first, 0.1 * seconds) / work)
        for trial, run in zip(trials, runs, strict=False):
            self.results.add(trial, run, size, seconds)
        found = ", ".join(f"2^{t.log2_lr:g}/{t.seed} {run.val_loss:.4f}" for t, run in zip(trials, runs, strict=False))
        print(f"{tuple(cell)}: {found} ({seconds:.0f} s, {size} at once)", flush=True)


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
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-batches", type=int, default=32)
    parser.add_argument("--members", type=int, default=10, help="of a stack at most [10: five rates, two seeds]")
    parser.add_argument("--data", nargs="+", help="files, folders or globs; default: Python source on this machine")
    parser.add_argument("--budget-seconds", type=float, default=inf, help="start no stack that would end later")
    parser.add_argument("--device", default="cuda", help="compiled on cuda, eager on cpu")
    parser.add_argument("--report", action="store_true", help="run nothing; what the file says")
    parser.add_argument("--out", type=Path, help="with --report: folder for figures and CSV")
    args = parser.parse_args(arguments)
    session = Session(
        schemes=tuple(args.schemes),
        widths=tuple(args.widths),
        depths=tuple(args.depths),
        seeds=tuple(args.seeds),
        proxy_width=args.proxy_width,
        head_dim=args.head_dim,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        eval_batches=args.eval_batches,
        steps=args.steps,
        members=args.members,
        source=tuple(args.data or default_source()),
        device=torch.device(args.device),
    )
    proxy = session.proxy(session.schemes[0])
    files = prepare(proxy.data, proxy.model.vocab_size, proxy.tokens_per_batch)
    results = Results(args.results, session, digest_of(files))
    if not args.report:
        Sitting(session, results, files, args.budget_seconds).run()
    report(session, results.loss, args.out)


def digest_of(files: TokenFiles) -> str:
    """What identifies the text and its split, wherever it lies."""
    record = {part: {k: v for k, v in files.record[part].items() if k != "path"} for part in ("train", "val")}
    return sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
