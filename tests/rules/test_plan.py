"""Plans: what every scheme must answer, errors, JSON, transformations, explanations."""

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from math import isfinite

import pytest

from umup.config.sections import ModelConfig
from umup.errors import PlanError
from umup.models.families import FAMILIES
from umup.models.specs import architecture, shape_of
from umup.rules.explain import LAYER, diff_text, parameter_rows, site_rows
from umup.rules.opscales import Value
from umup.rules.plan import STORAGE_QUANTITIES, USE_QUANTITIES, OpPlan, ParamPlan, Plan, make_plan
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import SCHEMES

TOKENS = 128
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_plan = pytest.mark.parametrize(
    ("scheme", "family", "dropout"), [(s, f, d) for s in SCHEMES for f in FAMILIES for d in (0.0, 0.1)]
)


def network(family="gpt2", width=96, **fields) -> Architecture:
    sizes = {"num_layers": 3, "head_dim": 16, "vocab_size": 50, "max_seq_len": 16, **fields}
    return architecture(shape_of(ModelConfig(family=family, hidden_size=width, **sizes)), TOKENS)


def plan(
    scheme,
    family="gpt2",
    width=96,
    base_width=64,
    base_layers=None,
    hparams=None,
    options=None,
    coupled=False,
    optimizer="adamw",
    **fields,
) -> Plan:
    fields = {"norm_placement": SCHEMES[scheme].norm_placements[0], **fields}
    base = network(family, base_width, **fields) if SCHEMES[scheme].needs_base else None
    if base and base_layers:
        base = replace(base, sizes=replace(base.sizes, num_layers=base_layers))
    target = network(family, width, **fields)
    return make_plan(
        scheme,
        target,
        base,
        optimizer=optimizer,
        independent_weight_decay=not coupled,
        hparams=hparams or {},
        options=options or {},
    )


def values_of(p: Plan) -> list[Value]:
    entries: list[ParamPlan | OpPlan] = [*p.params.values(), *p.ops.values()]
    return [value for entry in entries for value in entry.values.values()]


def numbers(p: Plan, *quantities: str) -> dict[tuple[str, str], float]:
    return {(name, q): entry[q] for name, entry in p.params.items() for q in quantities if q in entry.values}


# --- what every scheme must answer ------------------------------------------------------------------------------


def everything(scheme: str) -> Architecture:
    """One parameter of every role and one site of every kind, normalised where the scheme wants it."""
    params = [ParamSpec(f"p.{role}", role, (4, 8), 8, 4) for role in Role if role is not Role.TIED_READOUT]
    params.append(ParamSpec("p.tied", Role.TIED_READOUT, (4, 8), 8, 4, tied_to="p.embedding"))
    sites = tuple(OpSite(f"s.{kind}", kind) for kind in OpKind)
    sizes = Sizes(2, TOKENS, 16, 8, 32, dropout=0.1, norm_placement=SCHEMES[scheme].norm_placements[0])
    return Architecture(tuple(params), sites, sizes)


@every_scheme
@pytest.mark.parametrize("independent", [True, False])
def test_a_scheme_answers_every_role_and_every_kind_of_site(scheme, independent):
    base = everything(scheme) if SCHEMES[scheme].needs_base else None
    p = make_plan(scheme, everything(scheme), base, independent_weight_decay=independent)
    assert {entry.spec.role for entry in p.params.values()} == set(Role)
    assert {op.site.kind for op in p.ops.values()} == set(OpKind)
    for entry in p.stored.values():
        assert set(entry.values) == {*USE_QUANTITIES, *STORAGE_QUANTITIES}
        assert all(entry[q] > 0 for q in (*USE_QUANTITIES, "lr", "eps"))
    assert set(p.params["p.tied"].values) == set(USE_QUANTITIES)
    assert all(isfinite(value.number) and value.number >= 0 for value in values_of(p))


@every_scheme
def test_every_scheme_gives_a_kind_of_site_the_same_quantities(scheme):
    """Models read op numbers by name, so that a scheme may not leave one out."""
    base = everything(scheme) if SCHEMES[scheme].needs_base else None
    ops = make_plan(scheme, everything(scheme), base).ops
    for name, reference in make_plan("sp", everything("sp")).ops.items():
        assert set(ops[name].values) == set(reference.values), name


@every_scheme
def test_every_number_has_a_rule_and_a_source(scheme):
    found = values_of(plan(scheme))
    assert len(found) > 100
    assert all(value.rule and value.source for value in found)


@every_scheme
def test_every_hyperparameter_moves_some_number(scheme):
    untied = plan(scheme, tie_embeddings=False)
    for h in SCHEMES[scheme].hparams:
        assert h.low <= h.default <= h.high
        assert h.doc
        assert h.source
        assert h.transfers
        assert untied.diff(plan(scheme, tie_embeddings=False, hparams={h.name: h.default * 1.5})), h.name


@every_scheme
def test_every_choice_of_an_option_moves_some_number(scheme):
    for option in SCHEMES[scheme].options:
        for name, choice in option.choices.items():
            assert choice.doc
            assert choice.source
            factors = {h.name: 2 * h.default for h in choice.hparams}
            moved = plan(scheme, num_layers=4, base_layers=2).diff(
                plan(scheme, num_layers=4, base_layers=2, options={option.name: name}, hparams=factors)
            )
            assert bool(moved) == (name != option.default), (option.name, name)


@every_scheme
def test_norms_and_biases_do_not_decay(scheme):
    for coupled in (True, False):
        for entry in plan(scheme, coupled=coupled).stored.values():
            vector = entry.spec.role in (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
            assert (entry["weight_decay"] == 0) == vector


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "umpu"}, "unknown scheme 'umpu'; did you mean 'umup'"),
        ({"hparams": {"alpha_rse": 1.0}}, "no hyperparameter 'alpha_rse'; did you mean 'alpha_res'"),
        ({"hparams": {"sigma_init": 1.0}}, "no hyperparameter 'sigma_init'; known: alpha_ffn_act"),
        ({"hparams": {"alpha_res": -1.0}}, "alpha_res: must be a positive number, not -1.0"),
        ({"hparams": {"alpha_res": 0.0}}, "alpha_res: must be a positive number"),
        ({"hparams": {"alpha_res": float("nan")}}, "alpha_res: must be a positive number"),
        ({"hparams": {"alpha_res": float("inf")}}, "alpha_res: must be a positive number"),
        ({"options": {"depth_cuont": "L"}}, "no option 'depth_cuont'; did you mean 'depth_count'"),
        ({"options": {"embedding_lr": "constnat"}}, "unknown choice 'constnat'; did you mean 'constant'"),
        ({"scheme": "ntp", "options": {"depth_count": "L"}}, "no option 'depth_count'; it has none"),
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adam'"),
        ({"scheme": "mup"}, "'mup' needs a base shape; write base"),
        ({"base": network()}, "'umup' is absolute and takes no base shape; remove it"),
        ({"scheme": "sp", "base": network()}, "'sp' is absolute"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_plan(**{"scheme": "umup", "architecture": network(), **arguments})


@pytest.mark.parametrize("part", ["rows", "ops"])
def test_a_table_that_does_not_answer_is_an_error(part, monkeypatch):
    answers: Mapping = getattr(SCHEMES["sp"], part)
    fewer = {k: v for k, v in answers.items() if k not in (Role.NORM_GAIN, OpKind.GELU)}
    monkeypatch.setitem(SCHEMES, "sp", replace(SCHEMES["sp"], **{part: fewer}))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="norm_gain" if part == "rows" else "gelu"):
        plan("sp")


# --- JSON and frozenness ----------------------------------------------------------------------------------------


@every_plan
def test_a_plan_survives_json(scheme, family, dropout):
    p = plan(scheme, family, dropout=dropout, hparams={h.name: 0.7 for h in SCHEMES[scheme].hparams[:1]})
    assert Plan.from_json(p.to_json()) == p
    assert Plan.from_json(p.fold().to_json()) == p.fold()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"umup_plan": 1}', '{"umup_plan": 1, "params": 3, "ops": {}}']
)
def test_text_that_is_no_plan_is_a_plan_error(text):
    with pytest.raises(PlanError, match="not a umup plan"):
        Plan.from_json(text)


def test_a_damaged_body_is_a_plan_error():
    body = json.loads(plan("umup").to_json())
    body["params"]["embed.weight"]["spec"]["role"] = "embeding"
    with pytest.raises(PlanError, match="embeding"):
        Plan.from_json(json.dumps(body))


def test_another_version_is_a_plan_error():
    body = {**json.loads(plan("umup").to_json()), "umup_plan": 2}
    with pytest.raises(PlanError, match="version 2; this umup reads version 1"):
        Plan.from_json(json.dumps(body))


def test_a_plan_is_frozen():
    p = plan("umup")
    for holder, field in (
        (p, "scheme"),
        (p.params["embed.weight"], "values"),
        (p.ops["loss"], "site"),
        (p.sizes, "tokens"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(holder, field, None)


def test_transformations_leave_the_plan_as_it_was():
    hparams = {"alpha_res": 0.5}
    p = plan("umup", hparams=hparams)
    before = p.to_json()
    p.shift({"embed.weight": 3.0})
    p.fold()
    p.unfold()
    hparams["alpha_res"] = 2.0
    assert p.to_json() == before


# --- muP and SP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [96, 112, 208, 1008])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mup_at_its_base_is_sp_to_the_last_bit(family, coupled, width):
    assert (
        plan("mup", family, width, base_width=width, coupled=coupled).diff(plan("sp", family, width, coupled=coupled))
        == []
    )


def test_mup_away_from_its_base_is_not_sp():
    assert plan("mup", width=96, base_width=64).diff(plan("sp", width=96)) != []


def test_table_3_of_tensor_programs_5_is_table_8_folded():
    """Readout: initial variance 1/fan_in^2, Adam's rate 1/fan_in, no multiplier, constant epsilon."""
    wide = plan("mup", width=256, base_width=64, tie_embeddings=False, hparams={"alpha_out": 0.5})
    table3 = wide.fold()
    readout = table3.params["head.weight"]
    assert readout["multiplier"] == readout["grad_input"] == readout["grad_weight"] == 1.0
    assert readout["init_std"] == pytest.approx(0.02 * 0.5 * 64 / 256, rel=1e-12)
    assert readout["lr"] == pytest.approx(0.5 * 64 / 256, rel=1e-12)
    assert readout["eps"] == pytest.approx(1 / 0.5, rel=1e-12)
    assert {name for name, *_ in wide.diff(table3)} == {"head.weight"}


# --- transformations --------------------------------------------------------------------------------------------


@every_plan
def test_unfolding_gives_every_random_weight_unit_variance(scheme, family, dropout):
    unfolded = plan(scheme, family, dropout=dropout).unfold()
    assert {round(p["init_std"], 14) for p in unfolded.stored.values() if p["init_std"]} == {1.0}


@every_plan
def test_folding_leaves_no_multiplier_but_a_tied_one_and_only_exact_gradients(scheme, family, dropout):
    folded = plan(scheme, family, dropout=dropout).fold()
    for name, p in folded.params.items():
        assert p["grad_input"] == p["grad_weight"] == p["multiplier"], name
        assert p["multiplier"] == pytest.approx(1.0, rel=1e-14) or p.spec.tied_to, name
    for op in folded.ops.values():
        if op.site.kind in (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP):
            assert op["split_grad"] == 1.0
            assert op["branch_grad"] == op["branch"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_unfolding_undoes_folding_of_umup(family, tied):
    p = plan("umup", family, tie_embeddings=tied)
    back = p.fold().unfold()
    for key, number in numbers(p, "multiplier", "init_std", "init_mean", "lr").items():
        assert number == pytest.approx(numbers(back, key[1])[key], rel=1e-12), key
    assert p.fold().params["layers.0.attn.q.weight"]["init_std"] == pytest.approx(96**-0.5)


def test_folding_sp_changes_no_number():
    assert plan("sp").diff(plan("sp").fold()) == []


def test_a_shift_moves_a_tied_use_with_its_owner():
    p = plan("umup")
    shifted = p.shift({"embed.weight": 4.0})
    assert {name for name, *_ in p.diff(shifted)} == {"embed.weight", "head.weight"}
    for name in ("embed.weight", "head.weight"):
        assert all(shifted.params[name][q] == p.params[name][q] / 4 for q in USE_QUANTITIES)
    assert shifted.params["embed.weight"]["lr"] == p.params["embed.weight"]["lr"] * 4


@pytest.mark.parametrize("name", ["nothing.weight", "head.weight"])
def test_a_shift_of_a_name_without_storage_is_an_error(name):
    with pytest.raises(PlanError, match=name):
        plan("umup").shift({name: 2.0})


@pytest.mark.parametrize(
    ("name", "quantity"), [("head.weight", "grad_weight"), ("layers.1.attn.q.weight", "grad_input")]
)
def test_gradients_without_one_constant_scale_cannot_be_folded(name, quantity):
    p = plan("umup")
    uneven = replace(p, params={**p.params, name: p.params[name].scaled({quantity: 2.0}, "x2", "test")})
    with pytest.raises(PlanError, match=name):
        uneven.fold()


# --- diff and explain -------------------------------------------------------------------------------------------


@every_scheme
def test_a_plan_does_not_differ_from_itself(scheme):
    assert plan(scheme).diff(plan(scheme)) == []


HIDDEN = {"hidden", "hidden_out"}


@pytest.mark.parametrize(
    ("scheme", "moved"),
    [
        ("sp", set()),
        (
            "mup",
            {(r, q) for r in HIDDEN for q in ("init_std", "lr", "eps")}
            | {("readout", q) for q in ("multiplier", "grad_input", "grad_weight", "eps")}
            | {("embedding", "eps"), ("norm_gain", "eps")},
        ),
        (
            "umup",
            {(r, q) for r in HIDDEN for q in ("multiplier", "grad_input", "lr")}
            | {("embedding", "lr"), ("readout", "multiplier")},
        ),
    ],
)
def test_what_depends_on_width(scheme, moved):
    narrow, wide = (plan(scheme, "llama", width, base_width=32) for width in (64, 128))
    assert {(str(narrow.params[name].spec.role), quantity) for name, quantity, *_ in narrow.diff(wide)} == moved


def test_a_difference_names_both_sides():
    found = {(name, q): (a, b) for name, q, a, b in plan("sp", "llama").diff(plan("sp", "llama", tie_embeddings=True))}
    assert found["head.weight", "lr"] == (1.0, None)
    assert "embed.weight" not in {name for name, _ in found}


@every_plan
def test_explain_mentions_every_parameter_and_site_once(scheme, family, dropout):
    p = plan(scheme, family, dropout=dropout)
    for entries, rows in ((p.params, parameter_rows(p)), (p.ops, site_rows(p))):
        shown = [row.name for row in rows]
        assert len(shown) == len(set(shown))
        for name, entry in entries.items():
            (row,) = (r for r in rows if r.name in {name, LAYER.sub("*", name)})
            assert row.values == entry.values
    text = p.explain()
    assert all(row.name in text for row in [*parameter_rows(p), *site_rows(p)])
    assert "layers.*.attn.q.weight" in text
    assert "layers.0.attn.q.weight" not in text


def test_explain_shows_layers_apart_where_they_differ():
    assert "layers.2.mlp.residual" in plan("umup").explain()
    assert "layers.*.mlp.residual" in plan("mup").explain()


def test_explain_shows_the_number_by_name_and_its_rule_and_source_by_role():
    lines = plan("umup").explain().splitlines()
    (number,) = (x for x in lines if x.startswith("layers.*.mlp.up.weight"))
    assert "0.0589256" in number
    (rule,) = (x for x in lines if x.split()[:2] == ["hidden", "lr"])
    for part in ("1/(sqrt(depth)*sqrt(fan_in))", "2407.17465", "app. G"):
        assert part in rule


def test_diff_text_collapses_layers():
    text = diff_text(plan("umup", "llama", width=64), plan("umup", "llama", width=128))
    assert text.splitlines()[0].split() == ["name", "quantity", "umup", "umup"]
    assert sum("attn.q.weight" in line for line in text.splitlines()) == 3


def test_diff_text_names_the_layers_that_differ():
    text = diff_text(plan("umup", "llama"), plan("sp", "llama"))
    branches = [row.split()[0] for row in text.splitlines() if row.split()[1] == "branch"]
    assert len(branches) == len(set(branches)) > 2
