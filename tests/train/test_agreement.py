"""Ranks take one decision: what they measured is reduced before anything is decided."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from umup.numerics.formats import E4M3
from umup.numerics.ranges import Range, choose, measure
from umup.train.look import agreed


def tensors_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(64, 32, generator=generator) * by for by in (1.0, 2.0 ** (12 * rank), 1.0)]


def look(rank):
    return torch.stack([measure(x) for x in tensors_of(rank)])


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(agreed(look(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_what_both_saw(tmp_path):
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
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
