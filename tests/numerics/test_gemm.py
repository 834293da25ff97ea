"""The three products against float64 on the operands that they really multiply, on both backends."""

import math

import pytest
import torch

from umup.errors import ConfigError
from umup.numerics.formats import E4M3, E5M2, encode, find_format, quantise
from umup.numerics.gemm import (
    DW_DECODE,
    DX_DECODE,
    G_ENCODE,
    W_ENCODE,
    X_ENCODE,
    Y_DECODE,
    Formats,
    Gemm,
    dynamic_gradient,
    dynamic_input,
    encode_gradient,
    encode_input,
    entry,
    forward_product,
    input_product,
    plain_product,
    power_of_two,
    require_fp8,
    scale_table,
    weight_product,
)

FACTORS = (0.7, 1.3, 0.4)
EXPONENTS = {"x": 1, "g": -2, "w": 3}
FAN_IN, FAN_OUT = 48, 32
BACKENDS = ("emulate", "scaled_mm")
PAIRS = {"E4M3/E5M2": (E4M3, E5M2), "E4M3/E4M3": (E4M3, E4M3), "E3M2/E4M1": tuple(map(find_format, ("E3M2", "E4M1")))}
CASES = [(pair, b) for pair in PAIRS for b in BACKENDS if pair != "E3M2/E4M1" or b == "emulate"]
# float32 keeps the accumulator, but for the order of its sum; bfloat16 rounds it by half of 2^-8 at most.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
every_case = pytest.mark.parametrize(("pair", "backend"), CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gemm_of(backend="emulate", pair="E4M3/E5M2", factors=FACTORS, dynamic=False):
    return Gemm(*factors, Formats(*PAIRS[pair], backend, dynamic))


def scales_of(gemm, **exponents):
    return scale_table(gemm, torch.tensor(list((EXPONENTS | exponents).values()), dtype=torch.int32))


def operands(tokens=64, dtype=torch.float32):
    shapes = (tokens, FAN_IN), (tokens, FAN_OUT), (FAN_OUT, FAN_IN)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def products(gemm, scales, x, g, w, dtype=torch.float32):
    """y, dx, dW as ops/linear.py makes them."""
    formats = gemm.formats
    x8, g8 = encode_input(x, formats, scales), encode_gradient(g, formats, scales)
    row = encode(w, entry(scales, W_ENCODE), formats.forward)
    column = row.view(torch.uint8).t().contiguous().view(row.dtype) if row.element_size() == 1 else row.t()
    return (
        forward_product(x8, row, formats, scales, dtype),
        input_product(g8, column, formats, scales, dtype),
        weight_product(g8, x8, formats, scales, dtype),
    )


def rounded(tensor, fmt, exponent):
    """What an operand is worth: float64, rounded at its scale."""
    return quantise(tensor.double() * 2.0**exponent, fmt) * 2.0**-exponent


def references(x, g, w, forward, gradient, factors=FACTORS, exponents=EXPONENTS):
    """y, dx, dW in float64, each with the sum of its terms' magnitudes."""
    x, w = rounded(x, forward, exponents["x"]), rounded(w, forward, exponents["w"])
    g = rounded(g, gradient, exponents["g"])
    pairs = ((x, w.t()), (g, w), (g.t(), x))
    return [(f * a @ b, f * a.abs() @ b.abs()) for f, (a, b) in zip(factors, pairs, strict=True)]


def assert_products(found, expected, dtype=torch.float32):
    for product, (reference, magnitude), name in zip(found, expected, ("y", "dx", "dW"), strict=True):
        assert product.dtype == dtype
        assert product.shape == reference.shape
        bound = TOLERANCE[torch.float32] * magnitude + TOLERANCE[dtype] * reference.abs()
        assert ((product.double() - reference).abs() <= bound).all(), name


@every_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_three_products_are_those_of_the_encoded_operands(pair, backend, dtype):
    gemm, tensors = gemm_of(backend, pair), operands(dtype=dtype)
    found = products(gemm, scales_of(gemm), *tensors, dtype)
    assert_products(found, references(*tensors, *PAIRS[pair]), dtype)


def test_the_comparison_notices_a_factor_a_scale_and_a_format():
    gemm, tensors = gemm_of(), operands()
    found = products(gemm, scales_of(gemm), *tensors)
    for wrong in (
        references(*tensors, E4M3, E5M2, factors=(0.7, 1.3, 0.40001)),
        references(*tensors, E4M3, E5M2, exponents=EXPONENTS | {"x": 9}),
        references(*tensors, E4M3, E4M3),
    ):
        with pytest.raises(AssertionError):
            assert_products(found, wrong)


@pytest.mark.parametrize("exponents", [{}, {"x": 5, "g": 12, "w": -4}, {"x": -20, "g": 30, "w": 20}])
def test_the_backends_multiply_the_same_bits(exponents):
    tensors = operands()
    encoded, results = [], []
    for backend in BACKENDS:
        gemm = gemm_of(backend)
        scales = scales_of(gemm, **exponents)
        pair = encode_input(tensors[0], gemm.formats, scales), encode_gradient(tensors[1], gemm.formats, scales)
        encoded.append([t.view(torch.uint8) for t in pair])
        results.append(products(gemm, scales, *tensors))
    assert all(torch.equal(a, b) for a, b in zip(*encoded, strict=True))
    for emulated, real in zip(*results, strict=True):
        torch.testing.assert_close(real, emulated, rtol=1e-5, atol=1e-6 * float(emulated.abs().max()))


@every_case
@pytest.mark.parametrize("which", range(3))
def test_each_factor_reaches_its_own_product_and_no_other(pair, backend, which):
    tensors, factors = operands(), [1.0, 1.0, 1.0]
    plain = gemm_of(backend, pair, (1.0, 1.0, 1.0))
    factors[which] = 0.3
    scaled = gemm_of(backend, pair, tuple(factors))
    before = products(plain, scales_of(plain), *tensors)
    after = products(scaled, scales_of(scaled), *tensors)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if i == which:
            # torch's kernel for CPUs scales the operands, not their product, so that its terms round apart.
            atol = 0.0 if backend == "emulate" else 1e-6 * float(a.abs().max())
            torch.testing.assert_close(b, 0.3 * a, rtol=3e-7, atol=atol)
        else:
            assert torch.equal(a, b)


@every_case
def test_powers_of_two_as_factors_and_scales_change_no_bit(pair, backend):
    tensors = [t.clamp(-1, 1) for t in operands()]
    one, four = gemm_of(backend, pair, (1.0, 1.0, 1.0)), gemm_of(backend, pair, (4.0, 0.5, 8.0))
    plain = products(one, scales_of(one, x=0, g=0, w=0), *tensors)
    scaled = products(four, scales_of(four, x=0, g=0, w=0), *tensors)
    for a, b, factor in zip(plain, scaled, (4.0, 0.5, 8.0), strict=True):
        assert torch.equal(factor * a, b)
    # Values and scales that move against each other give the same encodings.
    x, g, w = tensors
    moved = products(one, scales_of(one, x=-3, g=5, w=2), x * 8, g / 32, w / 4)
    for a, b, factor in zip(plain, moved, (8 / 4, 1 / 32 / 4, 8 / 32), strict=True):
        assert torch.equal(factor * a, b)


@every_backend
@pytest.mark.parametrize("tokens", [1, 7, 16, 17])
def test_any_number_of_tokens_is_padded_without_a_trace(tokens, backend):
    gemm, tensors = gemm_of(backend), operands(tokens)
    assert_products(products(gemm, scales_of(gemm), *tensors), references(*tensors, E4M3, E5M2))


@every_backend
@pytest.mark.parametrize("sides", [(24, 32), (32, 24), (8, 32), (32, 1)])
def test_sides_that_fp8_units_do_not_take_are_refused_on_every_backend(sides, backend):
    fan_in, fan_out = sides
    gemm = gemm_of(backend)
    scales = scales_of(gemm)
    x, g = torch.ones(16, fan_in).to(E4M3.dtype), torch.ones(16, fan_out).to(E5M2.dtype)
    row, column = torch.ones(fan_out, fan_in).to(E4M3.dtype), torch.ones(fan_in, fan_out).to(E4M3.dtype)
    for product in (
        lambda: forward_product(x, row, gemm.formats, scales, torch.float32),
        lambda: input_product(g, column, gemm.formats, scales, torch.float32),
    ):
        with pytest.raises(ConfigError, match=r"must be multiples of 16; spare this layer by precision.overrides") as e:
            product()
        assert "\n" not in str(e.value)


def test_formats_that_are_only_rounded_to_take_any_sides():
    gemm = gemm_of(pair="E3M2/E4M1")
    x, g, w = torch.randn(5, 7), torch.randn(5, 3), torch.randn(3, 7)
    assert_products(products(gemm, scales_of(gemm), x, g, w), references(x, g, w, *PAIRS["E3M2/E4M1"]))


@every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_wherever_it_enters(pair, backend, bad):
    gemm = gemm_of(backend, pair)
    x, g, w = operands()
    x[3, 5] = bad
    y, _, dw = products(gemm, scales_of(gemm), x, g, w)
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()
    assert dw[:, 5].isnan().all()
    x[3, 5], g[3, 7] = 1.0, bad
    _, dx, dw = products(gemm, scales_of(gemm), x, g, w)
    assert dx[3].isnan().all()
    assert dw[7].isnan().all()
    g[3, 7], w[2, 1] = 1.0, bad
    y, dx, _ = products(gemm, scales_of(gemm), x, g, w)
    assert y[:, 2].isnan().all()
    assert dx[:, 1].isnan().all()


@every_case
def test_overflow_saturates(pair, backend):
    gemm = gemm_of(backend, pair, (1.0, 1.0, 1.0))
    forward, gradient = PAIRS[pair]
    x, g, w = (torch.zeros(shape) for shape in ((16, FAN_IN), (16, FAN_OUT), (FAN_OUT, FAN_IN)))
    x[0, 0], g[0, 0], w[0, 0] = 1e30, -1e30, 3e38
    y, dx, dw = products(gemm, scales_of(gemm, x=1, g=2, w=3), x, g, w)
    assert y[0, 0] == (forward.max / 2) * (forward.max / 8)
    assert dx[0, 0] == -(gradient.max / 4) * (forward.max / 8)
    assert dw[0, 0] == -(gradient.max / 4) * (forward.max / 2)


@pytest.mark.parametrize("size", [1e-20, 0.01, 1.0, 448.0, 449.0, 57344.0, 1e6, 1e20])
def test_dynamic_scales_are_the_largest_powers_of_two_that_fit(size):
    gemm = gemm_of(dynamic=True)
    x, g, _ = operands()
    x, g = x * (size / x.abs().max()), g * (size / g.abs().max())
    scales = dynamic_gradient(g, gemm, dynamic_input(x, gemm, scales_of(gemm)))
    for tensor, name, fmt in ((x, X_ENCODE, E4M3), (g, G_ENCODE, E5M2)):
        scale = entry(scales, name).item()
        assert math.frexp(scale)[0] == 0.5
        assert scale * float(tensor.abs().max()) <= fmt.max < 2 * scale * float(tensor.abs().max())


@every_case
def test_dynamic_scales_undo_themselves_and_leave_the_weights_alone(pair, backend):
    gemm, (x, g, w) = gemm_of(backend, pair, dynamic=True), operands()
    x, g = 1e4 * x, 1e-4 * g
    start = scales_of(gemm)
    scales = dynamic_gradient(g, gemm, dynamic_input(x, gemm, start))
    assert torch.equal(entry(scales, W_ENCODE), entry(start, W_ENCODE))
    exponents = {k: round(math.log2(entry(scales, i).item())) for k, i in (("x", X_ENCODE), ("g", G_ENCODE))}
    exponents["w"] = EXPONENTS["w"]
    assert torch.equal(scales, scales_of(gemm, **exponents))
    assert_products(products(gemm, scales, x, g, w), references(x, g, w, *PAIRS[pair], exponents=exponents))


@every_backend
def test_dynamic_scales_of_zeros_give_zeros(backend):
    gemm = gemm_of(backend, dynamic=True)
    x, g, w = (torch.zeros_like(t) for t in operands())
    scales = dynamic_gradient(g, gemm, dynamic_input(x, gemm, scales_of(gemm)))
    assert all(torch.equal(p, torch.zeros_like(p)) for p in products(gemm, scales, x, g, w))


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dynamic_scales_hide_nothing(bad, backend):
    gemm = gemm_of(backend, dynamic=True)
    x, g, w = operands()
    x[3, 5], g[4, 7] = bad, bad
    scales = dynamic_gradient(g, gemm, dynamic_input(x, gemm, scales_of(gemm)))
    y, dx, dw = products(gemm, scales, x, g, w)
    assert y[3].isnan().all()
    assert dx[4].isnan().all()
    assert dw[:, 5].isnan().all()
    assert dw[7].isnan().all()


def test_scales_are_exact_and_each_lies_at_16_bytes():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**k for k in range(-126, 128)]
    gemm = gemm_of(factors=(0.7, 1.3, 0.4))
    table = scales_of(gemm, x=5, g=-7, w=2)
    assert table.dtype == torch.float32
    assert (table == table[:, :, :1]).all()
    assert all((entry(table, i).data_ptr() - table.data_ptr()) % 16 == 0 for i in range(8))
    expected = torch.tensor([0.7 / 2**5, 1.3 * 2**7, 0.4 * 2**7])
    assert torch.equal(torch.stack([entry(table, i).squeeze() for i in (Y_DECODE, DX_DECODE, DW_DECODE)]), expected)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_plain_product_is_alpha_times_the_product(alpha, lead):
    a, b = torch.randn(*lead, 4, 5, dtype=torch.float64), torch.randn(*lead, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(plain_product(a, b, alpha), alpha * (a @ b))
    assert plain_product(a * math.nan, b, alpha).isnan().all()


def test_a_cpu_and_an_older_gpu_are_told_what_to_write(monkeypatch):
    with pytest.raises(ConfigError, match=r"need a GPU and this run is on cpu; write precision.backend: emulate") as e:
        require_fp8(torch.device("cpu"))
    assert "\n" not in str(e.value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        ConfigError, match=r"NVIDIA A100 has compute capability 8.0, .* 8.9; write precision.recipe: bf16"
    ):
        require_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_fp8(torch.device("cuda"))
