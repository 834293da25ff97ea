"""What a learning-rate line costs: its runs one by one, as CUDA graphs, and stacked as one program (study/stacked.py).

    python benchmarks/stacked_sweep.py [--width 128 256] [--members 16] [--depth 4] [--tokens 8192] [--device cuda]

Printed per width: milliseconds per step and run, medians over rounds in which the variants take turns in one process,
the ratios of the other two to the stacked runs, and the loss of the first run under each, after the same batches.

    one by one    the trainer's own step: torch.compile, torch's AdamW, the loss read back every step
    CUDA graphs   the same compiled step, its optimizer included, captured whole and replayed, nothing read back
    stacked       `members` runs of different rates in one compiled program

Batches lie on the device before the clock starts. bf16 on CUDA; float32 on a CPU, which has no graphs. `--eager` leaves
the compiler out (and the graphs).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.models.build import build
from umup.models.specs import plan_for
from umup.optim.adamw import make_optimizer
from umup.optim.groups import param_groups
from umup.study.stacked import Stack
from umup.train.step import train_step

SEQ_LEN = 256
WARMUP = 3
STEPS = 3
BATCHES = 4

# One step on (tokens, targets) -> the first run's loss.
Step = Callable[[Tensor, Tensor], Tensor]


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


def parts_of(config: RunConfig, device: str) -> tuple[nn.Module, list[dict[str, object]], Step]:
    """A single run's model, parameter groups and loss."""
    plan = plan_for(config)
    model = build(config, plan, device)
    groups = param_groups(plan, model.named_parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if config.train.compile else model.loss
    return model, groups, loss


def single(config: RunConfig, device: str) -> Step:
    """The trainer's step."""
    _, groups, loss = parts_of(config, device)
    optimizer = make_optimizer(config.optimizer, groups)
    return lambda tokens, targets: torch.tensor(train_step(loss, optimizer, [(tokens, targets)], 0.0).loss)


def graphed(config: RunConfig, device: str, first: tuple[Tensor, Tensor]) -> Step:
    """The same step as one CUDA graph, recorded after WARMUP steps on the first batch."""
    model, groups, loss_fn = parts_of(config, device)
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, capturable=True)
    tokens, targets = (part.clone() for part in first)
    parameters = list(model.parameters())

    def step() -> Tensor:
        loss = loss_fn(tokens, targets)
        gradients = torch.autograd.grad(loss, parameters)
        nn.utils.get_total_norm(gradients)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay(new_tokens: Tensor, new_targets: Tensor) -> Tensor:
        tokens.copy_(new_tokens)
        targets.copy_(new_targets)
        graph.replay()
        return result

    return replay


def stacked(configs: Sequence[RunConfig], device: str) -> Step:
    """All runs at once; each sees the same batches."""
    stack = Stack(configs, torch.device(device))
    members = len(configs)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        return stack.step([(tokens.expand(members, -1, -1), targets.expand(members, -1, -1))], 1.0)[0]

    return step


def measure(args: argparse.Namespace, width: int) -> dict[str, Cost]:
    """Every variant's cost at a width."""
    configs = [config_of(args, width, member) for member in range(args.members)]
    generator = torch.Generator().manual_seed(0)
    # Something to learn: 32 of 256 ids occur.
    ids = torch.randint(32, (BATCHES, args.tokens // SEQ_LEN, SEQ_LEN + 1), generator=generator).to(args.device)
    batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in ids]
    steps: dict[str, Step] = {"one by one": single(configs[0], args.device)}
    steps["stacked"] = stacked(configs, args.device)
    for step in steps.values():
        for _ in range(WARMUP):
            step(*batches[0])
    if args.device == "cuda" and not args.eager:
        steps["CUDA graphs"] = graphed(configs[0], args.device, batches[0])
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
    runs = {"stacked": args.members}
    return {name: Cost(1e3 * median(found) / runs.get(name, 1), losses[name]) for name, found in seconds.items()}


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
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args(argv)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, depth {args.depth}, {args.tokens} tokens, {args.members} members")
    for width in args.width:
        began = perf_counter()
        costs = measure(args, width)
        print(f"width {width} (in {perf_counter() - began:.0f} s)")
        for name, cost in costs.items():
            ratio = cost.ms / costs["stacked"].ms
            print(
                f"  {name:12s} {cost.ms:9.3f} ms per step and run  {ratio:6.2f}x stacked  loss {cost.loss:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
