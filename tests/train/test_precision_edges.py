"""FP8 in the trainer where models and optimizers are less regular: overrides, frozen parts, foreign writes."""

import pytest
import torch

from umup.config.load import parse_config
from umup.errors import ConfigError
from umup.models.build import build
from umup.nn.fp8 import encoded
from umup.numerics.formats import encode
from umup.numerics.gemm import W_ENCODE, entry
from umup.optim.adamw import AdamW
from umup.train.look import LookLoss
from umup.train.precision import ScaleKeeper

SIZES = {"hidden_size": 32, "num_layers": 3, "head_dim": 16, "max_seq_len": 16, "norm_gain": False}
IDS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = IDS[:, :-1], IDS[:, 1:]


def model_of(seed=0, model=None, **precision):
    return build(
        parse_config(
            {
                "model": {**SIZES, **(model or {})},
                "train": {"seed": seed},
                "precision": {"recipe": "fp8", "backend": "emulate", **precision},
            }
        )
    )


def look(model, mode="adapt", step=0, **options):
    keeper = ScaleKeeper(model, mode, 1, **options)
    keeper.look(step, LookLoss(model), *BATCH)
    return keeper


def assert_encoded(model):
    """Every product computes with its present weights."""
    for p in encoded(model):
        whole = torch.cat([w.detach() for w in p.weights])
        scale = entry(p.matmul.scales_table, W_ENCODE)
        expected = encode(whole, scale, p.matmul.formats.forward)
        assert torch.equal(p.matmul.row.view(torch.uint8), expected.view(torch.uint8)), p.name
        assert float((whole.abs() * scale).max()) <= 448


@pytest.mark.parametrize(
    "overrides", [{"*.attn.k": "fp8_e4m3"}, {"*.attn.*": "bf16", "*.mlp.up": "fp8_e4m3"}, {"*.attn.v": "bf16"}]
)
def test_a_look_sees_products_that_run_apart(overrides, tmp_path):
    model = model_of(overrides=overrides)
    keeper = look(model, record=tmp_path / "ranges.jsonl")
    rows = (tmp_path / "ranges.jsonl").read_text().splitlines()
    assert len(rows) == 3 * len(keeper.products)


def test_frozen_weights_are_no_obstacle():
    model = model_of()
    frozen = [model.layers[0].attn.q.weight, model.layers[1].mlp.down.weight]
    for weight in frozen:
        weight.requires_grad_(False)
    keeper = look(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    keeper.follow(optimizer)
    for _ in range(3):
        model.loss(*BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_encoded(model)


def test_two_optimizers_each_look_after_their_own():
    model = model_of()
    keeper = ScaleKeeper(model, "static", 1)
    named = list(model.named_parameters())
    halves = [[p for name, p in named if (".attn." in name) == attn] for attn in (True, False)]
    optimizers = [AdamW(halves[0], lr=3.0), torch.optim.SGD(halves[1], lr=30.0)]
    for optimizer in optimizers:
        keeper.follow(optimizer)
    for _ in range(3):
        model.loss(*BATCH).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
            assert_encoded(model)
            model.loss(*BATCH).backward()
    assert_encoded(model)


def test_loading_a_state_dict_encodes_it():
    a, b = model_of(seed=0), model_of(seed=1)
    b.load_state_dict(a.state_dict())
    assert_encoded(b)
    assert torch.equal(a.loss(*BATCH), b.loss(*BATCH))


def test_a_change_of_dtype_leaves_encodings_and_scales_alone():
    model = model_of()
    before = [(p.matmul.row.view(torch.uint8).clone(), p.matmul.scales_table.clone()) for p in encoded(model)]
    model.bfloat16()
    for p, (row, scales) in zip(encoded(model), before, strict=True):
        assert torch.equal(p.matmul.row.view(torch.uint8), row)
        assert torch.equal(p.matmul.scales_table, scales)


def test_scales_of_another_grouping_start_anew():
    apart, said = model_of(overrides={"*.attn.k": "fp8_e4m3"}), []
    with torch.no_grad():
        for layer in apart.layers:
            layer.attn.k.weight *= 64
    joined = model_of()
    joined.load_state_dict(apart.state_dict())
    ScaleKeeper(joined, "adapt", 1, notice=said.append).load(look(apart).state())
    assert_encoded(joined)
    assert any("in other formats or groups" in line for line in said)


def test_a_look_draws_no_random_numbers():
    model = model_of(model={"dropout": 0.1})
    torch.manual_seed(0)
    alone = model.loss(*BATCH)
    torch.manual_seed(0)
    look(model, "monitor")
    assert torch.equal(model.loss(*BATCH), alone)


@pytest.mark.slow  # 30 s
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_many_products_may_be_spared_in_a_compiled_run():
    model = model_of(model={"num_layers": 6})
    loss = torch.compile(model.loss, backend="eager", fullgraph=True, dynamic=False)
    for layer in model.layers:
        look_at_spread(model, layer.attn.norm)
        loss(*BATCH).backward()
        with torch.no_grad():
            loss(*BATCH)
    assert sum(p.matmul.spared for p in encoded(model)) >= 6


def look_at_spread(model, norm):
    """A look while the norm's output holds values of 2^-30 beside those of 2^10, which no E4M3 scale serves."""
    spread = torch.where(torch.arange(32) % 2 == 0, 2.0**-30, 2.0**10)
    handle = norm.register_forward_hook(lambda module, args, out: out * spread.to(out.dtype))
    try:
        look(model)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "changes", [{"recipe": "bf16"}, {"recipe": "fp8_partial"}, {"overrides": {"*.mlp.up": "bf16"}}]
)
def test_compact_is_refused_where_it_would_change_nothing(changes):
    with pytest.raises(ConfigError, match=r"write precision\.compact: false"):
        model_of(compact=True, **changes)
    assert all(layer.mlp.compact for layer in model_of(compact=True).layers)
