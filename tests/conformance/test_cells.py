"""Every cell of scheme x role x optimizer x decay is answered, and relative schemes are sp at their base.

Parametrized over the tables themselves: a new scheme or optimizer is tested without an edit here.
"""

from dataclasses import replace
from itertools import product
from math import isfinite

import pytest

from umup.config.sections import BaseShape, ModelConfig
from umup.errors import PlanError
from umup.models.specs import architecture, base_architecture, shape_of
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import STORAGE_QUANTITIES, USE_QUANTITIES, Plan, make_plan
from umup.rules.roles import Role
from umup.rules.schemes import SCHEMES

WIDE, DEEP = 192, 6
RELATIVE = [name for name, table in SCHEMES.items() if table.needs_base]
NO_DECAY = (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
both_decays = pytest.mark.parametrize("independent", [True, False], ids=["independent", "coupled"])


def cell(plan_of, scheme: str, role: Role, optimizer: str, independent: bool) -> Plan | str:
    """The plan of a role alone, away from its base; or what the scheme says where it has none."""
    roles = (Role.EMBEDDING, role) if role is Role.TIED_READOUT else (role,)
    try:
        return plan_of(scheme, optimizer, WIDE, DEEP, independent, roles)
    except PlanError as refusal:
        return str(refusal)


def assert_answered(plan: Plan) -> None:
    for name, p in plan.params.items():
        quantities = USE_QUANTITIES if p.spec.tied_to else (*USE_QUANTITIES, *STORAGE_QUANTITIES)
        assert set(p.values) == set(quantities), name
        for quantity, value in p.values.items():
            assert isfinite(value.number), (name, quantity)
            assert value.rule, (name, quantity)
            assert value.source, (name, quantity)
            may_be_zero = quantity in ("init_std", "init_mean", "weight_decay")
            assert value.number > 0 or (may_be_zero and value.number == 0), (name, quantity)


@every_scheme
@every_optimizer
@both_decays
def test_every_cell_is_answered_or_refused_by_name(plan_of, scheme, optimizer, independent):
    for role in Role:
        found = cell(plan_of, scheme, role, optimizer, independent)
        if isinstance(found, Plan):
            assert_answered(found)
        else:
            assert f"scheme {scheme!r} has no rule for role {role} " in found


def test_no_cell_is_skipped(plan_of, record_property):
    cells = list(product(SCHEMES, Role, OPTIMIZERS, (True, False)))
    answered = sum(isinstance(cell(plan_of, *c), Plan) for c in cells)
    record_property("cells", answered)
    print(f"{answered} of {len(cells)} cells answered")
    assert answered > 2300


@every_scheme
def test_a_missing_row_is_refused_by_name(scheme, monkeypatch):
    """What the tests above take for an answer."""
    network = architecture(shape_of(ModelConfig(norm_placement=SCHEMES[scheme].norm_placements[0])), 64)
    rows = {role: row for role, row in SCHEMES[scheme].rows.items() if role is not Role.HIDDEN_OUT}
    monkeypatch.setitem(SCHEMES, scheme, replace(SCHEMES[scheme], rows=rows))
    base = network if SCHEMES[scheme].needs_base else None
    with pytest.raises(
        PlanError, match=rf"{scheme!r} has no rule for role hidden_out \(parameter layers\.0\.attn\.out"
    ):
        make_plan(scheme, network, base)


@every_scheme
@every_optimizer
def test_what_coupled_decay_takes_in_a_step_does_not_depend_on_the_optimizer(plan_of, scheme, optimizer):
    """`w *= 1 - lr*wd`: the rates of a family are its own, the product is not."""
    mine, adam = (plan_of(scheme, o, WIDE, DEEP, independent=False).stored for o in (optimizer, "adamw"))
    for name, p in mine.items():
        assert p["lr"] * p["weight_decay"] == pytest.approx(adam[name]["lr"] * adam[name]["weight_decay"], rel=1e-12)
        assert (p["weight_decay"] == 0) == (p.spec.role in NO_DECAY)


@every_optimizer
def test_what_is_no_matrix_is_trained_by_the_rest_of_a_hybrid(plan_of, optimizer):
    family = OPTIMIZERS[optimizer]
    trained = {role: family.trains(plan_of("umup", optimizer).params[role].spec).name for role in Role}
    kernel = replace(plan_of("umup", optimizer).params[Role.HIDDEN].spec, shape=(64, 64, 3))
    for role, name in {**trained, "kernel": family.trains(kernel).name}.items():
        assert name == (optimizer if role in (Role.HIDDEN, Role.HIDDEN_OUT) else family.rest or optimizer), role


# --- a relative scheme at its base is sp, bit for bit ------------------------------------------------------------


@pytest.mark.parametrize("scheme", RELATIVE)
@every_optimizer
@both_decays
def test_a_relative_scheme_at_its_base_is_sp(plan_of, scheme, optimizer, independent):
    every_role, sp = (plan_of(s, optimizer, independent=independent) for s in (scheme, "sp"))
    assert every_role.diff(sp) == []
    for family, width in (("gpt2", 112), ("llama", 208), ("llama", 4208)):
        model = ModelConfig(family=family, hidden_size=width, num_layers=2, head_dim=16, num_kv_heads=1)
        network = architecture(shape_of(model), 128)
        fields = {"optimizer": optimizer, "independent_weight_decay": independent}
        assert make_plan(scheme, network, network, **fields).diff(make_plan("sp", network, **fields)) == []


@pytest.mark.parametrize("scheme", RELATIVE)
@every_optimizer
def test_a_relative_scheme_away_from_its_base_is_not_sp(plan_of, scheme, optimizer):
    moved = plan_of(scheme, optimizer, WIDE, DEEP).diff(plan_of("sp", optimizer, WIDE, DEEP))
    assert {"init_std", "multiplier"} <= {quantity for _, quantity, *_ in moved}


# --- sides that grow by different factors -----------------------------------------------------------------------

# name: (fan_in, fan_out) over the base's, with fewer heads for keys and values and another MLP there.
UNEVEN = {
    "attn.q": (4, 4),
    "attn.k": (4, 2),
    "attn.v": (4, 2),
    "attn.out": (4, 4),
    "mlp.gate": (4, 6),
    "mlp.up": (4, 6),
    "mlp.down": (6, 4),
}
# fan_in, fan_out, s over the base's -> rate and epsilon; s is the optimizer's own factor.
EXPECTED = {
    "sgd": (lambda i, o, s: o / i, lambda i, o: 1.0),
    "adamw": (lambda i, o, s: 1 / i, lambda i, o: 1 / o),
    "lion": (lambda i, o, s: 1 / i, lambda i, o: 1.0),
    "adafactor": (lambda i, o, s: i**-0.5, lambda i, o: i**-0.5),
    "shampoo": (lambda i, o, s: (o / i) ** 0.5, lambda i, o: i / o),
    "soap": (lambda i, o, s: (o / i) ** 0.5, lambda i, o: (i / o) ** 0.5),
    "muon": (lambda i, o, s: (o / i) ** 0.5 / s, lambda i, o: (i / o) ** 0.5),
    "muon_match_rms_adamw": (lambda i, o, s: (o / i) ** 0.5 / s, lambda i, o: (i / o) ** 0.5),
}
FACTORS = {
    "muon": lambda rows, columns: max(1, rows / columns) ** 0.5,
    "muon_match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}


@pytest.mark.parametrize("optimizer", EXPECTED)
def test_every_matrix_has_its_own_ratios(optimizer):
    shape = shape_of(ModelConfig(hidden_size=512, head_dim=64, num_kv_heads=2, intermediate_size=1536, num_layers=1))
    base = BaseShape(hidden_size=128, head_dim=64, num_kv_heads=1, intermediate_size=256)
    target, small = architecture(shape, 64), base_architecture(shape, base, 64)
    plan = make_plan("mup", target, small, optimizer=optimizer)
    shapes = {spec.name: spec.shape for spec in small.params}
    lr, eps = EXPECTED[optimizer]
    factor = FACTORS.get(optimizer, lambda rows, columns: 1.0)
    for name, (i, o) in UNEVEN.items():
        p = plan.params[f"layers.0.{name}.weight"]
        s = factor(*p.spec.shape) / factor(*shapes[p.spec.name])
        assert (p.spec.fan_in / shapes[p.spec.name][1], p.spec.fan_out / shapes[p.spec.name][0]) == (i, o), name
        assert p["lr"] == pytest.approx(lr(i, o, s), rel=1e-12), name
        assert p["eps"] == pytest.approx(eps(i, o), rel=1e-12), name


@pytest.mark.parametrize("optimizer", FACTORS)
def test_a_transposed_matrix_has_the_same_effect(plan_of, optimizer):
    """GPT-2's Conv1D stores (fan_in, fan_out): the rate times the optimizer's own factor stays."""
    up, down = (64, 256), (256, 64)

    def effect(shape: tuple[int, int]) -> float:
        network = architecture(shape_of(ModelConfig()), 64)
        spec = replace(network.params[1], name="w", role=Role.HIDDEN, shape=shape, fan_in=64, fan_out=256)
        one = replace(network, params=(spec,), sites=())
        return make_plan("umup", one, optimizer=optimizer).params["w"]["lr"] * FACTORS[optimizer](*shape)

    assert effect(up) == pytest.approx(effect(down), rel=1e-12)
