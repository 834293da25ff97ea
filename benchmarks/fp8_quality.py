"""What FP8 costs in loss: every recipe against BF16 at the tuned learning rate, and u-muP against SP.

    python -m benchmarks.fp8_quality --results FILE.jsonl [--size 35m] [--seeds 0 1 2 3] [--variants ...]
                                     [--budget-seconds 500] [--workers 4]
    python -m benchmarks.fp8_quality_report FILE.jsonl

A variant is SCHEME/PRODUCTS[/SCALES]: a recipe of rules/precision.py with its scale mode (umup/fp8/adapt), or, with
hidden products alone in FP8, `torchao` (its tensorwise dynamic scaling) or `plain` (a saturating cast at scale 1, which
no recipe allows under SP). Trials come in an order that is of use wherever the budget ends: first each scheme's BF16
over learning rates, doubling or halving until the best lies inside; then, seed by seed, all variants at the best rate
of their scheme; after all seeds, the variants of `--then`. One seed means the same draws for the initial weights and
the same batches in the same order, so gaps are paired. With `--common K` the first K steps of a seed are taken once, in
BF16, and every variant goes on from there with its weights and moments: what differs then is the format, and hardly the
luck of an early phase transition, which moves losses of this size by 10%. Each finished trial is one line appended to
the file; what is there already is not run again.

Common steps stay on the device, 12 bytes per parameter, scheme and seed. While workers compile, trials that run beside
them are slower than those later.

Not covered: optimizer memory in BF16, tokenizers other than bytes, several GPUs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from importlib.util import find_spec
from math import inf, log2
from pathlib import Path
from time import perf_counter

import torch
from benchmarks.fp8_quality_session import SIZES, Row, Session, Trial
from benchmarks.fp8_quality_trainer import Data, Start, Trainer, compiling, ready
from torch import nn

VARIANTS = (
    *("umup/bf16", "umup/fp8/adapt", "umup/fp8_partial/adapt", "sp/bf16", "umup/fp8/static", "umup/fp8_head/adapt"),
    *("sp/torchao", "umup/torchao", "umup/fp8/dynamic", "sp/plain"),
)


class Sitting:
    """The trainers of a session, and the common steps that they go on from. Variants in `compiled` are waited for."""

    def __init__(self, session: Session, data: Data, compiled: Mapping[str, Future[None]]) -> None:
        self.session, self.data, self.compiled = session, data, compiled
        self.trainers: dict[str, Trainer] = {}
        self._starts: dict[Trial, Start] = {}

    def trainer(self, variant: str) -> Trainer:
        """The variant's."""
        if variant not in self.trainers:
            wait([self.compiled[variant]] if variant in self.compiled else [])
            self.trainers[variant] = ready(self.session, variant)
        return self.trainers[variant]

    def steps(self, trial: Trial) -> int:
        """How many a trial will take: the common ones are taken once."""
        return trial.steps - (trial.common if trial.leader in self._starts else 0)

    def run(self, trial: Trial) -> Row:
        """One trial, as a line of the results."""
        batches, leader = self.data.order(trial.seed, trial.steps), trial.leader
        if trial.common and leader not in self._starts:
            lead = self.trainer(leader.variant).lead
            self._starts[leader] = lead(self.session.config(leader), batches, trial.common)
        trainer, start = self.trainer(trial.variant), self._starts.get(leader)
        found = trainer.train(self.session.config(trial), batches, self.data.held_out, trial.common, start)
        return {**describe(self.session, trial, self.data, trainer.model), **found}


def run(session: Session, results: Path, budget: float, workers: int) -> None:
    """Run trials until all are done or the next would not fit the budget (seconds), appending each to `results`."""
    began = perf_counter()
    data = Data(session.config(Trial("umup/bf16", 1.0, 0, session.steps)), SIZES[session.size], session.device)
    rows = {row["key"]: row for row in read(results)}
    print(f"{len(data.tokens):,} tokens of text, digest {data.digest}; {len(rows)} trials in {results}", flush=True)

    def loss(trial: Trial) -> float | None:
        row = rows.get(session.key(trial, data.digest))
        return None if row is None else inf if row["val_loss"] is None else row["val_loss"]

    pace = slowest_build = 0.0
    with compiling(session, workers if session.next(loss) else 0) as compiled:
        sitting = Sitting(session, data, compiled)
        while (trial := session.next(loss)) is not None:
            needed = pace * (steps := sitting.steps(trial))
            needed += 0.0 if trial.variant in sitting.trainers else slowest_build
            left = budget - (perf_counter() - began)
            if needed > left:
                print(f"{trial} needs {needed:.0f} s and {left:.0f} s are left; the same command goes on from here")
                break
            start = perf_counter()
            sitting.trainer(trial.variant)
            built = perf_counter()
            row = sitting.run(trial)
            ended = perf_counter()
            pace, slowest_build = max(pace, (ended - built) / steps), max(slowest_build, built - start)
            rows[row["key"]] = row
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            times = f"{built - start:.0f} s to build, {ended - built:.0f} s to run, {ended - began:.0f} s in all"
            print(line(row), f"({times})", flush=True)


def describe(session: Session, trial: Trial, data: Data, model: nn.Module) -> Row:
    """What a result needs to be read later."""
    cuda = session.device.type == "cuda"
    return {
        "key": session.key(trial, data.digest),
        "variant": trial.variant,
        "lr": trial.lr,
        "seed": trial.seed,
        "hparams": session.hparams(trial),
        "size": session.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trial.steps,
        "common": trial.common,
        "tokens_per_step": session.config(trial).tokens_per_step,
        "data": data.digest,
        "device": torch.cuda.get_device_name(session.device) if cuda else "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> list[Row]:
    """The trials in a results file; none where there is no file."""
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()] if path.exists() else []


def line(row: Row) -> str:
    """One trial in one line."""
    losses = "diverged" if row["val_loss"] is None else f"val {row['val_loss']:.4f}  train {row['train_loss']:.4f}"
    speed = f"{(row['tokens_per_second'] or 0) / 1e3:.0f}k tokens/s"
    scales = f"{row['moves']} moves, {len(row['spared'])} spared"
    return f"{row['variant']:23s} lr 2^{log2(row['lr']):<6g} seed {row['seed']}  {losses}  {speed}  {scales}"


def default_source() -> list[str]:
    """This Python's library and the packages beside torch."""
    return ["python-stdlib", f"{Path(torch.__file__).parents[1]}/**/*.py"]


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file that trials are appended to")
    parser.add_argument("--size", choices=SIZES, default="35m")
    parser.add_argument("--steps", type=int, help="default: the size's")
    parser.add_argument("--common", type=int, default=0, help="steps that all variants of a scheme share, in BF16")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--then", nargs="+", default=(), metavar="VARIANT", help="variants that come after all seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3))
    parser.add_argument("--umup-lr", nargs="+", type=float, default=(2.0, 4.0), help="first rates to try; one is taken")
    parser.add_argument("--sp-lr", nargs="+", type=float, default=(2.0**-11, 2.0**-10), help="the same for SP")
    parser.add_argument("--tune-steps", type=int, help="steps of the runs that try rates; default: those of all runs")
    parser.add_argument(
        "--umup-hparams", nargs="+", default=(), metavar="NAME=VALUE", help="u-muP's multipliers; default: all 1"
    )
    parser.add_argument("--data", nargs="+", help="files, folders or globs; default: Python source on this machine")
    parser.add_argument("--budget-seconds", type=float, default=inf, help="start no trial that would end later")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile all variants ahead")
    parser.add_argument("--device", default="cuda", help="compiled on cuda, eager on cpu")
    parser.add_argument("--backend", choices=("auto", "emulate"), default="auto", help="of FP8 products")
    return parser


def available(variants: Sequence[str]) -> tuple[str, ...]:
    """Those that can run here; says which cannot."""
    found = tuple(v for v in variants if not v.endswith("/torchao") or find_spec("torchao"))
    for variant in [v for v in variants if v not in found]:
        print(f"skipping {variant}: torchao is not installed")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = options().parse_args(arguments)
    session = Session(
        size=args.size,
        steps=args.steps or SIZES[args.size].steps,
        variants=available(args.variants),
        then=available(args.then),
        seeds=tuple(args.seeds),
        lrs={"umup": tuple(args.umup_lr), "sp": tuple(args.sp_lr)},
        source=tuple(args.data or default_source()),
        common=args.common,
        tune_steps=args.tune_steps,
        device=torch.device(args.device),
        backend=args.backend,
        umup_hparams={name: float(value) for name, _, value in (text.partition("=") for text in args.umup_hparams)},
    )
    run(session, args.results, args.budget_seconds, args.workers)


if __name__ == "__main__":
    main()
