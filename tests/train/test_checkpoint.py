"""Checkpoints: complete, atomic, verified, refused by name."""

import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from umup import checkpoint
from umup.checkpoint import (
    RunState,
    TensorFiles,
    TensorLayout,
    load_checkpoint,
    load_latest,
    load_weights,
    save_checkpoint,
    write_tensors,
)
from umup.errors import CheckpointError, RunError


def state(step):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    return RunState(
        step,
        {"epoch": 1, "position": step},
        {"a.weight": weight},
        {"exp_avg/a.weight": weight * 2, "step/a.weight": torch.tensor(float(step))},
        {"cpu": torch.get_rng_state()},
        {"layers.0.attn.q": torch.tensor([step, -1, 2, 0], dtype=torch.int32)},
    )


def same(a, b):
    assert (a.step, a.data) == (b.step, b.data)
    for part in ("model", "optimizer", "rng", "precision"):
        left, right = getattr(a, part), getattr(b, part)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)


def test_round_trip(tmp_path):
    folder = save_checkpoint(tmp_path, state(7), keep=2)
    assert folder.name == "step-00000007"
    same(load_checkpoint(folder), state(7))
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert load_latest(tmp_path) == (None, [])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def alter(path):
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(bytes(body))


@pytest.mark.parametrize("damage", [truncate, alter, lambda p: p.unlink()], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage, name):
    save_checkpoint(tmp_path, state(1), keep=2)
    damage(save_checkpoint(tmp_path, state(2), keep=2) / name)
    loaded, refused = load_latest(tmp_path)
    same(loaded, state(1))
    assert len(refused) == 1
    assert "step-00000002" in refused[0]
    assert name in refused[0]


def test_all_damaged_is_an_error(tmp_path):
    truncate(save_checkpoint(tmp_path, state(1), keep=2) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000001.*model\.safetensors"):
        load_latest(tmp_path)


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    good = save_checkpoint(tmp_path, state(1), keep=2)
    shutil.copytree(good, good.with_name(".step-00000002"))
    loaded, refused = load_latest(tmp_path)
    assert (loaded.step, refused) == (1, [])
    save_checkpoint(tmp_path, state(2), keep=2)
    same(load_latest(tmp_path)[0], state(2))


def test_tensors_written_one_at_a_time_are_a_safetensors_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "d": torch.randn(4, 3).half().t(),
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, [TensorLayout(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], iter(tensors.values()))
    found = TensorFiles([path])
    assert found.keys() == load_file(path).keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float())
        assert found[name].dtype == tensor.dtype
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # where tensors begin
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_weights_that_do_not_fit_are_all_named():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False), "b": torch.nn.Linear(1, 1, bias=False)})
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, {"a.weight": torch.zeros(3, 5), "c.weight": torch.zeros(1)}.items(), "here")
    for fault in ("a.weight has shape (3, 5)", "b.weight is missing", "c.weight is not in the model"):
        assert fault in str(caught.value)


def test_a_refused_later_checkpoint_never_pushes_out_the_good_ones(tmp_path):
    save_checkpoint(tmp_path, state(100), keep=2)
    truncate(save_checkpoint(tmp_path, state(200), keep=2) / "model.safetensors")
    save_checkpoint(tmp_path, state(150), keep=1)
    loaded, refused = load_latest(tmp_path)
    same(loaded, state(150))
    assert refused == []


def test_a_full_disk_is_a_failed_run_in_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("No space left on device")

    save_checkpoint(tmp_path, state(1), keep=2)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(tmp_path, state(2), keep=2)
    same(load_latest(tmp_path)[0], state(1))
