"""What FP8 costs in loss: every recipe against BF16 at the tuned learning rate, and u-muP against SP.

    python benchmarks/fp8_quality.py --results FILE.jsonl [--size 35m] [--seeds 0 1 2 3] [--variants ...]
                                     [--budget-seconds 500] [--workers 4]
    python benchmarks/fp8_quality_report.py FILE.jsonl

A variant is SCHEME/PRODUCTS[/SCALES]: a recipe of rules/precision.py with its scale mode (umup/fp8/adapt), or, with
hidden products alone in FP8, `torchao` (its tensorwise dynamic scaling) or `plain` (a saturating cast at scale 1, which
no recipe allows under SP). Trials come in an order that is of use wherever the budget ends: first each scheme's BF16
over learning rates, doubling or halving until the best lies inside; then, seed by seed, all variants at the best rate
of their scheme. One seed means the same draws for the initial weights and the same batches in the same order, so gaps
are paired. With `--common K` the first K steps of a seed are taken once, in BF16, and every variant goes on from there
with its weights and moments: what differs then is the format, and hardly the luck of an early phase transition, which
moves losses of this size by 10%. Each finished trial is one line appended to the file; what is there already is not run
again.

Not covered: optimizer memory in BF16, tokenizers other than bytes, several GPUs.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from hashlib import sha256
from importlib.util import find_spec
from math import inf, isfinite, log2
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from umup.checkpoint import load_weights
from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.data.batches import Batches
from umup.data.tokens import prepare
from umup.models.build import build, initialise
from umup.models.specs import plan_for
from umup.nn.fp8 import encoded, refresh_weights
from umup.nn.modules import Linear, Matmul, UseScales, join
from umup.numerics.formats import E4M3, E5M2, encode
from umup.numerics.gemm import Formats, Gemm, GemmState, scale_table
from umup.ops.linear import linear
from umup.ops.scaled import scale
from umup.optim.groups import load_state_tensors, param_groups, state_tensors
from umup.optim.schedule import apply_factor, factor
from umup.train.look import LookLoss
from umup.train.precision import ScaleKeeper
from umup.train.step import evaluate, to_device

Row = dict[str, Any]
VARIANTS = (
    *("umup/bf16", "umup/fp8/adapt", "umup/fp8_partial/adapt", "sp/bf16", "umup/fp8/static", "umup/fp8_head/adapt"),
    *("sp/torchao", "umup/torchao", "umup/fp8/dynamic", "sp/plain"),
)
POINTS = 100  # of a loss curve
TAIL = 20  # the last 1/20 of a curve is its final loss


@dataclass(frozen=True)
class Size:
    """A llama and how long it trains."""

    hidden_size: int
    num_layers: int
    head_dim: int
    intermediate_size: int
    seq_len: int
    batch_size: int
    eval_batches: int
    steps: int


SIZES = {
    "tiny": Size(64, 2, 16, 176, 32, 4, 2, 12),
    "35m": Size(512, 8, 64, 2048, 1024, 32, 16, 800),
    "100m": Size(1024, 8, 64, 2816, 1024, 32, 16, 800),
}
NETWORK_FIELDS = ("hidden_size", "num_layers", "head_dim", "intermediate_size")


@dataclass(frozen=True)
class Trial:
    """One training run."""

    variant: str
    lr: float
    seed: int


# --- the peers, as products of our own decoder --------------------------------------------------------------------


class PlainCast(Matmul):
    """FP8 without scales: operands and gradients saturate or vanish as they come."""

    ones: Tensor

    def __init__(self, scales: UseScales, backend: str) -> None:
        super().__init__(scales)
        self.formats = Formats(E4M3, E5M2, backend)
        table = scale_table(Gemm(*scales, self.formats), torch.zeros(3, dtype=torch.int32))
        self.register_buffer("ones", table, persistent=False)

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """As Matmul's."""
        weight = join(weights)
        row = encode(weight.detach(), 1.0, E4M3)
        return linear(x, weight, *self.scales, self.formats, GemmState(row, row.t().contiguous(), self.ones))


class Torchao(Matmul):
    """torchao's Float8Linear, tensorwise with dynamic scales, our factors outside of it."""

    def __init__(self, scales: UseScales, backend: str) -> None:
        from torchao.float8.config import Float8LinearConfig  # type: ignore[import-not-found]
        from torchao.float8.float8_linear import (  # type: ignore[import-not-found]
            Float8Linear,
            matmul_with_hp_or_float8_args,
        )

        super().__init__(scales)
        config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=backend == "emulate")
        gemms = Float8Linear(16, 16, bias=False, device="meta", config=config).linear_mm_config
        self.product: Any = lambda x, w: matmul_with_hp_or_float8_args.apply(x, w.t(), gemms, config)

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """As Matmul's."""
        multiplier, grad_input, grad_weight = self.scales
        weight = join(weights).to(x.dtype)
        product = self.product(scale(x, 1.0, grad_input), scale(weight, 1.0, grad_weight))
        return scale(product, multiplier, 1.0)


PEERS: dict[str, Callable[[UseScales, str], Matmul]] = {"torchao": Torchao, "plain": PlainCast}


def use_peer(model: nn.Module, make: Callable[[UseScales, str], Matmul], backend: str, device: torch.device) -> None:
    """Run the hidden products by `make`'s module, those that were one still as one."""
    made: dict[Matmul, Matmul] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name != "head":
            old = module.matmul
            made[old] = made.get(old) or make(module.scales, backend).to(device)
            module.matmul = made[old]


# --- data and trainers --------------------------------------------------------------------------------------------


class Data:
    """Bytes of text on the device: the batches of a seed, in order, and held-out ones that all seeds share."""

    def __init__(self, config: RunConfig, size: Size, device: torch.device) -> None:
        files = prepare(config.data, config.model.vocab_size, config.tokens_per_batch)
        self.tokens, self.size, self.device = files.train.load(), size, device
        record = {part: {k: v for k, v in files.record[part].items() if k != "path"} for part in ("train", "val")}
        self.digest = sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]
        held_out = Batches(files.val.load(), size.batch_size, size.seq_len, 0).fixed(size.eval_batches)
        self.held_out = [to_device(batch, device) for batch in held_out]

    @lru_cache(maxsize=1)  # noqa: B019 (one object lives as long as the program)
    def order(self, seed: int, steps: int) -> Tensor:
        """(steps, 2, batch, positions) inputs and targets, int32."""
        batches = Batches(self.tokens, self.size.batch_size, self.size.seq_len, seed)
        found = np.empty((steps, 2, self.size.batch_size, self.size.seq_len), np.int32)
        state = batches.start()
        for step in found:
            step[0], step[1], state = batches.next(state)
        return torch.from_numpy(found).to(self.device)


@dataclass(frozen=True)
class Start:
    """Where trials of a seed go on from: weights and optimizer state by name."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Trainer:
    """One variant's model, compiled once and initialised anew for every trial."""

    def __init__(self, config: RunConfig, products: str, device: torch.device) -> None:
        self.config, self.plan, self.device = config, plan_for(config), device
        self.model = build(config, self.plan, device)
        self.model.train()
        self.starting = [product.matmul.exponents.clone() for product in encoded(self.model)]
        if products in PEERS:
            backend = "emulate" if config.precision.backend == "emulate" else "scaled_mm"
            use_peer(self.model, PEERS[products], backend, device)
        compiles = device.type == "cuda"
        self.loss_fn = torch.compile(self.model.loss, fullgraph=True, dynamic=False) if compiles else self.model.loss

    def lead(self, trial: Trial, batches: Tensor, common: int) -> Start:
        """The first `common` steps of a trial."""
        p = self.config.precision
        keeper = ScaleKeeper(self.model, p.scales, p.sample_every)
        optimizer = self._start(trial, keeper, None)
        self._steps(batches, optimizer, keeper, range(common))
        weights = {name: w.detach().clone() for name, w in self.model.named_parameters()}
        return Start(weights, {name: t.clone() for name, t in state_tensors(optimizer).items()})

    def train(
        self,
        trial: Trial,
        batches: Tensor,
        held_out: list[tuple[Tensor, Tensor]],
        common: int = 0,
        start: Start | None = None,
    ) -> Row:
        """Train on the batches after the `common` ones; losses, times and what became of the scales."""
        events: list[str] = []
        p = self.config.precision
        keeper = ScaleKeeper(self.model, p.scales, p.sample_every, None, events.append)
        optimizer = self._start(trial, keeper, start)
        curve, durations = self._steps(batches, optimizer, keeper, range(common, len(batches)))
        tokens = (len(batches) - common) * batches[0, 0].numel()
        finite, tail = isfinite(curve[-1]), max(1, len(curve) // TAIL)
        val = evaluate(self.model, self.model.loss, held_out) if finite else inf
        optimizer.zero_grad(set_to_none=True)
        return {
            "tail": tail,
            "train_loss": mean(curve[-tail:]) if finite else None,
            "val_loss": val if isfinite(val) else None,
            "tokens_per_second": round(tokens / sum(durations)) if finite else None,
            "moves": sum("->" in event for event in events),
            "spared": [product.name for product in keeper.products if product.matmul.spared],
            "curve": [round(loss, 5) for loss in curve if isfinite(loss)],
            "seconds": [round(seconds, 4) for seconds in durations],
        }

    def _start(self, trial: Trial, keeper: ScaleKeeper, start: Start | None) -> torch.optim.Optimizer:
        torch.manual_seed(trial.seed)
        initialise(self.model, self.plan, trial.seed)
        if start is not None:
            load_weights(self.model, start.weights, "common steps")
        for product, exponents in zip(keeper.products, self.starting, strict=True):
            product.matmul.spared = False
            product.matmul.set_exponents(exponents)
        refresh_weights(keeper.products)
        o = self.config.optimizer
        named = self.model.named_parameters()
        groups = param_groups(self.plan, named, lr=trial.lr, weight_decay=o.weight_decay, eps=o.eps)
        optimizer = torch.optim.AdamW(groups, betas=o.betas, fused=self.device.type == "cuda")
        if start is not None:
            load_state_tensors(optimizer, {name: t.clone() for name, t in start.optimizer.items()})
            for p in self.model.parameters():  # torch's fused step counts on the device
                optimizer.state[p]["step"] = optimizer.state[p]["step"].to(self.device)
        keeper.follow(optimizer)
        return optimizer

    def _steps(
        self, batches: Tensor, optimizer: torch.optim.Optimizer, keeper: ScaleKeeper, which: range
    ) -> tuple[list[float], list[float]]:
        """(mean loss, seconds) of each stretch of steps; waits for the device only at the end of a stretch."""
        steps, losses, curve, durations, compiled = len(batches), list[Tensor](), list[float](), list[float](), set()
        began, graphs = perf_counter(), counters["stats"]["unique_graphs"]
        for step in which:
            inputs, targets = batches[step].long()
            if keeper.due(step - which.start):
                keeper.look(step, LookLoss(self.model), inputs, targets)
            apply_factor(optimizer, factor(self.config.schedule, step, steps))
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss_fn(inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) * POINTS // steps > step * POINTS // steps:
                curve.append(float(torch.stack(losses).mean()))
                now = perf_counter()
                if counters["stats"]["unique_graphs"] > graphs:
                    compiled.add(len(durations))
                durations.append(now - began)
                losses, began, graphs = [], perf_counter(), counters["stats"]["unique_graphs"]
                if not isfinite(curve[-1]):
                    break
        # Compilation (a product spared midway is another graph) is the same for a run of any length: left out.
        typical = median(d for i, d in enumerate(durations) if i not in compiled or len(compiled) == len(durations))
        return curve, [typical if i in compiled else d for i, d in enumerate(durations)]


# --- which trial comes next ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """What the command line asked for."""

    size: str
    steps: int
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: dict[str, tuple[float, ...]]
    source: tuple[str, ...]
    common: int
    device: torch.device
    backend: str
    umup_hparams: Mapping[str, float] = field(default_factory=dict)

    def body(self, trial: Trial) -> Row:
        """The run of a trial, as a config file would say it; peers start from BF16."""
        size, (scheme, products, *scales) = SIZES[self.size], trial.variant.split("/")
        model = {name: value for name, value in asdict(size).items() if name in NETWORK_FIELDS}
        # u-muP's transfer asks for norms without gains; SP keeps its own.
        gains = {"norm_gain": False} if scheme == "umup" else {}
        hparams = {"hparams": dict(self.umup_hparams)} if scheme == "umup" and self.umup_hparams else {}
        recipe = "bf16" if products in PEERS else products
        return {
            "model": {"family": "llama", "vocab_size": 256, "max_seq_len": size.seq_len, **model, **gains},
            "parametrization": {"scheme": scheme, **hparams},
            "optimizer": {"lr": trial.lr, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": self.steps // 10, "final_factor": 0.1},
            "train": {"steps": self.steps, "batch_size": size.batch_size, "seed": trial.seed},
            "precision": {"recipe": recipe, "scales": (scales or ["adapt"])[0]},
        }

    def config(self, trial: Trial) -> RunConfig:
        """The same with what makes no difference to the numbers: where the text lies, and the backend."""
        body = self.body(trial)
        data = {"source": list(self.source), "tokenizer": "bytes"}
        return parse_config({**body, "data": data, "precision": {**body["precision"], "backend": self.backend}})

    def key(self, trial: Trial, digest: str) -> str:
        """Equal for trials that would repeat one another."""
        identity = [trial.variant, self.body(trial), digest, *([self.common] if self.common else [])]
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def next(self, loss: Callable[[Trial], float | None]) -> Trial | None:
        """The first trial without a loss: learning rates first, then seed by seed. None when all are done."""
        tuned: dict[str, float] = {}
        for scheme in dict.fromkeys(variant.split("/")[0] for variant in self.variants):
            trials = [Trial(f"{scheme}/bf16", lr, self.seeds[0]) for lr in sorted(self.lrs[scheme])]
            trial = trials[0] if len(trials) == 1 else search(trials, loss)
            if loss(trial) is None and len(trials) > 1:
                return trial
            tuned[scheme] = trial.lr
        wanted = (Trial(v, tuned[v.split("/")[0]], seed) for seed in self.seeds for v in self.variants)
        return next((trial for trial in wanted if loss(trial) is None), None)


def search(trials: list[Trial], loss: Callable[[Trial], float | None]) -> Trial:
    """The best of trials in rising order of learning rate, or one that must run before it is known to be the best."""
    losses = [loss(trial) for trial in trials]
    if None in losses:
        return trials[losses.index(None)]
    best = min(zip(losses, trials, strict=True), key=lambda pair: pair[0] or 0.0)[1]
    if best == trials[-1]:
        return search([*trials, replace(best, lr=2 * best.lr)], loss)
    if best == trials[0]:
        return search([replace(best, lr=best.lr / 2), *trials], loss)
    return best


def ready(session: Session, variant: str) -> Trainer:
    """The variant's trainer, compiled by two steps on noise."""
    torch._dynamo.config.recompile_limit = 64  # all variants are one code object, each with modules of its own
    size, trial = SIZES[session.size], Trial(variant, 1.0, 0)
    trainer = Trainer(session.config(trial), variant.split("/")[1], session.device)
    noise = torch.randint(256, (2, 2, size.batch_size, size.seq_len), device=session.device)
    trainer.train(trial, noise, [(noise[0, 0], noise[0, 1])])
    return trainer


def compile_in_worker(session: Session, threads: int, variant: str) -> None:
    """Leave the variant's kernels in torch's cache."""
    torch._inductor.config.compile_threads = threads
    ready(session, variant)


def compile_ahead(session: Session, workers: int) -> None:
    """Compile all variants side by side, so that this process finds their kernels in the cache."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(compile_in_worker, session, threads), session.variants))


def run(session: Session, results: Path, budget: float, workers: int) -> None:
    """Run trials until all are done or the next would not fit the budget (seconds), appending each to `results`."""
    began = perf_counter()
    data = Data(session.config(Trial("umup/bf16", 1.0, 0)), SIZES[session.size], session.device)
    rows = {row["key"]: row for row in read(results)}
    print(f"{len(data.tokens):,} tokens of text, digest {data.digest}; {len(rows)} trials in {results}", flush=True)

    def loss(trial: Trial) -> float | None:
        row = rows.get(session.key(trial, data.digest))
        return None if row is None else inf if row["val_loss"] is None else row["val_loss"]

    if workers and session.next(loss) is not None:
        compile_ahead(session, workers)
        print(f"compiled ahead in {perf_counter() - began:.0f} s", flush=True)
    trainers: dict[str, Trainer] = {}
    starts: dict[tuple[str, float, int], Start] = {}
    slowest = slowest_build = 0.0
    while (trial := session.next(loss)) is not None:
        needed, left = slowest, budget - (perf_counter() - began)
        needed += 0.0 if trial.variant in trainers else slowest_build
        if needed > left:
            print(f"{trial} needs {needed:.0f} s and {left:.0f} s are left; the same command goes on from here")
            break
        start = perf_counter()
        if trial.variant not in trainers:
            trainers[trial.variant] = ready(session, trial.variant)
        built = perf_counter()
        batches, start_of = data.order(trial.seed, session.steps), None
        if session.common:
            scheme = trial.variant.split("/")[0]
            leader, place = f"{scheme}/bf16", (scheme, trial.lr, trial.seed)
            if leader not in trainers:
                trainers[leader] = ready(session, leader)
            if place not in starts:
                starts = {k: v for k, v in starts.items() if k[2] == trial.seed}
                starts[place] = trainers[leader].lead(trial, batches, session.common)
            start_of = starts[place]
        row = trainers[trial.variant].train(trial, batches, data.held_out, session.common, start_of)
        ended = perf_counter()
        slowest, slowest_build = max(slowest, ended - built), max(slowest_build, built - start)
        row = {**describe(session, trial, data, trainers[trial.variant].model), **row}
        rows[row["key"]] = row
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), f"({built - start:.0f} s to build, {ended - built:.0f} s to run)", flush=True)


def describe(session: Session, trial: Trial, data: Data, model: nn.Module) -> Row:
    """What a result needs to be read later."""
    cuda = session.device.type == "cuda"
    return {
        "key": session.key(trial, data.digest),
        "variant": trial.variant,
        "lr": trial.lr,
        "seed": trial.seed,
        "size": session.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": session.steps,
        "common": session.common,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file that trials are appended to")
    parser.add_argument("--size", choices=SIZES, default="35m")
    parser.add_argument("--steps", type=int, help="default: the size's")
    parser.add_argument("--common", type=int, default=0, help="steps that all variants of a scheme share, in BF16")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3))
    parser.add_argument("--umup-lr", nargs="+", type=float, default=(2.0, 4.0), help="first rates to try; one is taken")
    parser.add_argument("--sp-lr", nargs="+", type=float, default=(2.0**-11, 2.0**-10), help="the same for SP")
    parser.add_argument(
        "--umup-hparams", nargs="+", default=(), metavar="NAME=VALUE", help="u-muP's multipliers; default: all 1"
    )
    parser.add_argument("--data", nargs="+", help="files, folders or globs; default: Python source on this machine")
    parser.add_argument("--budget-seconds", type=float, default=inf, help="start no trial that would end later")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile all variants ahead")
    parser.add_argument("--device", default="cuda", help="compiled on cuda, eager on cpu")
    parser.add_argument("--backend", choices=("auto", "emulate"), default="auto", help="of FP8 products")
    args = parser.parse_args(arguments)
    available = [v for v in args.variants if not v.endswith("/torchao") or find_spec("torchao")]
    for variant in [v for v in args.variants if v not in available]:
        print(f"skipping {variant}: torchao is not installed")
    session = Session(
        size=args.size,
        steps=args.steps or SIZES[args.size].steps,
        variants=tuple(available),
        seeds=tuple(args.seeds),
        lrs={"umup": tuple(args.umup_lr), "sp": tuple(args.sp_lr)},
        source=tuple(args.data or default_source()),
        common=args.common,
        device=torch.device(args.device),
        backend=args.backend,
        umup_hparams={name: float(value) for name, _, value in (text.partition("=") for text in args.umup_hparams)},
    )
    run(session, args.results, args.budget_seconds, args.workers)


if __name__ == "__main__":
    main()
