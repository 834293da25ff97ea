"""Parameter groups carry the plan's numbers to any torch optimizer, and its state goes by parameter name."""

import pytest
import torch

from umup.errors import CheckpointError, PlanError
from umup.models.build import build
from umup.models.specs import plan_for
from umup.optim.groups import load_state_tensors, param_groups, state_tensors

NUMBERS = {"lr": 0.5, "weight_decay": 0.25, "eps": 1e-6}
SCHEMES = [{"scheme": "sp"}, {"scheme": "mup", "base": {"hidden_size": 16}}, {"scheme": "umup"}]
every_scheme = pytest.mark.parametrize("parametrization", SCHEMES, ids=lambda p: p["scheme"])


def grouped(config):
    plan, model = plan_for(config), build(config)
    return plan, model, param_groups(plan, model.named_parameters(), **NUMBERS)


@every_scheme
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_stands_once_with_its_plans_numbers(tiny, parametrization, independent, family):
    config = tiny(
        model={"family": family},
        parametrization=parametrization,
        optimizer={"independent_weight_decay": independent},
    )
    plan, model, groups = grouped(config)
    found = {n: (p, g) for g in groups for n, p in zip(g["names"], g["params"], strict=True)}
    assert sum(len(g["params"]) for g in groups) == len(found)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        stored, group = found[name]
        rate = 0.5 * plan.params[name]["lr"]
        decay = 0.25 * plan.params[name]["weight_decay"]
        assert stored is parameter
        assert group["lr"] == group["initial_lr"] == pytest.approx(rate)
        assert group["eps"] == pytest.approx(1e-6 * plan.params[name]["eps"])
        assert group["weight_decay"] * (rate if independent else 1.0) == pytest.approx(decay)


def test_equal_numbers_are_merged_and_different_ones_are_not(tiny):
    def sizes(scheme, **model):
        return sorted(len(g["names"]) for g in grouped(tiny(model=model, parametrization={"scheme": scheme}))[2])

    # SP tells matrices, which decay, from norm gains.
    assert sizes("sp") == [3, 9]
    assert sizes("sp", norm_gain=False) == [9]
    # u-muP: readout, down (another fan-in), and the others, whose rates are 1/sqrt(32) like the embedding's.
    assert sizes("umup", norm_gain=False) == [1, 1, 7]
    # Depth slows the branches and not the embedding.
    assert sizes("umup", norm_gain=False, num_layers=2) == [1, 1, 2, 12]


@every_scheme
def test_lambda_lr_only_multiplies(tiny, parametrization):
    groups = grouped(tiny(parametrization=parametrization))[2]
    peaks = [g["lr"] for g in groups]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([p / (1 + step) for p in peaks])
        optimizer.step()
        schedule.step()
    assert (len(set(peaks)) > 1) == (parametrization["scheme"] != "sp")


def test_a_plan_of_another_model_is_refused_by_the_parameters_name(tiny):
    shallow, deep = tiny(model={"num_layers": 1}), tiny(model={"num_layers": 2})
    with pytest.raises(PlanError, match=r"only the model has the parameter 'layers\.1\."):
        param_groups(plan_for(shallow), build(deep).named_parameters(), **NUMBERS)
    with pytest.raises(PlanError, match=r"only the plan has the parameter 'layers\.1\."):
        param_groups(plan_for(deep), build(shallow).named_parameters(), **NUMBERS)


def test_a_wrappers_prefix_is_refused(tiny):
    config = tiny()
    wrapped = torch.nn.ModuleDict({"module": build(config)})
    with pytest.raises(PlanError, match=r"embed\.weight"):
        param_groups(plan_for(config), wrapped.named_parameters(), **NUMBERS)


def stepped(config, steps, restored=None):
    _, model, groups = grouped(config)
    optimizer = torch.optim.AdamW(groups)
    if restored is not None:
        load_state_tensors(optimizer, restored)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.01 * (i + step + 1))
        optimizer.step()
    return model, optimizer


def test_optimizer_state_round_trips_by_name(tiny):
    config = tiny()
    model, optimizer = stepped(config, 3)
    saved = {key: value.clone() for key, value in state_tensors(optimizer).items()}
    names = dict(model.named_parameters())
    assert saved.keys() == {f"{entry}/{n}" for entry in ("step", "exp_avg", "exp_avg_sq") for n in names}
    assert all(saved[f"step/{n}"] == 3 for n in names)
    _, fresh = stepped(config, 0, saved)
    again = state_tensors(fresh)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_restored_state_takes_the_same_next_step(tiny):
    config = tiny()
    model, optimizer = stepped(config, 3)
    twin, twin_optimizer = stepped(config, 0, {k: v.clone() for k, v in state_tensors(optimizer).items()})
    twin.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        for p in m.parameters():
            p.grad = torch.full_like(p, -0.5)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_that_no_parameter_claims_is_refused(tiny):
    _, optimizer = stepped(tiny(), 0)
    with pytest.raises(CheckpointError, match=r"'exp_avg/layers\.7\.q' belongs to no parameter"):
        load_state_tensors(optimizer, {"exp_avg/layers.7.q": torch.zeros(1)})
