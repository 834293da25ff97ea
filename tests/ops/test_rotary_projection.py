"""The fused q, k, v projection against the product, the split and the rotation one after another."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from umup.models import decoder
from umup.models.decoder import Context, Frame, SelfAttention
from umup.nn.fp8 import convert
from umup.nn.modules import Attention, Linear, Residual, RMSNorm, UseScales
from umup.numerics.formats import E4M3, E5M2, encode
from umup.numerics.gemm import W_ENCODE, Formats, Gemm, GemmState, entry, scale_table
from umup.ops.attention import rotary, rotary_tables
from umup.ops.linear import linear
from umup.ops.rotary_projection import rotary_projection

B, S, C, D = 2, 24, 48, 16
FACTORS = (0.7, 1.3, 0.4)
ROTATION = rotary_tables(D, S, 100.0)

every_gemm = pytest.mark.parametrize(
    ("gradient", "backend"), [(E5M2, "emulate"), (E4M3, "emulate"), (E5M2, "scaled_mm")], ids=str
)
every_shape = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)


def product(heads, gradient, backend, dtype=torch.float32):
    """x, W, the constants and the tensors of a product, and gradients for what it makes."""
    gemm = Gemm(*FACTORS, Formats(E4M3, gradient, backend))
    x, w = torch.randn(B, S, C).to(dtype), torch.randn((heads[0] + 2 * heads[1]) * D, C)
    scales = scale_table(gemm, torch.tensor((3, 6, 5), dtype=torch.int32))
    row = encode(w, entry(scales, W_ENCODE), E4M3)
    state = GemmState(row, row.view(torch.uint8).t().contiguous().view(row.dtype), scales)
    upstream = [torch.randn(B, n, S, D).to(dtype) for n in (heads[0], heads[1], heads[1])]
    return x.requires_grad_(), w.requires_grad_(), gemm, state, upstream


def segment(x, w, rotation, heads, gemm, state):
    return rotary_projection(x, w, rotation, heads, gemm.formats, state)


def composite(x, w, rotation, heads, gemm, state):
    qkv = linear(x, w, *gemm[:3], gemm.formats, state)
    sizes = [n * D for n in (heads[0], heads[1], heads[1])]
    q, k, v = (part.view(B, S, -1, D).transpose(1, 2) for part in qkv.split(sizes, -1))
    return rotary(q, *rotation), rotary(k, *rotation), v


def results(function, x, w, heads, gemm, state, upstream, rotation=ROTATION):
    out = function(x, w, rotation, heads, gemm, state)
    return *out, *torch.autograd.grad(out, (x, w), upstream)


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@every_gemm
@every_shape
def test_it_is_the_composite_in_float32(heads, gradient, backend):
    x, w, gemm, state, upstream = product(heads, gradient, backend)
    mine = results(segment, x, w, heads, gemm, state, upstream)
    theirs = results(composite, x, w, heads, gemm, state, upstream)
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(mine[3:], theirs[3:], strict=True):
        assert a.dtype == b.dtype
        # The rotation's sums are the same float32 numbers but for a fused multiply-add, hence few encodings differ.
        assert error(a, b) < 1e-3


@every_shape
def test_in_bfloat16_its_gradients_are_nearer_the_exact_ones(heads):
    x, w, gemm, state, upstream = product(heads, E5M2, "emulate", torch.bfloat16)
    mine = results(segment, x, w, heads, gemm, state, upstream)
    theirs = results(composite, x, w, heads, gemm, state, upstream)
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        assert torch.equal(a, b)
    cos, sin = (t.to(torch.bfloat16).double() for t in ROTATION)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    plain = Gemm(*FACTORS)
    exact = results(composite, *wide, heads, plain, None, [u.double() for u in upstream], (cos, sin))
    for a, b, c in zip(mine[3:], theirs[3:], exact[3:], strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) < 0.04  # of E5M2 encodings whose operand bfloat16 moved over a tie
        assert error(a, c) < 1.02 * error(b, c) < 0.1


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradients_that_are_asked_for_are_computed(frozen):
    x, w, gemm, state, upstream = product((4, 2), E5M2, "emulate")
    reference = results(segment, x, w, (4, 2), gemm, state, upstream)[3:][1 - frozen]
    (x, w)[frozen].requires_grad_(False)
    out = rotary_projection(x, w, ROTATION, (4, 2), gemm.formats, state)
    assert torch.equal(torch.autograd.grad(out, (x, w)[1 - frozen], upstream)[0], reference)


def test_outputs_that_nobody_uses_have_no_gradient():
    x, w, gemm, state, upstream = product((4, 2), E5M2, "emulate")
    q, _, _ = rotary_projection(x, w, ROTATION, (4, 2), gemm.formats, state)
    _, dw = torch.autograd.grad(q, (x, w), upstream[0])
    assert dw[: 4 * D].abs().min() > 0
    assert dw[4 * D :].abs().max() == 0


def test_what_is_saved_is_the_encoded_input():
    saved = []
    x, w, gemm, state, _ = product((4, 2), E5M2, "emulate", torch.bfloat16)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary_projection(x, w, ROTATION, (4, 2), gemm.formats, state)
    ours = [t for t in saved if t.data_ptr() not in {part.data_ptr() for part in state}]
    assert sorted((tuple(t.shape), t.element_size()) for t in ours) == [((S, D // 2), 2)] * 2 + [((B * S, C), 1)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(bad):
    x, w, gemm, state, upstream = product((4, 2), E5M2, "emulate")
    upstream[1][1, 0, 3, 5] = bad
    *_, dx, dw = results(segment, x, w, (4, 2), gemm, state, upstream)
    assert dx.isnan().any(-1).nonzero().tolist() == [[1, 3]]
    assert dw.isnan().all(-1).nonzero().flatten().tolist() == [4 * D + 5, 4 * D + 5 + D // 2]


# What a compiler makes of it.


def check_compiled(dtype, backend, compiler):
    heads = (4, 2)
    x, w, gemm, state, upstream = product(heads, E5M2, backend, dtype)

    def function(x, w, rotation, heads, gemm, state):
        return segment(2 * x, w, rotation, heads, gemm, state)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
    for mine, eager in zip(
        results(compiled, x, w, heads, gemm, state, upstream),
        results(function, x, w, heads, gemm, state, upstream),
        strict=True,
    ):
        assert eager.abs().max() > 0
        assert mine.dtype == eager.dtype
        assert (mine - eager).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-6) * eager.abs().max()


every_compilation = pytest.mark.parametrize(
    ("dtype", "backend"), [(d, b) for d in (torch.float32, torch.bfloat16) for b in ("emulate", "scaled_mm")], ids=str
)


@every_compilation
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
def test_traced_gradients_are_eagers(dtype, backend):
    check_compiled(dtype, backend, "aot_eager")


@every_compilation
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_gradients_are_eagers(dtype, backend):
    check_compiled(dtype, backend, "inductor")


# Where the decoder uses it.


def attention(formats="", biased=False, dynamic=False, interleaved=False):
    bias = UseScales() if biased else None
    q, k, v = (Linear(C, n, UseScales(), bias) for n in (4 * D, 2 * D, 2 * D))
    out = Linear(4 * D, C, UseScales())
    norm, sdpa, residual = RMSNorm(C, 1e-5, None), Attention(D**-0.5, 1.0, 0.0), Residual(1.0, 1.0, 1.0, 1.0)
    frame = Frame(norm, False, torch.nn.Identity(), residual)
    block = SelfAttention(frame, 0, D, interleaved, q, k, v, sdpa, out)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=C**-0.5)
    convert(block, dict.fromkeys(formats, Formats(E4M3, E5M2, "emulate", dynamic)))
    return block


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return rotary_projection(*args)

    monkeypatch.setattr(decoder, "rotary_projection", counted)
    return made


def train(block, x, rotation=ROTATION):
    out = block(x, Context(rotation))
    return out, *torch.autograd.grad(out, list(block.parameters()), torch.ones_like(out) / 100)


def test_the_decoder_uses_it_with_the_composites_results(calls):
    block, x = attention(formats="qkv"), torch.randn(B, S, C)
    fused = train(block, x)
    assert len(calls) == 1
    block.q.matmul.watched = True
    composed = train(block, x)
    assert len(calls) == 1
    assert torch.equal(fused[0], composed[0])
    for a, b in zip(fused[1:], composed[1:], strict=True):
        assert error(a, b) < 1e-3


@pytest.mark.parametrize(
    ("made", "length", "rotation"),
    [
        ({"formats": "qkv"}, S - 1, (ROTATION[0][: S - 1], ROTATION[1][: S - 1])),
        ({"formats": "qkv"}, S, None),
        ({"formats": "qkv", "biased": True}, S, ROTATION),
        ({"formats": "qkv", "dynamic": True}, S, ROTATION),
        ({"formats": "qv"}, S, ROTATION),
        ({}, S, ROTATION),
        ({"formats": "qkv"}, S, (ROTATION[0][:, ::2], ROTATION[1][:, ::2])),
        ({"formats": "qkv", "interleaved": True}, S, ROTATION),
    ],
    ids=["odd tokens", "no rotation", "biased", "dynamic", "one spared", "not converted", "in part", "interleaved"],
)
def test_the_decoder_takes_the_composite_elsewhere(calls, made, length, rotation):
    train(attention(**made), torch.randn(1 if length % 2 else B, length, C), rotation)
    assert not calls


def test_no_gradients_no_segment(calls):
    block = attention(formats="qkv")
    with torch.no_grad():
        block(torch.randn(B, S, C), Context(ROTATION))
    assert not calls
