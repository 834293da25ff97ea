"""The choices on which muP's implementations differ, by hand from what their authors' code computes."""

from math import sqrt

import pytest
import torch

from umup.config.sections import BaseShape, ModelConfig, OptimizerConfig, ParametrizationConfig, RunConfig, TrainConfig
from umup.errors import PlanError
from umup.models.build import build
from umup.models.specs import plan_for
from umup.rules.roles import Role

# Twice as wide as the base, and three times as wide inside the MLP.
MODEL = ModelConfig(family="gpt2", hidden_size=64, num_layers=3, head_dim=16, intermediate_size=384, vocab_size=512)
BASE = BaseShape(hidden_size=32, intermediate_size=128)
HIDDEN = (Role.HIDDEN, Role.HIDDEN_OUT)
CUT_STD = 0.8796  # of a unit normal cut at +-2


def plan_with(options=None, hparams=None, coupled=False, tied=True, scheme="mup"):
    base = BASE if scheme == "mup" else None
    section = ParametrizationConfig(scheme=scheme, base=base, options=options or {}, hparams=hparams or {})
    model = MODEL.model_copy(update={"tie_embeddings": tied})
    return plan_for(
        RunConfig(model=model, parametrization=section, optimizer=OptimizerConfig(independent_weight_decay=not coupled))
    )


def by_role(plan, quantity):
    return {p.spec.role: p[quantity] for p in plan.stored.values()}


def test_one_epsilon():
    assert set(by_role(plan_with({"eps": "constant"}), "eps").values()) == {1.0}
    assert by_role(plan_with(), "eps")[Role.EMBEDDING] == 0.5


def test_one_epsilon_leaves_rates_of_other_optimizers_alone():
    run = RunConfig(model=MODEL, optimizer=OptimizerConfig(name="sgd"))
    rates = []
    for options in ({}, {"eps": "constant"}):
        section = ParametrizationConfig(scheme="mup", base=BASE, options=options)
        rates.append(by_role(plan_for(run.model_copy(update={"parametrization": section})), "lr"))
    assert rates[0] == rates[1]


def test_decay_through_the_rate():
    """The model zoo: one number, times each parameter's own rate; independent decay says the same."""
    coupled = plan_with({"decay": "with_rate"}, coupled=True)
    independent = plan_with({"decay": "with_rate"}, {"eta_emb": 3.0})
    for name, p in coupled.stored.items():
        vector = p.spec.role in (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
        assert p["weight_decay"] == (0.0 if vector else 1.0), name
        mine = independent.params[name]
        assert mine["weight_decay"] == pytest.approx(0.0 if vector else mine["lr"]), name
    assert coupled.params["layers.0.mlp.down.weight"]["lr"] == pytest.approx(1 / 3)


def test_logits_by_the_root_of_width():
    plan = plan_with({"logits": "inv_sqrt_width"}, {"alpha_out": 2.0})
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(2 / sqrt(2))


def test_initial_weights_cut_at_two_stds():
    section = ParametrizationConfig(scheme="mup", base=BASE, options={"init": "truncated"})
    model = MODEL.model_copy(update={"tie_embeddings": False})
    config = RunConfig(model=model, parametrization=section, train=TrainConfig(seed=3))
    plan = plan_for(config)
    weights = dict(build(config, plan).named_parameters())
    for name, p in plan.stored.items():
        if p.spec.role in (Role.EMBEDDING, *HIDDEN):
            drawn = weights[name]
            assert drawn.abs().max() <= 2 * p["init_std"] * (1 + 1e-6), name
            assert drawn.std().item() == pytest.approx(CUT_STD * p["init_std"], rel=0.05), name
    head = weights["head.weight"]
    assert head.abs().max() > 2.5 * plan.params["head.weight"]["init_std"]
    assert torch.equal(weights["layers.0.attn.norm.weight"], torch.ones(64))


FACTORS = {
    "std_emb": ("init_std", ("embed", "positions")),
    "std_attn_out": ("init_std", ("attn.out",)),
    "std_ffn_in": ("init_std", ("mlp.up",)),
    "std_ffn_out": ("init_std", ("mlp.down",)),
    "std_head": ("init_std", ("head",)),
    "eta_attn": ("lr", ("attn.q", "attn.k", "attn.v", "attn.out")),
    "eta_ffn_in": ("lr", ("mlp.up",)),
    "eta_ffn_out": ("lr", ("mlp.down",)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_moves_its_role_alone(name):
    quantity, modules = FACTORS[name]
    plain, moved = plan_with(tied=False), plan_with({"roles": "apart"}, {name: 3.0}, tied=False)
    expected = {n for n in plain.stored if n.removesuffix(".weight").endswith(modules) and n.endswith(".weight")}
    found = {(n, q): (a, b) for n, q, a, b in plain.diff(moved)}
    assert {n for n, _ in found} == expected
    assert {q for _, q in found} == {quantity}
    assert all(b == pytest.approx(3 * a) for a, b in found.values())


def test_the_factors_exist_only_where_they_are_asked_for():
    with pytest.raises(PlanError, match="no hyperparameter 'std_emb'"):
        plan_with(hparams={"std_emb": 2.0})
    with pytest.raises(PlanError, match="no option 'eps'"):
        plan_with({"eps": "constant"}, scheme="spectral")
