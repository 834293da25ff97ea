"""The speed table of this machine: one process per variant, timed in turns, beside the loss after the same tokens.

All workers of a group compile at once; then each in turn trains briefly (the loss, and a profile of one pass); then
rounds of timed steps go over the variants again and again, so that a machine that slows down slows all. Medians over
all timed steps; the spread is that of the rounds' medians. The floor comes from rates measured in between.

A group holds what fits the GPU together with the reference, which every group times anew: ratios are within a group.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from statistics import median
from typing import IO, Any

import torch

from umup.config.sections import RunConfig
from umup.models.specs import Shape, plan_for, products_for, shape_of
from umup.rules.explain import table
from umup.study.bench_variants import REFERENCE, VARIANTS, config_of
from umup.study.rooflines import Rates, floor_ms, measure_rates

CONTEXT_BYTES = 10**9
HEAD = (
    *("variant", "tokens/s", "fwd+bwd ms", "spread", "step ms", f"x {REFERENCE}", "floor ms", "of floor"),
    *("of steady", "peak GiB", "activations", "kernels/layer", "gemm ms", "attention", "other", "loss"),
)
SMALL_PRINT = (
    "Medians; spread: between rounds. step: with the optimizer, and the encoding of weights where there is one. "
    "activations: peak less weights, gradients and optimizer. kernels/layer: all kernels of a pass over layers. "
    "floor: from rates measured after a pause; steady: the same from rates at the power that a long run settles to. "
    "loss: after the same tokens, at each scheme's own rate."
)


@dataclass(frozen=True)
class BenchPlan:
    """What to run: the model and microbatch, the rows, timed rounds of steps, steps of the training run."""

    shape: RunConfig
    variants: tuple[str, ...]
    rounds: int
    steps: int
    loss_steps: int
    resident: int | None = None

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.shape.train.batch_size * self.shape.model.max_seq_len


@dataclass(frozen=True)
class Row:
    """One variant. Milliseconds are medians; `ratio` is the reference's forward + backward over this one's.

    `gemm`, `attention`, `other` are milliseconds of kernels of one pass, `look_percent` is a look's share of 100 steps;
    None stands for what was not measured.
    """

    variant: str
    failure: str | None = None
    loss: float | None = None
    forward_backward_ms: float | None = None
    spread_percent: float | None = None
    step_ms: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    floor_ms: float | None = None
    floor_percent: float | None = None
    steady_percent: float | None = None
    peak_gib: float | None = None
    activations_gib: float | None = None
    kernels_per_layer: float | None = None
    gemm_ms: float | None = None
    attention_ms: float | None = None
    other_ms: float | None = None
    attention_kernel: str | None = None
    look_ms: float | None = None
    look_percent: float | None = None
    compile_s: float | None = None
    spared: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    top_kernels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Bench:
    """The table, and the rates its floors come from (None on a CPU): after a pause, and at steady power."""

    machine: str
    tokens: int
    layers: int
    rows: tuple[Row, ...]
    rates: Rates | None
    steady: Rates | None


class Worker:
    """The other end of study/bench_worker.py."""

    def __init__(self, variant: str, plan: BenchPlan, device: str, threads: int) -> None:
        self.variant = variant
        self.answers: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.failure: str | None = None
        order = {"variant": variant, "device": device, "loss_steps": plan.loss_steps}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [
                sys.executable,
                *("-m", "umup.study.bench_worker"),
                json.dumps({**order, "shape": plan.shape.model_dump_json()}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def answer(self, order: str | None = None) -> dict[str, Any]:
        """What it says next, after an order if there is one; {} once it has failed."""
        if self.failure is not None:
            return {}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            if order is not None:
                print(order, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        said: dict[str, Any] = json.loads(line or "{}")
        if not line:
            self.failure = self._last_words()
        elif said["event"] == "failed":
            self.failure = said["reason"]
        return {} if self.failure else said

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [x.strip() for x in self._log.read().decode(errors="replace").splitlines() if x.strip()]
        errors = [x for x in lines if "Error" in x]
        return ([f"exit code {self._process.returncode}", *lines[-1:], *errors[-1:]])[-1]


def run_bench(plan: BenchPlan, say: Callable[[str], None] = lambda line: None) -> Bench:
    """Run it all; on a machine without a GPU eagerly, with emulated FP8, and without what only a GPU tells."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    s = shape_of(plan.shape.model)
    rates: list[Rates] = []

    def measured() -> list[Rates]:
        if cuda and not rates:
            rates.extend(measure_rates(s, plan.shape.train.batch_size, steady) for steady in (False, True))
            torch.cuda.empty_cache()
        return rates

    rows: dict[str, Row] = {}
    for group in groups(plan, resident(plan, s, cuda)):
        for row in _run_group(group, plan, device, measured, say):
            rows.setdefault(row.variant, row)
    machine = f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}"
    return Bench(
        machine, plan.tokens, s.num_layers, tuple(rows[name] for name in plan.variants), *(rates or (None, None))
    )


def resident(plan: BenchPlan, s: Shape, cuda: bool) -> int:
    """How many workers may be on the device: as asked, else what their weights and one active pass leave room for."""
    if plan.resident is not None or not cuda:
        return plan.resident or len(plan.variants)
    parameters = sum(prod(p.spec.shape) for p in plan_for(plan.shape).stored.values())
    active = 8 * parameters + plan.tokens * (32 * s.num_layers * s.hidden_size + 6 * s.vocab_size)
    total = 0.92 * torch.cuda.get_device_properties(0).total_memory
    return max(2, 1 + int((total - active) / (4 * parameters + CONTEXT_BYTES)))


def groups(plan: BenchPlan, size: int) -> Iterator[tuple[str, ...]]:
    """The variants in groups of at most `size`, the reference in each that is asked for."""
    first = tuple(v for v in plan.variants if v == REFERENCE)
    rest = tuple(v for v in plan.variants if v != REFERENCE)
    width = max(1, size - len(first))
    for start in range(0, max(1, len(rest)), width):
        yield (*first, *rest[start : start + width])


def _run_group(
    names: Sequence[str],
    plan: BenchPlan,
    device: str,
    measured: Callable[[], list[Rates]],
    say: Callable[[str], None],
) -> list[Row]:
    threads = max(1, (os.cpu_count() or 1) // len(names))
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, plan, device, threads)) for name in names]
        for worker in workers:
            worker.answers["compiled"] = worker.answer()
            worker.answers["ready"] = worker.answer("go")
            loss = worker.answers["ready"].get("loss")
            say(f"{worker.variant}: " + (worker.failure or f"loss {loss:.4f} after {plan.loss_steps} steps"))
        rates = measured()
        for number in range(plan.rounds):
            for worker in workers:
                worker.rounds.append(worker.answer(f"time {plan.steps}"))
            say(f"round {number + 1} of {plan.rounds} timed")
        for worker in workers:
            worker.answers["profiled"] = worker.answer("profile") if device == "cuda" else {}
            worker.answers["looked"] = worker.answer("look")
        times = {w.variant: _pooled(w, "forward_backward") for w in workers if w.failure is None}
        base = median(times[REFERENCE]) if REFERENCE in times else None
        return [_row(worker, plan, device, rates, base) for worker in workers]


def _pooled(worker: Worker, what: str) -> list[float]:
    return [t for answer in worker.rounds for t in answer[what]]


def _row(worker: Worker, plan: BenchPlan, device: str, rates: list[Rates], base: float | None) -> Row:
    if worker.failure is not None:
        return Row(worker.variant, failure=worker.failure)
    ready, seen, last = worker.answers["ready"], worker.answers["profiled"], worker.rounds[-1]
    spent = seen.get("spent", {})
    passes = median(_pooled(worker, "forward_backward"))
    step = passes + median(_pooled(worker, "optimizer"))
    medians = [median(answer["forward_backward"]) for answer in worker.rounds]
    looks = worker.answers["looked"]["milliseconds"]
    layers = plan.shape.model.num_layers
    floor, steady = [variant_floor(worker.variant, plan, device, r) for r in rates] or (None, None)
    return Row(
        worker.variant,
        loss=ready["loss"],
        forward_backward_ms=passes,
        spread_percent=100 * (max(medians) - min(medians)) / passes,
        step_ms=step,
        tokens_per_second=1000 * plan.tokens / step,
        ratio=None if base is None else base / passes,
        floor_ms=floor,
        floor_percent=None if floor is None else 100 * floor / passes,
        steady_percent=None if steady is None else 100 * steady / passes,
        peak_gib=last.get("peak"),
        activations_gib=last.get("activations"),
        kernels_per_layer=seen["kernels"] / layers if seen else None,
        gemm_ms=spent.get("gemm"),
        attention_ms=spent.get("attention"),
        other_ms=spent.get("other"),
        attention_kernel=seen.get("attention_kernel"),
        look_ms=median(looks) if looks else None,
        look_percent=median(looks) / step if looks else None,
        compile_s=worker.answers["compiled"]["seconds"],
        spared=tuple(ready["spared"]),
        events=tuple(ready["events"]),
        losses=tuple(ready["losses"]),
        top_kernels=tuple((name, time) for name, time in seen.get("top", ())),
    )


def variant_floor(variant: str, plan: BenchPlan, device: str, rates: Rates) -> float | None:
    """The floor of a variant's number formats; None where the GPU has no FP8. torchao's are those of recipe fp8."""
    v = VARIANTS[variant if VARIANTS[variant].torchao is None else "fp8"]
    config = config_of(v, plan.shape, device)
    formats = products_for(config, plan_for(config))
    if not rates.fp8 and any(p.forward is not None for p in formats.values()):
        return None
    return floor_ms(shape_of(plan.shape.model), plan.tokens, formats, rates)


def bench_text(bench: Bench) -> str:
    """The table with its small print."""
    lines = [table([HEAD, *(_cells(row) for row in bench.rows)])]
    lines += [f"{row.variant}: {row.failure}" for row in bench.rows if row.failure is not None]
    lines += [f"{row.variant}: sent back to bf16: {', '.join(row.spared)}" for row in bench.rows if row.spared]
    lines += [
        f"{row.variant}: attention is not cuDNN's but {row.attention_kernel}" for row in bench.rows if _foreign(row)
    ]
    lines += [
        f"{row.variant}: a look at the scales takes {row.look_ms:.1f} ms, {row.look_percent:.2f}% of 100 steps"
        for row in bench.rows
        if row.look_ms is not None
    ]
    lines.append(f"{bench.machine}; {bench.tokens} tokens a pass, {bench.layers} layers. {SMALL_PRINT}")
    if bench.rates is not None:
        lines.append(_rates_text(bench.rates))
    return "\n".join(lines)


def _foreign(row: Row) -> bool:
    return row.attention_kernel is not None and "cudnn" not in row.attention_kernel.lower()


def _cells(row: Row) -> tuple[str, ...]:
    def shown(number: float | None, form: str) -> str:
        return "-" if number is None else format(number, form)

    return (
        row.variant,
        shown(row.tokens_per_second, ",.0f"),
        shown(row.forward_backward_ms, ".2f"),
        "-" if row.spread_percent is None else f"{row.spread_percent:.1f}%",
        shown(row.step_ms, ".2f"),
        shown(row.ratio, ".3f"),
        shown(row.floor_ms, ".2f"),
        "-" if row.floor_percent is None else f"{row.floor_percent:.0f}%",
        "-" if row.steady_percent is None else f"{row.steady_percent:.0f}%",
        shown(row.peak_gib, ".2f"),
        shown(row.activations_gib, ".2f"),
        shown(row.kernels_per_layer, ".1f"),
        shown(row.gemm_ms, ".2f"),
        shown(row.attention_ms, ".2f"),
        shown(row.other_ms, ".2f"),
        shown(row.loss, ".4f"),
    )


def _rates_text(rates: Rates) -> str:
    rows = [("ms: forward, input and weight gradient", "bf16", "fp8")]
    for name, times in rates.bf16.items():
        low = rates.fp8.get(name)
        rows.append((name, _joined(times), "-" if low is None else _joined(low)))
    return f"{table(rows)}\nattention {rates.attention:.2f} ms a layer; copy {rates.copy / 1e9:.2f} TB/s"


def _joined(times: Sequence[float]) -> str:
    return " ".join(f"{t:.3f}" for t in times)


def bench_json(bench: Bench) -> str:
    """The same as one JSON document."""
    return json.dumps(asdict(bench))
