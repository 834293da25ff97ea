"""Stochastic rounding to bfloat16 from a counter: the same bits on every device, after every resume, on every rank.

Rounding to nearest loses every update smaller than half a unit in the last place, and bfloat16 keeps 8 bits: a second
moment with beta2 0.999 freezes, a weight stops at relative steps under 2^-9. Rounding up with the probability of the
remainder is unbiased instead (2010.06192). The noise is Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), a function of a key and the element's place, so that there is no generator state to keep.

Not covered: other target formats, and sharded tensors, whose shards count their own elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Salmon et al. find 7 rounds to pass BigCrush, and 10 to be a margin that rounding does not need.
ROUNDS = 7

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Key(NamedTuple):
    """What a tensor's noise depends on, two words below 2^32: its place among tensors, and the optimizer's step."""

    tensor: int
    step: int


def philox(key: Key, counter: Words, rounds: int = ROUNDS) -> Words:
    """Four random words below 2^32 per counter of four, all int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The products wrap around in int64 with the right low 64 bits; the mask removes the sign that shifting copies.
        left, right = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1 = (right >> 32 & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = (left >> 32 & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + _KEY_STEP[0]) & _WORD, (k1 + _KEY_STEP[1]) & _WORD
    return c0, c1, c2, c3


def noise(shape: torch.Size, key: Key, stream: int, device: torch.device) -> Tensor:
    """Random words below 2^32 of the given shape, int64. Element 4i+j has word j of counter (i, stream, 0, 0)."""
    places = torch.arange(-(-shape.numel() // 4), device=device)
    zero = torch.zeros_like(places)
    words = philox(key, (places, zero + stream, zero, zero))
    return torch.stack(words, dim=-1).flatten()[: shape.numel()].view(shape)


def stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 `x` rounded to a bfloat16 neighbour, away from zero with the probability of the remainder.

    `bits` holds 16 random bits per element, int64. Exact values stay, infinities and NaN too.
    """
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) & -0x10000).view(torch.float32)
    # A NaN whose payload is all ones, which is CUDA's, would carry over into the sign and become a zero.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)
