"""A small GPT, trained on the bytes of Python's standard library, with muP in three added lines (marked `# umup`).

    python examples/nanogpt.py --width 256 --steps 200 --lr 3e-3

Tune `--lr` at width 64 and train at 512 with the same. Without the three lines this is a plain GPT-2 in the standard
parametrization, and the best rate falls with the width.
"""

import argparse
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import umup

BASE_WIDTH = 64


@dataclass(frozen=True)
class GPTConfig:
    """Heads keep their size, so that a wider model has more of them."""

    width: int = 256
    num_layers: int = 4
    head_dim: int = 32
    vocab_size: int = 256
    max_seq_len: int = 128


class Attention(nn.Module):
    """Causal self-attention with one fused input projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.width // config.head_dim
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Two pre-norm residual branches."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2's network and init; the head is tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.max_seq_len, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(batch, sequence) tokens and the tokens that follow them -> mean cross entropy in nats."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def stdlib_bytes(files: int = 40) -> Tensor:
    """Some of the standard library as one vector of bytes."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[:files]
    return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8).long()


def batch(data: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Random stretches of the data and what follows each byte."""
    starts = torch.randint(len(data) - length - 1, (size, 1))
    window = data[starts + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


def cosine(step: int, steps: int, warmup: int = 10) -> float:
    """A factor on every group's rate: linear warm-up, then down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def main(argv: list[str] | None = None) -> tuple[list[float], torch.optim.Optimizer]:
    """Train; returns the losses and the optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = GPTConfig(width=args.width)
    model = GPT(config)
    groups = model.parameters()
    plan = umup.plan(model, base=lambda: GPT(replace(config, width=BASE_WIDTH)))  # umup
    plan.apply(model)  # umup
    groups = plan.param_groups(model, lr=args.lr, weight_decay=args.weight_decay)  # umup
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    # A scheduler must multiply each group's own rate, as torch's do: one rate written to all would undo the plan.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, args.steps))

    data, losses = stdlib_bytes(), []
    for step in range(args.steps):
        loss = model(*batch(data, args.batch_size, config.max_seq_len))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses, optimizer


if __name__ == "__main__":
    main()
