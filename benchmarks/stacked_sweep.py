"""What a learning-rate line costs: its runs one by one, as CUDA graphs, and stacked as one program (study/stacked.py).

    python benchmarks/stacked_sweep.py [--width 128 256] [--members 16] [--depth 4] [--tokens 8192] [--device cuda]
                                       [--variants one graphs stacked stock vmap]

Printed per width: milliseconds per step and run, medians over rounds in which the variants take turns in one process,
their ratio to the stacked runs, and the first run's loss after the same batches. A loss that is not that of the same
run one by one is called out: its time is then no claim.

    one        one by one, the trainer's own step: torch.compile, torch's AdamW, the loss read back every step
    graphs     the same step, its optimizer included, captured whole as a CUDA graph and replayed, nothing read back
    stacked    `members` runs of different rates in one compiled program
    stock      a twin in plain torch (study/bench_variants.py), one by one, nothing read back
    vmap       `members` of the twin by torch.func.functional_call and vmap over seeds (umup's own operations define
               their backward passes, which vmap cannot batch)

Batches lie on the device before the clock starts. bf16 on CUDA (the twins' weights, too); float32 on a CPU, which has
no graphs. `--eager` leaves the compiler out.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.models.build import build
from umup.models.specs import plan_for, shape_of
from umup.ops.norm import rms_norm
from umup.optim.adamw import make_optimizer
from umup.optim.groups import param_groups
from umup.study.bench_variants import SP_LR, StockDecoder
from umup.study.stacked import Stack
from umup.train.step import train_step

SEQ_LEN = 256
WARMUP = 3
STEPS = 3
BATCHES = 4
# Compiled programs and bf16 round differently; a broken run is further off after some steps.
SAME_LOSS = 0.01

# One step on (tokens, targets) -> the first run's loss.
Step = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cost:
    """Milliseconds per step and run, and the first run's loss in the end."""

    ms: float
    loss: float


def config_of(args: argparse.Namespace, width: int, member: int) -> RunConfig:
    """Run number `member` of the line: rates a quarter of an octave apart."""
    return parse_config(
        {
            "model": {
                "hidden_size": width,
                "num_layers": args.depth,
                "head_dim": min(64, width // 2),
                "max_seq_len": SEQ_LEN,
                "norm_gain": False,
            },
            "optimizer": {"lr": 2.0 ** (-1 - member / 4)},
            "train": {"batch_size": args.tokens // SEQ_LEN, "compile": not args.eager},
            "precision": {"recipe": "bf16" if args.device == "cuda" else "fp32"},
        }
    )


def parts_of(config: RunConfig, device: str) -> tuple[nn.Module, list[dict[str, Any]], Step]:
    """A single run's model, parameter groups and loss."""
    plan = plan_for(config)
    model = build(config, plan, device)
    groups = param_groups(plan, model.named_parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if config.train.compile else model.loss
    return model, groups, loss


def single(configs: Sequence[RunConfig], device: str, first: Batch) -> Step:
    """The trainer's step."""
    _, groups, loss = parts_of(configs[0], device)
    optimizer = make_optimizer(configs[0].optimizer, groups)
    return lambda tokens, targets: torch.tensor(train_step(loss, optimizer, [(tokens, targets)], 0.0).loss)


class StaticStep:
    """The trainer's step on buffers that stay where they are, as a CUDA graph needs it; uncaptured, the same step.

    A graph replays kernels on addresses and keeps nothing alive but its own memory. So this object owns all that lies
    outside: batch, weights, optimizer state, rates. (Captured in a function whose model and optimizer ended with it,
    replays trained on memory that had been given to others: losses of 4.12 and NaN.)
    """

    def __init__(self, config: RunConfig, device: str, first: Batch) -> None:
        self.model, groups, self.loss = parts_of(config, device)
        self.tokens, self.targets = (part.clone() for part in first)
        self.peaks = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)  # a number would be captured as a constant
        self.optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, capturable=device == "cuda")
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result = torch.empty(())

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch -> its loss, whose memory the next step overwrites."""
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.result

    def run(self) -> Tensor:
        """One step on the buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.tokens, self.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.optimizer.step()
        return loss.detach()

    def schedule(self, factor: float) -> None:
        """The peak rates times a factor, from the next step on."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"].fill_(peak * factor)

    @torch.no_grad()
    def restore(self) -> None:
        """Weights and optimizer state as they were in the beginning, in place."""
        for p, start in zip(self.model.parameters(), self.start, strict=True):
            p.copy_(start)
        for state in self.optimizer.state.values():
            for part in state.values():
                part.zero_()

    def capture(self) -> "StaticStep":
        """Record a step as a graph: torch's whole-network recipe, warmed up on a side stream, then begun anew."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.restore()
        self.optimizer.zero_grad(set_to_none=True)  # the capture then makes gradients in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.run()
        self.graph = graph
        return self


def graphed(configs: Sequence[RunConfig], device: str, first: Batch) -> Step:
    """The first run as a graph."""
    return StaticStep(configs[0], device, first).capture()


def stacked(configs: Sequence[RunConfig], device: str, first: Batch) -> Step:
    """All runs at once; each sees the same batches."""
    stack = Stack(configs, torch.device(device))
    members = len(configs)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        return stack.step([(tokens.expand(members, -1, -1), targets.expand(members, -1, -1))], 1.0)[0]

    return step


class Twin(StockDecoder):
    """The stock decoder with a loss of torch's own, so that all of its operations can be batched."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, S), (B, S) -> mean cross entropy."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(rms_norm(x, None, self.shape.norm_eps))
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def twin_of(config: RunConfig, device: str, seed: int) -> Twin:
    """A twin with the seed's initial weights."""
    torch.manual_seed(seed)
    model = Twin(shape_of(config.model)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.rotate(device)
    return model


def stock(configs: Sequence[RunConfig], device: str, first: Batch) -> Step:
    """The twin by itself."""
    model = twin_of(configs[0], device, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SP_LR, weight_decay=0.0)
    loss_of = torch.compile(model, fullgraph=True, dynamic=False) if configs[0].train.compile else model

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = loss_of(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def vmapped(configs: Sequence[RunConfig], device: str, first: Batch) -> Step:
    """Twins of several seeds by vmap; AdamW, elementwise, steps all of them at once."""
    models = [twin_of(configs[0], device, seed) for seed in range(len(configs))]
    found, _ = stack_module_state(models)
    parameters = {name: p.detach() for name, p in found.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=SP_LR, weight_decay=0.0)

    def loss_of(weights: Mapping[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = functional_call(models[0], dict(weights), (tokens, targets))
        return loss

    together = vmap(grad_and_value(loss_of), in_dims=(0, None, None))
    if configs[0].train.compile:
        together = torch.compile(together, dynamic=False)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        gradients, losses = together(parameters, tokens, targets)
        for name, p in parameters.items():
            p.grad = gradients[name]
        optimizer.step()
        return losses[0]  # type: ignore[no-any-return]

    return step


@dataclass(frozen=True)
class Variant:
    """A row. `same`: the row whose loss it must have; `many`: it trains all runs in a step."""

    make: Callable[[Sequence[RunConfig], str, Batch], Step]
    same: str
    many: bool = False


VARIANTS: Mapping[str, Variant] = {
    "one": Variant(single, "one"),
    "graphs": Variant(graphed, "one"),
    "stacked": Variant(stacked, "one", many=True),
    "stock": Variant(stock, "stock"),
    "vmap": Variant(vmapped, "stock", many=True),
}
DEFAULT = {"cuda": ("one", "graphs", "stacked"), "cpu": ("one", "stacked", "stock", "vmap")}


def measure(args: argparse.Namespace, width: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """Every variant's cost at a width, and why others have none."""
    configs = [config_of(args, width, member) for member in range(args.members)]
    generator = torch.Generator().manual_seed(0)
    # Something to learn: 32 of 256 ids occur.
    ids = torch.randint(32, (BATCHES, args.tokens // SEQ_LEN, SEQ_LEN + 1), generator=generator).to(args.device)
    batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in ids]
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in args.variants:
        try:
            steps[name] = VARIANTS[name].make(configs, args.device, batches[0])
            for _ in range(WARMUP):
                steps[name](*batches[0])
        except RuntimeError as error:  # what one variant cannot do is its row
            steps.pop(name, None)
            failed[name] = str(error).strip().splitlines()[0]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for turn in range(args.rounds):
        for name, step in steps.items():
            synchronize(args.device)
            began = perf_counter()
            for i in range(STEPS):
                loss = step(*batches[(turn + i) % BATCHES])
            synchronize(args.device)
            seconds[name].append((perf_counter() - began) / STEPS)
            losses[name] = float(loss)
    runs = {name: args.members if VARIANTS[name].many else 1 for name in steps}
    return {name: Cost(1e3 * median(found) / runs[name], losses[name]) for name, found in seconds.items()}, failed


def rows(costs: Mapping[str, Cost], failed: Mapping[str, str]) -> list[str]:
    """The table's lines."""
    lines = []
    for name, cost in costs.items():
        ratio = f"{cost.ms / costs['stacked'].ms:6.2f}x stacked" if "stacked" in costs else ""
        same = costs.get(VARIANTS[name].same, cost)
        off = "" if isclose(cost.loss, same.loss, rel_tol=SAME_LOSS) else f"  NOT {same.loss:.4f}: no claim"
        lines.append(f"  {name:8s} {cost.ms:9.3f} ms per step and run  {ratio}  loss {cost.loss:.4f}{off}")
    return [*lines, *(f"  {name:8s} does not run here: {why}" for name, why in failed.items())]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help=f"per run and step, a multiple of {SEQ_LEN}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all but twins (CUDA) or graphs (CPU)")
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args(argv)
    args.variants = args.variants or DEFAULT[args.device]
    warnings.filterwarnings("ignore", message=".*batching rule.*")  # vmap's attention on a CPU runs member by member
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, depth {args.depth}, {args.tokens} tokens, {args.members} members")
    for width in args.width:
        began = perf_counter()
        costs, failed = measure(args, width)
        print(f"width {width} (in {perf_counter() - began:.0f} s)")
        print("\n".join(rows(costs, failed)), flush=True)


if __name__ == "__main__":
    main()
