"""FP8 for anything made of umup.nn: products replaced by rule, weights kept encoded, scales that move between steps.

    convert(model, formats)           the named linears' products become StaticMatmuls
    refresh_weights(encoded(model))   encodes the weights: call it after whatever changes them (load_state_dict does)
    keep_products                     for checkpoint(..., use_reentrant=False, context_fn=keep_products)

A scale is a power of two per tensor, 2^exponent. Those of activations and output gradients are moved by whoever looks
at them (train/precision.py); those of weights follow here: the pass that writes the encoded weights also takes their
largest value, from which, widened by the most that one optimizer step can add, the next pass gets its scale. Nothing
waits for the GPU.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from umup.config.sections import PrecisionConfig
from umup.errors import ConfigError, DataError, did_you_mean
from umup.nn.modules import Linear, Matmul, UseScales, join
from umup.numerics.formats import E4M3, E5M2, encode, find_format
from umup.numerics.gemm import (
    W_DECODE,
    W_ENCODE,
    Formats,
    Gemm,
    GemmState,
    entry,
    power_of_two,
    require_fp8,
    scale_table,
)
from umup.numerics.kernels.cast import cast_weights
from umup.ops.linear import linear
from umup.ops.loss import linear_cross_entropy
from umup.rules.precision import Product

# Formats that reach further (E8M10) need no weights up there, where products would leave float32.
ENOUGH = 2.0**16
OPERANDS = ("x", "g", "w")  # columns of `exponents`: input, output gradient, weight


class Encoded(NamedTuple):
    """A converted product: its module, the names of its linears, its weights."""

    matmul: "StaticMatmul"
    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]

    @property
    def name(self) -> str:
        """What the records call it: linears that run as one product are joined by '+'."""
        first, *others = self.names
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])


class StaticMatmul(Matmul):
    """`Matmul` with FP8 operands: buffers hold the encoded weight in two layouts and the scales."""

    row: Tensor
    column: Tensor
    scales_table: Tensor
    exponents: Tensor
    amax: Tensor

    def __init__(self, scales: UseScales, formats: Formats, fan_in: int, fan_out: int, device: torch.device) -> None:
        super().__init__(scales)
        self.formats, self.spared, self.watched = formats, False, False
        storage = formats.forward.dtype or torch.float32
        for name, shape, dtype in (
            ("row", (fan_out, fan_in), storage),
            ("column", (fan_in, fan_out), storage),
            ("exponents", (3,), torch.int32),
            ("scales_table", (8, 1, 4), torch.float32),
            ("amax", (1,), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.set_exponents(self.exponents)

    @property
    def gemm(self) -> Gemm:
        """The constants."""
        return Gemm(*self.scales, self.formats)

    @property
    def state(self) -> GemmState:
        """The tensors."""
        return GemmState(self.row, self.column, self.scales_table)

    @property
    def joins(self) -> bool:
        """As Matmul's; the encoded weights are joined for good."""
        return not self.spared or super().joins

    @property
    def fusable(self) -> bool:
        """Whether an op over several products may run in place of `forward`: in true FP8, unwatched."""
        exempt = self.spared or self.watched or self.formats.dynamic
        return not exempt and all(form in (E4M3, E5M2) for form in self.formats[:2])

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """As Matmul's. Raises DataError for an x of no rows, for which there are no scales to be right."""
        _refuse_empty(x)
        if self.spared:
            return super().forward(x, *weights)
        return linear(x, join(weights), *self.scales, self.formats, self.state)

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor, multiplier: float, grad: float) -> Tensor:
        """As Matmul's."""
        if self.spared:
            return super().loss(x, weight, targets, multiplier, grad)
        return linear_cross_entropy(x, weight, targets, self.gemm, multiplier, grad, self.state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaticMatmul":
        """Moves to a device; what `model.bfloat16()` would make of encodings and scales is undone."""
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            self._buffers[name] = self.get_buffer(name).to(dtype)
        self.set_exponents(self.exponents)
        return self

    @torch.no_grad()
    def set_exponents(self, exponents: Tensor) -> None:
        """(3,) integers for x, g, w: buffer writes, which recompile nothing."""
        self.exponents.copy_(exponents)
        self.scales_table.copy_(scale_table(self.gemm, self.exponents))


def formats_of(products: Iterable[Product], device: torch.device, precision: PrecisionConfig) -> dict[str, Formats]:
    """The formats of those products (rules/precision.py) that leave the stream's dtype.

    Raises ConfigError where the device cannot run them.
    """
    formats = {}
    for p in products:
        if p.forward is not None and p.gradient is not None:
            backend = "emulate" if p.simulated else precision.backend
            if backend == "auto" or (backend == "scaled_mm" and device.type == "cuda"):
                require_fp8(device)
                backend = "scaled_mm"
            dynamic = precision.scales == "dynamic"
            forward, gradient = find_format(p.forward), find_format(p.gradient)
            if p.simulated:  # values in float32, of any format and any sides
                forward, gradient = replace(forward, dtype=None), replace(gradient, dtype=None)
            formats[p.name] = Formats(forward, gradient, backend, dynamic)
    return formats


def convert(model: nn.Module, formats: Mapping[str, Formats]) -> list[Encoded]:
    """Run the named linears' products in FP8; those that shared a product still do if their formats agree.

    Raises ConfigError for a name that is no umup.nn.Linear of the model. Weights are encoded at their exact scale.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for name in formats:
        if name not in linears:
            raise ConfigError(f"no linear {name!r} in the model; {did_you_mean(name, linears)}")
    groups: dict[tuple[int, Formats], list[str]] = {}
    for name, chosen in formats.items():
        groups.setdefault((id(linears[name].matmul), chosen), []).append(name)
    for (_, chosen), names in groups.items():
        install([linears[name] for name in names], linears[names[0]].scales, chosen)
    return start(model)


def install(linears: Sequence[Linear | nn.Linear], scales: UseScales, formats: Formats) -> None:
    """Give linears that read the same input one FP8 product: their child `matmul`, without a name in the state dict."""
    weight = linears[0].weight
    fan_out = sum(len(part.weight) for part in linears)
    matmul = StaticMatmul(scales, formats, fan_out=fan_out, fan_in=weight.shape[1], device=weight.device)
    for part in linears:
        part.matmul = matmul


def start(model: nn.Module) -> list[Encoded]:
    """Encode the weights of all installed products, now and after every load_state_dict."""
    found = encoded(model)
    refresh_weights(found)
    model.register_load_state_dict_post_hook(_refresh_loaded)  # type: ignore[no-untyped-call]
    return found


def _refresh_loaded(model: nn.Module, _: object) -> None:
    refresh_weights(encoded(model))


def keep_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Activation checkpointing that recomputes anything but matrix products; emulated and spared ones are kept too."""
    aten = torch.ops.aten
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]]
    contexts = create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
        [aten._scaled_mm.default, aten.mm.default, aten.addmm.default]
    )
    return contexts


def _refuse_empty(x: Tensor) -> None:
    if x.numel() == 0:
        raise DataError(f"an FP8 product got an empty batch, input {tuple(x.shape)}; leave empty batches out")


def encoded(model: nn.Module) -> list[Encoded]:
    """The converted products of a model, in its order."""
    by_matmul: dict[StaticMatmul, list[tuple[str, Linear | nn.Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | nn.Linear) and isinstance(matmul := module._modules.get("matmul"), StaticMatmul):
            by_matmul.setdefault(matmul, []).append((name, module))
    return [
        Encoded(matmul, tuple(name for name, _ in parts), tuple(cast(nn.Parameter, m.weight) for _, m in parts))
        for matmul, parts in by_matmul.items()
    ]


@torch.no_grad()
def refresh_weights(
    products: Iterable[Encoded], growth: Mapping[nn.Parameter, tuple[float, float]] | None = None
) -> None:
    """Encode the weights as they are now.

    `growth` holds (absolute, relative) per weight: since the last refresh no element w of it has changed by more than
    absolute + relative*|w|. The scale then follows from the largest value that the last refresh saw. Without it the
    largest value is taken first, in a pass of its own.
    """
    chosen = [p for p in products if not p.matmul.spared]
    if not chosen:
        return
    if growth is None:
        exact = iter(torch._foreach_norm([w.detach() for p in chosen for w in p.weights], float("inf")))
        largest = torch.stack([torch.stack([next(exact).float() for _ in p.weights]).amax() for p in chosen])
    else:
        absolute, relative = zip(
            *(map(max, zip(*(growth[w] for w in p.weights), strict=True)) for p in chosen), strict=True
        )
        seen = torch.cat([p.matmul.amax for p in chosen])
        largest = torch.addcmul(_like(absolute, seen), seen, 1 + _like(relative, seen))
    _move_weight_scales(chosen, largest)
    for p in chosen:
        write_weights(p)


@torch.no_grad()
def write_weights(p: Encoded) -> None:
    """Encode one product's weights with the scale it has, and take their largest value."""
    matmul, form = p.matmul, p.matmul.formats.forward
    matmul.amax.zero_()
    start = 0
    for weight in p.weights:
        rows = slice(start, start + len(weight))
        start += len(weight)
        row, column = matmul.row[rows], matmul.column[:, rows]
        scale = entry(matmul.scales_table, W_ENCODE)
        if form.dtype is None:
            row.copy_(encode(weight, scale, form))
            column.copy_(row.t())
            matmul.amax.copy_(torch.maximum(matmul.amax, weight.abs().amax()))
        else:
            cast_weights(weight.detach(), scale, form.dtype, row, column, matmul.amax)


def _like(numbers: tuple[float, ...], x: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=x.dtype).to(x.device, non_blocking=True)


def _move_weight_scales(products: list[Encoded], largest: Tensor) -> None:
    limits = _like(tuple(min(p.matmul.formats.forward.max, ENOUGH) for p in products), largest)
    # frexp: ratio = m * 2^e with m in [1/2, 1), so 2^(e-1) is the largest power of two that keeps all inside.
    exponent = torch.frexp(limits / largest.clamp(2.0**-100, 2.0**100)).exponent - 1
    encode_by = power_of_two(exponent).view(-1, 1, 1).expand(-1, 1, 4)
    torch._foreach_copy_([p.matmul.exponents[2] for p in products], list(exponent.unbind()))
    torch._foreach_copy_([p.matmul.scales_table[W_ENCODE] for p in products], list(encode_by.unbind()))
    torch._foreach_copy_([p.matmul.scales_table[W_DECODE] for p in products], list((1 / encode_by).unbind()))
