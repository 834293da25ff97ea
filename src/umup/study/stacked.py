"""The points of a learning-rate line (rates x seeds) as one program, a leading axis running over the points.

A small proxy leaves a GPU idle: its kernels take less time than their launches. Runs of one shape therefore train
together, as one decoder with a model axis (models/stacked.py), each member with its own initial weights, data order,
learning rate, weight decay and clipping: what `run_training` gives for each config alone, to rounding. Nothing is read
back before the end, so that the host runs ahead of the device.

A member whose loss or gradient norm is no number is frozen from that step on and has lost (infinity); no other member
changes by a bit, since no sum runs over the model axis.

Activations and logits of all members exist at once. `members_that_fit` guesses how many a GPU's free memory holds, from
what one keeps for its backward pass; whoever runs a stack must still expect that it does not fit.

Not covered: members that differ in anything but `MAY_DIFFER`, optimizers other than AdamW, FP8, dropout, resuming.
`unstackable` says why a config must run alone; `stack_key` which may run together.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import inf, isfinite, prod, sqrt

import numpy as np
import torch
from torch import Tensor

from umup.config.sections import RunConfig
from umup.data.batches import Batches, Ids
from umup.data.tokens import TokenFiles, prepare
from umup.errors import ConfigError
from umup.models.specs import plan_for, products_for, shape_of
from umup.models.stacked import build_stacked, initialise_stacked, stacked_loss
from umup.optim.groups import param_groups
from umup.optim.schedule import factor
from umup.rules.plan import Plan
from umup.train.metrics import Metrics
from umup.train.runtime import device_of
from umup.train.step import to_device

MAY_DIFFER = (("optimizer", "lr"), ("optimizer", "weight_decay"), ("train", "seed"))
# torch's Adam runs with decoupled decay here (optim/groups.py), which makes it AdamW.
OPTIMIZERS = ("adamw", "adam")
# Batches of one seed drawn in a row: data/batches.py keeps the order of two epochs, not of every seed's.
BLOCK = 16
# torch keeps 8 programs per function and then fails; a search has one or two for every shape and number of members.
PROGRAMS = 256
# Of a parameter: weight, gradient, two moments, a copy in the products' format, temporaries of the update.
STATE_BYTES = 24
SHARE_OF_FREE = 0.8

Microbatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StackedRun:
    """One member's run, its numbers meaning what RunResult's and Metrics' do; a diverged one has losses infinity.

    `losses` and `grad_norms` have an entry per step, `evaluations` one per step that evaluated (by the number of steps
    done), up to the step before the one that diverged.
    """

    val_loss: float
    train_loss: float
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    evaluations: Mapping[int, float]

    def metrics(self, config: RunConfig, tokens_per_second: float) -> list[Metrics]:
        """What the run alone would have written, one record per step."""
        s, steps, peak = config.schedule, config.train.steps, config.optimizer.lr
        return [
            Metrics(i + 1, loss, peak * factor(s, i, steps), norm, tokens_per_second, self.evaluations.get(i + 1))
            for i, (loss, norm) in enumerate(zip(self.losses, self.grad_norms, strict=True))
        ]


def unstackable(config: RunConfig) -> str | None:
    """Why the config must run alone, as a sentence's end; None if it can be stacked."""
    o = config.optimizer
    if o.name not in OPTIMIZERS:
        return f"optimizer.name is {o.name!r}; a stack trains with {' or '.join(OPTIMIZERS)}"
    if o.state_dtype != "fp32" or o.master_dtype != "fp32":
        return "optimizer.state_dtype or master_dtype is bf16; write fp32"
    if config.model.dropout:
        return "model.dropout draws other masks in a stack; write 0"
    if any(product.forward for product in products_for(config, plan_for(config)).values()):
        return "precision has products in FP8; write recipe: bf16, fp16 or fp32 and no overrides"
    return None


def stack_key(config: RunConfig) -> str:
    """Configs of equal keys differ in `MAY_DIFFER` alone, and may be stacked unless `unstackable`."""
    body = config.model_dump(mode="json")
    for section, name in MAY_DIFFER:
        del body[section][name]
    return json.dumps(body, sort_keys=True)


def member_bytes(config: RunConfig) -> int:
    """About what one member takes in training: state, what eager layers keep for the backward pass, logits twice.

    Compiled layers keep about half of it. The units of a layer (12 widths, 4.5 of the MLP) are gpt2's and llama's as
    counted by torch's saved-tensor hooks, rounded up.
    """
    shape, p = shape_of(config.model), config.precision
    count = sum(prod(parameter.spec.shape) for parameter in plan_for(config).stored.values())
    units = shape.num_layers * (12 * shape.hidden_size + 4.5 * shape.intermediate_size)
    number = 4 if p.recipe == "fp32" else 2
    tokens = config.train.batch_size * config.model.max_seq_len
    return round(STATE_BYTES * count + tokens * (number * units + 12 * shape.vocab_size))


def members_that_fit(config: RunConfig, device: torch.device) -> int:
    """How many members the device's free memory should hold, at least 1. A CPU's memory is not asked."""
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch keeps for itself
    return max(1, int(SHARE_OF_FREE * free) // member_bytes(config))


def run_stacked(configs: Sequence[RunConfig], files: TokenFiles | None = None) -> list[StackedRun]:
    """Train all configs at once, to the end; one result per config, in order. Nothing is written.

    `files` is the configs' prepared data. With `train.compile` the model and the update are compiled, once each; the
    programs of the last stack are kept, so that another of its shape and number of members need not compile. Raises
    ConfigError for configs that cannot share a program, and the InputErrors of `run_training`.
    """
    first = configs[0]
    files = files or prepare(first.data, first.model.vocab_size, first.tokens_per_batch)
    t, device = first.train, device_of(first)
    program = (stack_key(first), len(configs))
    stack = _kept.pop(program, None)
    _kept.clear()
    if stack is None:
        stack = Stack(configs, device)
    else:
        stack.begin(configs)
    order = (to_device(batch, device) for batch in member_batches(configs, files))
    fixed = Batches(files.val.load(), t.batch_size, first.model.max_seq_len, t.seed).fixed(t.eval_batches)
    held_out = [to_device(batch, device) for batch in fixed]
    evaluations = {}
    for step in range(1, t.steps + 1):
        stack.step(list(islice(order, t.grad_accum)), factor(first.schedule, step - 1, t.steps))
        if step == t.steps or step % t.eval_every == 0:
            evaluations[step] = stack.evaluate(held_out)
    results = stack.results(evaluations)
    if t.compile:
        _kept[program] = stack
    return results


# The compiled stack that ran last.
_kept: dict[tuple[str, int], "Stack"] = {}


class Stack:
    """Models of several configs as one, with their AdamW. `step` never waits for the device."""

    def __init__(self, configs: Sequence[RunConfig], device: torch.device) -> None:
        """Raises ConfigError for configs that cannot share a program."""
        _require_one_program(configs)
        first, plan = configs[0], plan_for(configs[0])
        self._first, self._plan = first, plan
        self.model = build_stacked(first, plan, _seeds(configs), device)
        loss, update = stacked_loss(self.model), adamw_
        if first.train.compile:
            torch._dynamo.config.recompile_limit = PROGRAMS
            loss, update = (torch.compile(f, fullgraph=True, dynamic=False) for f in (loss, update))
        self._loss = loss
        names = dict(self.model.named_parameters())
        self._parameters = [names[name] for name in plan.stored]
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters]
        self.alive = torch.ones(len(configs), dtype=torch.bool, device=device)
        self._betas = first.optimizer.betas
        epsilons = self._hold(configs)
        self._update = partial(update, betas=self._betas, epsilons=epsilons, grad_clip=first.train.grad_clip)

    def begin(self, configs: Sequence[RunConfig]) -> None:
        """Begin as many other runs of the same shape, nothing compiled anew."""
        _require_one_program([self._first, *configs])
        if len(configs) != len(self.alive):
            raise ConfigError(f"stacked runs: a stack of {len(self.alive)} cannot train {len(configs)}")
        initialise_stacked(self.model, self._plan, _seeds(configs))
        for moment in chain.from_iterable(self._moments):
            moment.zero_()
        self.alive.fill_(True)
        self._hold(configs)

    def _hold(self, configs: Sequence[RunConfig]) -> tuple[float, ...]:
        """Take the members' rates and decays, and forget what was; the epsilons, which members share."""
        rates, decays, epsilons = _numbers(self._plan, configs, self.model)
        self.rates, self.decays = (
            torch.tensor(part, dtype=torch.float64, device=self.alive.device) for part in (rates, decays)
        )
        self._history: list[Tensor] = []
        return epsilons

    def step(self, microbatches: Microbatches, scheduled: float) -> Tensor:
        """One optimizer step at `scheduled` times the peak rates -> the members' losses, (models), on the device.

        microbatches: (tokens, targets), (models, batch, positions) each.
        """
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for tokens, targets in microbatches:
            loss = self._loss(tokens, targets)
            new = torch.autograd.grad(loss.sum(), self._parameters)
            gradients = [a + b for a, b in zip(gradients, new, strict=True)] if gradients else list(new)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean(0)
        done = len(self._history) + 1
        beta1, beta2 = self._betas
        norms = self._update(
            [p.detach() for p in self._parameters],
            gradients,
            self._moments,
            self.alive,
            mean,
            (1.0 - self.rates * self.decays * scheduled).float(),
            (self.rates * (scheduled / (1.0 - beta1**done))).float(),
            torch.full((), sqrt(1.0 - beta2**done), device=mean.device),
        )
        self._history.append(torch.stack((mean, norms, self.alive.float())))
        return mean

    def evaluate(self, batches: Microbatches) -> Tensor:
        """Each member's mean loss over batches that all share, (batch, positions) each -> (models)."""
        members = len(self.alive)
        shared = [[part.expand(members, *part.shape).contiguous() for part in batch] for batch in batches]
        # Without gradients, or of other strides, it would be another compiled program, which costs more than it saves.
        with torch.set_grad_enabled(self._first.train.compile):
            losses = [self._loss(*batch).detach() for batch in shared]
        return torch.stack(losses).mean(0)

    def results(self, evaluations: Mapping[int, Tensor]) -> list[StackedRun]:
        """What the steps so far and the evaluations, (models) by the number of steps done, make of each member."""
        history = torch.stack(self._history, -1).permute(1, 0, 2).tolist()
        by_member = zip(*(losses.tolist() for losses in evaluations.values()), strict=True)
        return [
            _result(losses, norms, alive, dict(zip(evaluations, found, strict=True)))
            for (losses, norms, alive), found in zip(history, by_member, strict=True)
        ]


@torch.no_grad()
def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    alive: Tensor,
    losses: Tensor,
    shrink: Tensor,
    size: Tensor,
    root: Tensor,
    *,
    betas: tuple[float, float],
    epsilons: tuple[float, ...],
    grad_clip: float,
) -> Tensor:
    """Per-member clipping and one AdamW step of living members, in place -> gradient norms before clipping, (models).

    All lists are by parameter, of tensors (models, ...). A member whose loss or norm is not finite leaves `alive`,
    (models), for good. shrink, size: (parameters, models), the decay's factor and the rate over the first moment's bias
    correction; root: of the second's. The order of operations is torch's single-tensor path's.
    """
    beta1, beta2 = betas
    by_parameter = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(by_parameter), dim=0)
    alive.logical_and_(losses.isfinite() & norms.isfinite())
    clip = (grad_clip / (norms + 1e-6)).clamp(max=1.0) if grad_clip > 0 else None
    for i, (p, g, (m, v)) in enumerate(zip(parameters, gradients, moments, strict=True)):
        by_member = (-1, *[1] * (p.ndim - 1))
        if clip is not None:
            g = g * clip.view(by_member)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        moved = p * shrink[i].view(by_member) - size[i].view(by_member) * m / (v.sqrt() / root + epsilons[i])
        # The moments of the dead may be NaN: a product with 0 would keep it, a choice does not.
        p.copy_(torch.where(alive.view(by_member), moved, p))
    return norms


def member_batches(configs: Sequence[RunConfig], files: TokenFiles) -> Iterator[tuple[Ids, Ids]]:
    """Every microbatch of the runs, in order: inputs and targets, (models, batch, positions), each member's its own."""
    t, tokens = configs[0].train, files.train.load()
    seeds = _seeds(configs)
    streams = {
        seed: _stream(Batches(tokens, t.batch_size, configs[0].model.max_seq_len, seed))
        for seed in dict.fromkeys(seeds)
    }
    total = t.steps * t.grad_accum
    for start in range(0, total, BLOCK):
        block = {seed: list(islice(stream, min(BLOCK, total - start))) for seed, stream in streams.items()}
        for parts in zip(*(block[seed] for seed in seeds), strict=True):
            yield np.stack([inputs for inputs, _ in parts]), np.stack([targets for _, targets in parts])


def _stream(batches: Batches) -> Iterator[tuple[Ids, Ids]]:
    position = batches.start()
    while True:
        inputs, targets, position = batches.next(position)
        yield inputs, targets


def _numbers(
    plan: Plan, configs: Sequence[RunConfig], model: torch.nn.Module
) -> tuple[list[list[float]], list[list[float]], tuple[float, ...]]:
    """(peak rates, decays, epsilons): rows by stored parameter, columns by member; the members share epsilons."""
    by_member = []
    for config in configs:
        o = config.optimizer
        groups = param_groups(plan, model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, eps=o.eps)
        by_member.append({name: group for group in groups for name in group["names"]})
    rates = [[numbers[name]["lr"] for numbers in by_member] for name in plan.stored]
    decays = [[numbers[name]["weight_decay"] for numbers in by_member] for name in plan.stored]
    return rates, decays, tuple(by_member[0][name]["eps"] for name in plan.stored)


def _seeds(configs: Sequence[RunConfig]) -> list[int]:
    return [config.train.seed for config in configs]


def _require_one_program(configs: Sequence[RunConfig]) -> None:
    if reason := unstackable(configs[0]):
        raise ConfigError(f"stacked runs: {reason}, or run the configs one by one")
    wanted = json.loads(stack_key(configs[0]))
    for config in configs[1:]:
        found = json.loads(stack_key(config))
        odd = [f"{part}.{name}" for part in wanted for name in wanted[part] if wanted[part][name] != found[part][name]]
        if odd:
            allowed = ", ".join(".".join(field) for field in MAY_DIFFER)
            raise ConfigError(f"stacked runs differ in {odd[0]}; stack those that differ in {allowed} alone")


def _result(
    losses: list[float], grad_norms: list[float], alive: list[float], evaluations: dict[int, float]
) -> StackedRun:
    whole = len(losses)
    broken = [step - 1 for step, loss in evaluations.items() if not isfinite(loss)]
    steps = min([int(sum(alive)), *broken])
    curves = tuple(losses[:steps]), tuple(grad_norms[:steps])
    kept = {step: loss for step, loss in evaluations.items() if step <= steps}
    if steps < whole:
        return StackedRun(inf, inf, *curves, kept)
    tail = losses[-max(1, steps // 10) :]
    return StackedRun(evaluations[whole], sum(tail) / len(tail), *curves, kept)
