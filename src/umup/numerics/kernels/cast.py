"""FP8 casts that write both layouts of a matrix in one pass over it.

`cast_transpose` encodes an activation or a gradient, `cast_weights` a master weight into banks owned by its module and
takes max|w| on the way. Values are those of `numerics.formats.encode`: scaled in float32, rounded to nearest even,
finite ones saturated, NaN and infinities made NaN (whose sign and payload are not kept).

Not covered: choosing a scale, amax of activations (scales are static), stochastic rounding.
"""

from __future__ import annotations  # `tl` exists only once a kernel is compiled

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umup.numerics.formats import E4M3, E5M2, encode
from umup.numerics.kernels import Tile, jit, transposed_bytes, word_aligned

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

CONFIGS = (Tile(128, 128, 8), Tile(128, 128, 4), Tile(128, 64, 4), Tile(64, 128, 4))
DEFAULT = CONFIGS[3]  # the fastest in benchmarks/kernels.py on an H200, by 1 to 8%

FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


@torch.library.custom_op("umup::cast_transpose", mutates_args=())
def cast_transpose(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x: (T, N) floating -> x * scale in `dtype` as (T, N) and as (N, T), both contiguous.

    scale: a float32 scalar on x's device. dtype: float8_e4m3fn or float8_e5m2. An opaque operator, like `transpose8`.
    """
    row = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if not _fits_kernel(x, row):
        row = encode(x, scale, FORMATS[dtype]).contiguous()
        return row, transposed_bytes(row)
    column = row.new_empty((x.shape[1], x.shape[0]))
    launch(x, scale, dtype, row, column, None, DEFAULT)
    return row, column


@cast_transpose.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[1], x.shape[0]), dtype=dtype)


@torch.no_grad()
def cast_weights(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, row_out: Tensor, column_out: Tensor, amax_out: Tensor
) -> None:
    """Refresh the FP8 copies of a weight, in place: row_out = weight * scale, column_out its transpose.

    weight: (N, K) float32 or bfloat16; scale: a float32 scalar; row_out: (N, K) and column_out: (K, N), of a one-byte
    dtype with unit stride along the last side, which may be slices of banks. amax_out: a float32 scalar, raised to
    max|weight| (unscaled, exact; NaN or infinite where the weight is); the caller resets it. Not for compiled graphs.
    """
    if _fits_kernel(weight, row_out, column_out):
        launch(weight, scale, dtype, row_out, column_out, amax_out, DEFAULT)
        return
    row = encode(weight, scale, FORMATS[dtype]).view(torch.uint8)
    row_out.view(torch.uint8).copy_(row)
    column_out.view(torch.uint8).copy_(row.t())
    amax_out.copy_(torch.maximum(amax_out, weight.abs().amax().float()))


def _fits_kernel(x: Tensor, *outputs: Tensor) -> bool:
    return x.is_cuda and x.stride(1) == 1 and all(word_aligned(out) for out in outputs)


def launch(
    x: Tensor, scale: Tensor, dtype: torch.dtype, row: Tensor, column: Tensor, amax: Tensor | None, tile: Tile
) -> None:
    """Encode x (M, N), unit stride along N, into row (M, N) and column (N, M), `word_aligned`; raise amax to max|x|."""
    rows, columns = x.shape
    jit(_cast_kernel)[tile.grid(rows, columns)](
        x,
        scale,
        row.view(torch.uint8),
        column.view(torch.int32),
        None if amax is None else amax.view(torch.int32),
        rows,
        columns,
        x.stride(0),
        row.stride(0),
        column.stride(0),
        LIMIT=FORMATS[dtype].max,
        IS_E5M2=dtype == torch.float8_e5m2,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )


def _cast_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    amax: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    x_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    LIMIT: tl.constexpr,
    IS_E5M2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) tile. `column` points to words of four bytes; column_stride counts bytes.

    r numbers blocks of four rows, whose bytes make one word of the transpose. amax holds the bits of a float32: without
    the sign they order as the numbers do, with NaN above infinity, which needs no NaN-propagating maximum.
    """
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, BLOCK_M // 4)[:, None]
    c = tl.arange(0, BLOCK_N)[None, :]
    inside = (pid_m * BLOCK_M + 4 * r < m) & (pid_n * BLOCK_N + c < n)
    source = x + pid_m.to(tl.int64) * BLOCK_M * x_stride + pid_n * BLOCK_N + 4 * r * x_stride + c
    target = row + pid_m.to(tl.int64) * BLOCK_M * row_stride + pid_n * BLOCK_N + 4 * r * row_stride + c
    factor = tl.load(scale)
    words = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.uint32)
    top = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.int32)
    for i in tl.static_range(4):
        value = tl.load(source + i * x_stride, mask=inside, other=0.0).to(tl.float32)
        if amax is not None:
            top = tl.maximum(top, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        finite = tl.abs(value) < float("inf")
        value = tl.minimum(tl.maximum(value * factor, -LIMIT), LIMIT)
        if IS_E5M2:
            byte = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        byte = tl.where(finite, byte, 0x7F).to(tl.uint8)  # NaN in both formats
        tl.store(target + i * row_stride, byte, mask=inside)
        words |= byte.to(tl.uint32) << (8 * i)
    rt = tl.arange(0, BLOCK_M // 4)[None, :]
    ct = tl.arange(0, BLOCK_N)[:, None]
    inside = (pid_m * (BLOCK_M // 4) + rt < m // 4) & (pid_n * BLOCK_N + ct < n)
    start = column + pid_n.to(tl.int64) * BLOCK_N * (column_stride // 4) + pid_m * (BLOCK_M // 4)
    tl.store(start + ct * (column_stride // 4) + rt, tl.trans(words).to(tl.int32, bitcast=True), mask=inside)
    if amax is not None:
        tl.atomic_max(amax, tl.max(tl.max(top, 1), 0), sem="relaxed")
