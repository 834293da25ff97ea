"""The abc-symmetry under torch's other optimizers, with the groups that `param_groups` makes: one run in any units.

test_symmetry.py does the same for AdamW, over every scheme and family.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor
from torch.optim import _muon as torch_muon

from umup.config.sections import BaseShape, ModelConfig
from umup.models.build import decoder
from umup.models.specs import Shape, architecture, base_architecture, shape_of
from umup.optim.groups import param_groups
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import Plan, make_plan
from umup.rules.schemes import SCHEMES

# These decays are large so that their effect is seen.

BASE = BaseShape(hidden_size=16, num_layers=1)
BATCH, SEQ, VOCAB, STEPS = 4, 16, 48, 6
# RAdam's first five steps are SGD's at Adam's rate: no units suit both. They are taken at rate 0, which moves only its
# moments.
RADAM_WARMUP = 5


@dataclass(frozen=True)
class Trainer:
    """An optimizer, with rates of its own for true and for unit-scaled gradients.

    Epsilon has the size of what it is compared with, so that a wrong factor on it shows.
    """

    make: Callable[[list[dict]], torch.optim.Optimizer]
    lr: tuple[float, float]
    eps: tuple[float, float] = (1e-3, 0.1)
    skip: int = 0


def muon(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.Muon(groups, momentum=0.9)


ADAMW = Trainer(lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)), (0.01, 0.2))
TRAINERS = {
    "sgd": Trainer(lambda groups: torch.optim.SGD(groups, momentum=0.9), (0.3, 0.02)),
    "adam": Trainer(lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95)), (0.01, 0.2)),
    "nadam": Trainer(lambda groups: torch.optim.NAdam(groups, betas=(0.9, 0.95)), (0.01, 0.2)),
    "radam": Trainer(torch.optim.RAdam, (0.2, 3.0), skip=RADAM_WARMUP),
    "adafactor": Trainer(torch.optim.Adafactor, (0.2, 0.2), (0.05, 0.5)),
    "muon": Trainer(muon, (0.05, 0.5), (0.03, 3.0)),
    "muon_match_rms_adamw": Trainer(muon, (0.05, 0.5), (0.03, 3.0)),
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    scheme: str
    family: str
    tied: bool
    coupled: bool

    def shape(self) -> Shape:
        fields = {"head_dim": 16, "vocab_size": VOCAB, "max_seq_len": SEQ, "tie_embeddings": self.tied}
        return shape_of(ModelConfig(family=self.family, hidden_size=32, num_layers=2, **fields))

    def plan(self, optimizer: str | None = None) -> Plan:
        table = SCHEMES[self.scheme]
        return make_plan(
            self.scheme,
            architecture(self.shape(), BATCH * SEQ),
            base_architecture(self.shape(), BASE, BATCH * SEQ) if table.needs_base else None,
            optimizer=optimizer or self.optimizer,
            independent_weight_decay=not self.coupled,
            hparams={h.name: 1.3 * h.default for h in table.hparams},
        )


# Multipliers and gradients of unit scaling; depth; a tied readout with a multiplier of its own.
NETWORKS = (("umup", "llama", True, False), ("completep", "gpt2", False, True), ("spectral", "gpt2", True, False))
CASES = [Case(optimizer, *network) for optimizer, network in product(TRAINERS, NETWORKS)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def orthogonalise_in_float64(monkeypatch):
    """torch's Muon iterates in bfloat16, where units other than powers of two round otherwise."""

    def iterate(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
        a, b, c = coefficients
        x = grad.T if grad.size(0) > grad.size(1) else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if grad.size(0) > grad.size(1) else x

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", iterate)


def optimizers(case: Case, plan: Plan, named: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """One optimizer, or the two of a hybrid."""
    unit, family = SCHEMES[case.scheme].unit_scaled, OPTIMIZERS[case.optimizer]
    found = []
    for part in [case.optimizer] if family.rest is None else [case.optimizer, family.rest]:
        trainer = ADAMW if part == "adamw" else TRAINERS[part]
        lr, eps = trainer.lr[unit], trainer.eps[unit]
        decay = 0.02 / lr if case.coupled else 0.02
        found.append(trainer.make(param_groups(plan, named.items(), lr=lr, weight_decay=decay, eps=eps, part=part)))
    return found


@dataclass
class Run:
    """Losses, and the weights that have a gradient, before and after: keys' biases have none, for softmax."""

    losses: list[float]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(case: Case, plan: Plan, skip: int | None = None) -> Run:
    model = decoder(case.shape(), plan, torch.float64).to(torch.float64)
    for name, p in plan.stored.items():
        draw = torch.randn(p.spec.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        model.get_parameter(name).data = draw * p["init_std"] + p["init_mean"]
    if case.tied:
        model.head.weight = model.embed.weight
    named = dict(model.named_parameters())
    watched = {name: p for name, p in named.items() if not name.endswith("attn.k.bias")}
    start = {name: p.detach().clone() for name, p in watched.items()}
    skip = TRAINERS[case.optimizer].skip if skip is None else skip
    both, losses = optimizers(case, plan, named), []
    for step in range(skip + STEPS):
        for group in (g for o in both for g in o.param_groups):
            group["lr"] = group["initial_lr"] if step >= skip else 0.0
        tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        for one in both:
            one.step()
    return Run(losses, start, {name: p.detach() for name, p in watched.items()})


@cache
def original(case: Case) -> Run:
    return train(case, case.plan())


def units(plan: Plan) -> dict[str, float]:
    random = Random(1)
    return {name: random.choice((0.13, 0.7, 1 / 3, 1.9, 5.3)) for name in plan.stored}


@every_case
def test_training_moves_every_weight(case):
    """What the tests below compare."""
    run, plan = original(case), case.plan()
    assert max(run.losses) - min(run.losses) > 1e-2
    assert max(run.losses) < 3 * run.losses[0]
    for name, weight in run.weights.items():
        size = plan.params[name]["init_std"] or 1.0
        assert (weight - run.start[name]).square().mean().sqrt() > 1e-5 * size, name


@every_case
def test_any_units_give_the_same_run(case):
    plan, reference = case.plan(), original(case)
    thetas = units(plan)
    shifted = train(case, plan.shift(thetas))
    assert shifted.losses == pytest.approx(reference.losses, rel=1e-10)
    for name, weight in reference.weights.items():
        torch.testing.assert_close(shifted.weights[name] / thetas[name], weight, rtol=1e-6, atol=1e-9)


@every_case
@pytest.mark.parametrize("form", [Plan.fold, Plan.exact_gradients])
def test_other_forms_of_a_plan_give_the_same_run(case, form):
    assert train(case, form(case.plan())).losses == pytest.approx(original(case).losses, rel=1e-10)


# --- the comparisons can fail -----------------------------------------------------------------------------------


def mine(case: Case, plan: Plan) -> dict[str, float]:
    """Other units for what the optimizer trains itself, where it shares the weights with another."""
    family = OPTIMIZERS[case.optimizer]
    return {name: theta for name, theta in units(plan).items() if family.trains(plan.params[name].spec) is family}


@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer in ("sgd", "adafactor")], ids=str)
def test_adams_powers_are_wrong_for_other_optimizers(case):
    plan = case.plan()
    as_adam = replace(replace(plan, optimizer="adamw").shift(mine(case, plan)), optimizer=case.optimizer)
    assert train(case, as_adam).losses != pytest.approx(original(case).losses, rel=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer != "sgd"], ids=str)
def test_without_its_factor_on_epsilon_the_run_differs(case):
    plan = case.plan()
    shifted = plan.shift(mine(case, plan))
    back = {n: p.scaled({"eps": plan.params[n]["eps"] / p["eps"]}, "", "") for n, p in shifted.stored.items()}
    unscaled = replace(shifted, params={**shifted.params, **back})
    assert train(case, unscaled).losses != pytest.approx(original(case).losses, rel=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer == "radam"], ids=str)
def test_radams_first_steps_are_of_no_units(case):
    plan = case.plan()
    plain, shifted = (train(case, p, skip=0).losses for p in (plan, plan.shift(units(plan))))
    assert shifted != pytest.approx(plain, rel=1e-5)
