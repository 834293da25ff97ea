"""Triton kernels for Hopper, each with a plain torch path for every other device.

Triton is loaded by `jit` alone, when a kernel is first launched, so these modules import where it is not installed.
Launch configurations are data, chosen once from measurements (benchmarks/kernels.py) and never tuned at run time: a
transposed one-byte store has come out wrong for single configurations of Triton (triton issue 11111), so a test holds
every one of them to exact bytes.

An FP8 tile is never transposed byte by byte. Four rows are packed into 32-bit words, one byte each, and words are
transposed: loads and stores are then up to 16 bytes wide per thread. This needs sides that are multiples of 16, as FP8
products do anyway; other shapes take the torch path, on a GPU too.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16


class Tile(NamedTuple):
    """A launch configuration: the tile one program handles, in elements of the input, and its warps."""

    rows: int
    columns: int
    warps: int

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Programs along the columns and the rows of a (rows, columns) input."""
        return -(-columns // self.columns), -(-rows // self.rows)


@cache
def jit(kernel: Callable[..., None]) -> Any:
    """The compiled form of a kernel written against the global name `tl`, which is bound here.

    Arguments called `scale` and `amax` are scalars inside larger tensors: they are not specialised by address.
    """
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language  # type: ignore[import-not-found, unused-ignore]

    kernel.__globals__["tl"] = triton.language
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize_on_alignment=[n for n in names if n in ("scale", "amax")])


def word_aligned(x: Tensor) -> bool:
    """Whether a one-byte matrix can be read and written as 16-byte vectors: sides, row stride and address agree."""
    return x.stride(1) == 1 and all(n % ALIGNMENT == 0 for n in (*x.shape, x.stride(0), x.data_ptr()))


def transposed_bytes(x: Tensor) -> Tensor:
    """(M, N) one-byte -> contiguous (N, M), in torch: some of its operators know no FP8 type."""
    # clone: `contiguous` would return a single row or column itself, which an operator may not.
    return x.view(torch.uint8).t().clone(memory_format=torch.contiguous_format).view(x.dtype)
