"""Megatron's flags: as kept, giving the plan's numbers by Megatron's arithmetic, and refused where they would not."""

from pathlib import Path

import pytest
import torch
from torch import nn

import umup
from umup.config.load import parse_config
from umup.errors import PlanError
from umup.interop.megatron import flags
from umup.models.specs import plan_for

GOLDEN = Path(__file__).parent / "golden"
HEAD = 16


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)


class GPT(nn.Module):
    def __init__(self, width, layers, inner=None):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width, inner or 4 * width) for _ in range(layers))
        self.head = nn.Linear(width, 50, bias=False)


def plan_of(scheme="mup", target=(96, 6), base=(32, 2), **arguments):
    with torch.device("meta"):
        return umup.plan(GPT(*target), base=GPT(*base), scheme=scheme, **arguments).plan


CASES = {
    "sp": (lambda: plan_of("sp"), {}),
    "mup": (plan_of, {"base_head_dim": HEAD}),
    "mup_merged": (plan_of, {"base_head_dim": HEAD, "use_mup": True}),
    "mup_hparams": (lambda: plan_of(hparams={"alpha_emb": 10.0, "alpha_out": 2.0}), {"base_head_dim": HEAD}),
    "completep": (lambda: plan_of("completep"), {"base_head_dim": HEAD}),
}


@pytest.mark.parametrize("name", CASES)
def test_text_is_as_kept(name):
    make, arguments = CASES[name]
    assert flags(make(), **arguments) == (GOLDEN / f"megatron_{name}.txt").read_text()


def read(text):
    return dict(line.removeprefix("--").partition(" ")[::2] for line in text.splitlines())


def test_megatrons_arithmetic_gives_the_plans_numbers():
    """width_mult and depth_mult as Megatron derives them, and what its table makes of them."""
    plan = plan_of("completep", independent_weight_decay=False)
    given = read(flags(plan, base_head_dim=HEAD))
    assert given["scaling-recipe"] == "depth_mup"
    width = 96 / int(given["scaling-base-hidden-size"])
    depth = 6 / int(given["scaling-base-num-layers"])
    hidden = plan.params["layers.0.fc1.weight"]
    assert hidden["lr"] == pytest.approx(1 / width)
    assert hidden["eps"] == pytest.approx(1 / (width * depth))
    assert hidden["weight_decay"] == pytest.approx(width)
    assert plan.params["layers.0.fc2.weight"]["multiplier"] == pytest.approx(1 / depth)
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(1 / width)
    assert plan.params["head.weight"]["eps"] == pytest.approx(1 / width)


def test_umups_own_models_plan_has_flags_too():
    config = parse_config(
        {
            "model": {"family": "gpt2", "hidden_size": 64, "num_layers": 2, "head_dim": 32, "vocab_size": 256},
            "parametrization": {"scheme": "mup", "base": {"hidden_size": 32}, "hparams": {"sigma_init": 0.1}},
        }
    )
    given = read(flags(plan_for(config), base_head_dim=32))
    assert (given["scaling-base-hidden-size"], given["init-method-std"]) == ("32", "0.1")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: plan_of("depth_mup"), {}, "no recipe is scheme 'depth_mup' (its depth_mup is completep)"),
        (lambda: plan_of(optimizer="muon"), {}, "the recipes are read for Adam, not 'muon'"),
        (lambda: plan_of("completep", options={"depth_alpha": "0.5"}), {}, "depth_alpha 1"),
        (lambda: plan_of("completep"), {"use_mup": True}, "--use-mup is scheme 'mup', not 'completep'"),
        (plan_of, {}, "write base_head_dim="),
        (lambda: plan_of(target=(96, 2, 256)), {"base_head_dim": HEAD}, "layers.0.fc2.weight grows by 2 where"),
        (lambda: plan_of(hparams={"eta_emb": 2.0}), {"base_head_dim": HEAD}, "no flag gives hparams.eta_emb=2"),
        (lambda: plan_of(hparams={"alpha_out": 3.0}), {"base_head_dim": HEAD}, "no flag gives hparams.alpha_out=3"),
    ],
)
def test_what_no_recipe_gives_is_refused(make, arguments, message):
    with pytest.raises(PlanError) as error:
        flags(make(), **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folded_plan_is_refused():
    with torch.device("meta"):
        folded = umup.plan(GPT(96, 2), base=GPT(32, 2)).folded
    with pytest.raises(PlanError, match=r"head\.weight grows by 1 where"):
        flags(folded, base_head_dim=HEAD)
