"""The gradients of rotated queries and keys, and of values, as the encoded gradient of the product that made them.

Attention's backward pass leaves three tensors, by heads. The product before it wants one matrix of tokens by features,
q | k | v, in FP8 and in two layouts. Rotating back, joining, encoding and transposing are one pass here: two bytes read
and two written per element.

Arithmetic is in float32 from the gradients to the encoding, where `ops.attention.rotary` in a 16-bit stream may round
each product and each sum. Not covered: the forward rotation, a pointwise kernel that a compiler makes as well.
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

# Columns count pairs: a tile has twice as many features.
CONFIGS = (Tile(64, 64, 4), Tile(128, 64, 4), Tile(128, 64, 8), Tile(64, 128, 8), Tile(128, 32, 4), Tile(64, 32, 4))
DEFAULT = CONFIGS[0]


@torch.library.custom_op("umup::rope_backward", mutates_args=())
def rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dq and dk rotated back, and dv, times `scale` in `dtype`: (T, F) and (F, T), contiguous; features q | k | v.

    dq: (B, H, S, D), dk and dv: (B, Hkv, S, D), floating, of any strides; T = B*S, F = (H + 2*Hkv)*D. cos, sin:
    (S, D/2), the tables in the dtype that the forward pass multiplied by. scale: a float32 scalar on their device.
    dtype: float8_e4m3fn or float8_e5m2. An opaque operator, like `transpose8`.
    """
    row, column = _outputs(dq, dk, dtype)
    grads = (dq, dk, dv)
    if dq.is_cuda and all(g.stride(-1) == 1 for g in grads) and word_aligned(row) and word_aligned(column):
        launch(*grads, cos.contiguous(), sin.contiguous(), scale, row, column, DEFAULT)
        return row, column
    parts = (_rotate_back(dq, cos, sin), _rotate_back(dk, cos, sin), dv.float())
    joined = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1).flatten(0, 1)
    row = encode(joined, scale, FORMATS[dtype])
    return row, transposed_bytes(row)


@rope_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _outputs(dq, dk, dtype)


def _outputs(dq: Tensor, dk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, positions, size = dq.shape
    row = dq.new_empty((batch * positions, (heads + 2 * dk.shape[1]) * size), dtype=dtype)
    return row, row.new_empty((row.shape[1], row.shape[0]))


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32, by minus the angles."""
    (a, b), cos, sin = grad.float().chunk(2, -1), cos.float(), sin.float()
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def launch(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor,
    row: Tensor,
    column: Tensor,
    tile: Tile,
) -> None:
    """Fill row (T, F) and column (F, T), contiguous and `word_aligned`, as `rope_backward` says; D has unit stride."""
    heads, kv_heads, positions, half = dq.shape[1], dk.shape[1], dq.shape[2], cos.shape[1]
    q_blocks, kv_blocks = (-(-n * half // tile.columns) for n in (heads, kv_heads))
    jit(_rope_kernel)[(q_blocks + 2 * kv_blocks, -(-len(row) // tile.rows))](
        dq,
        dk,
        dv,
        cos,
        sin,
        scale,
        row.view(torch.uint8),
        column.view(torch.int32),
        len(row),
        positions,
        heads,
        kv_heads,
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        HALF=half,
        LIMIT=FORMATS[row.dtype].max,
        IS_E5M2=row.dtype == torch.float8_e5m2,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )


def _rope_kernel(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_position: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_position: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_position: tl.tensor,
    HALF: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_E5M2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """BLOCK_M tokens of BLOCK_N pairs, all in q, in k or in v. `column` points to words of four tokens, a byte each.

    r numbers blocks of four tokens, c pairs: pair p of a tensor is (j, j + HALF) of its head p // HALF. Encoding as in
    cast.py.
    """
    block, pid_m = tl.program_id(0), tl.program_id(1)
    q_blocks, kv_blocks = tl.cdiv(heads * HALF, BLOCK_N), tl.cdiv(kv_heads * HALF, BLOCK_N)
    rotated = block < q_blocks + kv_blocks
    if block < q_blocks:
        grad, n, feature = dq, heads, 0
        by_batch, by_head, by_position = q_batch, q_head, q_position
    elif rotated:
        grad, n, feature, block = dk, kv_heads, heads, block - q_blocks
        by_batch, by_head, by_position = k_batch, k_head, k_position
    else:
        grad, n, feature, block = dv, kv_heads, heads + kv_heads, block - q_blocks - kv_blocks
        by_batch, by_head, by_position = v_batch, v_head, v_position
    width = (heads + 2 * kv_heads) * 2 * HALF
    p = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    head, j = p // HALF, p % HALF
    target = row + (feature + head) * 2 * HALF + j
    source = grad + head.to(tl.int64) * by_head + j
    factor = tl.load(scale)
    a_words = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.uint32)
    b_words = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.uint32)
    for i in tl.static_range(4):
        t = pid_m * BLOCK_M + 4 * tl.arange(0, BLOCK_M // 4)[:, None] + i
        s = t % positions
        inside = (t < tokens) & (p < n * HALF)
        start = source + (t // positions).to(tl.int64) * by_batch + s.to(tl.int64) * by_position
        a = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
        if rotated:
            c = tl.load(cos + s * HALF + j, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(sin + s * HALF + j, mask=inside, other=0.0).to(tl.float32)
            a, b = a * c + b * d, b * c - a * d
        for part in tl.static_range(2):
            value = a if part == 0 else b
            finite = tl.abs(value) < float("inf")
            value = tl.minimum(tl.maximum(value * factor, -LIMIT), LIMIT)
            if IS_E5M2:
                byte = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
            else:
                byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            byte = tl.where(finite, byte, 0x7F).to(tl.uint8)  # NaN in both formats
            tl.store(target + t.to(tl.int64) * width + part * HALF, byte, mask=inside)
            word = byte.to(tl.uint32) << (8 * i)
            a_words, b_words = (a_words | word, b_words) if part == 0 else (a_words, b_words | word)
    pt = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    w = pid_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)[None, :]
    inside = (pt < n * HALF) & (w < tokens // 4)
    start = column + ((feature + pt // HALF) * 2 * HALF + pt % HALF).to(tl.int64) * (tokens // 4) + w
    tl.store(start, tl.trans(a_words).to(tl.int32, bitcast=True), mask=inside)
    tl.store(start + HALF * (tokens // 4), tl.trans(b_words).to(tl.int32, bitcast=True), mask=inside)
