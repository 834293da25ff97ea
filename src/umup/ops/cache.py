"""The KV-cache protocol: what attention asks of a cache, and the plain preallocated one."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Keys and values of the positions seen so far, per layer."""

    def length(self) -> int:
        """How many positions the cache holds."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (..., kv_heads, new, head_dim) of a layer and return all of that layer's."""


class KVCache:
    """Preallocated buffers of shape (layers, batch, kv_heads, max_len, head_dim)."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._k = torch.empty(layers, batch, kv_heads, max_len, head_dim, dtype=dtype, device=device)
        self._v = torch.empty_like(self._k)
        self._lengths = [0] * layers

    def length(self) -> int:
        """How many positions the last layer has seen: all layers' count once a forward pass is over."""
        return self._lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer and return all of that layer's."""
        start = self._lengths[layer]
        end = self._lengths[layer] = start + k.shape[-2]
        self._k[layer, :, :, start:end] = k
        self._v[layer, :, :, start:end] = v
        return self._k[layer, :, :, :end], self._v[layer, :, :, :end]
