"""The listing of the tables: the formulas of papers by hand, and those of real models' plans."""

import json

import pytest

from umup.config.sections import ModelConfig
from umup.models.specs import architecture, shape_of
from umup.rules.catalog import HORIZON, catalog, optimizer_table, role_rows, scheme_table, site_formulas
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import make_plan
from umup.rules.roles import OpKind, Role
from umup.rules.schemes import SCHEMES

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def formulas(scheme, optimizer, role, in_branch=False):
    rows = role_rows(SCHEMES[scheme], OPTIMIZERS[optimizer])
    (row,) = (r for r in rows if r.role is role and r.in_branch == in_branch)
    return {quantity: found.formula for quantity, found in row.formulas.items()}


@pytest.mark.parametrize(
    ("scheme", "optimizer", "role", "in_branch", "expected"),
    [
        ("umup", "adamw", Role.HIDDEN, True, {"lr": "1/(sqrt(depth)*sqrt(fan_in))", "multiplier": "1/sqrt(fan_in)"}),
        ("umup", "adamw", Role.HIDDEN, False, {"lr": "1/sqrt(fan_in)", "init_std": "1"}),
        ("umup", "adamw", Role.EMBEDDING, False, {"lr": "1/sqrt(fan_out)"}),
        ("mup", "adamw", Role.HIDDEN, True, {"lr": "base_fan_in/fan_in", "decay_coupled": "fan_in/base_fan_in"}),
        ("mup", "adamw", Role.READOUT, False, {"multiplier": "alpha_out*base_fan_in/fan_in", "lr": "1"}),
        ("mup", "sgd", Role.BIAS, False, {"lr": "fan_out/base_fan_out", "decay_coupled": "0"}),
        ("spectral", "shampoo", Role.HIDDEN, True, {"lr": "sqrt(fan_out)/sqrt(fan_in)", "eps": "fan_in/fan_out"}),
        ("sp", "muon", Role.HIDDEN_OUT, True, {"lr": "1", "init_std": "0.707107*sigma_init/sqrt(depth)"}),
    ],
)
def test_formulas_are_those_of_the_papers(scheme, optimizer, role, in_branch, expected):
    assert expected.items() <= formulas(scheme, optimizer, role, in_branch).items()


@every_scheme
@every_optimizer
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_plan_of_a_model_has_no_other_rule(scheme, optimizer, independent, family):
    fields = {"hidden_size": 64, "num_layers": 2, "head_dim": 16, "vocab_size": 32, "norm_gain": True}
    model = architecture(shape_of(ModelConfig(family=family, norm_placement=scheme.norm_placements[0], **fields)), 64)
    base = model if scheme.needs_base else None
    plan = make_plan(scheme.name, model, base, optimizer=optimizer.name, independent_weight_decay=independent)
    rows = {(r.role, r.in_branch): r for r in role_rows(scheme, optimizer)}
    decay = "decay_independent" if independent else "decay_coupled"
    for name, p in plan.params.items():
        row = rows[p.spec.role, p.spec.on_residual]
        assert row.trained_by == (None if p.spec.tied_to else optimizer.trains(p.spec).name), name
        for quantity, value in p.values.items():
            listed = row.formulas.get(decay if quantity == "weight_decay" else quantity)
            if listed is None:
                assert (quantity, value.number) == ("eps", 1.0), name
            else:
                assert (value.rule, value.source) == (listed.formula, listed.source), (name, quantity)
    sites = site_formulas(scheme)
    for op in plan.ops.values():
        for quantity, value in op.values.items():
            assert value.rule == sites[op.site.kind][quantity].formula


@every_scheme
def test_every_role_and_site_is_listed(scheme):
    rows = role_rows(scheme, OPTIMIZERS["adamw"])
    assert {r.role for r in rows} == set(Role)
    assert {r.role for r in rows if r.in_branch} >= {Role.HIDDEN, Role.HIDDEN_OUT, Role.NORM_GAIN, Role.BIAS}
    assert set(site_formulas(scheme)) == set(OpKind)


def test_a_hybrid_trains_matrices_inside_the_network_alone():
    rows = role_rows(SCHEMES["umup"], OPTIMIZERS["muon"])
    assert {r.role for r in rows if r.trained_by == "muon"} == {Role.HIDDEN, Role.HIDDEN_OUT}
    assert {r.role for r in rows if r.trained_by is None} == {Role.TIED_READOUT}


def test_a_family_without_epsilon_lists_none():
    assert "eps" not in formulas("mup", "lion", Role.HIDDEN)
    assert "eps" in formulas("mup", "adam", Role.HIDDEN)


@every_scheme
@every_optimizer
def test_a_source_stands_once_in_a_rate(scheme, optimizer):
    for row in role_rows(scheme, optimizer):
        if row.trained_by is not None:
            sources = row.formulas["lr"].source.split("; ")
            assert len(sources) == len(set(sources)), row


def test_the_catalog_is_json_and_holds_every_row_with_its_source():
    document = json.loads(json.dumps(catalog()))
    assert list(document["schemes"]) == list(SCHEMES)
    assert list(document["optimizers"]) == list(OPTIMIZERS)
    assert {axis: list(rules) for axis, rules in document["horizon"].items()} == {
        a: list(r) for a, r in HORIZON.items()
    }
    for entry in [*document["schemes"].values(), *document["optimizers"].values()]:
        assert entry["source"]
    assert document["horizon"]["batch"]["linear"]["unit_moves"] == {"lr": "sqrt(batch)"}
    assert document["optimizers"]["muon"]["rest"] == "adamw"
    umup = document["schemes"]["umup"]
    assert umup["options"]["depth_count"]["default"] == "L"
    assert umup["options"]["depth_count"]["choices"].keys() == {"L", "2L"}
    assert (umup["hparams"]["alpha_res"]["low"], umup["hparams"]["alpha_res"]["high"]) == (0.125, 8.0)
    assert (umup["unit_scaled"], umup["needs_base"], umup["norm_placements"]) == (True, False, ["pre", "post"])


@every_scheme
def test_tables_are_json(scheme):
    table = json.loads(json.dumps(scheme_table(scheme, OPTIMIZERS["muon"])))
    assert table["scheme"]["name"] == scheme.name
    rows = json.loads(json.dumps(optimizer_table(OPTIMIZERS["muon"])))["schemes"][scheme.name]
    assert rows == table["parameters"]
    assert table["sites"]["loss"].keys() == {"logits", "grad"}
