"""The backward pass of a gated SiLU between FP8 products: every encoding that they need, in one pass over its inputs.

    a = output * up * gate * s                            s = sigmoid(mult * gate)
    d_gate = output * da * up * s * (1 + mult * gate * (1 - s))
    d_up = output * da * gate * s

Of the gradients both layouts are written, and of `a`, which is made again here so that nobody keeps it, the transpose
alone: the product before took its rows. Arithmetic is in float32 from operands to encoding; nothing is rounded on the
way. At 11 bytes per element of `a` (9 with gate and up in FP8) this is a matter of bandwidth.

Not covered: other activations, and a forward pass (a pointwise kernel with one output, which a compiler fuses as well).
"""

from __future__ import annotations  # `tl` exists only once a kernel is compiled

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umup.numerics.formats import encode
from umup.numerics.kernels import Tile, jit, transposed_bytes, word_aligned
from umup.numerics.kernels.cast import FORMATS

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

CONFIGS = (Tile(64, 64, 4), Tile(128, 64, 4), Tile(128, 64, 8), Tile(64, 128, 4), Tile(64, 128, 8), Tile(128, 32, 4))
DEFAULT = CONFIGS[0]


@torch.library.custom_op("umup::swiglu_backward", mutates_args=())
def swiglu_backward(
    da: Tensor,
    gu: Tensor,
    mult: float,
    output: float,
    g_scale: Tensor,
    a_scale: Tensor,
    g_dtype: torch.dtype,
    a_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and a, encoded: (T, 2f) and (2f, T) in g_dtype, (f, T) in a_dtype; contiguous.

    da: (T, f), the gradient of a, floating. gu: (T, 2f), gate | up side by side, floating or float8_e4m3fn (then at
    scale 1). The scales are float32 scalars on their device, the dtypes float8_e4m3fn or float8_e5m2. Opaque to a
    compiler, like `transpose8`.
    """
    row, row_t, a_t = _outputs(da, g_dtype, a_dtype)
    if da.is_cuda and da.stride(1) == gu.stride(1) == 1 and word_aligned(row) and word_aligned(row_t):
        launch(da, gu, mult, output, g_scale, a_scale, row, row_t, a_t, DEFAULT)
        return row, row_t, a_t
    gradient, a = _in_torch(da, gu, mult, output)
    row = encode(gradient, g_scale, FORMATS[g_dtype])
    return row, transposed_bytes(row), transposed_bytes(encode(a, a_scale, FORMATS[a_dtype]))


@swiglu_backward.register_fake
def _(
    da: Tensor,
    gu: Tensor,
    mult: float,
    output: float,
    g_scale: Tensor,
    a_scale: Tensor,
    g_dtype: torch.dtype,
    a_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(da, g_dtype, a_dtype)


def _outputs(da: Tensor, g_dtype: torch.dtype, a_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = da.shape
    row = da.new_empty((tokens, 2 * width), dtype=g_dtype)
    return row, row.new_empty((2 * width, tokens)), da.new_empty((width, tokens), dtype=a_dtype)


def _in_torch(da: Tensor, gu: Tensor, mult: float, output: float) -> tuple[Tensor, Tensor]:
    """(T, 2f) gradients of gate | up and (T, f) a, float32."""
    gate, up = gu.float().chunk(2, -1)
    s = torch.sigmoid(mult * gate)
    pull = output * da.float() * s
    gradient = torch.cat((pull * up * (1 + mult * gate * (1 - s)), pull * gate), -1)
    return gradient, output * (gate * s) * up


def launch(
    da: Tensor,
    gu: Tensor,
    mult: float,
    output: float,
    g_scale: Tensor,
    a_scale: Tensor,
    row: Tensor,
    row_t: Tensor,
    a_t: Tensor,
    tile: Tile,
) -> None:
    """Fill row (T, 2f), row_t (2f, T) and a_t (f, T), contiguous and `word_aligned`, as `swiglu_backward` says."""
    tokens, width = da.shape
    jit(_swiglu_kernel)[tile.grid(tokens, width)](
        da,
        gu.view(torch.uint8) if gu.element_size() == 1 else gu,
        mult,
        output,
        g_scale,
        a_scale,
        row.view(torch.uint8),
        row_t.view(torch.int32),
        a_t.view(torch.int32),
        tokens,
        width,
        da.stride(0),
        gu.stride(0),
        G_LIMIT=FORMATS[row.dtype].max,
        G_E5M2=row.dtype == torch.float8_e5m2,
        A_LIMIT=FORMATS[a_t.dtype].max,
        A_E5M2=a_t.dtype == torch.float8_e5m2,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )


def _swiglu_kernel(
    da: tl.tensor,
    gu: tl.tensor,
    mult: tl.tensor,
    output: tl.tensor,
    g_scale: tl.tensor,
    a_scale: tl.tensor,
    row: tl.tensor,
    row_t: tl.tensor,
    a_t: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    da_stride: tl.tensor,
    gu_stride: tl.tensor,
    G_LIMIT: tl.constexpr,
    G_E5M2: tl.constexpr,
    A_LIMIT: tl.constexpr,
    A_E5M2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) tile of a, (m, n). row_t and a_t point to words of four bytes, four rows of the tile each.

    Encoding as in cast.py. r numbers blocks of four rows, c columns.
    """
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, BLOCK_M // 4)[:, None]
    c = tl.arange(0, BLOCK_N)[None, :]
    inside = (pid_m * BLOCK_M + 4 * r < m) & (pid_n * BLOCK_N + c < n)
    first, left = pid_m.to(tl.int64) * BLOCK_M, pid_n * BLOCK_N
    pull_in = da + first * da_stride + left + 4 * r * da_stride + c
    gate_in = gu + first * gu_stride + left + 4 * r * gu_stride + c
    target = row + first * (2 * n) + left + 4 * r * (2 * n) + c
    g_factor, a_factor = tl.load(g_scale), tl.load(a_scale)
    empty = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.uint32)
    gate_words, up_words, a_words = empty, empty, empty
    for i in tl.static_range(4):
        pull = tl.load(pull_in + i * da_stride, mask=inside, other=0).to(tl.float32)
        gate = tl.load(gate_in + i * gu_stride, mask=inside, other=0)
        up = tl.load(gate_in + i * gu_stride + n, mask=inside, other=0)
        if gate.dtype == tl.uint8:
            gate, up = gate.to(tl.float8e4nv, bitcast=True), up.to(tl.float8e4nv, bitcast=True)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        s = 1 / (1 + tl.exp(-mult * gate))
        pull = output * pull * s
        for part in tl.static_range(3):
            if part == 0:
                value, factor, limit = pull * up * (1 + mult * gate * (1 - s)), g_factor, G_LIMIT
            elif part == 1:
                value, factor, limit = pull * gate, g_factor, G_LIMIT
            else:
                value, factor, limit = output * (gate * s) * up, a_factor, A_LIMIT
            finite = tl.abs(value) < float("inf")
            value = tl.minimum(tl.maximum(value * factor, -limit), limit)
            if G_E5M2 if part < 2 else A_E5M2:
                byte = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
            else:
                byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            byte = tl.where(finite, byte, 0x7F).to(tl.uint8)  # NaN in both formats
            word = byte.to(tl.uint32) << (8 * i)
            if part < 2:
                tl.store(target + i * (2 * n) + part * n, byte, mask=inside)
            if part == 0:
                gate_words |= word
            elif part == 1:
                up_words |= word
            else:
                a_words |= word
    rt = tl.arange(0, BLOCK_M // 4)[None, :]
    ct = tl.arange(0, BLOCK_N)[:, None]
    inside = (pid_m * (BLOCK_M // 4) + rt < m // 4) & (left + ct < n)
    start = left.to(tl.int64) * (m // 4) + pid_m * (BLOCK_M // 4) + ct * (m // 4) + rt
    tl.store(row_t + start, tl.trans(gate_words).to(tl.int32, bitcast=True), mask=inside)
    tl.store(row_t + n.to(tl.int64) * (m // 4) + start, tl.trans(up_words).to(tl.int32, bitcast=True), mask=inside)
    tl.store(a_t + start, tl.trans(a_words).to(tl.int32, bitcast=True), mask=inside)
