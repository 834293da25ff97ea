"""The one decoder: every family, every scheme. Shapes: B batch, S positions, H heads, D head size, C width.

Modules receive their parts built (build.py); nothing here reads a config, a table or a plan.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from umup.nn.fp8 import StaticMatmul
from umup.nn.modules import Attention, Embedding, Linear, Residual, join, project, share_matmul
from umup.numerics.kernels import ALIGNMENT
from umup.ops.activation import gated_silu
from umup.ops.attention import rotary
from umup.ops.cache import Cache
from umup.ops.embedding import add, embedding
from umup.ops.gated_mlp import gated_mlp
from umup.ops.rotary_projection import rotary_projection

Activation = Callable[[Tensor], Tensor]


class Branch(nn.Module):
    """One residual branch: norm, then what a subclass does `inside`; the norm comes last where `norm_last`."""

    def __init__(self, norm: nn.Module, norm_last: bool, dropout: nn.Module, residual: Residual) -> None:
        super().__init__()
        self.norm, self.norm_last, self.dropout, self.residual = norm, norm_last, dropout, residual

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        out = self.norm(self.inside(x, *context)) if self.norm_last else self.inside(self.norm(x), *context)
        return self.residual.add(self.dropout(out), skip)

    def inside(self, x: Tensor, *context: Any) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        raise NotImplementedError


class SelfAttention(Branch):
    """q, k, v -> causal attention -> out."""

    def __init__(
        self,
        layer: int,
        head_dim: int,
        norm: nn.Module,
        q: Linear,
        k: Linear,
        v: Linear,
        sdpa: Attention,
        out: Linear,
        norm_last: bool,
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__(norm, norm_last, dropout, residual)
        self.layer, self.head_dim = layer, head_dim
        self.q, self.k, self.v, self.sdpa, self.out = q, k, v, sdpa, out
        share_matmul(q, k, v)

    def inside(self, x: Tensor, *context: Any) -> Tensor:
        """`context`: the rotation's tables (or None) and the cache (or None)."""
        q, k, v = self._project(x, *context)
        out: Tensor = self.out(self.sdpa(q, k, v).transpose(-3, -2).flatten(-2))
        return out

    def _project(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, and k and v of all positions, by heads: in FP8 as one segment where that can be."""
        matmul = self.q.matmul
        if (
            isinstance(matmul, StaticMatmul)
            and matmul is self.k.matmul is self.v.matmul
            and matmul.fusable
            and rotation is not None
            and cache is None
            and self.q.bias is self.k.bias is self.v.bias is None
            and _trains_in_tiles(x)
        ):
            weights = self.q.weight, self.k.weight, self.v.weight
            heads = len(self.q.weight) // self.head_dim, len(self.k.weight) // self.head_dim
            return rotary_projection(x, join(weights), rotation, heads, matmul.formats, matmul.state)
        q, k, v = (self._heads(part) for part in project(x, self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotary(q, *rotation), rotary(k, *rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(-3, -2)


class MLP(Branch):
    """up -> activation -> down."""

    def __init__(
        self,
        norm: nn.Module,
        up: Linear,
        act: Activation,
        down: Linear,
        norm_last: bool,
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__(norm, norm_last, dropout, residual)
        self.up, self.act, self.down = up, act, down

    def inside(self, x: Tensor, *context: Any) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class GatedMLP(Branch):
    """gate, up -> gated SiLU -> down.

    act: the activation's (mult, output). `compact`: where the products are in FP8, keep gate and up in E4M3 too.
    """

    def __init__(
        self,
        norm: nn.Module,
        gate: Linear,
        up: Linear,
        act: tuple[float, float],
        down: Linear,
        norm_last: bool,
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__(norm, norm_last, dropout, residual)
        self.gate, self.up, self.act, self.down = gate, up, act, down
        share_matmul(gate, up)
        self.compact = False

    @property
    def segment(self) -> tuple[StaticMatmul, StaticMatmul] | None:
        """The products of gate and up, and of down, where they may run as one segment."""
        first, last = self.gate.matmul, self.down.matmul
        if (
            isinstance(first, StaticMatmul)
            and isinstance(last, StaticMatmul)
            and first is self.up.matmul
            and first.fusable
            and last.fusable
            and self.gate.bias is self.up.bias is self.down.bias is None
        ):
            return first, last
        return None

    def inside(self, x: Tensor, *context: Any) -> Tensor:
        """gate, up, activation, down: in FP8 as one segment where that can be, else one after another."""
        if (segment := self.segment) is not None and _trains_in_tiles(x):
            first, last = segment
            weights = join((self.gate.weight, self.up.weight)), self.down.weight
            formats, states = (first.formats, last.formats), (first.state, last.state)
            return gated_mlp(x, weights, formats, states, *self.act, self.compact)
        gate, up = project(x, self.gate, self.up)
        out: Tensor = self.down(gated_silu(gate, up, *self.act))
        return out


def _trains_in_tiles(x: Tensor) -> bool:
    """Whether segments, which exist for training, take this many tokens."""
    tokens = x.numel() // x.shape[-1]
    return torch.is_grad_enabled() and tokens > 0 and tokens % ALIGNMENT == 0


class Block(nn.Module):
    """One layer: attention, then the MLP."""

    def __init__(self, attn: SelfAttention, mlp: MLP | GatedMLP) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        result: Tensor = self.mlp(self.attn(x, rotation, cache))
        return result


class LearnedPositions(nn.Module):
    """A table of position embeddings, added to the token embedding."""

    def __init__(self, table: Embedding, output: float) -> None:
        super().__init__()
        self.weight = table.weight
        self._scales, self.output = table.scales, output

    def forward(self, x: Tensor, start: int) -> Tensor:
        """(B, S, C) at positions start..start+S-1."""
        ids = torch.arange(start, start + x.shape[-2], device=x.device).view(*[1] * (x.ndim - 2), -1)
        return add(
            x, embedding(ids, self.weight, self._scales.multiplier, self._scales.grad_weight).to(x.dtype), self.output
        )


class Decoder(nn.Module):
    """Tokens -> logits, and tokens with targets -> loss."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        embed: Embedding,
        positions: LearnedPositions | None,
        rotary_tables: tuple[Tensor, Tensor] | None,
        dropout: nn.Module,
        layers: list[Block],
        norm: nn.Module,
        head: Linear,
        loss: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embed, self.positions, self.dropout = embed, positions, dropout
        self.layers, self.norm, self.head = nn.ModuleList(layers), norm, head
        self.loss_multiplier, self.loss_grad, self.dtype = *loss, dtype
        self.rotates = rotary_tables is not None
        for name, table in zip(("cos", "sin"), rotary_tables or (), strict=False):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S) ids -> (B, S, vocab) logits, in the compute dtype, before the loss's multiplier."""
        logits: Tensor = self.head(self.trunk(tokens, cache))
        return logits

    def trunk(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S) ids -> (B, S, C): all but the head."""
        start = 0 if cache is None else cache.length()
        x = self.embed(tokens).to(self.dtype)
        if self.positions is not None:
            x = self.positions(x, start)
        x = self.dropout(x)
        end = start + tokens.shape[-1]
        rotation = (self.cos[start:end], self.sin[start:end]) if self.rotates else None
        for layer in self.layers:
            x = layer(x, rotation, cache)
        out: Tensor = self.norm(x)
        return out

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats; its gradient is the plan's (ops/loss.py)."""
        x = self.trunk(tokens)
        return self.head.matmul.loss(x, self.head.weight, targets, self.loss_multiplier, self.loss_grad)

    def next_token_logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S) -> (B, vocab): what the loss's softmax sees at the last position, float32 or wider."""
        logits: Tensor = self(tokens, cache)[:, -1]
        return (logits.float() if logits.element_size() < 4 else logits) * self.loss_multiplier
