"""metrics.jsonl: what is written is read back, and a resumed run finds no line that it will write again."""

import json
from dataclasses import replace

import pytest

from umup.errors import CheckpointError
from umup.train.metrics import Metrics, append_metrics, final_losses, read_metrics, rewind_metrics


def record(step, val=None):
    return Metrics(step, 1 / (step + 2), 0.1 * step, 3e-7, 12345.678, val)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_metrics(path, record(step, 0.1 + step if step % 2 == 0 else None))
    return path


def test_records_round_trip_to_the_last_digit(path):
    assert read_metrics(path) == [record(s, 0.1 + s if s % 2 == 0 else None) for s in range(1, 6)]


def test_a_line_has_the_names_that_dashboards_expect(path):
    first, second = (json.loads(line) for line in path.read_text().splitlines()[:2])
    assert list(first) == ["step", "train/loss", "lr", "grad_norm", "tokens_per_second"]
    assert list(second) == [*first, "val/loss"]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert rewind_metrics(tmp_path / "metrics.jsonl", 3) == []


def test_rewinding_drops_what_comes_after_a_step_and_changes_no_other_byte(path):
    before = path.read_text().splitlines(keepends=True)
    assert [m.step for m in rewind_metrics(path, 3)] == [1, 2, 3]
    assert path.read_text().splitlines(keepends=True) == before[:3]
    assert rewind_metrics(path, 0) == []
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_is_dropped_and_the_next_starts_afresh(path, cut):
    path.write_text(path.read_text()[:-cut])
    assert [m.step for m in rewind_metrics(path, 9)] == [1, 2, 3, 4]
    append_metrics(path, record(5))
    assert [m.step for m in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_final_losses_are_the_last_tenths_mean_and_the_last_evaluation():
    rows = [record(s) for s in range(1, 31)]
    rows[4], rows[9] = replace(rows[4], val_loss=9.0), replace(rows[9], val_loss=5.0)
    assert final_losses(rows) == (pytest.approx((1 / 30 + 1 / 31 + 1 / 32) / 3), 5.0)
    assert final_losses(rows[:3]) == (rows[2].train_loss, None)


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1"):
        read_metrics(path)
