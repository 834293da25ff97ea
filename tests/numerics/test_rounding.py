"""Philox against its authors' vectors, and rounding whose mean is the value."""

import pytest
import torch

from umup.numerics.rounding import ROUNDS, Key, noise, philox, stochastic_bfloat16

WORD = 2**32 - 1
# Random123, kat_vectors: philox4x32 with 10 rounds.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(Key(*key), tuple(torch.tensor([c]) for c in counter), rounds=10)
    assert tuple(w.item() for w in words) == expected


def test_noise_is_a_function_of_key_stream_and_place_alone():
    one = noise(torch.Size([7, 9]), Key(3, 5), 0, torch.device("cpu"))
    long = noise(torch.Size([200]), Key(3, 5), 0, torch.device("cpu"))
    assert torch.equal(one.flatten(), long[:63])
    words = philox(Key(3, 5), tuple(torch.tensor([c]) for c in (2, 0, 0, 0)), ROUNDS)
    assert long[8:12].tolist() == [w.item() for w in words]
    for key, stream in [(Key(3, 6), 0), (Key(4, 5), 0), (Key(3, 5), 1)]:
        assert (noise(torch.Size([200]), key, stream, torch.device("cpu")) != long).all()


def test_noise_is_uniform_in_every_bit():
    n = 2**18
    words = noise(torch.Size([n]), Key(1, 2), 0, torch.device("cpu"))
    assert words.min() >= 0
    assert words.max() <= WORD
    shares = torch.stack([(words >> b & 1).double().mean() for b in range(32)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.5 / n**0.5
    neighbours = torch.corrcoef(torch.stack([words[:-1].double(), words[1:].double()]))[0, 1]
    assert neighbours.abs() < 4.5 / n**0.5


def test_every_random_draw_gives_the_value_on_average():
    """Over all 2^16 draws the mean is exact: each remainder counts as often as it is large."""
    every = torch.arange(2**16)
    for value in (1.0 + 1 / 256, -3.1415927, 1e-38, 1.1e-41, 123456.789, 2.0**-126 * (1 - 2.0**-20)):
        x = torch.tensor(value)
        rounded = stochastic_bfloat16(x.expand(2**16).contiguous(), every).double()
        assert rounded.mean().item() == pytest.approx(x.double().item(), rel=1e-12)
        assert rounded.unique().numel() <= 2


def test_exact_values_stay():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    every = every[~every.isnan()]
    for draw in (0, 1, 2**15, 2**16 - 1):
        rounded = stochastic_bfloat16(every.float(), torch.full(every.shape, draw))
        assert torch.equal(rounded.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("payload", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000])
def test_nan_stays_nan_whatever_its_payload(payload):
    nan = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    for draw in (0, 2**16 - 1):
        assert stochastic_bfloat16(nan, torch.tensor([draw])).isnan().all()
