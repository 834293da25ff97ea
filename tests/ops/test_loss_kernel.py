"""The chunked loss as a compiler sees it: the chunks fill one buffer in place, and no pass scales a gradient."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import run_and_get_code

from umup.nn.fp8 import convert
from umup.nn.modules import Linear, UseScales
from umup.numerics.formats import E4M3, E5M2, find_format
from umup.numerics.gemm import DW_DECODE, DX_DECODE, Formats, Gemm, scale_gradients, scale_table
from umup.ops import loss as loss_module

TOKENS, CHUNK, FAN_IN, VOCAB = 160, 64, 32, 48
MULTIPLIER, GRAD = 1.3, 2.0
FORMATS = {
    "plain": None,
    "scaled_mm": Formats(E4M3, E5M2, "scaled_mm"),
    "simulated": Formats(find_format("E4M2"), find_format("E5M1"), "emulate"),
    "dynamic": Formats(E4M3, E5M2, "emulate", dynamic=True),
}
torch_warns_itself = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo and Inductor do
every_kind = pytest.mark.parametrize("kind", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _chunked(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", CHUNK * VOCAB)
    torch.compiler.reset()


def problem(kind, dtype=torch.bfloat16):
    """A loss of (x, targets), and leaves."""
    head = Linear(FAN_IN, VOCAB, UseScales(0.7, 1.2, 0.4))
    nn.init.normal_(head.weight)
    if FORMATS[kind] is not None:
        convert(nn.ModuleDict({"head": head}), {"head": FORMATS[kind]})
    x, targets = torch.randn(TOKENS, FAN_IN, dtype=dtype, requires_grad=True), torch.randint(VOCAB, (TOKENS,))
    return lambda x, t: head.matmul.loss(x, head.weight, t, MULTIPLIER, GRAD), (x, head.weight), targets


def value_and_gradients(function, leaves, targets, upstream=1.0):
    loss = function(leaves[0], targets)
    return loss.detach(), *torch.autograd.grad(upstream * loss, leaves)


def assert_same(found, expected, rtol):
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        assert (mine - theirs).abs().max() <= rtol * theirs.abs().max()


@torch_warns_itself
@every_kind
@every_dtype
def test_chunks_write_one_buffer_once_and_nothing_is_repeated_backward(kind, dtype):
    graphs = []

    def record(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return make_boxed_func(module)

    function, leaves, targets = problem(kind, dtype)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    found = value_and_gradients(compiled, leaves, targets, upstream=-0.3)
    forward, backward = graphs
    writes = [target for target in forward if "auto_functionalized" in target or "token_losses" in target]
    assert len(writes) == -(-TOKENS // CHUNK)
    assert not [target for target in backward if "auto_functionalized" in target or "token_losses" in target]
    assert_same(found, value_and_gradients(function, leaves, targets, upstream=-0.3), 1e-6)


@torch_warns_itself
@pytest.mark.slow
@every_kind
@every_dtype
def test_generated_code_has_eagers_gradients_and_one_buffer(kind, dtype):
    function, leaves, targets = problem(kind, dtype)
    compiled = torch.compile(function, fullgraph=True)
    found, codes = run_and_get_code(value_and_gradients, compiled, leaves, targets, -0.3)
    assert_same(found, value_and_gradients(function, leaves, targets, -0.3), 1e-5 if dtype == torch.float32 else 0.02)
    forward = codes[0]
    written = [line for line in forward.splitlines() if "umup.token_losses.default(" in line]
    buffers = {line.rsplit("reinterpret_tensor(", 1)[1].split(",")[0] for line in written}
    assert (len(written), len(buffers)) == (-(-TOKENS // CHUNK), 1)
    # A copy of the buffer would be one more of its size; two kinds are encoded after the fact.
    allocated = forward.count(f"empty_strided_cpu(({TOKENS}, {VOCAB})")
    assert allocated == (2 if kind in ("simulated", "dynamic") else 1)


@every_dtype
def test_what_arrives_from_above_multiplies_fp8_gradients_in_float32(dtype):
    """1.7 is no number of bfloat16, the stream's dtype."""
    function, leaves, targets = problem("scaled_mm", dtype)
    _, dx, dw = value_and_gradients(function, leaves, targets)
    _, scaled_dx, scaled_dw = value_and_gradients(function, leaves, targets, upstream=1.7)
    assert_same([scaled_dw], [1.7 * dw], 1e-6)
    assert_same([scaled_dx.float()], [1.7 * dx.float()], 1e-6 if dtype == torch.float32 else 2.0**-7)


def test_scaling_gradients_moves_their_two_scales_alone():
    scales = scale_table(Gemm(0.7, 1.3, 0.4), torch.tensor([1, -2, 3]))
    scaled = scale_gradients(scales, torch.tensor(-0.3))
    moved = {int(row) for row in (scaled != scales).nonzero()[:, 0]}
    assert moved == {DX_DECODE, DW_DECODE}
    assert scaled.shape == scales.shape
    torch.testing.assert_close(scaled[DX_DECODE : DW_DECODE + 1], -0.3 * scales[DX_DECODE : DW_DECODE + 1])


@every_kind
def test_an_evaluation_allocates_no_gradient(kind, monkeypatch):
    sinks, original = [], loss_module.token_losses
    monkeypatch.setattr(loss_module, "token_losses", lambda *a: sinks.append(a[-1]) or original(*a))
    function, (x, _), targets = problem(kind)
    with torch.no_grad():
        function(x, targets)
    assert sinks == [None] * 3


def test_chunks_are_slices_of_one_buffer_in_the_products_format(monkeypatch):
    sinks, original = [], loss_module.token_losses
    monkeypatch.setattr(loss_module, "token_losses", lambda *a: sinks.append(a[-1]) or original(*a))
    function, (x, _), targets = problem("scaled_mm")
    function(x, targets)
    assert {sink.dtype for sink in sinks} == {E5M2.dtype}
    assert [sink.storage_offset() for sink in sinks] == [0, CHUNK * VOCAB, 2 * CHUNK * VOCAB]
    assert len({sink.untyped_storage().data_ptr() for sink in sinks}) == 1


@torch_warns_itself
@pytest.mark.parametrize("kind", ["plain", "scaled_mm"])
def test_an_evaluation_compiles(kind):
    function, (x, _), targets = problem(kind)
    with torch.no_grad():
        expected = function(x, targets)
        found = torch.compile(function, fullgraph=True, dynamic=False)(x, targets)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
