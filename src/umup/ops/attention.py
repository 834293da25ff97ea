"""Causal attention through torch's SDPA, and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, logits: float, output: float, dropout: float = 0.0) -> Tensor:
    """`output * softmax(logits * q k^T, causal) v`; gradients are exact.

    q: (..., heads, queries, head_dim); k, v: (..., kv_heads, keys, head_dim), keys >= queries: the queries are the
    last positions, as in decoding with a cache. Heads share keys in consecutive groups when kv_heads < heads.
    """
    if q.ndim > 4:  # SDPA's fast kernels know one batch axis
        rows = attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), logits, output, dropout)
        return rows.view(q.shape)
    queries, keys = q.shape[-2], k.shape[-2]
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=queries == keys,
        scale=logits,
        enable_gqa=q.shape[-3] != k.shape[-3],
    )
    return out if output == 1.0 else out * output


def rotary_tables(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/d), each (length, head_dim/2), float32 (2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + d/2) of x: (..., positions, head_dim) by the tables' rows."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
