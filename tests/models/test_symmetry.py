"""The abc-symmetry on real decoders with torch's AdamW: other units for every weight, the same run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor

from umup.config.sections import BaseShape, ModelConfig
from umup.models.build import decoder, initialise
from umup.models.decoder import Decoder
from umup.models.families import FAMILIES
from umup.models.specs import Shape, architecture, base_architecture, shape_of
from umup.rules.plan import Plan, make_plan
from umup.rules.schemes import SCHEMES

# These decays are large so that their effect is seen.

BASE = BaseShape(hidden_size=16, num_layers=1)
BATCH, SEQ, VOCAB, STEPS = 4, 16, 64, 6
# Epsilon is of the size of the gradients, so that a wrong factor on it shows.
LR = {**dict.fromkeys(SCHEMES, 0.01), "umup": 0.5, "mus": 0.5, "spectral": 0.1}
EPS = {scheme: 0.1 if table.unit_scaled else 1e-3 for scheme, table in SCHEMES.items()}


@dataclass(frozen=True)
class Case:
    scheme: str
    family: str
    tied: bool
    coupled: bool = False
    option: tuple[str, str] | None = None

    def shape(self, width: int = 32) -> Shape:
        return shape_of(
            ModelConfig(
                family=self.family,
                hidden_size=width,
                num_layers=2,
                head_dim=16,
                vocab_size=VOCAB,
                max_seq_len=SEQ,
                tie_embeddings=self.tied,
                norm_placement=SCHEMES[self.scheme].norm_placements[0],
            )
        )

    def plan(self) -> Plan:
        table = SCHEMES[self.scheme]
        return make_plan(
            self.scheme,
            architecture(self.shape(), BATCH * SEQ),
            base_architecture(self.shape(), BASE, BATCH * SEQ) if table.needs_base else None,
            independent_weight_decay=not self.coupled,
            hparams={h.name: 1.3 * h.default for h in table.hparams},
            options=dict([self.option] if self.option else []),
        )


# Parallel blocks with a shared norm and a bias at the head; a norm on the embedding.
OTHERS = [Case(scheme, family, False) for scheme in ("sp", "umup", "completep") for family in ("gptj", "bloom")]
CASES = [Case(*c) for c in product(SCHEMES, ("llama", "gpt2"), (True, False))] + OTHERS
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_case_and_decay = pytest.mark.parametrize(
    "case", [replace(case, coupled=coupled) for case in CASES for coupled in (True, False)], ids=str
)


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def model_of(case: Case, plan: Plan, dtype: torch.dtype = torch.float64) -> Decoder:
    """float32: as umup initialises it. float64: the same draws times the plan's numbers without rounding to float32."""
    model = decoder(case.shape(), plan, dtype).to(dtype)
    if dtype is torch.float32:
        initialise(model, plan, seed=0)
        return model
    for name, p in plan.stored.items():
        draw = torch.randn(p.spec.shape, generator=torch.Generator().manual_seed(len(name)), dtype=dtype)
        model.get_parameter(name).data = draw * p["init_std"] + p["init_mean"]
    if case.tied:
        model.head.weight = model.embed.weight
    return model


def adamw(case: Case, plan: Plan, model: Decoder, eps_of: Plan, decay: float = 0.02) -> torch.optim.AdamW:
    groups = []
    for name, p in plan.stored.items():
        lr = LR[case.scheme] * p["lr"]
        coupled = decay / LR[case.scheme] * p["weight_decay"]
        groups.append(
            {
                "params": [model.get_parameter(name)],
                "lr": lr,
                "eps": EPS[case.scheme] * eps_of.params[name]["eps"],
                "weight_decay": coupled if case.coupled else decay * p["weight_decay"] / lr,
            }
        )
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, Tensor]


def train(
    case: Case, plan: Plan, dtype: torch.dtype = torch.float64, eps_of: Plan | None = None, clip: float = 0.0
) -> Run:
    model = model_of(case, plan, dtype)
    optimizer = adamw(case, plan, model, eps_of or plan)
    losses = []
    for step in range(STEPS):
        loss = model.loss(*batch(step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return Run(losses, {name: p.detach() for name, p in model.named_parameters()})


@cache
def original(case: Case, dtype: torch.dtype = torch.float64) -> Run:
    return train(case, case.plan(), dtype)


def thetas(plan: Plan, choices: Iterable[float]) -> dict[str, float]:
    random, choices = Random(1), list(choices)
    return {name: random.choice(choices) for name in plan.stored}


POWERS_OF_TWO = [2.0**k for k in range(-3, 4)]
ANY = [0.13, 0.7, 1 / 3, 1.9, 5.3]


def joined(name: str) -> str:
    """The first linear of the product that a weight takes part in."""
    return re.sub(r"mlp\.up", "mlp.gate", re.sub(r"attn\.[kv]\.", "attn.q.", name))


@every_case_and_decay
def test_powers_of_two_change_no_bit(case):
    """Weights of one product share a unit: with units of their own they would be products of their own, which sum in
    another order."""
    plan, reference = case.plan(), original(case, torch.float32)
    drawn = thetas(plan, POWERS_OF_TWO)
    units = {name: drawn.get(joined(name), drawn[name]) for name in drawn}
    shifted = train(case, plan.shift(units), torch.float32)
    assert shifted.losses == reference.losses
    for name, weight in reference.weights.items():
        assert torch.equal(shifted.weights[name] / units[name], weight), name


@every_case_and_decay
def test_any_units_give_the_same_run(case):
    plan, reference = case.plan(), original(case)
    units = thetas(plan, ANY)
    shifted = train(case, plan.shift(units))
    assert shifted.losses == pytest.approx(reference.losses, rel=1e-10)
    for name, weight in reference.weights.items():
        torch.testing.assert_close(shifted.weights[name] / units[name], weight, rtol=1e-7, atol=1e-10)


@every_case_and_decay
@pytest.mark.parametrize("form", ["fold", "unfold", "exact_gradients"])
def test_other_forms_of_a_plan_give_the_same_run(case, form):
    assert train(case, getattr(case.plan(), form)()).losses == pytest.approx(original(case).losses, rel=1e-10)


OPTIONS = [
    Case(s, "gpt2", True, option=(o.name, choice)) for s in SCHEMES for o in SCHEMES[s].options for choice in o.choices
]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_choice_of_an_option_can_be_folded(case):
    assert train(case, case.plan().fold()).losses == pytest.approx(original(case).losses, rel=1e-10)


@every_case
def test_training_moves_every_weight(case):
    """The tests above compare runs; this one says that there is something to compare."""
    start, run = model_of(case, case.plan()), original(case)
    assert max(run.losses) - min(run.losses) > 1e-3
    for name, p in start.named_parameters():
        assert not torch.equal(p, run.weights[name]), name


def gradients(case: Case, plan: Plan) -> dict[str, Tensor]:
    model = model_of(case, plan)
    model.loss(*batch(0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_case
@pytest.mark.parametrize("form", ["fold", "exact_gradients"])
def test_exact_gradients_are_those_of_finite_differences(case, form):
    plan = getattr(case.plan(), form)()
    model, exact = model_of(case, plan), gradients(case, plan)
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        step = 1e-4 * (plan.params[name]["init_std"] or 0.1)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * step)
                sides.append(model.loss(*batch(0)).item())
                p.sub_(direction, alpha=sign * step)
        slope = (exact[name] * direction).sum().item()
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-14 / step), name


@every_case
def test_a_plans_gradients_are_the_exact_ones_times_the_constant_that_epsilon_makes_up_for(case):
    plan = case.plan()
    exact_plan = plan.exact_gradients()
    exact = gradients(case, exact_plan)
    for name, grad in gradients(case, plan).items():
        gain = plan.params[name]["eps"] / exact_plan.params[name]["eps"]
        # A key's bias has no gradient but rounding noise, since softmax sees only differences.
        torch.testing.assert_close(grad, gain * exact[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_uses_of_umups_tied_embedding_see_gradients_of_one_scale(family):
    """Otherwise their sum would be no multiple of the true gradient, and exact_gradients would refuse."""
    tied, untied = (Case("umup", family, t).plan() for t in (True, False))
    assert tied.exact_gradients().params["embed.weight"]["eps"] == pytest.approx(
        untied.exact_gradients().params["head.weight"]["eps"], rel=1e-12
    )


@every_case
def test_without_its_factor_on_epsilon_the_run_differs(case):
    plan = case.plan()
    unscaled = train(case, plan.shift(thetas(plan, POWERS_OF_TWO)), eps_of=plan)
    assert unscaled.losses != pytest.approx(original(case).losses, rel=1e-6)


@every_case
def test_clipping_by_the_global_norm_is_not_invariant(case):
    """The norm is taken in the units of the plan, so that a clipped run depends on them."""
    plan = case.plan()
    clipped, shifted = (train(case, p, clip=1e-2) for p in (plan, plan.shift(thetas(plan, POWERS_OF_TWO))))
    assert shifted.losses != pytest.approx(clipped.losses, rel=1e-6)
