"""The backward pass of a rotation in FP8 against plain torch; the ways to run the kernel are test_kernels.py's.

In Triton's interpreter, whose FP8 cast does not round, quarter turns keep values on the format's grid, hence exact.
Turns by any angle need a GPU; there a float32 sum beside a tie may round the other way than the float64 reference.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umup.numerics.kernels import rope
from umup.numerics.kernels.rope import rope_backward
from umup.ops.attention import rotary

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter")
formats = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["E4M3", "E5M2"])
tiles = pytest.mark.parametrize("tile", rope.CONFIGS, ids=lambda t: "x".join(map(str, t)))

# Memory orders of a (batch, heads, positions, size) tensor; SDPA's backward pass returns the first two.
ORDERS = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}
B, H, KV = 2, 3, 2


def stored(x, order, slack=0):
    """x with its dimensions in memory in the given order, rows apart by `slack` elements."""
    order = ORDERS[order]
    memory = torch.full((*(x.shape[i] for i in order[:3]), x.shape[3] + slack), torch.nan, dtype=x.dtype, device=DEVICE)
    view = memory[..., : x.shape[3]].permute([order.index(i) for i in range(4)])
    return view.copy_(x)


def tables(positions, half, dtype=torch.bfloat16, quarters=False):
    if quarters:
        turns = torch.randint(4, (positions, half))
        cos, sin = (torch.tensor(values, dtype=dtype)[turns] for values in ([1, 0, -1, 0], [0, 1, 0, -1]))
    else:
        angles = torch.rand(positions, half) * 6.3
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return cos.to(DEVICE), sin.to(DEVICE)


def heads_of(positions, size, dtype=torch.bfloat16, make=torch.randn):
    return [make(B, heads, positions, size).to(dtype).to(DEVICE) for heads in (H, KV, KV)]


def on_grid(dtype):
    """A maker of values times 4 that the format holds, some out of its range, and a few special ones."""

    def make(*shape):
        x = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype).float().nan_to_num(1.0, 2.0, -2.0) / 4
        x[0, 0, 0, 1], x[0, -1, 3, 2], x[-1, 0, -1, -1] = 1e9, -1e9, torch.nan
        return x

    return make


def joined(dq, dk, dv, cos, sin):
    """float64 q | k | v rows: dq and dk as complex numbers, turned back by the angles."""
    turn = torch.complex(cos.double(), -sin.double())
    parts = []
    for grad in (dq, dk):
        pairs = torch.complex(*grad.double().chunk(2, -1)) * turn
        parts.append(torch.cat((pairs.real, pairs.imag), -1))
    rows = [part.permute(0, 2, 1, 3).reshape(B * dq.shape[2], -1) for part in (*parts, dv.double())]
    return torch.cat(rows, -1)


def reference(tensors, scale, dtype):
    value = joined(*tensors)
    value = torch.where(value.isinf(), torch.nan, value) * scale
    return value.clamp(-LARGEST[dtype], LARGEST[dtype]).float().to(dtype)


def raw(x):
    """The bytes of x as integers, with one number for every NaN and for either zero."""
    return torch.where(x.float().isnan(), 0x7F, torch.where(x.float() == 0, 0, x.view(torch.uint8))).int()


def assert_encodes(row, column, tensors, scale, dtype, share=0.0):
    """Both layouts agree, with the reference too, but for a share of elements that are a step away."""
    assert row.dtype == column.dtype == dtype
    assert row.is_contiguous()
    assert column.is_contiguous()
    assert torch.equal(raw(column), raw(row).t())
    expected = reference(tensors, scale, dtype)
    different = raw(row) != raw(expected)
    assert different.double().mean() <= share
    worst = (row.float().double() - expected.double()).abs()[different]
    step = 2.0 ** -(2 if dtype == E5M2 else 3) * expected.double().abs()[different].clamp(min=2.0**-6)
    assert bool((worst <= step).all())


@formats
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "size"), [(8, 16), (5, 6), (1, 2), (24, 32)])
def test_the_encoded_gradient_in_both_layouts(positions, size, source, dtype):
    cos, sin = tables(positions, size // 2, source)
    tensors = *heads_of(positions, size, source), cos, sin
    row, column = rope_backward(*tensors, torch.tensor(8.0, device=DEVICE), dtype)
    assert row.shape == (B * positions, (H + 2 * KV) * size)
    assert_encodes(row, column, tensors, 8.0, dtype, share=0.02)


@formats
@pytest.mark.parametrize("order", ORDERS)
def test_quarter_turns_are_exact_in_any_memory_order(order, dtype):
    grads = [stored(g, order, slack=8) for g in heads_of(8, 16, make=on_grid(dtype))]
    tensors = *grads, *tables(8, 8, quarters=True)
    assert_encodes(*rope_backward(*tensors, torch.tensor([4.0], device=DEVICE), dtype), tensors, 4.0, dtype)


def test_it_undoes_the_rotation_of_autograd():
    cos, sin = tables(8, 8, torch.float32)
    q, k, v = (torch.randn(B, n, 8, 16, device=DEVICE, requires_grad=True) for n in (H, KV, KV))
    grads = [torch.randn_like(t) for t in (q, k, v)]
    outs = rotary(q, cos, sin), rotary(k, cos, sin), v
    found = torch.autograd.grad(outs, (q, k, v), grads)
    expected = torch.cat([g.transpose(1, 2).flatten(2) for g in found], -1).flatten(0, 1)
    row, _ = rope_backward(*grads, cos, sin, torch.ones((), device=DEVICE), E4M3)
    assert (row.float() - expected).abs().max() <= 2.0**-4 * expected.abs().max()


def test_the_operator_is_registered_soundly():
    utilities = ("test_schema", "test_faketensor")  # the others compare results, which FP8 does not know
    cos, sin = tables(8, 8)
    for order in ORDERS:
        grads = [stored(g, order) for g in heads_of(8, 16)]
        torch.library.opcheck(
            rope_backward, (*grads, cos, sin, torch.ones(1, device=DEVICE), E5M2), test_utils=utilities
        )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel_of", str(Path(__file__))]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def launched(tensors, scale, dtype, tile):
    """Row and column, out of buffers whose other bytes must not change."""
    rows, features = B * tensors[0].shape[2], (H + 2 * KV) * tensors[0].shape[3]
    buffers = [torch.full((n * m + 64,), 0xA5, dtype=torch.uint8, device=DEVICE) for n, m in [(rows, features)] * 2]
    row, column = (b[32:-32].view(dtype).view(n, -1) for b, n in zip(buffers, (rows, features), strict=True))
    rope.launch(*tensors, torch.tensor([scale], device=DEVICE), row, column, tile)
    for b in buffers:
        assert bool((b[:32] == 0xA5).all())
        assert bool((b[-32:] == 0xA5).all())
    return row, column


@kernels
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@formats
@tiles
@pytest.mark.parametrize(("positions", "size"), [(8, 16), (72, 48), (40, 128)])
def test_kernel_of_rope_turns_back_by_quarters(positions, size, tile, dtype):
    made = heads_of(positions, size, make=on_grid(dtype))
    grads = [stored(g, order, slack=8) for g, order in zip(made, ORDERS, strict=True)]
    tensors = *grads, *tables(positions, size // 2, quarters=True)
    assert_encodes(*launched(tensors, 4.0, dtype, tile), tensors, 4.0, dtype)


@kernels
@tiles
def test_kernel_of_rope_leaves_an_infinite_value_alone_with_its_pair(tile):
    grads = heads_of(8, 16, make=torch.ones)
    grads[2][1, 1, 5, 3] = -torch.inf
    grads[0][0, 2, 4, 9] = torch.inf
    row, _ = launched((*grads, *tables(8, 8)), 1.0, E4M3, tile)
    spoilt = row.float().isnan().nonzero().tolist()
    assert spoilt == [[4, 2 * 16 + 1], [4, 2 * 16 + 9], [8 + 5, (H + KV + 1) * 16 + 3]]


@gpu
@formats
@tiles
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_compiled_rope_at_full_size(order, tile, dtype):
    grads = [stored(g, order) for g in heads_of(2048, 128)]
    tensors = *grads, *tables(2048, 64)
    assert_encodes(*launched(tensors, 2.0, dtype, tile), tensors, 2.0, dtype, share=1e-3)
