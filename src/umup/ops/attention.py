"""Attention through torch's SDPA, and what tells it positions: rotary turns and ALiBi's biases."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: float,
    output: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`output * softmax(logits * q k^T + bias, causal) v`; gradients are exact.

    q: (..., heads, queries, head_dim); k, v: (..., kv_heads, keys, head_dim), keys >= queries: the queries are the
    last positions, as in decoding with a cache. Heads share keys in consecutive groups when kv_heads < heads.
    bias: (heads, queries, keys), -inf where a query may not look: it then makes attention causal, or not.
    """
    if q.ndim > 4:  # SDPA's fast kernels know one batch axis
        rows = attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), logits, output, dropout, bias)
        return rows.view(q.shape)
    queries, keys = q.shape[-2], k.shape[-2]
    mask = None if bias is None else bias.to(q.dtype)
    if bias is None and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and queries == keys,
        scale=logits,
        enable_gqa=q.shape[-3] != k.shape[-3],
    )
    return out if output == 1.0 else out * output


def rotary_tables(rotary_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/rotary_dim), each (length, rotary_dim/2), float32 (2104.09864)."""
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of features of x: (..., positions, head_dim) by the tables' rows, (positions, r/2).

    The first r features turn, the others pass; pairs are (j, j + r/2), or `interleaved` (2j, 2j + 1).
    """
    turned, passed = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    pairs = (torch.stack((a, b), dim=-1).flatten(-2),) if interleaved else (a, b)
    return torch.cat((*pairs, passed) if passed.shape[-1] else pairs, dim=-1)


def alibi_slopes(heads: int) -> Tensor:
    """The falling rates of ALiBi's biases, (heads), float32: 2^(-8h/heads) for a power of two (2108.12409).

    For other numbers of heads: those of the next smaller power of two, then every second one of the next larger.
    """
    smaller = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8 / smaller * torch.arange(1, smaller + 1, dtype=torch.float64))
    between = 2.0 ** (-4 / smaller * (2 * torch.arange(heads - smaller, dtype=torch.float64) + 1))
    return torch.cat((first, between)).float()


def alibi(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """ALiBi's causal biases, (heads, queries, keys): -slope * distance, -inf ahead; queries are the last positions."""
    at = torch.arange(keys, device=slopes.device)
    distance = at[keys - queries :, None] - at
    return torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)
