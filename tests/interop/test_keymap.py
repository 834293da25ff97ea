"""Tables of names are read both ways without losing a bit, and say what does not fit."""

import pytest
import torch

from umup.config.sections import ModelConfig
from umup.errors import CheckpointError
from umup.interop.keymap import BY_HEAD, TRANSPOSED, row, to_ours, to_theirs
from umup.models.specs import decoder_specs, shape_of

QKV = tuple(f"layers.{{i}}.attn.{part}" for part in ("q", "k", "v"))
TABLE = (
    row("wte", "embed.weight"),
    row("h.{i}.qkv.w", *(f"{name}.weight" for name in QKV), packing=BY_HEAD),
    row("h.{i}.qkv.b", *(f"{name}.bias" for name in QKV), packing=BY_HEAD),
    row("h.{i}.proj", "layers.{i}.attn.out.weight", packing=TRANSPOSED),
    row("h.{i}.proj_bias", "layers.{i}.attn.out.bias"),
    row("h.{i}.gate_up", "layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"),
    row("h.{i}.down", "layers.{i}.mlp.down.weight", packing=TRANSPOSED),
    *(row(f"n.{{i}}.{k}", f"layers.{{i}}.{k}.norm.weight") for k in ("attn", "mlp")),
    row("ln", "norm.weight"),
    row("out", "head.weight"),
)


def shape(**fields):
    sizes = {"hidden_size": 24, "num_layers": 2, "head_dim": 4, "num_kv_heads": 2, "vocab_size": 7}
    return shape_of(ModelConfig(**{**sizes, **fields}))


def ours(s):
    return {p.name: torch.randn(p.shape) for p in decoder_specs(s) if p.tied_to is None}


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"tie_embeddings": True}, {"num_kv_heads": 6}])
def test_a_round_trip_keeps_every_bit(fields):
    s = shape(**fields)
    mine = ours(s)
    theirs = dict(to_theirs(TABLE, mine, s))
    assert all(t.is_contiguous() for t in theirs.values())
    back = dict(to_ours(TABLE, theirs, s))
    assert back.keys() == mine.keys()
    assert all(torch.equal(back[name], mine[name]) for name in mine)


def test_by_head_puts_the_queries_of_a_key_head_before_it():
    s = shape()
    mine = ours(s)
    packed = dict(to_theirs(TABLE, mine, s))["h.0.qkv.w"]
    q, k, v = (mine[f"layers.0.attn.{part}.weight"] for part in ("q", "k", "v"))
    expected = torch.cat((q[:12], k[:4], v[:4], q[12:], k[4:], v[4:]))
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("ln"), "ln is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is in no place of this network"),
        (lambda t: t.update(out=torch.zeros(8, 24)), r"out has shape \(8, 24\), this network wants \(7, 24\)"),
        (lambda t: t.update({"h.1.proj": torch.zeros(24)}), r"h.1.proj has shape \(24,\)"),
    ],
)
def test_what_does_not_fit_is_named(spoil, message):
    s = shape()
    theirs = dict(to_theirs(TABLE, ours(s), s))
    spoil(theirs)
    with pytest.raises(CheckpointError, match=message):
        list(to_ours(TABLE, theirs, s))


def test_tensors_that_hold_nothing_learned_may_be_ignored():
    s = shape()
    theirs = {**dict(to_theirs(TABLE, ours(s), s)), "h.0.mask": torch.zeros(1)}
    assert len(list(to_ours(TABLE, theirs, s, lambda name: name.endswith(".mask")))) == len(ours(s))


def test_a_parameter_without_a_row_is_refused():
    s = shape(mlp_bias=True)
    with pytest.raises(CheckpointError, match=r"no place for layers.0.mlp.gate.bias"):
        list(to_theirs(TABLE, ours(s), s))
