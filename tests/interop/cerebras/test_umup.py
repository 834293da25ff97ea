"""A model-zoo config there and a umup run here: the same initial stds, multipliers and rates, by parameter."""

import json
import re
from math import sqrt
from pathlib import Path

import pytest
import torch
from cerebras_zoo import FAMILIES, GOLDEN, GPT, MUP, WARMUP, differences, flat, needs_golden, normal, trainer

from umup.config.load import load_config, parse_config, read_yaml
from umup.errors import ConfigError, InputError
from umup.interop.cerebras.convert import Tuned, sp_to_mup
from umup.interop.cerebras.document import read_document
from umup.interop.cerebras.from_umup import from_umup
from umup.interop.cerebras.numbers import shrinkage
from umup.interop.cerebras.to_umup import to_umup
from umup.models.families import FAMILIES as ROWS
from umup.models.specs import plan_for, shape_of

WIDTH, FILTER, LAYERS, HEAD = 128 / 32, 512 / 64, 8, 32
RECIPES = Path(__file__).parents[3] / "recipes"


def run_of(body, faithful=False):
    return to_umup(read_document(body), faithful)[0]


def expected_numbers(name):
    """Initial std and rate of a parameter under MUP, from the zoo's own tables of groups and initializers."""
    hidden, out = WIDTH**-0.5, (2 * LAYERS) ** -0.5
    if not name.endswith(".weight") or "norm" in name:
        return None, 1.0
    if name in ("embed.weight", "positions.weight"):
        return 0.08, 1.0
    if name == "head.weight":
        return 0.02, 1.0
    if name.endswith("attn.out.weight"):
        return 0.05 * hidden * out, 1 / WIDTH
    if ".attn." in name:
        return 0.06 * hidden, 1 / WIDTH
    if name.endswith("mlp.down.weight"):
        return 0.03 * FILTER**-0.5 * out, 1 / FILTER
    return 0.04 * hidden, 1 / WIDTH


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_zoos_numbers(family):
    config = run_of(trainer({**FAMILIES[family], **MUP}, name=family))
    assert config.model.family == family
    plan = plan_for(config)
    for name, p in plan.stored.items():
        std, rate = expected_numbers(name)
        if std is not None:
            assert p["init_std"] == pytest.approx(std, rel=1e-12), name
            assert p["init_cut"] == 2.0 if name != "head.weight" else "init_cut" not in p.values
        assert p["lr"] == pytest.approx(rate, rel=1e-12), name
        assert p["eps"] == 1.0
        assert p["weight_decay"] == (0.0 if p.spec.role in ("norm_gain", "norm_bias", "bias") else 1.0)
    assert plan.params["embed.weight"]["multiplier"] == pytest.approx(10.0)
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(1.5 / WIDTH)
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(1 / HEAD)
    assert not config.optimizer.independent_weight_decay


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_the_familys_own(family):
    """Nothing is overridden where the zoo's config is the family's."""
    config = run_of(trainer(FAMILIES[family], name=family))
    changed = config.model.model_fields_set & set(ROWS[family].traits.__dataclass_fields__)
    # The zoo's rotary positions turn neighbours, in every family.
    assert changed <= {"rotary_interleaved"}
    shape = shape_of(config.model)
    assert shape.num_kv_heads == {"llama": 2, "falcon": 1, "starcoder": 1}.get(family, 4)
    assert shape.rotary_dim == {"gptj": 8, "llama": 32, "falcon": 32}.get(family, shape.rotary_dim)


def test_training_settings_go_over():
    for body in (flat(), trainer()):
        config = run_of(body)
        assert (config.train.steps, config.train.batch_size, config.train.seed) == (100, 16, 1)
        assert (config.train.eval_every, config.train.checkpoint_every, config.train.grad_clip) == (50, 50, 1.0)
        s = config.schedule
        assert (s.name, s.warmup_steps, s.final_factor) == ("cosine", 10, 0.1)
        assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.eps) == (6e-4, (0.9, 0.95), 1e-8)
        assert config.precision.recipe == "bf16"
        assert config.parametrization.scheme == "sp"
        assert config.parametrization.options == {"init": "truncated"}


def test_sp_with_other_stds_than_gpt2s_keeps_them():
    model = {"initializer": normal(0.03), "output_layer_initializer": normal(0.02), "position_embedding_type": "alibi"}
    plan = plan_for(run_of(trainer(model, name="bloom")))
    stds = {
        end: plan.params[f"layers.0.{end}.weight"]["init_std"] for end in ("attn.q", "mlp.up", "attn.out", "mlp.down")
    }
    assert stds == pytest.approx({"attn.q": 0.03, "mlp.up": 0.03, "attn.out": 0.02, "mlp.down": 0.02})
    assert plan.params["embed.weight"]["init_std"] == pytest.approx(0.02)
    assert {p["lr"] for p in plan.stored.values()} == {1.0}
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(HEAD**-0.5)


def test_bases_that_are_no_integers():
    """BTLM's base has a filter of 682.6."""
    bases = {"mup_base_hidden_size": 32.5, "mup_base_filter_size": 68.26}
    plan = plan_for(run_of(trainer({**MUP, **bases})))
    assert plan.params["layers.0.attn.q.weight"]["lr"] == pytest.approx(32.5 / 128, rel=1e-12)
    down = plan.params["layers.0.mlp.down.weight"]
    assert down["lr"] == pytest.approx(68.26 / 512, rel=1e-12)
    assert down["init_std"] == pytest.approx(0.03 * sqrt(68.26 / 512) / 4, rel=1e-12)
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(1.5 * 32.5 / 128, rel=1e-12)


def test_groups_of_learning_rates_may_be_set_by_hand():
    adjust = {"embedding": 2.0, "decoder_attention": 0.5, "decoder_input_ffn": 1.0}
    plan = plan_for(run_of(trainer(MUP, {"adjust_learning_rate": adjust})))
    names = {"embed": 2.0, "layers.0.attn.q": 0.5, "layers.0.attn.out": 0.5, "layers.0.mlp.up": 1.0}
    for name, factor in {**names, "layers.0.mlp.down": 1 / FILTER}.items():
        assert plan.params[f"{name}.weight"]["lr"] == pytest.approx(factor), name
        assert plan.params[f"{name}.weight"]["weight_decay"] == 1.0


def test_logits_may_go_by_the_root_of_width():
    config = run_of(trainer({**MUP, "scale_output_logits_by_d": False}))
    assert config.parametrization.options["logits"] == "inv_sqrt_width"
    assert plan_for(config).params["head.weight"]["multiplier"] == pytest.approx(1.5 / sqrt(WIDTH))


def test_other_laws_keep_their_deviation():
    """A normal beside cut ones, and a cut that the plan has not."""
    plain = {"name": "normal", "mean": 0.0, "std": 0.05}
    plan = plan_for(run_of(trainer({**MUP, "embedding_initializer": plain})))
    assert plan.params["embed.weight"]["init_std"] * 0.87962566 == pytest.approx(0.05, rel=1e-6)
    cut = {key: normal(0.05, cut=1.0) for key in MUP if key.endswith("initializer")}
    wide = plan_for(run_of(trainer({**MUP, **cut})))
    assert "init_cut" not in wide.params["embed.weight"].values
    assert wide.params["embed.weight"]["init_std"] == pytest.approx(0.05 * 0.539560, rel=1e-5)


def test_the_legacy_format_means_what_the_current_one_does():
    tuned = Tuned(32, 3e-3, 0.05, 12.5)
    legacy = sp_to_mup(read_document(flat()), tuned, current=False).body
    current = sp_to_mup(read_document(flat()), tuned, current=True).body
    assert_equal_plans(run_of(legacy), run_of(current))


def assert_equal_plans(left, right):
    for name, quantity, a, b in plan_for(left).diff(plan_for(right)):
        assert a == pytest.approx(b, rel=1e-12), (name, quantity)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention_sliding_window_length": 4096}, "model.attention_sliding_window_length: 4096 is not in umup's"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"pos_scaling_factor": 8.0}, "pos_scaling_factor"),
        ({"scale_qk_dot_by_layer_idx": True}, "scale_qk_dot_by_layer_idx"),
        ({"moe": {"num_experts": 8, "top_k": 2}}, "model.moe"),
        ({"attention_dropout_rate": 0.1}, "umup has one dropout"),
        ({"nonlinearity": "quick_gelu"}, "model.nonlinearity: 'quick_gelu'"),
        ({"norm_type": "batchnorm1d"}, "model.norm_type"),
        ({"position_embedding_type": "fixed"}, "model.position_embedding_type"),
        ({"use_ffn_bias_in_attention": False}, "umup has both or none"),
        ({"attention_module": "multiquery_attention"}, "num_kv_groups is missing"),
        ({"initializer": {"name": "xavier_uniform"}}, "xavier_uniform is no normal distribution"),
        ({"initializer": {**normal(0.02), "mean": 0.1}}, "model.initializer.mean: expected 0"),
        ({"initializer": {**normal(0.02), "a": -0.1}}, "expected a and b of equal size"),
    ],
)
def test_what_umup_cannot_express_is_named(model, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_of(trainer(model))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"learning_rate": [{"scheduler": "Exponential", "initial_learning_rate": 1e-3, "decay_rate": 0.9}]},
            "Exponential",
        ),
        (
            {"learning_rate": [WARMUP, {**WARMUP, "initial_learning_rate": 6e-4, "end_learning_rate": 9e-4}]},
            "Linear, Linear",
        ),
        ({"learning_rate": None}, "no learning rate"),
        ({"optimizer_type": "lamb"}, "optimizer lamb"),
        ({"amsgrad": True}, "amsgrad"),
    ],
)
def test_optimizers_and_schedules_that_umup_has_not_are_named(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        run_of(flat(optimizer=optimizer))


def test_sparse_models_are_refused():
    with pytest.raises(ConfigError, match="sparsity"):
        run_of(flat(sparsity={"sparsity": 0.75}))


@pytest.mark.parametrize(
    ("legs", "expected"),
    [
        ([("Constant", 0.1, 0.1, 40), ("Linear", 0.1, 0.0, 60)], ("wsd", 0, 0.0, 100, 0.6)),
        ([("Linear", 0.0, 0.1, 10), ("Linear", 0.1, 0.02, 90)], ("linear", 10, 0.2, 100, 0.2)),
        (
            [("Linear", 0.0, 0.1, 10), ("CosineDecay", 0.1, 0.01, 60), ("Constant", 0.01, 0.01, 30)],
            ("cosine", 10, 0.1, 70, 0.2),
        ),
    ],
)
def test_schedules(legs, expected):
    def entry(kind, first, last, steps):
        if kind == "Constant":
            return {"scheduler": kind, "learning_rate": first, "total_iters": steps}
        return {"scheduler": kind, "initial_learning_rate": first, "end_learning_rate": last, "total_iters": steps}

    config = run_of(flat(optimizer={"learning_rate": [entry(*leg) for leg in legs]}))
    s = config.schedule
    assert (s.name, s.warmup_steps, s.final_factor, config.train.steps, s.decay_fraction) == pytest.approx(expected)


# --- umup's own, written for the zoo --------------------------------------------------------------------------------

RUN = {
    "model": {
        "family": "gpt3",
        "hidden_size": 128,
        "num_layers": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_seq_len": 64,
    },
    "parametrization": {
        "scheme": "mup",
        "base": {"hidden_size": 64},
        "hparams": {"sigma_init": 0.05, "alpha_emb": 10.0, "alpha_out": 2.0, "alpha_attn": 0.5, "eta_emb": 3.0},
        "options": {"eps": "constant", "decay": "with_rate", "init": "truncated"},
    },
    "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "independent_weight_decay": False, "eps": 1e-8},
    "schedule": {"name": "linear", "warmup_steps": 10, "final_factor": 0.1},
    "train": {"steps": 100, "batch_size": 8, "grad_accum": 2, "grad_clip": 1.0},
}


def with_section(section, /, **changes):
    return {**RUN, section: {**RUN[section], **changes}}


ROUND_TRIPS = {
    "gpt3": RUN,
    "sp": {
        **RUN,
        "parametrization": {"scheme": "sp", "hparams": {"sigma_init": 0.03}, "options": {"init": "truncated"}},
    },
    "normal": with_section("parametrization", options={"eps": "constant", "decay": "with_rate"}),
    "roles": with_section(
        "parametrization",
        hparams={"std_emb": 2.0, "std_ffn_in": 0.5, "std_attn_out": 3.0, "std_ffn_out": 0.25, "eta_ffn_out": 4.0},
        options={"eps": "constant", "decay": "with_rate", "roles": "apart"},
    ),
    "root": with_section(
        "parametrization", options={"eps": "constant", "decay": "with_rate", "logits": "inv_sqrt_width"}
    ),
    "independent": with_section("optimizer", weight_decay=3e-4, independent_weight_decay=True),
    **{
        family: with_section(
            "model", family=family, **({"rotary_interleaved": True} if family in ("llama", "falcon") else {})
        )
        for family in ("gptj", "bloom", "llama", "falcon", "starcoder", "mpt", "gpt2")
    },
    "wsd": with_section("schedule", name="wsd", decay_fraction=0.3),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_there_and_back(case):
    before = parse_config(ROUND_TRIPS[case])
    after = run_of(from_umup(before).body)
    ours, theirs = plan_for(before), plan_for(after)
    for name, quantity, a, b in ours.diff(theirs):
        rate = quantity == "weight_decay" and before.optimizer.independent_weight_decay
        if rate:  # the same shrinkage, said per rate
            lr = after.optimizer.lr * theirs.params[name]["lr"]
            a, b = a * before.optimizer.weight_decay, b * after.optimizer.weight_decay * lr
        assert a == pytest.approx(b, rel=1e-9), (name, quantity)
    assert shape_of(after.model) == shape_of(before.model)
    assert after.schedule.model_dump() == pytest.approx(before.schedule.model_dump())
    assert (after.optimizer.lr, after.train.grad_clip) == (before.optimizer.lr, before.train.grad_clip)
    assert after.train.batch_size * after.train.grad_accum == before.train.batch_size * before.train.grad_accum


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (with_section("parametrization", options={}), "{eps: constant}"),
        (with_section("parametrization", options={"eps": "constant"}), "{decay: with_rate}"),
        ({**RUN, "parametrization": {"scheme": "umup"}}, "have no key for it"),
        (
            {**RUN, "parametrization": {"scheme": "completep", "base": {"hidden_size": 64, "num_layers": 1}}},
            "no key for it",
        ),
        (with_section("model", norm_gain=False), "write norm_gain: true"),
        (with_section("optimizer", name="sgd"), "optimizer.name sgd"),
        ({**RUN, "precision": {"recipe": "fp8"}}, "precision.recipe fp8"),
    ],
)
def test_what_the_zoo_cannot_express_is_named(body, message):
    if body.get("precision"):
        body = {**body, "model": {**body["model"], "family": "llama"}}
    if "norm_gain" in body["model"]:
        body = {**body, "model": {**body["model"], "norm": "rms"}}
    with pytest.raises(InputError, match=re.escape(message)):
        from_umup(parse_config(body))


# --- what their own classes computed --------------------------------------------------------------------------------

# Their name of a parameter, as a pattern -> ours.
NAMES = {
    r"embedding_layer\.word_embeddings": "embed",
    r"embedding_layer\.position_embeddings\.embed": "positions",
    r"ln_f": "norm",
    r"lm_head": "head",
    r"self_attn\.proj_([qkv])_dense_layer": r"attn.\1",
    r"self_attn\.proj_output_dense_layer": "attn.out",
    r"norm1": "attn.norm",
    r"norm3": "mlp.norm",
    r"ffn\.ffn\.0\.linear_layer": "mlp.up",
    r"ffn\.ffn\.1\.linear_layer": "mlp.down",
}
# Faults of release 2.10 by file, as the notes list them -> the parameters whose initial std they move.
UNSCALED = "fault 2: GPT-J's initializers are not scaled"
FALLBACK = "fault 1: FFN outputs fall back to initializer_range"
FAULTS = {
    "gpt3-40m": {"attn.out.weight": FALLBACK, "mlp.down.weight": FALLBACK},
    "gpt3-2p7b-mup": {"mlp.down.weight": FALLBACK},
    "gptj-6b-mup": dict.fromkeys(
        ("attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight"),
        UNSCALED,
    ),
}


def ours(name, plan):
    name = name.removeprefix("model.").replace("transformer_decoder.layers.*", "layers.0")
    for pattern, mine in NAMES.items():
        name = re.sub(pattern, mine, name)
    # One norm before both branches is neither's.
    return name if name in plan.params else name.replace("attn.norm", "norm")


def wrong(case, faithful):
    """Parameters whose initial std differs from the golden plan's; everything else is asserted equal."""
    folder = GOLDEN / "current" / case
    golden = json.loads((folder / "plan.json").read_text())
    config = to_umup(read_document(read_yaml((folder / "config.yaml").read_text())), faithful)[0]
    plan, found = plan_for(config), set()
    for theirs, wanted in golden["parameters"].items():
        p = plan.params[ours(theirs, plan)]
        assert list(p.spec.shape) == wanted["shape"], theirs
        assert p["lr"] == pytest.approx(wanted["lr_factor"], rel=1e-12), theirs
        decay = config.optimizer.weight_decay * p["weight_decay"]
        assert decay == pytest.approx(wanted["weight_decay"], rel=1e-12), theirs
        law = wanted["init"]
        if law["name"] in ("ones", "zeros"):
            assert (p["init_std"], p["init_mean"]) == (0.0, {"ones": 1.0, "zeros": 0.0}[law["name"]])
            continue
        assert ("init_cut" in p.values) == (law["name"] == "truncated_normal"), theirs
        if p["init_std"] != pytest.approx(law["std"], rel=1e-12):
            found.add(ours(theirs, plan).removeprefix("layers.0."))
    layers = {n for n in plan.stored if not n.startswith("layers.") or n.startswith("layers.0.")}
    assert {ours(n, plan) for n in golden["parameters"]} == layers
    forward = golden["forward"]
    assert plan.params["embed.weight"]["multiplier"] == pytest.approx(forward["embeddings_scale"], rel=1e-12)
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(forward["output_logits_scale"], rel=1e-12)
    (attention,) = forward["attention"].values()
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(attention["logits_factor"], rel=1e-12)
    return found


@needs_golden
@pytest.mark.parametrize("case", FAULTS)
def test_the_numbers_of_their_own_classes_but_for_known_faults(case):
    assert wrong(case, faithful=False) == set(FAULTS[case])


@needs_golden
@pytest.mark.parametrize("case", FAULTS)
def test_faithfully_the_faults_too(case):
    assert wrong(case, faithful=True) == set()


@needs_golden
@pytest.mark.parametrize("case", FAULTS)
def test_the_faults_are_said(case):
    folder = GOLDEN / "current" / case
    _, notes = to_umup(read_document(read_yaml((folder / "config.yaml").read_text())))
    roles = {note.partition("initial std of ")[2].partition(":")[0] for note in notes if "initial std of" in note}
    expected = {
        "gpt3-40m": {"attention_out", "ffn_out"},
        "gpt3-2p7b-mup": {"ffn_out"},
        "gptj-6b-mup": {"attention", "attention_out", "ffn_in", "ffn_out"},
    }
    assert roles == expected[case]


def test_a_faithful_gptj_does_not_switch_the_attention_scale():
    body = trainer({**FAMILIES["gptj"], **MUP, "scale_qk_dot_by_d": None}, name="gptj")
    meant, done = (plan_for(run_of(body, faithful)).ops["layers.0.attn.sdpa"]["logits"] for faithful in (False, True))
    assert (meant, done) == (pytest.approx(1 / HEAD), pytest.approx(HEAD**-0.5))


def test_a_trip_through_sp_of_our_own_config_is_the_tutorials():
    """umup's SP config to the zoo's muP: by way of its SP."""
    body = {**RUN, "parametrization": {"scheme": "sp"}, "optimizer": {"lr": 6e-4, "weight_decay": 0.0}}
    document = read_document(from_umup(parse_config(body)).body)
    assert document.format == "standard"
    found = sp_to_mup(document, Tuned(64, 3e-3, 0.05, 10.0), current=True).body["trainer"]["init"]["model"]
    assert differences(normal(0.05), found["initializer"]) == []
    assert (found["mup_base_hidden_size"], found["mup_base_filter_size"]) == (64, 256)
    assert GPT["nonlinearity"] == found["nonlinearity"]


@needs_golden
def test_the_recipe_of_the_tutorials_proxy_is_their_40m_config():
    recipe = load_config(RECIPES / "cerebras-40m-mup.yaml", [("model.vocab_size", "50257")])
    theirs = run_of(read_yaml((GOLDEN / "current" / "gpt3-40m" / "config.yaml").read_text()))
    assert_equal_plans(recipe, theirs)
    assert recipe.optimizer == theirs.optimizer
    assert recipe.schedule == theirs.schedule
    assert (recipe.train.steps, recipe.train.batch_size) == (theirs.train.steps, theirs.train.batch_size)


def test_the_deviation_of_a_cut_normal():
    """Against a sample; 0.8796 is what notes on the model zoo measured."""
    draws = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    for cut in (1.0, 2.0, 3.0):
        assert shrinkage(cut) == pytest.approx(draws[draws.abs() < cut].std().item(), rel=3e-3)
    assert shrinkage(2.0) == pytest.approx(0.8796, abs=5e-5)
