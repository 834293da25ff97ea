"""Compiled ops have eager's gradients: torch 2.11 loses, without a word, those of a Function whose forward returns what
it wrote in place, or passed through a conversion that converts nothing. Both show when a graph is traced, before any
code is generated, so that the quick backend finds them."""

import pytest
import torch

from umup.nn.fp8 import convert
from umup.nn.modules import Linear, UseScales
from umup.numerics.formats import E4M3, E5M2, find_format
from umup.numerics.gemm import Formats
from umup.ops import loss as loss_module
from umup.ops.residual import residual_add, residual_split
from umup.ops.scaled import scale

FAN_IN, FAN_OUT = 16, 32
FORMATS = {
    "plain": None,
    "emulated": Formats(E4M3, E5M2, "emulate"),
    "scaled_mm": Formats(E4M3, E5M2, "scaled_mm"),
    "simulated": Formats(find_format("E4M2"), find_format("E5M1"), "emulate"),
    "dynamic": Formats(E4M3, E5M2, "emulate", dynamic=True),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def one_linear(kind, factors):
    module = Linear(FAN_IN, FAN_OUT, UseScales(*factors))
    torch.nn.init.normal_(module.weight)
    if FORMATS[kind] is not None:
        convert(torch.nn.ModuleDict({"it": module}), {"it": FORMATS[kind]})
    return module


def linear_op(kind, factors=(0.7, 1.3, 0.4)):
    module = one_linear(kind, factors)
    return lambda x: module(x), [module.weight]


def loss_op(kind):
    module, targets = one_linear(kind, (1.0, 1.0, 1.0)), torch.randint(FAN_OUT, (2, 20))
    return lambda x: module.matmul.loss(x, module.weight, targets, 1.7, 30.0), [module.weight]


def residual_op(split_grad, skip_weight):
    def residual(x):
        inside, skip = residual_split(x, split_grad, skip_weight)
        return residual_add(inside.sin(), skip, 0.6, 1.1, skip_weight)

    return residual, []


OPS = {
    "scale both": lambda: (lambda x: scale(x.sin(), 0.5, 3.0), []),
    "scale forward": lambda: (lambda x: scale(x.sin(), 0.5, 1.0), []),
    "scale backward": lambda: (lambda x: scale(x.sin(), 1.0, 3.0), []),
    "scale a leaf": lambda: (lambda x: scale(x, 1.0, 3.0), []),
    "residual": lambda: residual_op(0.3, 0.8),
    "residual, skip untouched": lambda: residual_op(0.3, 1.0),
    **{f"linear, {kind}": (lambda kind=kind: linear_op(kind)) for kind in FORMATS},
    "linear without factors": lambda: linear_op("plain", (1.0, 1.0, 1.0)),
    **{f"loss, {kind}": (lambda kind=kind: loss_op(kind)) for kind in FORMATS},
}


def check(name, dtype, backend):
    """One graph, whose results and gradients are eager's."""
    torch.compiler.reset()
    function, weights = OPS[name]()
    leaves = [torch.randn(2, 20, FAN_IN).to(dtype).requires_grad_(), *weights]
    found = []
    for f in (torch.compile(function, fullgraph=True, dynamic=False, backend=backend), function):
        out = f(leaves[0])
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
        found.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for compiled, eager in zip(*found, strict=True):
        assert eager.abs().max() > 0
        assert compiled.dtype == eager.dtype
        assert (compiled - eager).abs().max() <= TOLERANCE[dtype] * eager.abs().max()


every_op = pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in OPS for d in TOLERANCE], ids=str)
no_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own


@every_op
@no_warnings
def test_a_traced_op_has_eagers_gradients(name, dtype):
    check(name, dtype, "aot_eager")


@every_op
@no_warnings
@pytest.mark.slow
def test_a_compiled_op_has_eagers_gradients(name, dtype):
    check(name, dtype, "inductor")


@no_warnings
@pytest.mark.parametrize("kind", FORMATS)
def test_a_traced_loss_in_chunks_has_eagers_gradients(kind, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 16 * FAN_OUT)
    check(f"loss, {kind}", torch.float32, "aot_eager")


@no_warnings
def test_a_moved_scale_compiles_nothing_anew():
    module = one_linear("emulated", (1.0, 1.0, 1.0))
    torch.compiler.reset()
    traced = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(16, FAN_IN, requires_grad=True)
    traced(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for exponent in (-8, 3):
            module.matmul.set_exponents(torch.tensor([exponent, 0, int(module.matmul.exponents[2])]))
            mine = traced(x)
            assert torch.equal(mine, module(x))
            mine.sum().backward()
