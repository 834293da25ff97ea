"""Every row of the family table trains: in every scheme, in every recipe of formats, and alike at every width."""

from itertools import product

import pytest
import torch

from umup.config.load import parse_config
from umup.errors import ConfigError
from umup.models.build import build
from umup.models.families import FAMILIES
from umup.models.specs import plan_for, shape_of
from umup.optim.groups import param_groups
from umup.rules.precision import RECIPES
from umup.rules.schemes import SCHEMES
from umup.study.coord_check import check_config

VOCAB, LENGTH, BATCH = 32, 16, 4
LR = {**dict.fromkeys(SCHEMES, 0.004), "umup": 0.5, "unit": 0.05, "mus": 0.05, "spectral": 0.02, "ntp": 0.05}


def config_for(family, scheme, recipe="fp32", **model):
    table = SCHEMES[scheme]
    sizes = {"hidden_size": 64, "num_layers": 2, "head_dim": 16, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    return parse_config(
        {
            "model": {"family": family, **sizes, "norm_placement": table.norm_placements[0], **model},
            "parametrization": {
                "scheme": scheme,
                "base": {"hidden_size": 64, "num_layers": 2} if table.needs_base else None,
            },
            "optimizer": {"lr": LR[scheme]},
            "train": {"batch_size": BATCH},
            "precision": {"recipe": recipe, "backend": "emulate"},
        }
    )


def losses(config, steps=12):
    """On one batch, learned by heart."""
    plan, model = plan_for(config), build(config)
    groups = param_groups(plan, model.named_parameters(), lr=config.optimizer.lr, weight_decay=0.0, eps=1e-8)
    optimizer = torch.optim.AdamW(groups)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("family", "scheme"), list(product(FAMILIES, SCHEMES)))
def test_every_family_learns_a_batch_by_heart_under_every_scheme(family, scheme):
    curve = losses(config_for(family, scheme))
    assert curve[-1] < curve[0] - 0.25


@pytest.mark.parametrize(("family", "recipe"), list(product(FAMILIES, [*RECIPES, "simulate:E4M3"])))
def test_every_family_learns_in_every_recipe(family, recipe):
    curve = losses(config_for(family, "umup", recipe))
    exact = losses(config_for(family, "umup"))
    assert curve[-1] < curve[0] - 0.25
    assert curve[0] == pytest.approx(exact[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["mup", "umup", "completep"])
def test_the_coordinate_check_passes(family, scheme):
    """u-muP's norms are without gains, as its transfer wants them."""
    gains = {"norm_gain": False} if scheme == "umup" else {}
    report = check_config(config_for(family, scheme, hidden_size=128, **gains), (128, 256, 512), seeds=5)
    assert report.verdict == "PASS", report.text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rotary_dim": 5}, "rotary turns pairs"),
        ({"rotary_dim": 64}, "exceeds model.head_dim"),
        ({"family": "gpt2", "rotary_dim": 4}, "write model.positions: rotary"),
        ({"family": "gptj", "norm_placement": "post"}, "write pre"),
    ],
)
def test_traits_that_exclude_each_other_are_refused(model, message):
    config = config_for("llama", "sp")
    with pytest.raises(ConfigError, match=message):
        shape_of(config.model.model_copy(update=model))
