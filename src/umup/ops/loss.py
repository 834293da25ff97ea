"""Next-token cross entropy: the value is always nats per token, the gradient is what the plan says."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.errors import DataError
from umup.numerics.gemm import (
    G_ENCODE,
    Gemm,
    GemmState,
    dynamic_gradient,
    dynamic_input,
    encode_gradient,
    encode_input,
    entry,
    forward_product,
    input_product,
    plain_product,
    scale_gradients,
    weight_product,
)
from umup.numerics.kernels.cross_entropy import token_losses
from umup.ops.scaled import scale, scale_fwd

# Logits that exist at one time: 4096 tokens of 32768 words, 256 MiB in bf16.
CHUNK_ELEMENTS = 2**27


def cross_entropy(logits: Tensor, targets: Tensor, multiplier: float, grad: float, stacked: bool = False) -> Tensor:
    """Mean of `-log softmax(multiplier*logits)[target]`, whose gradient at the logits is `grad*(softmax - onehot)`.

    logits: (..., vocab); targets: (...) integers. `grad = multiplier/tokens` is the exact gradient of the mean over the
    optimizer step's tokens, however many microbatches share it. `stacked`: axis 0 is a model axis, the result (models).
    """
    scaled = scale_fwd(logits.float() if logits.element_size() < 4 else logits, multiplier)
    losses = F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    total = losses.flatten(1).sum(1) if stacked else losses.sum()
    return scale(total, total.numel() / targets.numel(), grad)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    gemm: Gemm,
    multiplier: float,
    grad: float,
    state: GemmState | None = None,
) -> Tensor:
    """`cross_entropy(linear(x, weight), targets)` with logits that exist a chunk of tokens at a time.

    x: (..., fan_in); weight: (vocab, fan_in); targets: (...). What is kept for the backward pass is the gradient at the
    logits, in the dtype in which its products run: one byte per token and word in FP8. Raises DataError for no tokens.
    """
    if targets.numel() == 0:
        raise DataError(f"an empty batch, targets {tuple(targets.shape)}, has no loss; leave empty batches out")
    tensors: tuple[Tensor | None, ...] = state or (None, None, None)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2), weight, targets.flatten(), *tensors, gemm, multiplier, grad, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        row: Tensor | None,
        column: Tensor | None,
        scales: Tensor | None,
        gemm: Gemm,
        multiplier: float,
        grad: float,
        training: bool,
    ) -> Tensor:
        w = weight.to(x.dtype) if row is None else row
        if gemm.formats is not None and scales is not None:
            if gemm.formats.dynamic:
                scales = dynamic_input(x, gemm, scales)
            operand = encode_input(x, gemm.formats, scales)
        else:
            operand = x
        gradient, encode_by = _gradient_buffer(x, len(w), gemm, scales) if training else (None, None)
        rows = max(16, CHUNK_ELEMENTS // len(w))
        losses = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = _logits(operand[part], w, gemm, scales, x.dtype)
            sink = None if gradient is None else gradient[part]
            losses.append(token_losses(logits, targets[part], multiplier, grad, encode_by, sink).sum())
        if gradient is not None:
            if gemm.formats is not None and scales is not None and gemm.formats.gradient.dtype is None:
                gradient = encode_gradient(gradient, gemm.formats, scales)
            ctx.save_for_backward(operand, weight, gradient, column, scales)
            ctx.gemm, ctx.dtype = gemm, x.dtype
        return torch.stack(losses).sum() / len(targets)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        operand, weight, gradient, column, scales = ctx.saved_tensors
        g: Gemm = ctx.gemm
        if g.formats is None or scales is None:
            dx = plain_product(gradient, weight.to(gradient.dtype), g.grad_input)
            dw = plain_product(gradient.t(), operand, g.grad_weight)
            upstream = upstream.to(dx.dtype)
            return dx * upstream, (dw * upstream).to(weight.dtype), *[None] * 8
        if g.formats.dynamic:
            scales = dynamic_gradient(gradient, g, scales)
            gradient = encode_gradient(gradient, g.formats, scales)
        scales = scale_gradients(scales, upstream)
        dx = input_product(gradient, column, g.formats, scales, ctx.dtype)
        dw = weight_product(gradient, operand, g.formats, scales, weight.dtype)
        return dx, dw, *[None] * 8


def _gradient_buffer(x: Tensor, vocab: int, gemm: Gemm, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where the chunks write the gradient at the logits, (T, vocab), and the scale they encode it by, if they do.

    What is encoded afterwards waits in x's dtype (dynamic scales) or in float32 (formats that have no dtype).
    """
    if gemm.formats is None or scales is None or gemm.formats.dynamic:
        return x.new_empty(len(x), vocab), None
    dtype = gemm.formats.gradient.dtype
    if dtype is None:
        return x.new_empty(len(x), vocab, dtype=torch.float32), None
    return x.new_empty(len(x), vocab, dtype=dtype), entry(scales, G_ENCODE)


def _logits(x: Tensor, w: Tensor, gemm: Gemm, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if gemm.formats is None or scales is None:
        return plain_product(x, w.t(), gemm.multiplier)
    return forward_product(x, w, gemm.formats, scales, dtype)
