"""The gated SiLU's backward kernel: values, layouts and what is no number; run in three ways, as test_kernels.py says.

Values are held between two encodings: of the exact result made a little smaller and a little larger.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umup.numerics.kernels import swiglu
from umup.numerics.kernels.swiglu import swiglu_backward

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter")
formats = pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E4M3), (E4M3, E5M2)], ids=["E5M2", "E4M3", "swapped"])
tiles = pytest.mark.parametrize("tile", swiglu.CONFIGS, ids=lambda t: "x".join(map(str, t)))
sources = pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, E4M3], ids=["bf16", "fp32", "gu in E4M3"])
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inside the interpreter


def scalar(value):
    return torch.tensor([value], device=DEVICE)


def inputs(tokens, width, source):
    """da and gate | up, in rows longer than needed."""
    da, gu = torch.randn(tokens, width + 16, device=DEVICE), 2 * torch.randn(tokens, 2 * width + 32, device=DEVICE)
    da = da.to(torch.bfloat16 if source == E4M3 else source)
    return da[:, :width], gu.to(source)[:, : 2 * width]


def exact(da, gu, mult, output):
    """The two results in float64, the gradient by differentiating the formula."""
    gu = gu.float().double().requires_grad_()
    gate, up = gu.chunk(2, -1)
    a = output * up * gate * torch.sigmoid(mult * gate)
    return torch.autograd.grad(a, gu, da.double())[0], a.detach()


def encoded(x, scale, dtype):
    """By the policy."""
    value = torch.where(x.isinf(), torch.nan, x.float() * scale)
    return value.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def raw(x):
    """The bytes of x, with one byte for every NaN."""
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8))


def assert_encodes(found, x, scale, terms=None, slack=1e-5):
    """`terms`: the size of what x is a difference of; float32 knows x to a share of that."""
    off = slack * (x if terms is None else terms).abs()
    ends = [encoded(end, scale, found.dtype).float() for end in (x - off, x + off)]
    found = found.float()
    assert bool((found >= torch.minimum(*ends)).all())
    assert bool((found <= torch.maximum(*ends)).all())


def assert_right(found, da, gu, mult, output, scales):
    row, row_t, a_t = found
    assert all(out.is_contiguous() for out in found)
    gradient, a = exact(da, gu, mult, output)
    up = gu.double().chunk(2, -1)[1]  # SiLU's slope, a difference, has a zero at -1.28
    slope_terms = torch.cat((da.double() * output * up, torch.zeros_like(up)), -1)
    assert_encodes(row, gradient, scales[0], slope_terms.abs() + gradient.abs())
    assert_encodes(a_t.view(torch.uint8).t().contiguous().view(a_t.dtype), a, scales[1])
    assert torch.equal(row_t.view(torch.uint8), row.view(torch.uint8).t())
    assert row.float().unique().numel() > 20  # the scales leave something to see


@formats
@sources
@pytest.mark.parametrize("mult", [1.0, 0.6])
@pytest.mark.parametrize(("tokens", "width"), [(48, 80), (3, 5), (1, 16), (272, 144)])
def test_the_operator_encodes_the_derivative(tokens, width, mult, source, dtypes):
    torch.manual_seed(0)
    da, gu = inputs(tokens, width, source)
    scales = 4.0, 0.5
    found = swiglu_backward(da, gu, mult, 1.7, *map(scalar, scales), *dtypes)
    assert [out.dtype for out in found] == [dtypes[0], dtypes[0], dtypes[1]]
    if tokens > 1 and width > 5:
        assert_right(found, da, gu, mult, 1.7, scales)
    assert [tuple(out.shape) for out in found] == [(tokens, 2 * width), (2 * width, tokens), (width, tokens)]


def test_gate_comes_first_and_the_temperature_is_inside():
    one, gate, up = scalar(1.0), 1.5, 3.0
    s = torch.sigmoid(torch.tensor(0.5 * gate))
    gu = torch.tensor([[gate, up]], device=DEVICE)
    row, _, a = swiglu_backward(one.view(1, 1), gu, 0.5, 2.0, one, one, E4M3, E4M3)
    expected = torch.stack((2 * up * s * (1 + 0.5 * gate * (1 - s)), 2 * gate * s)).to(E4M3).float()
    assert row.float().tolist() == [expected.tolist()]
    assert a.item() == (2 * up * gate * s).to(E4M3).item()


def special(tokens, width, source):
    """Powers of two, so that with mult 0 and output 2 every result is one; some saturate, and some are no numbers."""
    generator = torch.Generator().manual_seed(1)

    def powers(columns):
        exponent = torch.randint(-3, 6, (tokens, columns), generator=generator)
        sign = torch.randint(-1, 2, (tokens, columns), generator=generator)
        return sign * 2.0**exponent

    da, gu = powers(width), powers(2 * width)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    da[1, :3] = bad
    if not (INTERPRETED and source == E4M3):  # which it would read as 480
        gu[2, 3:6], gu[-1, -3:] = bad, bad
    return da.to(torch.bfloat16 if source == E4M3 else source).to(DEVICE), gu.to(source).to(DEVICE)


def assert_special(found, da, gu, dtypes, scales):
    row, row_t, a_t = found
    gate, up = gu.float().chunk(2, -1)
    half = 0.5 + 0.0 * gate  # what is no number stays none
    pull = 2 * da.float() * half
    gradient, a = torch.cat((pull * up * (1 + 0 * gate * half), pull * gate), -1), 2 * gate * half * up
    expected = raw(encoded(gradient, scales[0], dtypes[0]))
    assert torch.equal(raw(row), expected)
    assert torch.equal(raw(row_t), expected.t())
    assert torch.equal(raw(a_t), raw(encoded(a, scales[1], dtypes[1])).t())
    assert row.float().isnan().any()
    assert row.float().nan_to_num().abs().max() == LARGEST[dtypes[0]]


@formats
@sources
def test_what_is_no_number_and_what_is_too_large(source, dtypes):
    da, gu = special(32, 48, source)
    scales = 2.0**8, 2.0**2
    found = swiglu_backward(da, gu, 0.0, 2.0, *map(scalar, scales), *dtypes)
    assert_special(found, da, gu, dtypes, scales)


def test_far_gates_give_numbers():
    gu = torch.tensor([[-300.0, 300.0, 2.0, 2.0]], device=DEVICE)
    row, _, a = swiglu_backward(torch.ones(1, 2, device=DEVICE), gu, 1.0, 1.0, scalar(1.0), scalar(0.5), E5M2, E4M3)
    assert row.float().tolist() == [[0, 2, 0, 320]]
    assert a.float().flatten().tolist() == [0, 288]


# What torch.compile sees.


@pytest.mark.parametrize("source", [torch.bfloat16, E4M3], ids=str)
def test_the_operator_is_registered_soundly(source):
    da, gu = inputs(32, 48, source)
    args = (da, gu, 1.0, 1.7, scalar(1.0), scalar(1.0), E5M2, E4M3)
    utilities = (
        ("test_schema", "test_faketensor") if source == torch.bfloat16 else "test_faketensor"
    )  # no FP8 arithmetic
    torch.library.opcheck(swiglu_backward, args, test_utils=utilities)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo raises some of its own
def test_the_operator_compiles_into_one_graph():
    torch.compiler.reset()
    da, gu = inputs(32, 48, torch.bfloat16)
    args = (1.0, 1.7, scalar(4.0), scalar(1.0), E5M2, E4M3)
    compiled = torch.compile(lambda da, gu: swiglu_backward(da * 2, gu, *args), backend="aot_eager", fullgraph=True)
    for mine, eager in zip(compiled(da, gu), swiglu_backward(da * 2, gu, *args), strict=True):
        assert torch.equal(mine.view(torch.uint8), eager.view(torch.uint8))


def test_it_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from umup.numerics.kernels.swiglu import swiglu_backward\n"
        "one, e = torch.ones(()), torch.float8_e4m3fn\n"
        "assert len(swiglu_backward(torch.ones(2, 3), torch.ones(2, 6), 1.0, 1.0, one, one, e, e)) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The kernel, in every launch configuration.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel_of", str(Path(__file__))]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


class Outputs:
    """The three results inside larger buffers, whose other bytes must not change."""

    def __init__(self, tokens, width, dtypes):
        shapes = [(tokens, 2 * width), (2 * width, tokens), (width, tokens)]
        shape = [(m + 2, n) for m, n in shapes]
        self.bytes = [torch.full(s, 0xA5, dtype=torch.uint8, device=DEVICE) for s in shape]
        self.matrices = [b[1:-1].view(d) for b, d in zip(self.bytes, (dtypes[0], *dtypes), strict=True)]

    def assert_rest_untouched(self):
        for matrix, everything in zip(self.matrices, self.bytes, strict=True):
            matrix.view(torch.uint8).fill_(0xA5)
            assert bool((everything == 0xA5).all())


@kernels
@numpy_warns
@formats
@tiles
@sources
@pytest.mark.parametrize(("tokens", "width"), [(16, 16), (272, 144)])
def test_kernel_of_swiglu_layouts_and_specials(tokens, width, source, tile, dtypes):
    da, gu = special(tokens, width, source)
    scales, out = (2.0**8, 2.0**2), Outputs(tokens, width, dtypes)
    swiglu.launch(da, gu, 0.0, 2.0, *map(scalar, scales), *out.matrices, tile)
    assert_special(out.matrices, da, gu, dtypes, scales)
    out.assert_rest_untouched()


@kernels
@numpy_warns
@tiles
@sources
def test_kernel_of_swiglu_values(source, tile):
    torch.manual_seed(0)
    da, gu = inputs(144, 80, source)
    scales, out = (4.0, 0.5), Outputs(144, 80, (E5M2, E4M3)).matrices
    swiglu.launch(da, gu, 0.6, 1.7, *map(scalar, scales), *out, tile)
    if not INTERPRETED:
        assert_right(out, da, gu, 0.6, 1.7, scales)
        return
    gradient, a = exact(da, gu, 0.6, 1.7)
    for found, x in ((out[0], gradient * scales[0]), (out[2], (a * scales[1]).t())):
        # Rounding that would carry into the exponent leaves the interpreter with half of the value.
        near = [(found.double() * by - x).abs() <= 0.26 * x.abs() + 2.0**-9 for by in (1, 2)]
        assert near[0].float().mean() > 0.8
        assert bool((near[0] | near[1]).all())


@gpu
@tiles
@pytest.mark.parametrize("source", [torch.bfloat16, E4M3], ids=str)
def test_compiled_swiglu_at_full_size(source, tile):
    torch.manual_seed(0)
    da, gu = inputs(4096, 11008, source)
    out = Outputs(4096, 11008, (E5M2, E4M3)).matrices
    swiglu.launch(da, gu, 1.0, 1.7, scalar(4.0), scalar(0.5), *out, tile)
    assert_right(out, da, gu, 1.0, 1.7, (4.0, 0.5))
