"""The exact transpose of an FP8 matrix.

Hopper's FP8 products read both operands contiguous along the contraction, so a tensor used in two products is needed in
two layouts. With one static scale per tensor the second layout is a permutation of bytes: one read and one write each.

Not covered: transposes fused into the cast that makes the tensor (cast.py), and stacks of matrices.
"""

from __future__ import annotations  # `tl` exists only once a kernel is compiled

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umup.numerics.kernels import Tile, jit, transposed_bytes, word_aligned

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

CONFIGS = (Tile(128, 128, 4), Tile(128, 128, 8), Tile(256, 128, 8), Tile(128, 256, 8))
DEFAULT = CONFIGS[0]


@torch.library.custom_op("umup::transpose8", mutates_args=())
def transpose8(x: Tensor) -> Tensor:
    """x: (M, N) of a one-byte dtype -> (N, M), contiguous, the same bytes.

    An opaque operator: torch.compile keeps it without a graph break and never recomputes it in a backward pass.
    """
    if not (x.is_cuda and word_aligned(x)):
        return transposed_bytes(x)
    out = x.new_empty((x.shape[1], x.shape[0]))
    launch(x, out, DEFAULT)
    return out


@transpose8.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]))


def launch(x: Tensor, out: Tensor, tile: Tile) -> None:
    """Write the transpose of x (M, N) into the contiguous `out` (N, M); both are `word_aligned`."""
    rows, columns = x.shape
    jit(_transpose_kernel)[tile.grid(rows, columns)](
        x.view(torch.int32),
        out.view(torch.int32),
        rows,
        columns,
        x.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )


def _transpose_kernel(
    x: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    x_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) tile. Pointers are to words of four bytes; m, n and x_stride count bytes.

    r numbers blocks of four rows and c blocks of four columns (one word), so that byte 4r of a word row is m = 4r.
    """
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, BLOCK_M // 4)[:, None]
    c = tl.arange(0, BLOCK_N // 4)[None, :]
    inside = (pid_m * (BLOCK_M // 4) + r < m // 4) & (pid_n * (BLOCK_N // 4) + c < n // 4)
    source = x + pid_m.to(tl.int64) * BLOCK_M * (x_stride // 4) + pid_n * (BLOCK_N // 4) + r * x_stride + c
    w0 = tl.load(source, mask=inside).to(tl.uint32, bitcast=True)
    w1 = tl.load(source + x_stride // 4, mask=inside).to(tl.uint32, bitcast=True)
    w2 = tl.load(source + 2 * (x_stride // 4), mask=inside).to(tl.uint32, bitcast=True)
    w3 = tl.load(source + 3 * (x_stride // 4), mask=inside).to(tl.uint32, bitcast=True)
    even01 = (w0 & 0x00FF00FF) | ((w1 & 0x00FF00FF) << 8)
    even23 = (w2 & 0x00FF00FF) | ((w3 & 0x00FF00FF) << 8)
    odd01 = ((w0 >> 8) & 0x00FF00FF) | (w1 & 0xFF00FF00)
    odd23 = ((w2 >> 8) & 0x00FF00FF) | (w3 & 0xFF00FF00)
    t0 = (even01 & 0x0000FFFF) | (even23 << 16)
    t1 = (odd01 & 0x0000FFFF) | (odd23 << 16)
    t2 = (even01 >> 16) | (even23 & 0xFFFF0000)
    t3 = (odd01 >> 16) | (odd23 & 0xFFFF0000)
    rt = tl.arange(0, BLOCK_M // 4)[None, :]
    ct = tl.arange(0, BLOCK_N // 4)[:, None]
    inside = (pid_m * (BLOCK_M // 4) + rt < m // 4) & (pid_n * (BLOCK_N // 4) + ct < n // 4)
    target = out + pid_n.to(tl.int64) * BLOCK_N * (m // 4) + pid_m * (BLOCK_M // 4) + ct * m + rt
    tl.store(target, tl.trans(t0).to(tl.int32, bitcast=True), mask=inside)
    tl.store(target + m // 4, tl.trans(t1).to(tl.int32, bitcast=True), mask=inside)
    tl.store(target + 2 * (m // 4), tl.trans(t2).to(tl.int32, bitcast=True), mask=inside)
    tl.store(target + 3 * (m // 4), tl.trans(t3).to(tl.int32, bitcast=True), mask=inside)
