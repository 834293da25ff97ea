"""The loss kernel: each token's loss, its gradient in every dtype, and what is no number; run in three ways, as
test_kernels.py says.

The exact gradient is autograd's, in float64. Its encoding is held between those of the exact value made a little
smaller and a little larger; in the interpreter, which does not round to FP8, within a factor of two.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from umup.numerics.kernels import cross_entropy
from umup.numerics.kernels.cross_entropy import losses_alone, losses_and_gradient, token_losses

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# The most by which rounding moves a value; the interpreter drops bits, and in FP8 a carry with them.
STEP = {E4M3: 0.5, E5M2: 0.5, BF16: 2.0**-8, FP32: 1e-6}
SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16, BF16: 1e-37, FP32: 1e-37}

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    STEP[BF16] = 2.0**-7
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter")
tiles = pytest.mark.parametrize("tile", cross_entropy.CONFIGS, ids=lambda t: "x".join(map(str, t)))
outputs = pytest.mark.parametrize("dtype", STEP, ids=str)
# Interpreted arithmetic, numpy's, warns of what the tests make happen.
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MULTIPLIER, GRAD, SCALE = 0.7, -1.3, 32.0


def logits_of(tokens, vocab, source):
    """Rows of a wider matrix: ordinary ones, and the extremes that a row may hold; the targets, at both ends too."""
    z = 3 * torch.randn(tokens, vocab + 16)
    z[1] = 1.5
    z[2] = torch.where(torch.rand(vocab + 16) < 0.5, 300.0, -300.0)
    z[3, 5:] = -torch.inf
    targets = torch.randint(vocab, (tokens,))
    targets[:4] = torch.tensor([0, vocab - 1, vocab // 2, 3])
    return z.to(DEVICE, source)[:, :vocab], targets.to(DEVICE)


def exact(z, targets):
    """Losses and gradient in float64."""
    wide = (MULTIPLIER * z.double()).requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none")
    return losses.detach(), GRAD * torch.autograd.grad(losses.sum(), wide)[0]


def assert_losses(found, expected):
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)  # of logits that reach 210


def assert_gradient(found, expected, scale=1.0):
    """Right within float32's error in p, and in p - 1 at the target, before the encoding."""
    dtype, target = found.dtype, expected * GRAD < 0
    value, error = expected * scale, scale * (2e-5 * (expected + GRAD * target).abs() + 2e-7 * target)
    mine = found.float().double()
    if dtype in LARGEST and not INTERPRETED:
        limit = LARGEST[dtype]
        low, high = ((value + e).float().clamp(-limit, limit).to(dtype).float() for e in (-error, error))
        assert bool(((low <= mine) & (mine <= high)).all())
    else:
        assert bool(((mine - value).abs() <= STEP[dtype] * value.abs() + error + SMALLEST[dtype]).all())


def scale_for(dtype, value=SCALE):
    return torch.tensor([[value]], device=DEVICE) if dtype in LARGEST else None


class Rows:
    """Rows of a larger buffer, whose other bytes must not change."""

    def __init__(self, tokens, vocab, dtype):
        size = dtype.itemsize
        self.bytes = torch.full((tokens + 2, (vocab + 16) * size), 0xA5, dtype=torch.uint8, device=DEVICE)
        self.matrix = self.bytes.view(dtype)[1:-1, :vocab]

    def assert_rest_untouched(self):
        self.matrix.zero_() if self.matrix.element_size() > 1 else self.matrix.view(torch.uint8).zero_()
        size = self.matrix.element_size() * self.matrix.shape[1]
        self.bytes[1:-1, :size] = 0xA5
        assert bool((self.bytes == 0xA5).all())


def check(run, tokens, vocab, dtype, source):
    """`run(logits, targets, scale, gradient) -> losses` against the exact ones; gradient may be None."""
    z, targets = logits_of(tokens, vocab, source)
    out, scale = Rows(tokens, vocab, dtype), scale_for(dtype)
    losses, gradient = exact(z, targets)
    assert_losses(run(z, targets, scale, out.matrix), losses)
    assert_gradient(out.matrix, gradient, 1.0 if scale is None else SCALE)
    out.assert_rest_untouched()
    assert_losses(run(z, targets, None, None), losses)


# The operator: the torch path, and on a GPU the kernel.


@outputs
@pytest.mark.parametrize("source", [BF16, FP32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [6, 48, 1000, 4099])
def test_losses_and_gradients_are_exact_to_their_encoding(vocab, source, dtype):
    check(lambda z, t, scale, out: token_losses(z, t, MULTIPLIER, GRAD, scale, out), 5, vocab, dtype, source)


def test_float64_stays_float64():
    z, targets = logits_of(5, 48, torch.float64)
    out = torch.empty_like(z)
    losses, gradient = exact(z, targets)
    torch.testing.assert_close(token_losses(z, targets, MULTIPLIER, GRAD, None, out), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_what_exceeds_the_format_saturates_on_both_sides(dtype):
    z, targets = torch.full((1, 48), -torch.inf, device=DEVICE), torch.tensor([5], device=DEVICE)
    z[0, 7] = 0.0
    out = torch.empty(1, 48, dtype=dtype, device=DEVICE)
    token_losses(z, targets, 1.0, 1e6, scale_for(dtype), out)
    expected = torch.zeros(1, 48, device=DEVICE)
    expected[0, 7], expected[0, 5] = LARGEST[dtype], -LARGEST[dtype]
    assert torch.equal(out.float(), expected)


@outputs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("at", [0, 47])
def test_what_is_no_number_spoils_its_row_and_no_other(bad, at, dtype):
    z, targets = torch.zeros(3, 48, dtype=BF16, device=DEVICE), torch.tensor([5, 0, 5], device=DEVICE)
    z[1, at] = bad
    out = torch.zeros(3, 48, dtype=dtype, device=DEVICE)
    losses = token_losses(z, targets, 1.0, 1.0, scale_for(dtype), out)
    assert losses.isnan().tolist() == [False, True, False]
    assert out.float().isnan().all(1).tolist() == [False, True, False]
    assert out.float()[::2].isfinite().all()


@pytest.mark.parametrize("target", [-1, 48, 2**40])
def test_a_target_outside_the_vocabulary_never_passes_for_a_loss(target):
    z, targets = torch.zeros(1, 48, device=DEVICE), torch.tensor([target], device=DEVICE)
    if DEVICE == "cuda":
        assert token_losses(z, targets, 1.0, 1.0, None, torch.empty_like(z)).isnan().all()
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            token_losses(z, targets, 1.0, 1.0, None, torch.empty_like(z))


def test_the_operator_is_registered_soundly():
    z, targets = logits_of(5, 48, BF16)
    torch.library.opcheck(losses_and_gradient, (z, targets, 1.0, 1.0, None, torch.empty_like(z)))
    torch.library.opcheck(losses_alone, (z.double(), targets, 1.0))
    arguments = z, targets, 1.0, 1.0, scale_for(E5M2), torch.zeros(5, 48, dtype=E5M2, device=DEVICE)
    # The others compare results, which FP8 does not know.
    torch.library.opcheck(losses_and_gradient, arguments, test_utils="test_faketensor")


# The kernel, in every launch configuration.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel_of", str(Path(__file__))]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def launched(tile):
    def run(z, targets, scale, out):
        losses = torch.empty(len(z), device=DEVICE)
        cross_entropy.launch(z, targets, MULTIPLIER, GRAD, scale, losses, out, tile)
        return losses

    return run


@kernels
@numpy_warns
@tiles
@outputs
@pytest.mark.parametrize("source", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("blocks", "more"), [(0, 6), (1, 0), (1, 1), (2, 0), (2, -3)], ids=str)
def test_kernel_of_cross_entropy(blocks, more, source, dtype, tile):
    """Vocabularies of less than a block, of whole blocks, and of an odd number of columns more or less."""
    check(launched(tile), 5, blocks * tile.columns + more, dtype, source)


@kernels
@numpy_warns
@tiles
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32] if INTERPRETED else STEP, ids=str)
def test_kernel_of_cross_entropy_keeps_what_is_no_number(bad, dtype, tile):
    z, targets = torch.zeros(2, tile.columns + 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    z[1, -1] = bad
    out = torch.zeros(z.shape, dtype=dtype, device=DEVICE)
    losses = launched(tile)(z, targets, scale_for(dtype), out)
    assert losses.isnan().tolist() == [False, True]
    assert out.float().isnan().all(1).tolist() == [False, True]
    assert out.float()[0].isfinite().all()


@kernels
@numpy_warns
@tiles
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_kernel_of_cross_entropy_saturates(dtype, sign, tile):
    z, targets = torch.full((1, tile.columns + 16), -1e4, device=DEVICE), torch.tensor([5], device=DEVICE)
    z[0, -1] = 0.0
    out = torch.empty(z.shape, dtype=dtype, device=DEVICE)
    launched(tile)(z, targets, scale_for(dtype, 1e6 * sign / GRAD), out)
    expected = torch.zeros(z.shape, device=DEVICE)
    expected[0, -1], expected[0, 5] = sign * LARGEST[dtype], -sign * LARGEST[dtype]
    assert torch.equal(out.float(), expected)


@kernels
@numpy_warns
@pytest.mark.parametrize("target", [-1, 48])
def test_kernel_of_cross_entropy_reads_and_writes_no_target_outside(target):
    z, targets = torch.zeros(1, 48, device=DEVICE), torch.tensor([target], device=DEVICE)
    out = Rows(1, 48, FP32)
    assert launched(cross_entropy.DEFAULT)(z, targets, None, out.matrix).isnan().all()
    out.assert_rest_untouched()


@gpu
@tiles
@outputs
@pytest.mark.parametrize(("tokens", "vocab"), [(512, 32768), (128, 131072), (128, 50257)])
def test_compiled_cross_entropy_at_full_size(tokens, vocab, dtype, tile):
    check(launched(tile), tokens, vocab, dtype, BF16)
