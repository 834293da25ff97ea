"""Unit-scaled products for adapt/unit_ops.py: linear, matmul, convolution, lookup, attention.

`measure_*` gives an op's factors from one call with example inputs, `run_*` runs a call with them. An edge that is no
cut of the graph has the same factor both ways (the library's default constraint); a readout is a cut.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.nn.modules import Matmul
from umup.ops.linear import add_bias, linear
from umup.ops.scaled import scale
from umup.rules.opscales import attention_scale, log_interpolate

Factors = tuple[float, ...]
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # where key and value have widths of their own


def product_factors(rows: float, fan_in: int) -> Factors:
    """(forward, towards the input, towards the weight) of a weight that `rows` inputs reach."""
    return fan_in**-0.5, fan_in**-0.5, rows**-0.5


def readout_factors(f: Factors, fan_out: int, ratio: float | None) -> Factors:
    """A product's factors as a readout: 1/fan_in forward; a cut edge may be scaled differently backward."""
    forward = f[0] ** 2
    return forward, fan_out**-0.5 if ratio is None else ratio * forward, f[2]


def measure_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Factors:
    """F.linear's (forward, towards the input, towards weight and bias)."""
    return product_factors(x.numel() / weight.shape[-1], weight.shape[-1])


def run_linear(
    function: Callable[..., Tensor], f: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x W^T + bias` by ops.linear."""
    out = linear(_stream(x), weight, f[0], f[1], f[2])
    return out if bias is None else add_bias(out, bias, 1.0, f[2])


def run_encoded(matmul: Matmul, f: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by a product in a format of its own."""
    out: Tensor = matmul(_stream(x), weight)
    return out if bias is None else add_bias(out, bias, 1.0, f[2])


def _stream(x: Tensor) -> Tensor:
    """x in the dtype that autocast, which does not see into ops, would give it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def measure_addmm(out: Tensor, bias: Tensor, x: Tensor, weight: Tensor) -> Factors:
    """torch.addmm's, which is a linear with its weight transposed (transformers' Conv1D)."""
    return measure_linear(out, x, weight.t())


def run_addmm(function: Callable[..., Tensor], f: Factors, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`bias + x W`, scaled as a linear."""
    return run_linear(function, f, x, weight.t(), bias)


def measure_matmul(out: Tensor, left: Tensor, right: Tensor) -> Factors:
    """(forward, towards left, towards right) of two activations; a weight on the right is given its own later."""
    factor = left.shape[-1] ** -0.5
    return factor, factor, factor


def run_matmul(function: Callable[..., Tensor], f: Factors, left: Tensor, right: Tensor) -> Tensor:
    """The scaled product of two tensors."""
    # Factors on the result scale both gradients too; what they should have instead is put on the operands.
    out = function(scale(left, 1.0, f[1] / f[0]), scale(right, 1.0, f[2] / f[0]))
    return scale(out, f[0], f[0])


def measure_conv(out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Factors:
    """(forward and towards the input, towards weight and bias)."""
    forward, _, towards_weight = product_factors(out.numel() / len(weight), weight.shape[1:].numel())
    return forward, towards_weight


def run_conv(
    function: Callable[..., Tensor],
    f: Factors,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Any convolution, the forward factor on its weight."""
    bias = None if bias is None else scale(bias, 1.0, f[1])
    return function(x, scale(weight, f[0], f[1]), bias, *args, **kwargs)


def measure_embedding(out: Tensor, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Factors:
    """(towards the table,): each row sees lookups/rows gradients."""
    return (sqrt(len(weight) / ids.numel()),)


def run_embedding(function: Callable[..., Tensor], f: Factors, *args: Any, **kwargs: Any) -> Tensor:
    """The lookup, its gradient scaled where it is smaller than the table's."""
    return scale(function(*args, **kwargs), 1.0, f[0])


def _attention_output(mask: Tensor | None, head_dim: int, keys: int, dropout: float, causal: bool) -> float:
    if causal or keys == 1:
        return attention_scale(1.0, head_dim, keys, dropout)
    flat = keys**-0.5
    if mask is not None:
        seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).sum(-1)
        flat = float(seen.clamp(min=1).float().reciprocal().mean().sqrt())
    return sqrt(1 - dropout) / log_interpolate(1 / (1 + 4 * head_dim), flat, 1.0)


def measure_attention(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Factors:
    """(factor on the logits, factor on the result)."""
    d = query.shape[-1]
    return 1 / d, _attention_output(attn_mask, d, key.shape[-2], dropout_p, is_causal)


def run_attention(function: Callable[..., Tensor], f: Factors, *args: Any, **kwargs: Any) -> Tensor:
    """Attention with the logits' factor in place of the caller's `scale`."""
    return function(*args, **(kwargs | {"scale": f[0]})) * f[1]


def fused_applies(*args: Any, need_weights: bool = True, **kwargs: Any) -> bool:
    """Whether a call of torch.nn.MultiheadAttention is plain attention, asked for no weights."""
    bias_k, add_zero = args[7], args[9]
    return bias_k is None and not add_zero and not need_weights and kwargs.get("static_k") is None


def measure_fused(
    out: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    heads: int,
    *args: Any,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> Factors:
    """linear's three; attention's two; the forward factors of the key's and the value's projections."""
    dropout_p, training = args[5], kwargs.get("training", True)
    rows, d = query.numel() / size, size // heads
    visible = None if attn_mask is None or attn_mask.dtype != torch.bool else ~attn_mask
    visible = attn_mask if visible is None else visible
    p = dropout_p if training else 0.0
    output = _attention_output(visible, d, len(key), p, is_causal)
    return (*product_factors(rows, size), 1 / d, output, key.shape[-1] ** -0.5, value.shape[-1] ** -0.5)


def run_fused(
    function: Callable[..., Any],
    f: Factors,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: None,
    bias_v: None,
    add_zero: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch.nn.MultiheadAttention's function, (positions, batch, features) or (positions, features) throughout."""
    weights = tuple(kwargs[name] for name in SEPARATE) if in_weight is None else in_weight.chunk(3)
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    parts: list[Tensor] = []
    for x, weight, bias, forward in zip((query, key, value), weights, biases, (f[0], f[5], f[6]), strict=True):
        projected = run_linear(function, (forward, forward, f[2]), x, weight, bias)
        # (positions, batch * heads, d): the batch axis is absent for an unbatched call, and then there is one.
        parts.append(projected.reshape(len(x), -1, heads, size // heads).permute(1, 2, 0, 3))
    mask = _join_masks(attn_mask, key_padding_mask, parts[0])
    q, k, v = parts
    p = dropout_p if training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal and mask is None, scale=f[3])
    merged = (attended * f[4]).permute(2, 0, 1, 3).reshape(query.shape)
    return run_linear(function, f[:3], merged, out_weight, out_bias), None


def _join_masks(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """torch.nn.MultiheadAttention's masks (True hides) as one to add, (batch|1, heads|1, queries, keys)."""
    total = None
    if attn_mask is not None:
        total = _additive(attn_mask, q).view(-1, 1 if attn_mask.ndim == 2 else q.shape[1], *attn_mask.shape[-2:])
    if padding is not None:
        hidden = _additive(padding, q).view(-1, 1, 1, padding.shape[-1])
        total = hidden if total is None else total + hidden
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
