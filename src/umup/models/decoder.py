"""The one decoder: every family, every scheme. Shapes: B batch, S positions, H heads, D head size, C width.

Modules receive their parts built (build.py); nothing here reads a config, a table or a plan.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from umup.nn.modules import Attention, Embedding, Linear, Residual
from umup.ops.attention import rotary
from umup.ops.cache import Cache
from umup.ops.embedding import add, embedding
from umup.ops.loss import cross_entropy

Activation = Callable[[Tensor], Tensor]
GatedActivation = Callable[[Tensor, Tensor], Tensor]


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
        self.dropout, self.residual = dropout, residual

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        h = self.norm(x)
        q, k, v = (self._heads(project(h)) for project in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotary(q, *rotation), rotary(k, *rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = self.sdpa(q, k, v).transpose(-3, -2).flatten(-2)
        return self.residual.add(self.dropout(self.out(out)), skip)

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
    """norm -> gate, up -> gated activation -> down, as one residual branch."""

    def __init__(
        self,
        norm: nn.Module,
        gate: Linear,
        up: Linear,
        act: GatedActivation,
        down: Linear,
        dropout: nn.Module,
        residual: Residual,
    ) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.act, self.down = norm, gate, up, act, down
        self.dropout, self.residual = dropout, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        h = self.norm(x)
        return self.residual.add(self.dropout(self.down(self.act(self.gate(h), self.up(h)))), skip)


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
        start = 0 if cache is None else cache.length()
        x = self.embed(tokens).to(self.dtype)
        if self.positions is not None:
            x = self.positions(x, start)
        x = self.dropout(x)
        end = start + tokens.shape[-1]
        rotation = (self.cos[start:end], self.sin[start:end]) if self.rotates else None
        for layer in self.layers:
            x = layer(x, rotation, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats; its gradient is the plan's (ops/loss.py)."""
        return cross_entropy(self(tokens), targets, self.loss_multiplier, self.loss_grad)

    def next_token_logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S) -> (B, vocab): what the loss's softmax sees at the last position, float32 or wider."""
        logits: Tensor = self(tokens, cache)[:, -1]
        return (logits.float() if logits.element_size() < 4 else logits) * self.loss_multiplier
