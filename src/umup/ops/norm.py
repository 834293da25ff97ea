"""RMS and layer norm. Weight-free ones need no scale; gains and biases have factors like any parameter."""

import torch.nn.functional as F
from torch import Tensor

from umup.ops.linear import align
from umup.ops.scaled import scale


def rms_norm(x: Tensor, gain: Tensor | None, eps: float, multiplier: float = 1.0, grad_gain: float = 1.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, times `multiplier*gain` if there is one (1910.07467)."""
    if gain is None:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    gain = scale(gain, multiplier, grad_gain).to(x.dtype)
    if gain.ndim == 1:
        return F.rms_norm(x, x.shape[-1:], gain, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * align(gain, x)


def layer_norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: float = 1.0,
    grad_gain: float = 1.0,
    bias_multiplier: float = 1.0,
    grad_bias: float = 1.0,
) -> Tensor:
    """Layer norm over the last axis, times `multiplier*gain`, plus `bias_multiplier*bias`, if given (1607.06450)."""
    gain = None if gain is None else scale(gain, multiplier, grad_gain).to(x.dtype)
    bias = None if bias is None else scale(bias, bias_multiplier, grad_bias).to(x.dtype)
    if gain is None or gain.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], gain, bias, eps)
    out = F.layer_norm(x, x.shape[-1:], eps=eps) * align(gain, x)
    return out if bias is None else out + align(bias, x)
