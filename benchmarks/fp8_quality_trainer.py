"""The runs of fp8_quality.py: text on the device, and one compiled model per variant, initialised for every trial."""

import gc
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from json import dumps
from math import inf, isfinite
from multiprocessing import get_context
from os import cpu_count
from statistics import mean, median
from time import perf_counter

import numpy as np
import torch
import torch._inductor.config
from benchmarks.fp8_quality_peers import PEERS, use_peer
from benchmarks.fp8_quality_session import SIZES, Row, Session, Size, Trial
from torch import Tensor
from torch._dynamo.utils import counters

from umup.checkpoint import load_weights
from umup.config.sections import RunConfig
from umup.data.batches import Batches
from umup.data.tokens import prepare
from umup.models.build import build, initialise
from umup.models.specs import plan_for
from umup.nn.fp8 import encoded, refresh_weights
from umup.optim.groups import load_state_tensors, param_groups, state_tensors
from umup.optim.schedule import apply_factor, factor
from umup.train.look import LookLoss
from umup.train.precision import ScaleKeeper
from umup.train.step import evaluate, to_device

POINTS = 100  # of a loss curve
TAIL = 20  # the last 1/20 of a curve is its final loss


class Data:
    """Bytes of text on the device: the batches of a seed, in order, and held-out ones that all seeds share."""

    def __init__(self, config: RunConfig, size: Size, device: torch.device) -> None:
        files = prepare(config.data, config.model.vocab_size, config.tokens_per_batch)
        self.tokens, self.size, self.device = files.train.load(), size, device
        record = {part: {k: v for k, v in files.record[part].items() if k != "path"} for part in ("train", "val")}
        self.digest = sha256(dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]
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
    """A config's model, compiled once and initialised anew for every run.

    Runs may differ from the config in rate, seed, length and schedule. products: a peer's name, if it has them.
    """

    def __init__(self, config: RunConfig, products: str, device: torch.device) -> None:
        self.plan, self.device = plan_for(config), device
        self.model = build(config, self.plan, device)
        self.model.train()
        self.starting = [product.matmul.exponents.clone() for product in encoded(self.model)]
        if products in PEERS:
            backend = "emulate" if config.precision.backend == "emulate" else "scaled_mm"
            use_peer(self.model, PEERS[products], backend, device)
        compiles = device.type == "cuda"
        self.loss_fn = torch.compile(self.model.loss, fullgraph=True, dynamic=False) if compiles else self.model.loss

    def lead(self, run: RunConfig, batches: Tensor, common: int) -> Start:
        """The first `common` steps of a run."""
        keeper, _ = self._keeper(run)
        optimizer = self._start(run, keeper, None)
        self._steps(run, batches, optimizer, keeper, range(common))
        weights = {name: w.detach().clone() for name, w in self.model.named_parameters()}
        return Start(weights, {name: t.clone() for name, t in state_tensors(optimizer).items()})

    def train(
        self,
        run: RunConfig,
        batches: Tensor,
        held_out: list[tuple[Tensor, Tensor]],
        common: int = 0,
        start: Start | None = None,
    ) -> Row:
        """Train on the batches after the `common` ones; losses, times and what became of the scales."""
        keeper, events = self._keeper(run)
        optimizer = self._start(run, keeper, start)
        curve, durations = self._steps(run, batches, optimizer, keeper, range(common, len(batches)))
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

    def _keeper(self, run: RunConfig) -> tuple[ScaleKeeper, list[str]]:
        p, events = run.precision, list[str]()
        return ScaleKeeper(self.model, p.scales, p.sample_every, None, events.append), events

    def _start(self, run: RunConfig, keeper: ScaleKeeper, start: Start | None) -> torch.optim.Optimizer:
        torch.manual_seed(run.train.seed)
        initialise(self.model, self.plan, run.train.seed)
        if start is not None:
            load_weights(self.model, start.weights.items(), "common steps")
        for product, exponents in zip(keeper.products, self.starting, strict=True):
            product.matmul.spared = False
            product.matmul.set_exponents(exponents)
        refresh_weights(keeper.products)
        o = run.optimizer
        named = self.model.named_parameters()
        groups = param_groups(self.plan, named, lr=o.lr, weight_decay=o.weight_decay, eps=o.eps)
        optimizer = torch.optim.AdamW(groups, betas=o.betas, fused=self.device.type == "cuda")
        if start is not None:
            load_state_tensors(optimizer, {name: t.clone() for name, t in start.optimizer.items()})
            for p in self.model.parameters():  # torch's fused step counts on the device
                optimizer.state[p]["step"] = optimizer.state[p]["step"].to(self.device)
        keeper.follow(optimizer)
        return optimizer

    def _steps(
        self, run: RunConfig, batches: Tensor, optimizer: torch.optim.Optimizer, keeper: ScaleKeeper, which: range
    ) -> tuple[list[float], list[float]]:
        """(mean loss, seconds) of each stretch of steps; waits for the device only at the end of a stretch."""
        steps = len(batches)
        losses, curve, durations, compiled = list[Tensor](), list[float](), list[float](), set[int]()
        began, graphs = perf_counter(), counters["stats"]["unique_graphs"]
        for step in which:
            inputs, targets = batches[step].long()
            if keeper.due(step - which.start):
                keeper.look(step, LookLoss(self.model), inputs, targets)
            apply_factor(optimizer, factor(run.schedule, step, steps))
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


def ready(session: Session, variant: str) -> Trainer:
    """The variant's trainer, compiled by two steps on noise."""
    torch._dynamo.config.recompile_limit = 64  # all variants are one code object, each with modules of its own
    trial, size = Trial(variant, 1.0, 0, 2), SIZES[session.size]
    run = session.config(trial)
    trainer = Trainer(run, trial.products, session.device)
    noise = torch.randint(256, (trial.steps, 2, size.batch_size, size.seq_len), device=session.device)
    trainer.train(run, noise, [(noise[0, 0], noise[0, 1])])
    return trainer


def compile_variant(session: Session, threads: int, variant: str) -> None:
    """Leave the variant's kernels in torch's cache, and nothing on the device."""
    torch._inductor.config.compile_threads = threads
    ready(session, variant)
    torch._dynamo.reset()
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def compiling(session: Session, workers: int) -> Iterator[dict[str, Future[None]]]:
    """All variants being compiled side by side, in `workers` processes, in the order of need.

    Who waits for a variant's future finds its kernels in the cache.
    """
    if not workers:
        yield {}
        return
    threads = max(1, (cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield {v: pool.submit(compile_variant, session, threads, v) for v in session.every_variant()}
    finally:
        pool.shutdown(cancel_futures=True)
