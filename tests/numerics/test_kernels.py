"""The kernels against torch, to the bit.

Three ways to run them. Everywhere: the torch paths and the compiler's view of the operators. Where Triton is installed:
the kernels in its interpreter (`test_the_kernels_in_the_interpreter` starts this file again with TRITON_INTERPRET=1).
On a GPU: the same tests compiled, and those marked `gpu`.

The interpreter moves bytes and combines values faithfully but does not round: its FP8 cast drops bits, does not
saturate and knows no NaN. Values already on the format's grid pass through it exactly, so layout, masks, saturation,
NaN and amax are decided there; rounding, and what Triton's compiler makes of a launch configuration, on a GPU only.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from umup.numerics.kernels import cast, transpose
from umup.numerics.kernels.cast import cast_transpose, cast_weights
from umup.numerics.kernels.transpose import transpose8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BYTE_DTYPES = [torch.uint8, E4M3, E5M2]

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter")
formats = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["E4M3", "E5M2"])


torch_warns_itself = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo and Inductor do


def tiles(module):
    return pytest.mark.parametrize("tile", module.CONFIGS, ids=lambda t: "x".join(map(str, t)))


def random_bytes(*shape, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype).to(DEVICE)


def reference(x, scale, dtype):
    """The policy in plain torch: infinities become NaN, what is finite saturates, rounding is to nearest even."""
    value = torch.where(x.isinf(), torch.nan, x.float())
    return (value * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def raw(x):
    """The bytes of x, with one byte for every NaN."""
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8))


def assert_encodes(row, column, x, scale, dtype):
    expected = raw(reference(x, scale, dtype))
    assert torch.equal(raw(row), expected)
    assert torch.equal(raw(column), expected.t())


def on_grid(rows, columns, dtype, source):
    """Values times 4 that the format holds exactly, some beyond its range, and the special ones."""
    x = random_bytes(rows, columns, dtype=dtype).float() / 4
    x[0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0])
    x[-1, -3:] = torch.tensor([1e9, -1e9, 3e38])
    return x.to(source)


class Bank:
    """A matrix inside a larger buffer, whose other bytes must not change."""

    def __init__(self, rows, columns, dtype, stride=None):
        stride = stride or columns
        self.bytes = torch.full((rows + 2, stride), 0xA5, dtype=torch.uint8, device=DEVICE)
        self.matrix = self.bytes[1:-1, 16 : 16 + columns] if stride > columns else self.bytes[1:-1]
        self.matrix = self.matrix.view(dtype)

    def assert_rest_untouched(self):
        self.matrix.view(torch.uint8).fill_(0xA5)
        assert bool((self.bytes == 0xA5).all())


# The torch paths: every device, every size.


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 48), (17, 33), (256, 272)])
def test_transpose_keeps_every_byte(shape, dtype):
    x = random_bytes(*shape, dtype=dtype)
    y = transpose8(x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8).t())


def test_transpose_of_a_slice_of_a_bank():
    x = random_bytes(64, 96)[16:48, 32:80]
    assert torch.equal(transpose8(x), x.t())


@formats
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (48, 32), (17, 33), (272, 144)])
def test_cast_transpose_writes_both_layouts(shape, source, dtype):
    x = torch.randn(shape, device=DEVICE).mul(100).to(source)
    row, column = cast_transpose(x, torch.tensor(8.0, device=DEVICE), dtype)
    assert row.dtype == column.dtype == dtype
    assert row.is_contiguous()
    assert column.is_contiguous()
    assert_encodes(row, column, x, 8.0, dtype)


def every_bf16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256).to(DEVICE)


@formats
@pytest.mark.parametrize("exponent", [-100, -7, 0, 3, 60])
def test_every_bf16_number(dtype, exponent):
    x, scale = every_bf16(), torch.tensor([2.0**exponent], device=DEVICE)
    row, column = cast_transpose(x, scale, dtype)
    assert_encodes(row, column, x, scale, dtype)
    assert torch.equal(row.float().isnan(), ~x.isfinite())
    assert row.float().nan_to_num().abs().max() == LARGEST[dtype]


def test_inputs_of_any_strides():
    x, one = torch.randn(32, 48, device=DEVICE), torch.ones((), device=DEVICE)
    for strided in (x.t(), x[:, ::2], x[8:24, 16:32]):
        assert_encodes(*cast_transpose(strided, one, E4M3), strided, one, E4M3)
        x8 = strided.to(E4M3)
        assert torch.equal(raw(transpose8(x8)), raw(x8).t())


def test_a_finite_value_saturates_even_where_the_scale_leaves_float32():
    x = torch.full((16, 16), -3e38, device=DEVICE)
    row, column = cast_transpose(x, torch.tensor(2.0**20, device=DEVICE), E4M3)
    assert bool((row.float() == -448).all())
    assert bool((column.float() == -448).all())


@formats
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(48, 80), (17, 33), (272, 144)])
def test_cast_weights_fills_slices_of_banks(n, k, source, dtype):
    w = torch.randn(n, k, device=DEVICE).to(source)
    scale = torch.tensor([2.0**5], device=DEVICE)
    row, column = Bank(n, k, dtype), Bank(k, n, dtype, stride=n + 64)
    amax = torch.zeros(3, device=DEVICE)
    cast_weights(w, scale, dtype, row.matrix, column.matrix, amax[1])
    assert_encodes(row.matrix, column.matrix, w, scale, dtype)
    assert amax.tolist() == [0.0, float(w.abs().max()), 0.0]
    row.assert_rest_untouched()
    column.assert_rest_untouched()


@pytest.mark.parametrize("side", [15, 32])
def test_the_amax_of_weights_accumulates_and_shows_what_is_not_finite(side):
    out = [torch.empty(side, side, dtype=E4M3, device=DEVICE) for _ in range(2)]
    amax, one = torch.zeros(1, device=DEVICE), torch.ones((), device=DEVICE)
    w = torch.full((side, side), -3.0, device=DEVICE)
    w.requires_grad_()
    cast_weights(w, one, E4M3, *out, amax)
    cast_weights(w * 0.5, one, E4M3, *out, amax)
    assert amax.item() == 3.0
    for bad in (-torch.inf, torch.nan):
        w = torch.ones(side, side, device=DEVICE)
        w[-1, -1] = bad
        cast_weights(w, one, E4M3, *out, amax)
        assert torch.equal(amax, torch.tensor([abs(bad)], device=DEVICE).abs()) or amax.isnan().all()
        assert amax.isinf().all() == (bad == -torch.inf)


# What torch.compile sees.


def test_the_operators_are_registered_soundly():
    torch.library.opcheck(transpose8, (random_bytes(32, 48),))
    torch.library.opcheck(transpose8, (random_bytes(64, 48)[:, 16:33],))
    x, scale = torch.randn(32, 48, device=DEVICE), torch.ones((), device=DEVICE)
    utilities = ("test_schema", "test_faketensor")  # the others compare results, which FP8 does not know
    torch.library.opcheck(cast_transpose, (x, scale, E4M3), test_utils=utilities)
    torch.library.opcheck(cast_transpose, (x.t(), scale, E5M2), test_utils=utilities)


@torch_warns_itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("tokens", [48, 35])
def test_the_operators_compile_into_one_graph(backend, tokens):
    def both(x, scale):
        row, column = cast_transpose(x * 2, scale, E4M3)
        return column, transpose8(row)

    torch.compiler.reset()
    x, scale = torch.randn(tokens, 64, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    column, transposed = torch.compile(both, backend=backend, fullgraph=True, dynamic=False)(x, scale)
    assert_encodes(column.t(), transposed, x * 2, scale, E4M3)


class Saved(torch.autograd.Function):
    """Needs the transpose of its input's encoding in the backward pass."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(transpose8((x * scale).to(E4M3)))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x8t,) = ctx.saved_tensors
        return grad * x8t.float().t(), None


@torch_warns_itself
def test_a_transpose_is_saved_for_the_backward_pass_and_not_repeated():
    graphs = []

    def record(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return make_boxed_func(module)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(32, 48, device=DEVICE, requires_grad=True)
    torch.compile(Saved.apply, backend=backend, fullgraph=True)(x, torch.ones((), device=DEVICE)).sum().backward()
    forward, backward = graphs
    assert forward.count("umup.transpose8.default") == 1
    assert backward.count("umup.transpose8.default") == 0
    assert torch.equal(x.grad, x.detach().to(E4M3).float())


def test_everything_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from umup.numerics.kernels.cast import cast_transpose\n"
        "from umup.numerics.kernels.transpose import transpose8\n"
        "row, column = cast_transpose(torch.ones(2, 3), torch.ones(()), torch.float8_e4m3fn)\n"
        "assert transpose8(row).shape == column.shape == (3, 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The kernels, in every launch configuration.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel_of", str(Path(__file__))]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@kernels
@tiles(transpose)
@pytest.mark.parametrize(("m", "n"), [(16, 16), (256, 256), (272, 144), (144, 528)])
def test_kernel_of_transpose(m, n, tile):
    x = Bank(m, n, torch.uint8, stride=n + 48)
    x.matrix.copy_(random_bytes(m, n))
    out = Bank(n, m, torch.uint8)
    transpose.launch(x.matrix, out.matrix, tile)
    assert torch.equal(out.matrix, x.matrix.t())
    out.assert_rest_untouched()


@kernels
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, inside the interpreter
@formats
@tiles(cast)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (272, 144)])
def test_kernel_of_cast_layouts_and_specials(m, n, source, tile, dtype):
    x, scale = on_grid(m, n, dtype, source), torch.tensor([4.0], device=DEVICE)
    row, column = Bank(m, n, dtype, stride=n + 32), Bank(n, m, dtype, stride=m + 80)
    amax = torch.zeros(2, device=DEVICE)
    cast.launch(x, scale, dtype, row.matrix, column.matrix, amax[1], tile)
    assert_encodes(row.matrix, column.matrix, x, scale, dtype)
    assert amax[0] == 0
    assert amax[1].isnan()
    row.assert_rest_untouched()
    column.assert_rest_untouched()


@kernels
@tiles(cast)
def test_kernel_of_cast_takes_the_amax(tile):
    x = torch.zeros(272, 144, device=DEVICE)
    row, column = (torch.empty(shape, dtype=E4M3, device=DEVICE) for shape in [(272, 144), (144, 272)])
    amax, one = torch.full((), 0.25, device=DEVICE), torch.ones((), device=DEVICE)
    for i, j, value in [(3, 3, 0.125), (271, 143, -1.1), (130, 7, 1e-40), (0, 140, 2.3), (5, 5, -torch.inf)]:
        x[i, j] = value
        cast.launch(x, one, E4M3, row, column, amax, tile)
        assert amax == max(0.25, float(x.abs().max()))
    cast.launch(x, one, E4M3, row, column, None, tile)
    assert amax == torch.inf


@gpu
@formats
@tiles(cast)
@pytest.mark.parametrize("exponent", [-100, -7, 0, 3, 60])
def test_compiled_cast_of_every_bf16_number(exponent, tile, dtype):
    x, scale = every_bf16(), torch.tensor([2.0**exponent], device=DEVICE)
    row, column = (torch.empty(256, 256, dtype=dtype, device=DEVICE) for _ in range(2))
    cast.launch(x, scale, dtype, row, column, None, tile)
    assert_encodes(row, column, x, scale, dtype)


@gpu
@formats
@tiles(cast)
def test_compiled_cast_rounds_float32_to_nearest_even(tile, dtype):
    """Every midpoint of two neighbours of the format, and the float32 numbers on either side of it."""
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].unique()
    ties = (grid[1:] + grid[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    x = torch.cat((grid, ties, ties.nextafter(infinity), ties.nextafter(-infinity)))
    x = x.repeat(256)[: 256 * 256].view(256, 256).to(DEVICE)
    row, column = (torch.empty(256, 256, dtype=dtype, device=DEVICE) for _ in range(2))
    one, amax = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    cast.launch(x, one, dtype, row, column, amax, tile)
    assert_encodes(row, column, x, one, dtype)
    assert amax == x.abs().max()


@gpu
@tiles(transpose)
def test_compiled_transpose_at_full_size(tile):
    x = random_bytes(4096, 11008)
    out = torch.empty(11008, 4096, dtype=torch.uint8, device=DEVICE)
    transpose.launch(x, out, tile)
    assert torch.equal(out, x.t())
