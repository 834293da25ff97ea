"""Cross entropy of a chunk of logits: each token's loss and, in the same pass, the gradient that products will read.

    loss = lse(multiplier * z) - multiplier * z[target]
    gradient = grad * (softmax(multiplier * z) - onehot(target))

A row of logits is read from memory once: one program takes it in blocks, keeping per lane a running maximum and the sum
of exponentials below it, in float32, and then takes it again from the caches, last block first, to write the gradient.

Not covered: targets to ignore, label smoothing, and vocabularies split over devices.
"""

from __future__ import annotations  # `tl` exists only once a kernel is compiled

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.numerics.formats import encode
from umup.numerics.kernels import Tile, jit
from umup.numerics.kernels.cast import FORMATS

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

# A program's row, in blocks of so many columns. Fewer rows at a time fit the caches better, more hide latency better.
CONFIGS = (Tile(1, 8192, 16), Tile(1, 4096, 16), Tile(1, 4096, 8), Tile(1, 2048, 8), Tile(1, 16384, 32))
DEFAULT = CONFIGS[0]

# Neighbouring columns that one thread holds: 16 bytes of bfloat16.
LANE = 8


def token_losses(
    logits: Tensor, targets: Tensor, multiplier: float, grad: float, scale: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """The loss of each token in nats, (T,), float32 (float64 of float64 logits); its gradient goes into `gradient`.

    logits: (T, V) floating; targets: (T,) integers in 0..V-1. `gradient`: (T, V), rows of a larger buffer if need be;
    None where only the loss is wanted. Its dtype decides: float8_e4m3fn or float8_e5m2, as `numerics.formats.encode`
    with `scale`, a float32 scalar on the logits' device; or a wider one, with scale None. A logit that is NaN or
    +infinity makes its whole row NaN, loss and gradient. A target outside its range raises, on a GPU it makes the
    loss NaN. Two opaque operators, since torch's compiler cannot write into None: with a gradient it writes in place,
    so that chunks fill one buffer without a copy.
    """
    losses: Tensor = (
        losses_alone(logits, targets, multiplier)
        if gradient is None
        else losses_and_gradient(logits, targets, multiplier, grad, scale, gradient)
    )
    return losses


@torch.library.custom_op("umup::token_losses", mutates_args=("gradient",))
def losses_and_gradient(
    logits: Tensor, targets: Tensor, multiplier: float, grad: float, scale: Tensor | None, gradient: Tensor
) -> Tensor:
    """`token_losses` with a gradient."""
    return _token_losses(logits, targets, multiplier, grad, scale, gradient)


@torch.library.custom_op("umup::token_losses_alone", mutates_args=())
def losses_alone(logits: Tensor, targets: Tensor, multiplier: float) -> Tensor:
    """`token_losses` without."""
    return _token_losses(logits, targets, multiplier, 0.0, None, None)


@losses_and_gradient.register_fake
def _(
    logits: Tensor, targets: Tensor, multiplier: float, grad: float, scale: Tensor | None, gradient: Tensor
) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


@losses_alone.register_fake
def _(logits: Tensor, targets: Tensor, multiplier: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


def _token_losses(
    logits: Tensor, targets: Tensor, multiplier: float, grad: float, scale: Tensor | None, gradient: Tensor | None
) -> Tensor:
    if logits.is_cuda and logits.element_size() < 8 and logits.stride(1) == 1:
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        launch(logits, targets, multiplier, grad, scale, losses, gradient, DEFAULT)
        return losses
    wide = logits if logits.element_size() == 8 else logits.float()
    log_share = F.log_softmax(wide * multiplier, -1)
    losses = -log_share.gather(-1, targets[:, None]).squeeze(-1)
    if gradient is not None:
        share = log_share.exp_().scatter_add_(-1, targets[:, None], -torch.ones_like(losses)[:, None]) * grad
        gradient.copy_(share if scale is None else encode(share, scale, FORMATS[gradient.dtype]))
    return losses


def launch(
    logits: Tensor,
    targets: Tensor,
    multiplier: float,
    grad: float,
    scale: Tensor | None,
    losses: Tensor,
    gradient: Tensor | None,
    tile: Tile,
) -> None:
    """Write the losses (T,), float32, and the gradient (T, V) if any; logits and gradient have unit stride along V."""
    rows, vocab = logits.shape
    jit(_cross_entropy_kernel)[(rows,)](
        logits,
        targets,
        scale,
        losses,
        gradient,
        logits.stride(0),
        0 if gradient is None else gradient.stride(0),
        multiplier,
        grad,
        LIMIT=None if scale is None or gradient is None else FORMATS[gradient.dtype].max,
        VOCAB=vocab,
        BLOCK=tile.columns,
        LANE=LANE,
        num_warps=tile.warps,
    )


def _cross_entropy_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    scale: tl.tensor,
    losses: tl.tensor,
    gradient: tl.tensor,
    logits_stride: tl.tensor,
    gradient_stride: tl.tensor,
    multiplier: tl.tensor,
    grad: tl.tensor,
    LIMIT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
) -> None:
    """One row, in logarithms of base 2. LIMIT: where the gradient saturates, or None.

    A maximum drops NaN, the sum does not: what is NaN or infinite is found in the sum.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    lane = LANE * tl.arange(0, BLOCK // LANE)[:, None] + tl.arange(0, LANE)[None, :]
    slope = multiplier * 1.4426950408889634
    top = tl.full((BLOCK // LANE,), -3e38, tl.float32)
    total = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = (start + lane < VOCAB) | (VOCAB % BLOCK == 0)
        z = tl.load(source + start + lane, mask=inside, other=0.0).to(tl.float32) * slope
        z = tl.where(inside, z, float("-inf"))
        above = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - above) + tl.sum(tl.exp2(z - above[:, None]), 1)
        top = above
    highest = tl.max(top, 0)
    lse = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    target = tl.load(targets + row)
    valid = (target >= 0) & (target < VOCAB)
    hit = tl.load(source + target, mask=valid, other=float("nan")).to(tl.float32) * slope
    tl.store(losses + row, (lse - hit) * 0.6931471805599453)
    if gradient is not None:
        sink = gradient + row * gradient_stride
        factor = grad
        if scale is not None:
            factor = grad * tl.load(scale)
        factor = tl.where(tl.abs(lse) < float("inf"), factor, float("nan"))
        for back in range(0, VOCAB, BLOCK):
            column = (VOCAB - 1) // BLOCK * BLOCK - back + lane
            inside = (column < VOCAB) | (VOCAB % BLOCK == 0)
            z = tl.load(source + column, mask=inside, other=0.0).to(tl.float32) * slope
            value = tl.exp2(z - lse)
            if LIMIT is not None:
                value = tl.minimum(value, LIMIT / tl.abs(factor))
            tl.store(sink + column, (value * factor).to(gradient.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the target's own element is written again, by another thread
        value = (tl.exp2(hit - lse) - 1.0) * factor
        if LIMIT is not None:
            value = tl.where(value == value, tl.minimum(tl.maximum(value, -LIMIT), LIMIT), value)
        tl.store(sink + target, value.to(gradient.dtype.element_ty), mask=valid)
