"""The one decoder: every family, every scheme. Shapes: B batch, S positions, H heads, D head size, C width.

Modules receive their parts built (build.py); nothing here reads a config, a table or a plan.
"""

from collections.abc import Callable

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


class SelfAttention(nn.Module):
    """norm -> q, k, v -> causal attention -> out, as one residual branch."""

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
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, head_dim
        self.norm, self.q, self.k, self.v, self.sdpa, self.out = norm, q, k, v, sdpa, out
        share_matmul(q, k, v)
        self.dropout, self.residual = dropout, residual

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        q, k, v = self._project(self.norm(x), rotation, cache)
        out = self.sdpa(q, k, v).transpose(-3, -2).flatten(-2)
        return self.residual.add(self.dropout(self.out(out)), skip)

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


class MLP(nn.Module):
    """norm -> up -> activation -> down, as one residual branch."""

    def __init__(
        self, norm: nn.Module, up: Linear, act: Activation, down: Linear, dropout: nn.Module, residual: Residual
    ) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = norm, up, act, down
        self.dropout, self.residual = dropout, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        return self.residual.add(self.dropout(self.down(self.act(self.up(self.norm(x))))), skip)


class GatedMLP(nn.Module):
    """norm -> gate, up -> gated SiLU -> down, as one residual branch.

    act: the activation's (mult, output). `compact`: where the products are in FP8, keep gate and up in E4M3 too.
    """

    def __init__(
        self,
        norm: nn.Module,
        gate: Linear,
        up: Linear,
        act: tuple[float, float],
        down: Linear,
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.act, self.down = norm, gate, up, act, down
        share_matmul(gate, up)
        self.compact = False
        self.dropout, self.residual = dropout, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        return self.residual.add(self.dropout(self._inside(self.norm(x))), skip)

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

    def _inside(self, x: Tensor) -> Tensor:
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
        ids = torch.arange(start, start + x.shape[-2], device=x.device)
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
