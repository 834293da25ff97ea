"""Training speed on this machine: our decoder under `sp` and `umup` against a plain PyTorch loop of the same network.

    python benchmarks/decoder_speed.py [--hidden-size 256] [--layers 4] [--steps 150] [--compile]

The three trainers take turns, step by step, in one process; printed are median tokens/s, and the median and quartiles
of the ratio over steps, with the loss after the same batches beside it (plain and sp are one network, of equal losses).
"""

import argparse
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.models.build import build
from umup.models.specs import Shape, plan_for, shape_of
from umup.ops.attention import rotary, rotary_tables
from umup.optim.groups import param_groups
from umup.train.step import train_step

WARMUP = 5
Step = Callable[[Tensor, Tensor], float]


class PlainLlama(nn.Module):
    """The llama family in a dozen lines of stock torch."""

    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        for name, (fan_in, fan_out) in {
            "q": (s.hidden_size, s.hidden_size),
            "k": (s.hidden_size, s.kv_size),
            "v": (s.hidden_size, s.kv_size),
            "out": (s.hidden_size, s.hidden_size),
            "gate": (s.hidden_size, s.intermediate_size),
            "up": (s.hidden_size, s.intermediate_size),
            "down": (s.intermediate_size, s.hidden_size),
        }.items():
            layers = (nn.Linear(fan_in, fan_out, bias=False) for _ in range(s.num_layers))
            self.add_module(name, nn.ModuleList(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(s.hidden_size, s.norm_eps) for _ in range(2 * s.num_layers + 1))
        self.head = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        cos, sin = rotary_tables(s.head_dim, s.max_seq_len, s.rope_theta)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy."""
        m = dict(self.named_children())
        x = m["embed"](tokens)
        for i in range(self.s.num_layers):
            part = {name: child[i] for name, child in m.items() if isinstance(child, nn.ModuleList)}
            h = self.norms[2 * i](x)
            q, k, v = (part[n](h).view(*h.shape[:-1], -1, self.s.head_dim).transpose(-3, -2) for n in "qkv")
            q, k = rotary(q, self.cos, self.sin), rotary(k, self.cos, self.sin)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + part["out"](a.transpose(-3, -2).flatten(-2))
            h = self.norms[2 * i + 1](x)
            x = x + part["down"](F.silu(part["gate"](h)) * part["up"](h))
        logits = m["head"](self.norms[-1](x))
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def plain_step(config: RunConfig, compiled: bool) -> Step:
    """A loop as one would write it by hand."""
    reference = build(config)
    model = PlainLlama(shape_of(config.model))
    with torch.no_grad():
        for mine, theirs in plain_names(model, reference):
            mine.copy_(theirs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=(0.9, 0.95), weight_decay=0.0)
    loss_fn = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model

    def step(tokens: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = loss_fn(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        return float(loss.detach())

    return step


def plain_names(model: nn.Module, reference: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of equal parameters."""
    ours = dict(reference.named_parameters())
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, p in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "norms":
            i = int(parts[1])
            layers = sum(n.endswith("attn.q.weight") for n in ours)
            key = f"layers.{i // 2}.{('attn', 'mlp')[i % 2]}.norm.weight" if i < 2 * layers else "norm.weight"
        elif len(parts) == 2:
            key = name
        else:
            branch = "mlp" if parts[0] in ("gate", "up", "down") else "attn"
            key = f"layers.{parts[1]}.{branch}.{parts[0]}.weight"
        pairs.append((p, ours[key]))
    return pairs


def umup_step(config: RunConfig, compiled: bool) -> Step:
    """The trainer's own step."""
    plan = plan_for(config)
    model = build(config, plan)
    groups = param_groups(plan, model.named_parameters(), lr=config.optimizer.lr, weight_decay=0.0, eps=1e-8)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loss_fn = torch.compile(model.loss, fullgraph=True, dynamic=False) if compiled else model.loss
    return lambda tokens, targets: train_step(loss_fn, optimizer, [(tokens, targets)], 0.0).loss


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    def config(scheme: str, lr: float, gains: bool) -> RunConfig:
        model = {
            "hidden_size": args.hidden_size,
            "num_layers": args.layers,
            "head_dim": 32,
            "max_seq_len": args.seq_len,
        }
        return parse_config(
            {
                "model": {**model, "norm_gain": gains},
                "parametrization": {"scheme": scheme},
                "optimizer": {"lr": lr},
                "train": {"batch_size": args.batch_size},
            }
        )

    steps = {
        "plain": plain_step(config("sp", 2.0**-10, True), args.compile),
        "sp": umup_step(config("sp", 2.0**-10, True), args.compile),
        "umup": umup_step(config("umup", 1.0, True), args.compile),
    }
    generator = torch.Generator().manual_seed(0)
    shape = (args.steps + WARMUP, args.batch_size, args.seq_len + 1)
    ids = torch.randint(256, shape, generator=generator).clamp(max=31)  # something to learn: 32 of 256 ids occur
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for batch in ids:
        for name, step in steps.items():
            began = perf_counter()
            losses[name] = step(batch[:, :-1], batch[:, 1:])
            seconds[name].append(perf_counter() - began)
    tokens = args.batch_size * args.seq_len
    network = f"width {args.hidden_size}, {args.layers} layers, {args.batch_size} x {args.seq_len} tokens"
    print(f"{network}, {torch.get_num_threads()} threads")
    for name in steps:
        timed = seconds[name][WARMUP:]
        against = {"sp": "plain", "umup": "sp"}.get(name)
        ratio = ""
        if against is not None:
            low, mid, high = quantiles((b / a for a, b in zip(timed, seconds[against][WARMUP:], strict=True)), n=4)
            ratio = f"  {mid:.3f} of {against} (quartiles {low:.3f} to {high:.3f})"
        print(f"{name:6s} {tokens / median(timed):9.0f} tokens/s  loss {losses[name]:.6f}{ratio}")


if __name__ == "__main__":
    main()
