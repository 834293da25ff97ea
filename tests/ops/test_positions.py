"""Rotary pairs, ALiBi and attention's biases against definitions written another way."""

import math

import pytest
import torch

from umup.ops.activation import gated_gelu, relu
from umup.ops.attention import alibi, alibi_slopes, attention, rotary, rotary_tables
from umup.rules.opscales import gated_gelu_scale


@pytest.mark.parametrize("turned", [4, 8])
def test_interleaved_rotary_turns_neighbours_as_complex_numbers_and_passes_the_rest(turned):
    cos, sin = rotary_tables(turned, 6, 100.0)
    x = torch.randn(2, 3, 6, 8)
    out = rotary(x, cos, sin, interleaved=True)
    numbers = torch.view_as_complex(x[..., :turned].unflatten(-1, (-1, 2)).contiguous())
    angles = torch.arange(6.0)[:, None] * 100.0 ** (-torch.arange(0, turned, 2) / turned)
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(out[..., :turned], expected)
    assert torch.equal(out[..., turned:], x[..., turned:])


def test_partial_rotary_is_rotary_of_the_first_features():
    tables = rotary_tables(4, 6, 100.0)
    x = torch.randn(2, 6, 10)
    expected = torch.cat((rotary(x[..., :4], *tables), x[..., 4:]), -1)
    assert torch.equal(rotary(x, *tables), expected)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(8, range(1, 9)), (2, (4, 8)), (6, (2, 4, 6, 8, 1, 3)), (1, (8,)), (12, [*range(1, 9), 0.5, 1.5, 2.5, 3.5])],
)
def test_alibi_slopes_are_the_papers(heads, exponents):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor([2.0**-e for e in exponents]))


def test_alibi_falls_with_distance_and_hides_the_future():
    bias = alibi(torch.tensor([0.5, 0.25]), 2, 5)
    for head, slope in enumerate((0.5, 0.25)):
        for query, key in ((i, j) for i in range(2) for j in range(5)):
            distance = (3 + query) - key
            assert bias[head, query, key] == (-slope * distance if distance >= 0 else -math.inf)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_adds_its_bias_after_scaling(kv_heads):
    q, k, v = (torch.randn(3, n, 7, 6, dtype=torch.float64) for n in (4, kv_heads, kv_heads))
    bias = alibi(alibi_slopes(4).double(), 7, 7)
    keys, values = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    expected = 1.5 * (0.3 * q @ keys.mT + bias).softmax(-1) @ values
    torch.testing.assert_close(attention(q, k, v, 0.3, 1.5, bias=bias), expected)
    last = attention(q[:, :, -1:], k, v, 0.3, 1.5, bias=bias[:, -1:])
    torch.testing.assert_close(last, expected[:, :, -1:])


@pytest.mark.parametrize("mult", [1e-3, 0.5, 1.0, 3.0, 1e3])
def test_gated_gelu_and_relu_have_unit_scale(mult):
    """By quadrature over the gate; up is independent of it and has variance 1. ReLU's is about its mean."""
    gate = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
    out = gated_gelu(gate, torch.ones_like(gate), mult, gated_gelu_scale(mult))
    assert torch.trapezoid(out.square() * density, gate).item() == pytest.approx(1.0, rel=1e-6)
    rectified = relu(gate, math.sqrt(2 / (1 - 1 / math.pi)))
    mean = torch.trapezoid(rectified * density, gate)
    assert torch.trapezoid((rectified - mean).square() * density, gate).item() == pytest.approx(1.0, rel=1e-6)
