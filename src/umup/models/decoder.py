"""The one decoder: every family, every scheme. Shapes: B batch, S positions, H heads, D head size, C width.

Modules receive their parts built (build.py); nothing here reads a config, a table or a plan.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from umup.nn.fp8 import StaticMatmul
from umup.nn.modules import Attention, Embedding, Linear, Residual, join, project, share_matmul
from umup.numerics.kernels import ALIGNMENT
from umup.ops.attention import alibi, rotary
from umup.ops.cache import Cache
from umup.ops.embedding import add, embedding
from umup.ops.gated_mlp import gated_mlp
from umup.ops.loss import cross_entropy
from umup.ops.residual import residual_split
from umup.ops.rotary_projection import rotary_projection
from umup.ops.scaled import scale_bwd

Activation = Callable[[Tensor], Tensor]
GatedActivation = Callable[[Tensor, Tensor], Tensor]


class Context(NamedTuple):
    """What all layers share in a pass.

    rotation: cos and sin, (S, r/2) each. bias: of attention, (H, S, keys).
    """

    rotation: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    cache: Cache | None = None


class Frame(NamedTuple):
    """What is around a branch; `norm_last`: the norm is of its output, not of its input."""

    norm: nn.Module
    norm_last: bool
    dropout: nn.Module
    residual: Residual


class Branch(nn.Module):
    """One residual branch: what a subclass does `inside`, and the frame around it."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.norm, self.norm_last, self.dropout, self.residual = frame

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x, skip = self.residual.split(x)
        return self.residual.add(self.branch(x, context), skip)

    def branch(self, x: Tensor, context: Context) -> Tensor:
        """What joins the stream: (B, S, C) -> (B, S, C)."""
        out = self.norm(self.inside(x, context)) if self.norm_last else self.inside(self.norm(x), context)
        result: Tensor = self.dropout(out)
        return result

    def inside(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        raise NotImplementedError


class SelfAttention(Branch):
    """q, k, v -> attention -> out. `interleaved`: which features rotary positions pair (ops/attention.py)."""

    def __init__(
        self,
        frame: Frame,
        layer: int,
        head_dim: int,
        interleaved: bool,
        q: Linear,
        k: Linear,
        v: Linear,
        sdpa: Attention,
        out: Linear,
    ) -> None:
        super().__init__(frame)
        self.layer, self.head_dim, self.interleaved = layer, head_dim, interleaved
        self.q, self.k, self.v, self.sdpa, self.out = q, k, v, sdpa, out
        share_matmul(q, k, v)

    def inside(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = self._project(x, context)
        out: Tensor = self.out(self.sdpa(q, k, v, context.bias).transpose(-3, -2).flatten(-2))
        return out

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, and k and v of all positions, by heads: in FP8 as one segment where that can be."""
        matmul, rotation = self.q.matmul, context.rotation
        if (
            isinstance(matmul, StaticMatmul)
            and matmul is self.k.matmul is self.v.matmul
            and matmul.fusable
            and rotation is not None
            and 2 * rotation[0].shape[-1] == self.head_dim
            and not self.interleaved
            and context.cache is None
            and self.q.bias is self.k.bias is self.v.bias is None
            and _trains_in_tiles(x)
        ):
            weights = self.q.weight, self.k.weight, self.v.weight
            heads = len(self.q.weight) // self.head_dim, len(self.k.weight) // self.head_dim
            return rotary_projection(x, join(weights), rotation, heads, matmul.formats, matmul.state)
        q, k, v = (self._heads(part) for part in project(x, self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotary(q, *rotation, self.interleaved), rotary(k, *rotation, self.interleaved)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(-3, -2)


class MLP(Branch):
    """up -> activation -> down."""

    def __init__(self, frame: Frame, up: Linear, act: Activation, down: Linear) -> None:
        super().__init__(frame)
        self.up, self.act, self.down = up, act, down

    def inside(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class GatedMLP(Branch):
    """gate, up -> gated activation -> down.

    `silu`: (mult, output) where the activation is gated SiLU, which FP8 runs as one segment. `compact`: where it does,
    keep gate and up in E4M3 too.
    """

    def __init__(
        self,
        frame: Frame,
        gate: Linear,
        up: Linear,
        act: GatedActivation,
        silu: tuple[float, float] | None,
        down: Linear,
    ) -> None:
        super().__init__(frame)
        self.gate, self.up, self.act, self.silu, self.down = gate, up, act, silu, down
        share_matmul(gate, up)
        self.compact = False

    @property
    def segment(self) -> tuple[StaticMatmul, StaticMatmul] | None:
        """The products of gate and up, and of down, where they may run as one segment."""
        first, last = self.gate.matmul, self.down.matmul
        if (
            self.silu is not None
            and isinstance(first, StaticMatmul)
            and isinstance(last, StaticMatmul)
            and first is self.up.matmul
            and first.fusable
            and last.fusable
            and self.gate.bias is self.up.bias is self.down.bias is None
        ):
            return first, last
        return None

    def inside(self, x: Tensor, context: Context) -> Tensor:
        """gate, up, activation, down: in FP8 as one segment where that can be, else one after another."""
        if (segment := self.segment) is not None and self.silu is not None and _trains_in_tiles(x):
            first, last = segment
            weights = join((self.gate.weight, self.up.weight)), self.down.weight
            formats, states = (first.formats, last.formats), (first.state, last.state)
            return gated_mlp(x, weights, formats, states, *self.silu, self.compact)
        out: Tensor = self.down(self.act(*project(x, self.gate, self.up)))
        return out


def _trains_in_tiles(x: Tensor) -> bool:
    """Whether segments, which exist for training, take this many tokens."""
    tokens = x.numel() // x.shape[-1]
    return torch.is_grad_enabled() and tokens > 0 and tokens % ALIGNMENT == 0


class Block(nn.Module):
    """One layer: attention, then the MLP, and after each a norm of the stream where there is one."""

    def __init__(self, attn: SelfAttention, mlp: MLP | GatedMLP, attn_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attn, self.attn_norm, self.mlp, self.mlp_norm = attn, attn_norm, mlp, mlp_norm

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        result: Tensor = self.mlp_norm(self.mlp(self.attn_norm(self.attn(x, context)), context))
        return result


class ParallelBlock(nn.Module):
    """One layer whose branches both read its input: through `norm`, or through norms of their own.

    Weights are those of the sequential block, so that a branch contributes as much to the stream, and so are the
    gradients inside the branches: the MLP's sum comes last, and what is before it is its skip.
    """

    def __init__(self, norm: nn.Module, attn: SelfAttention, mlp: MLP | GatedMLP) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = norm, attn, mlp

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        first, second = self.attn.residual, self.mlp.residual
        x, skip = residual_split(x, 1.0, first.skip)
        x = self.norm(x)
        out = first.add(self.attn.branch(scale_bwd(x, first.split_grad), context), skip)
        return second.add(self.mlp.branch(scale_bwd(x, second.split_grad), context), scale_bwd(out, second.skip))


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
    """Tokens -> logits, and tokens with targets -> loss.

    `rotary_tables`: cos and sin of all positions, (max_seq_len, r/2). `slopes`: ALiBi's, (H).
    """

    cos: Tensor | None
    sin: Tensor | None
    slopes: Tensor | None

    def __init__(
        self,
        embed: Embedding,
        positions: LearnedPositions | None,
        embed_norm: nn.Module | None,
        rotary_tables: tuple[Tensor, Tensor] | None,
        slopes: Tensor | None,
        dropout: nn.Module,
        layers: list[Block | ParallelBlock],
        norm: nn.Module | None,
        head: Linear,
        loss: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embed, self.positions, self.embed_norm, self.dropout = embed, positions, embed_norm, dropout
        self.layers, self.norm, self.head = nn.ModuleList(layers), norm, head
        self.loss_multiplier, self.loss_grad, self.dtype = *loss, dtype
        cos, sin = rotary_tables or (None, None)
        for name, table in (("cos", cos), ("sin", sin), ("slopes", slopes)):
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
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x)
        context = self._context(start, start + tokens.shape[-1], cache)
        for layer in self.layers:
            x = layer(x, context)
        out: Tensor = x if self.norm is None else self.norm(x)
        return out

    def _context(self, start: int, end: int, cache: Cache | None) -> Context:
        rotation = None if self.cos is None or self.sin is None else (self.cos[start:end], self.sin[start:end])
        bias = None if self.slopes is None else alibi(self.slopes, end - start, end)
        return Context(rotation, bias, cache)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats; its gradient is the plan's (ops/loss.py)."""
        if self.head.bias is not None:
            return cross_entropy(self(tokens), targets, self.loss_multiplier, self.loss_grad)
        x = self.trunk(tokens)
        return self.head.matmul.loss(x, self.head.weight, targets, self.loss_multiplier, self.loss_grad)

    def next_token_logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S) -> (B, vocab): what the loss's softmax sees at the last position, float32 or wider."""
        logits: Tensor = self(tokens, cache)[:, -1]
        return (logits.float() if logits.element_size() < 4 else logits) * self.loss_multiplier
