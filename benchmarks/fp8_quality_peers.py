"""What fp8_quality.py compares with, as products of our own decoder: a plain cast to FP8, and torchao's float8."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from umup.nn.modules import Linear, Matmul, UseScales, join
from umup.numerics.formats import E4M3, E5M2, encode
from umup.numerics.gemm import Formats, Gemm, GemmState, scale_table
from umup.ops.linear import linear
from umup.ops.scaled import scale


class PlainCast(Matmul):
    """FP8 without scales: operands and gradients saturate or vanish as they come."""

    ones: Tensor

    def __init__(self, scales: UseScales, backend: str) -> None:
        super().__init__(scales)
        self.formats = Formats(E4M3, E5M2, backend)
        table = scale_table(Gemm(*scales, self.formats), torch.zeros(3, dtype=torch.int32))
        self.register_buffer("ones", table, persistent=False)

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """As Matmul's."""
        weight = join(weights)
        row = encode(weight.detach(), 1.0, E4M3)
        return linear(x, weight, *self.scales, self.formats, GemmState(row, row.t().contiguous(), self.ones))


class Torchao(Matmul):
    """torchao's Float8Linear, tensorwise with dynamic scales, our factors outside of it."""

    def __init__(self, scales: UseScales, backend: str) -> None:
        from torchao.float8.config import Float8LinearConfig  # type: ignore[import-not-found]
        from torchao.float8.float8_linear import (  # type: ignore[import-not-found]
            Float8Linear,
            matmul_with_hp_or_float8_args,
        )

        super().__init__(scales)
        config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=backend == "emulate")
        gemms = Float8Linear(16, 16, bias=False, device="meta", config=config).linear_mm_config
        self.product: Any = lambda x, w: matmul_with_hp_or_float8_args.apply(x, w.t(), gemms, config)

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """As Matmul's."""
        multiplier, grad_input, grad_weight = self.scales
        weight = join(weights).to(x.dtype)
        product = self.product(scale(x, 1.0, grad_input), scale(weight, 1.0, grad_weight))
        return scale(product, multiplier, 1.0)


PEERS: dict[str, Callable[[UseScales, str], Matmul]] = {"torchao": Torchao, "plain": PlainCast}


def use_peer(model: nn.Module, make: Callable[[UseScales, str], Matmul], backend: str, device: torch.device) -> None:
    """Run the hidden products by `make`'s module, those that were one still as one."""
    made: dict[Matmul, Matmul] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name != "head":
            old = module.matmul
            made[old] = made.get(old) or make(module.scales, backend).to(device)
            module.matmul = made[old]
