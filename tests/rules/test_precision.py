"""Which product runs in which format: every recipe x role, overrides, refusals with what they tell to write."""

from dataclasses import replace

import pytest

from umup.config.load import parse_config
from umup.errors import ConfigError
from umup.models.specs import plan_for, products_for
from umup.rules.explain import explain_text, product_rows
from umup.rules.plan import Plan
from umup.rules.precision import PRODUCT_ROLES, RECIPES, SIDE, find_recipe, products
from umup.rules.roles import Role
from umup.rules.schemes import SCHEMES

BASE = {"hidden_size": 32, "num_layers": 2}


def config_of(scheme="umup", model=None, **precision):
    sizes = {"hidden_size": 64, "num_layers": 2, "head_dim": 16, "num_kv_heads": 2, "max_seq_len": 32}
    base = BASE if SCHEMES[scheme].needs_base else None
    placement = {"norm_placement": SCHEMES[scheme].norm_placements[0]}
    return parse_config(
        {
            "model": sizes | placement | (model or {}),
            "parametrization": {"scheme": scheme, "base": base},
            "precision": precision,
        }
    )


def products_of(scheme="umup", model=None, **precision):
    config = config_of(scheme, model, **precision)
    return products_for(config, plan_for(config))


def formats(product):
    return (product.forward, product.gradient)


# --- recipes ----------------------------------------------------------------------------------------------------

EMULATED = ("E4M3", "E5M2")
PLAIN = (None, None)
BY_ROLE = {
    "fp32": ("fp32", PLAIN, PLAIN, PLAIN),
    "bf16": ("bf16", PLAIN, PLAIN, PLAIN),
    "fp16": ("fp16", PLAIN, PLAIN, PLAIN),
    "fp8": ("bf16", EMULATED, EMULATED, PLAIN),
    "fp8_partial": ("bf16", EMULATED, PLAIN, PLAIN),
    "fp8_e4m3": ("bf16", ("E4M3", "E4M3"), ("E4M3", "E4M3"), PLAIN),
    "fp8_head": ("bf16", EMULATED, EMULATED, EMULATED),
    "simulate:E4M3": ("fp32", ("E4M3", "E4M3"), ("E4M3", "E4M3"), PLAIN),
    "simulate:E2M10": ("fp32", ("E2M10", "E2M10"), ("E2M10", "E2M10"), PLAIN),
    "simulate:E8M0": ("fp32", ("E8M0", "E8M0"), ("E8M0", "E8M0"), PLAIN),
}


def test_every_recipe_is_in_the_table_of_this_test():
    assert set(RECIPES) == {name for name in BY_ROLE if not name.startswith("simulate")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BY_ROLE)
def test_a_recipe_answers_every_role(name, tied):
    stream, hidden, hidden_out, readout = BY_ROLE[name]
    head = Role.TIED_READOUT if tied else Role.READOUT
    expected = {Role.HIDDEN: hidden, Role.HIDDEN_OUT: hidden_out, head: readout}
    found = products_of(recipe=name, model={"tie_embeddings": tied})
    assert {p.role for p in found.values()} == set(expected)
    for product in found.values():
        assert formats(product) == expected[product.role], product.name
        assert product.stream == stream
        assert product.simulated == (name.startswith("simulate") and product.forward is not None)


@pytest.mark.parametrize("name", BY_ROLE)
def test_a_recipe_that_lowers_some_roles_names_a_reason_with_its_paper_for_each_it_spares(name):
    recipe = find_recipe(name)
    assert recipe.source
    if recipe.forward is None:
        assert not recipe.roles
        assert not recipe.spared
    else:
        assert set(recipe.spared) == set(PRODUCT_ROLES) - recipe.roles
        assert all("2407.17465" in reason for reason in recipe.spared.values())


def test_each_product_says_why_it_runs_where_it_does():
    found = products_of(recipe="fp8_partial")
    assert "2209.05433" in found["layers.0.attn.q"].reason
    for name in ("layers.1.attn.out", "layers.1.mlp.down"):
        assert found[name].reason.startswith("spared: its input's scale jumps")
    assert found["head"].reason.startswith("spared: its weights grow")
    assert "float32's range" in products_of(recipe="bf16")["head"].reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp9", "^precision.recipe: unknown recipe 'fp9'; did you mean 'fp8'"),
        ("fp8_partail", "did you mean 'fp8_partial'"),
        ("int4", "unknown recipe 'int4'; known: fp32, .*fp8_head, simulate:ExMy$"),
        ("E4M3", "unknown recipe 'E4M3'; did you mean 'fp8_e4m3'"),
        *[
            (
                f"simulate:{bad}",
                r"^precision.recipe: 'simulate:.*' is no format; write simulate:ExMy, e\.g\. .* 0 to 10 m",
            )
            for bad in ("E1M3", "E9M3", "E4M11", "E4M03", "e4m3", "E4", "fp8", "", "E4M3 ")
        ],
        ("simulate", "is no format"),
    ],
)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_recipe(name)


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_are_the_matrices_of_the_plan_with_their_sides(family):
    found = products_of(model={"family": family, "intermediate_size": 176})
    gate = ["mlp.gate"] if family == "llama" else []
    branches = ["attn.q", "attn.k", "attn.v", "attn.out", *gate, "mlp.up", "mlp.down"]
    assert list(found) == [f"layers.{i}.{b}" for i in range(2) for b in branches] + ["head"]
    assert all(name == product.name for name, product in found.items())
    sides = {name: (p.fan_in, p.fan_out) for name, p in found.items()}
    assert sides["layers.1.attn.k"] == (64, 32)
    assert sides["layers.0.mlp.down"] == (176, 64)
    assert sides["head"] == (64, 256)


# --- overrides --------------------------------------------------------------------------------------------------


def test_an_override_gives_matching_products_its_formats_whatever_their_role():
    plain = products_of(recipe="fp8")
    found = products_of(recipe="fp8", overrides={"layers.*.mlp.down": "fp8_e4m3", "head": "fp8_partial"})
    assert formats(found["layers.0.mlp.down"]) == formats(found["layers.1.mlp.down"]) == ("E4M3", "E4M3")
    assert formats(found["head"]) == ("E4M3", "E5M2")
    assert found["head"].reason == "precision.overrides 'head': fp8_partial"
    changed = {name for name in plain if plain[name] != found[name]}
    assert changed == {"layers.0.mlp.down", "layers.1.mlp.down", "head"}


def test_the_streams_name_spares_a_product():
    found = products_of(recipe="fp8", overrides={"*.attn.out": "bf16"})
    assert formats(found["layers.1.attn.out"]) == PLAIN
    assert found["layers.1.attn.out"].reason == "precision.overrides '*.attn.out': bf16"
    assert formats(found["layers.1.mlp.down"]) == EMULATED


def test_later_patterns_win():
    first = {"layers.0.*": "bf16", "*.attn.q": "fp8_e4m3"}
    last = dict(reversed(first.items()))
    assert formats(products_of(recipe="fp8", overrides=first)["layers.0.attn.q"]) == ("E4M3", "E4M3")
    assert formats(products_of(recipe="fp8", overrides=last)["layers.0.attn.q"]) == PLAIN


def test_an_override_keeps_the_stream_and_says_whether_it_simulates():
    head = products_of(recipe="fp8", overrides={"head": "simulate:E3M4"})["head"]
    assert (formats(head), head.stream, head.simulated) == (("E3M4", "E3M4"), "bf16", True)
    real = products_of(recipe="simulate:E3M4", overrides={"layers.0.attn.q": "fp8"})["layers.0.attn.q"]
    assert (formats(real), real.stream, real.simulated) == (EMULATED, "fp32", False)
    spared = products_of(recipe="simulate:E3M4", overrides={"layers.0.attn.q": "fp32"})["layers.0.attn.q"]
    assert (formats(spared), spared.simulated) == (PLAIN, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"layers.*.attn.qq": "bf16"},
            r"overrides 'layers\.\*\.attn\.qq': no product .*did you mean 'layers\.\*\.attn\.q'",
        ),
        ({"layers.7.mlp.up": "bf16"}, r"no product has such a name; did you mean 'layers\.\*\.mlp\.up'"),
        ({"embed": "bf16"}, r"no product has such a name; known: layers\.\*\.attn\.q, .*head$"),
        ({"head": "fp9"}, "^precision.overrides 'head': unknown recipe 'fp9'; did you mean 'fp8'"),
        ({"head": "simulate:E9M9"}, "^precision.overrides 'head': .* write simulate:ExMy"),
        ({"head": "fp32"}, "'head': fp32 is not the stream of recipe fp8; write bf16 to spare .* fp8, fp8_partial, "),
        ({"head": "fp16"}, "'head': fp16 is not the stream of recipe fp8; write bf16"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        products_of(recipe="fp8", overrides=overrides)


# --- refusals ---------------------------------------------------------------------------------------------------

NOT_UNIT_SCALED = [name for name, table in SCHEMES.items() if not table.unit_scaled]


def test_the_unit_scaled_schemes_are_those_whose_matrices_and_gradients_start_at_one():
    assert "umup" not in NOT_UNIT_SCALED
    for name, table in SCHEMES.items():
        plan = plan_for(config_of(name))
        stds = {p["init_std"] for p in plan.stored.values() if p.spec.role in PRODUCT_ROLES}
        gradient_at_logits = plan.ops["loss"]["grad"]
        assert (stds == {1.0} and gradient_at_logits > 1) == table.unit_scaled, name


@pytest.mark.parametrize("scales", ["static", "monitor", "adapt"])
@pytest.mark.parametrize("recipe", [name for name in BY_ROLE if BY_ROLE[name][1] != PLAIN])
@pytest.mark.parametrize("scheme", NOT_UNIT_SCALED)
def test_static_formats_want_a_unit_scaled_scheme(scheme, recipe, scales):
    with pytest.raises(ConfigError) as refused:
        products_of(scheme, recipe=recipe, scales=scales)
    text, stream = str(refused.value), BY_ROLE[recipe][0]
    assert text.startswith(f"precision.scales: {scales} scales serve unit-scaled schemes only, and layers.0.attn.q ")
    assert text.endswith(f"write precision.scales: dynamic, parametrization.scheme: umup or precision.recipe: {stream}")
    assert any(p.forward for p in products_of(scheme, recipe=recipe, scales="dynamic").values())
    assert not any(p.forward for p in products_of(scheme, recipe=stream, scales=scales).values())


def test_one_override_is_enough_to_want_a_unit_scaled_scheme():
    with pytest.raises(ConfigError, match=r"and head would run in E4M3 under 'sp'; .* or no such override$"):
        products_of("sp", recipe="bf16", overrides={"head": "fp8"})


@pytest.mark.parametrize("scales", ["adapt", "dynamic"])
@pytest.mark.parametrize("scheme", NOT_UNIT_SCALED)
def test_fp16_has_no_loss_scaling(scheme, scales):
    with pytest.raises(ConfigError, match=r"fp16 under scheme .* write precision.recipe: bf16 or .*scheme: umup$"):
        products_of(scheme, recipe="fp16", scales=scales)


def test_fp8_products_want_sides_in_multiples_of_16_and_the_two_ways_out_work():
    narrow = {"head_dim": 8, "num_kv_heads": 1}
    with pytest.raises(ConfigError) as refused:
        products_of(recipe="fp8", model=narrow)
    assert str(refused.value) == (
        "precision: layers.0.attn.k maps 64 features to 8, and FP8 products take multiples of 16; change 8 to 16 "
        "in the model section, or write precision.overrides: {'layers.*.attn.k': bf16}"
    )
    products_of(recipe="fp8", model={"head_dim": 8, "num_kv_heads": 2})
    with pytest.raises(ConfigError, match=r"overrides: \{'layers\.\*\.attn\.v': bf16\}"):
        products_of(recipe="fp8", model=narrow, overrides={"layers.*.attn.k": "bf16"})
    products_of(recipe="fp8", model=narrow, overrides={"layers.*.attn.k": "bf16", "layers.*.attn.v": "bf16"})


@pytest.mark.parametrize("model", [{"vocab_size": 250}, {"intermediate_size": 250}])
def test_either_side_is_checked_and_the_next_multiple_named(model):
    with pytest.raises(ConfigError, match="change 250 to 256"):
        products_of(recipe="fp8_head", model=model)


def test_simulated_and_spared_products_take_any_side():
    odd = {"vocab_size": 250, "intermediate_size": 250}
    products_of(recipe="bf16", model=odd)
    products_of(recipe="simulate:E4M3", model=odd)
    products_of(recipe="fp8", model={"vocab_size": 250})
    products_of(recipe="bf16", model=odd, overrides={"*": "simulate:E5M2", "head": "bf16"})
    with pytest.raises(ConfigError, match=f"multiples of {SIDE}"):
        products_of(recipe="simulate:E4M3", model=odd, overrides={"head": "fp8"})


# --- explained --------------------------------------------------------------------------------------------------


def test_layers_that_agree_are_one_row_and_those_that_do_not_are_shown():
    rows = {p.name: p for p in product_rows(products_of(recipe="fp8"))}
    assert "layers.*.attn.q" in rows
    assert len(rows) == 8
    rows = {p.name: p for p in product_rows(products_of(recipe="fp8", overrides={"layers.1.attn.q": "bf16"}))}
    assert formats(rows["layers.0.attn.q"]) == EMULATED
    assert formats(rows["layers.1.attn.q"]) == PLAIN
    assert "layers.*.attn.k" in rows


def test_the_explained_table_shows_formats_stream_and_reason():
    config = config_of(recipe="fp8", overrides={"head": "simulate:E3M4"})
    plan = plan_for(config)
    lines = explain_text(plan, products_for(config, plan)).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("product "))
    assert lines[header].split() == ["product", "role", "x", "and", "w", "gradient", "stream", "why"]
    table = {line.split()[0]: line for line in lines[header + 1 : lines.index("", header)]}
    assert table["layers.*.mlp.down"].split()[:5] == ["layers.*.mlp.down", "hidden_out", "E4M3", "E5M2", "bf16"]
    assert "2209.05433" in table["layers.*.mlp.down"]
    assert table["head"].split()[1:7] == ["readout", "E3M4", "simulated", "E3M4", "simulated", "bf16"]
    assert [line.split()[0] for line, above in zip(lines[1:], lines, strict=False) if not above] == [
        "parameter",
        "site",
        "product",
        "role",
    ]
    assert not any(line.startswith("product ") for line in plan.explain().splitlines())


def test_a_plan_read_back_gives_the_same_products():
    config = config_of(recipe="fp8_head", model={"tie_embeddings": True})
    plan = plan_for(config)
    assert products_for(config, Plan.from_json(plan.to_json())) == products_for(config, plan)


def test_a_scheme_is_asked_for_by_the_plan_not_by_the_config():
    config = config_of(recipe="fp8")
    with pytest.raises(ConfigError, match="under 'sp'"):
        products(replace(plan_for(config), scheme="sp"), find_recipe("fp8"), {}, "adapt")
