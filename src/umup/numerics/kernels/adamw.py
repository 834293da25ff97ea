"""One AdamW step in one kernel per parameter: p, g, m and v are read once, p, m and v written once.

The arithmetic is that of `umup.optim.adamw.step_eager`, the random bits are exactly those of `umup.numerics.rounding`.
Numbers that change from step to step are scalars, so that none of them compiles a kernel anew.

Not covered: several parameters in one launch, and FP8 copies of what is written (cast.py).
"""

from __future__ import annotations  # `tl` exists only once a kernel is compiled

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umup.numerics.kernels import jit
from umup.numerics.rounding import ROUNDS, Key

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

# A program's elements, four to each call of the generator.
QUADS = 256


def adamw_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    key: Key,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step number `key.step` of AdamW, in place on the contiguous `p`, `m` and `v`; each is float32 or bfloat16."""
    beta1, beta2 = betas
    with torch.cuda.device_of(p):  # type: ignore[no-untyped-call]
        jit(_adamw_kernel)[(-(-p.numel() // (4 * QUADS)),)](
            p,
            grad.contiguous(),
            m,
            v,
            p.numel(),
            key.step << 32 | key.tensor,
            1.0 - lr * weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            eps,
            lr / (1.0 - beta1**key.step),
            (1.0 - beta2**key.step) ** 0.5,
            BLOCK=QUADS,
            ROUNDS=ROUNDS,
        )


def _adamw_kernel(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    numel: tl.tensor,
    seed: tl.tensor,
    decay: tl.tensor,
    rate1: tl.tensor,
    beta2: tl.tensor,
    rate2: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    correction: tl.tensor,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    """Elements 4i + j of one block of i. Rounding is in float32: a store converts what is already exact."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, 4)[None, :]
    place = i * 4 + j
    inside = place < numel
    p = tl.load(p_ptr + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
    m += rate1 * (g - m)
    v = v * beta2 + rate2 * g * g
    p = p * decay - step_size * m / (tl.sqrt_rn(v) / correction + eps)
    counter = i.to(tl.uint32)
    zero = tl.zeros_like(counter)
    if m_ptr.dtype.element_ty == tl.bfloat16:
        w0, w1, w2, w3 = tl.philox(seed, counter, zero, zero, zero, ROUNDS)
        bits = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
        m_bits = (m.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        v_bits = (v.to(tl.uint32, bitcast=True) + (bits >> 16)) & 0xFFFF0000
        m = tl.where(m == m, m_bits.to(tl.float32, bitcast=True), m)
        v = tl.where(v == v, v_bits.to(tl.float32, bitcast=True), v)
    if p_ptr.dtype.element_ty == tl.bfloat16:
        w0, w1, w2, w3 = tl.philox(seed, counter, zero + 1, zero, zero, ROUNDS)
        bits = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
        p_bits = (p.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        p = tl.where(p == p, p_bits.to(tl.float32, bitcast=True), p)
    tl.store(p_ptr + place, p.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(m_ptr + place, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + place, v.to(v_ptr.dtype.element_ty), mask=inside)
