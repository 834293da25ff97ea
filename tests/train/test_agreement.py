"""Ranks take one decision: what they measured is reduced before anything is decided."""

from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from umup.config.load import parse_config
from umup.models.build import build
from umup.numerics.formats import E4M3
from umup.numerics.ranges import Range, choose, measure
from umup.train.look import LookLoss, agreed
from umup.train.precision import ScaleKeeper

Seen = namedtuple("Seen", "measured state events")


def tensors_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(64, 32, generator=generator) * by for by in (1.0, 2.0 ** (12 * rank), 1.0)]


def look(rank):
    return torch.stack([measure(x) for x in tensors_of(rank)])


def keep_scales(rank):
    """Two looks of a run whose ranks read other tokens, and one of which has activations far larger than its own."""
    sizes = {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16, "norm_gain": False}
    model = build(parse_config({"model": sizes, "precision": {"recipe": "fp8_head", "backend": "emulate"}}))
    events = []
    keeper = ScaleKeeper(model, "adapt", 1, notice=events.append)
    model.layers[0].mlp.norm.register_forward_hook(lambda module, args, out: out * 2.0 ** (12 * rank))
    for step in range(2):
        ids = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(2 * step + rank))
        keeper.look(step, LookLoss(model), ids[:, :-1], ids[:, 1:])
    return keeper.state(), events


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save((agreed(look(rank)), *keep_scales(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (str(folder),), nprocs=2)
    return [Seen(*torch.load(folder / f"{rank}.pt")) for rank in range(2)]


def test_ranks_keep_equal_scales_and_say_so_alike(ranks):
    (_, first, events), (_, second, others) = ranks
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert events == others
    alone, said = keep_scales(0)
    assert not all(torch.equal(alone[name], first[name]) for name in first)
    assert said != events


def test_ranks_agree_on_what_both_saw(ranks):
    first, second = (seen.measured for seen in ranks)
    assert torch.equal(first, second)
    alone, other = look(0), look(1)
    assert torch.equal(first[:, 0], torch.maximum(alone[:, 0], other[:, 0]))
    assert torch.equal(first[:, 1:], alone[:, 1:] + other[:, 1:])
    # One rank's large values move the scale that the other alone would keep.
    assert choose(Range.of(alone[1]), E4M3, 0).exponent == 0
    assert choose(Range.of(first[1]), E4M3, 0).exponent < -3


def test_one_process_keeps_what_it_saw():
    measured = look(0)
    assert torch.equal(agreed(measured.clone()), measured)
