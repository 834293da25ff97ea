"""Batches: what they hold, that every window comes once, and that a state resumes exactly."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umup.data.batches import Batches, epoch_starts
from umup.errors import DataError


def counting(length, batch_size=3, seq_len=5, seed=0):
    return Batches(np.arange(length, dtype=np.uint16), batch_size, seq_len, seed)


def run(batches, state, steps):
    """The batches of `steps` steps and the state after them."""
    out = []
    for _ in range(steps):
        inputs, targets, state = batches.next(state)
        out.append((inputs, targets))
    return out, state


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_targets_are_the_tokens_after_the_inputs():
    inputs, targets, _ = counting(100).next({"epoch": 0, "position": 0})
    for ids in (inputs, targets):
        assert ids.shape == (3, 5)
        assert ids.dtype == np.int64
        assert ids.flags.c_contiguous
    assert (np.diff(inputs, axis=1) == 1).all()
    assert (targets == inputs + 1).all()


@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 5), st.integers(0, 50))
def test_an_epoch_visits_every_window_once(extra, seq_len, seed, epoch):
    length = seq_len + extra
    starts = epoch_starts(length, seq_len, seed, epoch)
    first, last = starts.min(), starts.max()
    assert sorted(starts) == list(range(first, last + 1, seq_len))
    assert 0 <= first < seq_len
    assert last + seq_len < length <= last + 2 * seq_len


@given(st.integers(30, 300), st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=40)
def test_batches_follow_the_epochs_without_a_gap(length, batch_size, seq_len):
    batches = counting(length, batch_size, seq_len, seed=1)
    expected = np.concatenate([epoch_starts(length, seq_len, 1, epoch) for epoch in range(20)])
    out, _ = run(batches, batches.start(), 4)
    assert [int(row[0]) for inputs, _ in out for row in inputs] == expected[: 4 * batch_size].tolist()


def test_epochs_and_seeds_differ_in_order_and_offset():
    orders = [tuple(epoch_starts(1000, 10, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert len({min(order) for order in orders}) > 4


@given(st.integers(12, 200), st.integers(1, 6), st.integers(0, 30), st.integers(1, 30))
@settings(max_examples=40)
def test_a_state_resumes_exactly_and_is_a_value(length, batch_size, before, after):
    batches = counting(length, batch_size)
    whole, end = run(batches, batches.start(), before + after)
    _, state = run(batches, batches.start(), before)
    kept = copy.deepcopy(state)
    epoch_starts.cache_clear()
    rest, resumed_end = run(counting(length, batch_size), state, after)
    assert same(rest, whole[before:])
    assert resumed_end == end
    assert state == kept


def test_a_state_is_plain_and_counts_windows():
    batches = counting(100)
    state = batches.start()
    assert state == {"epoch": 0, "position": 0}
    assert batches.next(state)[2] == {"epoch": 0, "position": 3}
    assert state == {"epoch": 0, "position": 0}


def test_fewer_windows_than_a_batch_repeat():
    inputs, _, state = counting(6, batch_size=4).next({"epoch": 0, "position": 0})
    assert inputs.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert state == {"epoch": 4, "position": 0}


def test_less_than_a_window_is_an_error():
    with pytest.raises(DataError, match="5 tokens are less than one window of 6"):
        counting(5)


def test_a_state_of_other_data_is_an_error():
    windows = len(epoch_starts(100, 5, 0, 0))
    with pytest.raises(DataError, match=f"window 50 of epoch 0, which now has {windows}"):
        counting(100).next({"epoch": 0, "position": 50})


def test_fixed_batches_are_spread_evenly_and_repeatable():
    batches = counting(1001, batch_size=4, seq_len=10)
    fixed = batches.fixed(5)
    assert same(fixed, batches.fixed(5))
    assert same(fixed, counting(1001, batch_size=4, seq_len=10, seed=7).fixed(5))
    assert [int(row[0]) for inputs, _ in fixed for row in inputs] == list(range(0, 1000, 50))
    assert all((targets == inputs + 1).all() for inputs, targets in fixed)


def test_fixed_batches_repeat_windows_where_there_are_too_few():
    (inputs, _), (more, _) = counting(11, batch_size=2).fixed(2)
    assert [*inputs[:, 0], *more[:, 0]] == [0, 0, 5, 5]
