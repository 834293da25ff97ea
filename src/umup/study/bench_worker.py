"""One variant of `umup bench` in a process of its own, driven by lines on stdin, answering in JSON lines on stdout.

    compile                  -> {"event": "compiled"}         nothing has run on the device yet
    "go"                     -> {"event": "ready", ...}       a short training run
    "time STEPS"             -> {"event": "timed", ...}       as often as asked
    "profile"                -> {"event": "profiled", ...}    the kernels of one pass (GPU only)
    "look"                   -> {"event": "looked", ...}      the last order: looks may move scales

A process per variant because torchao changes the compiler for its whole process, and so that all variants compile at
once while only one at a time is on the device. Between orders only the weights stay on it.
"""

import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from umup.config.sections import RunConfig
from umup.errors import UmupError
from umup.optim.adamw import AdamW
from umup.optim.schedule import apply_factor
from umup.study.bench_variants import VARIANTS, Trainee, config_of, text_batches, trainee
from umup.study.rooflines import Stopwatch
from umup.train.look import LookLoss
from umup.train.precision import ScaleKeeper

BETAS = (0.9, 0.95)
WARMUP = 8
SETTLE = 3
# The loss of a row is the mean over this many last steps.
TAIL = 8
# Looks that are timed, after those that warm up and record.
LOOKS, UNSETTLED = 5, 3
GIB = 2**30

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = list[tuple[Tensor, Tensor]]


class Channel:
    """Orders in, answers out; whatever else prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **body: Any) -> None:
        """One answer."""
        print(json.dumps({"event": event, **body}), file=self._out, flush=True)

    def receive(self) -> list[str]:
        """The next order's words; none at the end."""
        return sys.stdin.readline().split()


def work(variant_name: str, shape: RunConfig, device: str, loss_steps: int, channel: Channel) -> None:
    """Serve one variant until stdin ends."""
    variant = VARIANTS[variant_name]
    torch.manual_seed(0)
    config = config_of(variant, shape, device)
    subject = trainee(variant, config, device)
    batches = text_batches(shape, loss_steps, device)
    release(subject, device)  # the float32 weights that it was built from
    events: list[str] = []
    keeper = ScaleKeeper(subject.model, variant.scales, every=100, notice=events.append)
    began = perf_counter()

    def turn() -> None:
        channel.send("compiled", seconds=perf_counter() - began)
        channel.receive()

    loss_fn: Loss = subject.model.loss  # type: ignore[assignment]
    if device == "cuda":
        loss_fn = compiled(loss_fn, turn)
    else:
        turn()
    _forward_backward(subject, loss_fn, batches[0])
    losses = short_run(subject, loss_fn, batches, keeper)
    release(subject, device)
    spared = [p.name for p in keeper.products if p.matmul.spared]
    channel.send("ready", loss=fmean(losses[-TAIL:]), losses=losses, spared=spared, events=events)
    while order := channel.receive():
        if order[0] == "profile":
            channel.send("profiled", **profile(partial(_forward_backward, subject, loss_fn, batches[0])))
        elif order[0] == "look":
            channel.send("looked", milliseconds=look_times(subject, batches, keeper))
        else:
            channel.send("timed", **timings(subject, loss_fn, batches, keeper, int(order[1]), device))
        release(subject, device)


def compiled(loss: Loss, turn: Callable[[], None]) -> Loss:
    """torch.compile, calling `turn` once between compiling, the backward pass included, and the first run."""
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx

    functorch.force_non_lazy_backward_lowering = True
    waiting = True

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal waiting
        result = compile_fx(graph, inputs)
        if waiting:
            waiting = False
            turn()
        return result

    return torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)


def short_run(t: Trainee, loss_fn: Loss, batches: Batches, keeper: ScaleKeeper) -> list[float]:
    """One optimizer step per batch with umup's AdamW, scales looked after as in a run; the loss of each step."""
    optimizer = AdamW([dict(group) for group in t.groups], betas=BETAS, weight_decay=0.0, state_dtype=torch.bfloat16)
    keeper.follow(optimizer)
    losses = []
    for step, batch in enumerate(batches):
        if keeper.due(step):
            keeper.look(step, LookLoss(t.model), *batch)  # type: ignore[arg-type]
        apply_factor(optimizer, min(1.0, (step + 1) / WARMUP))
        losses.append(_forward_backward(t, loss_fn, batch))
        optimizer.step()
    return [float(loss) for loss in losses]


def _forward_backward(t: Trainee, loss_fn: Loss, batch: tuple[Tensor, Tensor]) -> Tensor:
    t.model.zero_grad(set_to_none=True)
    loss = loss_fn(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def timings(
    t: Trainee, loss_fn: Loss, batches: Batches, keeper: ScaleKeeper, steps: int, device: str
) -> dict[str, Any]:
    """Milliseconds of `steps` forward + backward passes and optimizer steps, and GiB at their peak.

    The rate is 0, so that the weights stay those of the short run. The optimizer is torch's fused AdamW, but umup's
    where encoded weights follow it.
    """
    groups = [{**group, "lr": 0.0} for group in t.groups]
    optimizer: torch.optim.Optimizer
    if keeper.products or device == "cpu":
        optimizer = AdamW(groups, betas=BETAS, weight_decay=0.0, state_dtype=torch.bfloat16)
        keeper.follow(optimizer)
    else:
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    watch = Stopwatch(device)
    for i in range(SETTLE + steps):
        if i == SETTLE:
            watch.mark()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        t.model.zero_grad(set_to_none=True)
        loss_fn(*batches[i % len(batches)]).backward()  # type: ignore[no-untyped-call]
        if i >= SETTLE:
            watch.mark()
        optimizer.step()
        if i >= SETTLE:
            watch.mark()
    spans = watch.milliseconds()
    memory = {}
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / GIB
        memory = {"peak": peak, "activations": peak - torch.cuda.memory_allocated() / GIB}
    return {"forward_backward": spans[0::2], "optimizer": spans[1::2], **memory}


def look_times(t: Trainee, batches: Batches, keeper: ScaleKeeper) -> list[float]:
    """Milliseconds that looks hold a run up, each at a batch of its own; none where nothing is looked at."""
    times = []
    for i in range(UNSETTLED + LOOKS) if keeper.due(0) else ():
        tokens, targets = batches[i % len(batches)]
        if tokens.is_cuda:
            torch.cuda.synchronize()
        began = perf_counter()
        keeper.look(i, LookLoss(t.model), tokens, targets)  # type: ignore[arg-type]
        times.append(1000 * (perf_counter() - began))
    return times[UNSETTLED:]


def release(t: Trainee, device: str) -> None:
    """Leave only the weights on the device, so that many workers fit."""
    t.model.zero_grad(set_to_none=True)
    gc.collect()  # an optimizer and its hook hold each other
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


ATTENTION = re.compile(r"cudnn|sdpa|flash|fmha|attention", re.IGNORECASE)
GEMM = re.compile(r"gemm|cutlass|nvjet|sm90|matmul", re.IGNORECASE)


def kernel_class(name: str) -> str:
    """ "attention", "gemm" or "other", by a kernel's name."""
    if name.startswith("triton_"):  # Inductor's names quote the operators that they stem from
        return "other"
    return "attention" if ATTENTION.search(name) else "gemm" if GEMM.search(name) else "other"


def profile(call: Callable[[], object]) -> dict[str, Any]:
    """Number of kernels of a call, their milliseconds by class, and the longest attention kernel's name."""
    call()  # release() has emptied the allocator
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    kernels = [(e["name"], e["dur"] / 1000) for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    spent = {"gemm": 0.0, "attention": 0.0, "other": 0.0}
    longest: dict[str, float] = {}
    for name, milliseconds in kernels:
        spent[kernel_class(name)] += milliseconds
        longest[name] = longest.get(name, 0.0) + milliseconds
    attention = [name for name in sorted(longest, key=longest.__getitem__) if kernel_class(name) == "attention"]
    top = sorted(longest.items(), key=lambda item: -item[1])[:40]
    return {"kernels": len(kernels), "spent": spent, "attention_kernel": (attention or [""])[-1], "top": top}


def main() -> None:
    """Serve the variant that the JSON of the first argument describes."""
    channel = Channel()
    order = json.loads(sys.argv[1])
    try:
        work(
            order["variant"],
            RunConfig.model_validate_json(order["shape"]),
            order["device"],
            order["loss_steps"],
            channel,
        )
    except UmupError as error:
        channel.send("failed", reason=str(error))


if __name__ == "__main__":
    main()
