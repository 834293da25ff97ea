"""The training loop, top to bottom: plan, data, model, optimizer, resume, steps, finish."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch

from umup.checkpoint import RunState, load_latest, load_weights, save_checkpoint, save_model
from umup.config.sections import RunConfig
from umup.data.batches import Batches
from umup.data.tokens import TokenFiles, prepare
from umup.errors import CheckpointError
from umup.models.build import build
from umup.models.specs import plan_for
from umup.optim.adamw import check_name, make_optimizer
from umup.optim.groups import load_state_tensors, param_groups, state_tensors
from umup.optim.schedule import apply_factor, factor
from umup.train.look import LookLoss
from umup.train.metrics import Metrics, append_metrics, final_losses, rewind_metrics
from umup.train.precision import ScaleKeeper
from umup.train.runtime import deferred_interrupts, device_of, open_run, restore_rng, rng_state
from umup.train.step import StepResult, divergence, evaluate, to_device, train_step


@dataclass(frozen=True)
class RunResult:
    """A finished run. `train_loss` is the mean over the last tenth of the steps, `val_loss` the last evaluation's."""

    steps: int
    train_loss: float
    val_loss: float
    tokens_per_second: float
    out: Path | None


def run_training(
    config: RunConfig,
    out: Path | None = None,
    observe: Callable[[Metrics], None] = lambda metrics: None,
    notice: Callable[[str], None] = lambda line: None,
    files: TokenFiles | None = None,
) -> RunResult:
    """Train as the config says, in the run directory `out`, going on from its newest checkpoint if it has one.

    `observe` is called after every step, `notice` with lines a person should read. With no `out` nothing is written.
    `files` is the config's prepared data, for callers that run many configs on it.
    Raises InputError before anything is trained, DivergedError when the loss is no number, KeyboardInterrupt after
    a Ctrl-C, once the step is over and a checkpoint is written.
    """
    t = config.train

    # 1. the plan, and the data it needs
    check_name(config.optimizer)
    plan = plan_for(config)
    device = device_of(config)
    seq_len = config.model.max_seq_len
    files = files or prepare(config.data, config.model.vocab_size, config.tokens_per_batch)
    batches = Batches(files.train.load(), t.batch_size, seq_len, t.seed)
    held_out = [
        to_device(b, device) for b in Batches(files.val.load(), t.batch_size, seq_len, t.seed).fixed(t.eval_batches)
    ]

    # 2. the model and its optimizer
    torch.manual_seed(t.seed)
    model = build(config, plan, device)
    model.train()
    groups = param_groups(
        plan,
        model.named_parameters(),
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        eps=config.optimizer.eps,
    )
    optimizer = make_optimizer(config.optimizer, groups)
    p = config.precision
    keeper = ScaleKeeper(model, p.scales, p.sample_every, None if out is None else out / "ranges.jsonl", notice)
    keeper.follow(optimizer)
    loss_fn = torch.compile(model.loss, fullgraph=True, dynamic=False) if t.compile else model.loss

    # 3. the run directory, and the newest checkpoint in it
    step, position = 0, batches.start()
    history: list[Metrics] = []
    if out is not None:
        open_run(out, config, plan, json.dumps(files.record, indent=1), notice)
        state, refused = load_latest(out)
        for line in refused:
            notice(f"refused {line}")
        if state is not None:
            load_weights(model, state.model.items(), f"run {out}")
            load_state_tensors(optimizer, state.optimizer)
            keeper.load(state.precision)
            restore_rng(state.rng, device)
            step, position = state.step, state.data
            notice(f"resuming {out} after step {step}")
        history = rewind_metrics(out / "metrics.jsonl", step)
        keeper.rewind(step)
        if step == t.steps and not history:
            raise CheckpointError(f"run {out} has finished but its metrics.jsonl is gone; choose another --out")

    def kept() -> str:
        return f"checkpoint of step {saved} is kept" if out is not None and saved else "no checkpoint yet"

    def checkpoint() -> None:
        if out is not None:
            # Finite weights may already be beyond saving; a checkpoint that replaces a good one must itself be good.
            probe = evaluate(model, loss_fn, held_out[:1])
            if not isfinite(probe):
                raise divergence(model, step, StepResult(probe, history[-1].grad_norm), kept(), held_out[:1])
            weights = {name: p.detach() for name, p in model.named_parameters()}
            now = RunState(step, position, weights, state_tensors(optimizer), rng_state(device), keeper.state())
            save_checkpoint(out, now, t.keep_checkpoints)

    # 4. the steps
    saved = resumed = step
    with deferred_interrupts() as interrupt:
        while step < t.steps and not interrupt.requested:
            began = perf_counter()
            microbatches = []
            for _ in range(t.grad_accum):
                inputs, targets, position = batches.next(position)
                microbatches.append(to_device((inputs, targets), device))
            if keeper.due(step):
                keeper.look(step, LookLoss(model), *microbatches[0])
            scheduled = factor(config.schedule, step, t.steps)
            apply_factor(optimizer, scheduled)
            result = train_step(loss_fn, optimizer, microbatches, t.grad_clip)
            if not (isfinite(result.loss) and isfinite(result.grad_norm)):
                raise divergence(model, step + 1, result, kept(), microbatches)
            step += 1
            seconds = perf_counter() - began
            last = step == t.steps
            val = evaluate(model, loss_fn, held_out) if last or step % t.eval_every == 0 else None
            if val is not None and not isfinite(val):
                raise divergence(model, step, StepResult(val, result.grad_norm), kept(), held_out)
            metrics = Metrics(
                step,
                result.loss,
                config.optimizer.lr * scheduled,
                result.grad_norm,
                config.tokens_per_step / seconds,
                val,
            )
            history.append(metrics)
            if out is not None:
                append_metrics(out / "metrics.jsonl", metrics)
            observe(metrics)
            if last or step % t.checkpoint_every == 0:
                checkpoint()
                saved = step
        if interrupt.requested and step < t.steps:
            if step > saved:
                checkpoint()
            raise KeyboardInterrupt

    # 5. what a finished run leaves
    if out is not None and (step > resumed or not (out / "model.safetensors").exists()):
        save_model(out / "model.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    train_loss, val_loss = final_losses(history)
    speed = sorted(m.tokens_per_second for m in history)[len(history) // 2]
    return RunResult(step, train_loss, val_loss if val_loss is not None else train_loss, speed, out)
