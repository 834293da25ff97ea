"""A proxy's numbers at a target: what moves by which rule, what is said about it, and what it will cost."""

import json
from math import sqrt

import pytest

from umup.config.load import dump_yaml, load_config, parse_config
from umup.errors import ConfigError, PlanError
from umup.models.memory import memory_table
from umup.models.specs import base_shape_of, plan_for, shape_of
from umup.rules.schemes import SCHEMES
from umup.study.cost import bench_speed, cost_of, flops_per_token
from umup.study.evidence import TESTED, not_transferred, warnings
from umup.study.planner import DEFAULT_RULES, HorizonRules, transfer
from umup.study.transfer_report import document, markdown, plan_text, plan_transfer
from umup.study.tuned import load_study

KEEP = HorizonRules("none", "none", "none")


def config(scheme="umup", base=None, **sections):
    """A proxy of width 256, depth 4: 32 sequences of 128, 5000 steps; nothing in it is outside tested ranges."""
    placement = {"norm_placement": SCHEMES[scheme].norm_placements[0]}
    body = {
        "model": {
            "hidden_size": 256,
            "num_layers": 4,
            "head_dim": 64,
            "max_seq_len": 128,
            "norm_gain": False,
            **placement,
        },
        "parametrization": {"scheme": scheme, **({"base": base} if base else {})},
        "optimizer": {"lr": 2.0, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 50},
        "train": {"steps": 5000, "batch_size": 32},
    }
    return parse_config({**body, **{name: {**body.get(name, {}), **section} for name, section in sections.items()}})


def target(model=None, train=None, **sections):
    """A target as a user writes it: sizes only, unless told otherwise."""
    small = {"hidden_size": 512, "num_layers": 4, "head_dim": 64, "max_seq_len": 128, "norm_gain": False}
    train = {"steps": 5000, "batch_size": 32, **(train or {})}
    return parse_config({"model": {**small, **(model or {})}, "train": train, **sections})


def moved(plan):
    return {m.field: (m.before, m.after) for m in plan.moved}


def texts(caveats):
    return "\n".join(c.text for c in caveats)


# --- what moves ---------------------------------------------------------------------------------------------------


def test_width_alone_copies_every_number():
    found = transfer(config(), target())
    o = found.config.optimizer
    assert (o.lr, o.betas, o.eps) == (2.0, (0.9, 0.95), None)
    assert found.config.parametrization == config().parametrization
    assert moved(found)["model.hidden_size"] == (256, 512)
    rule = next(m.rule for m in found.moved if m.field == "optimizer.lr")
    assert "scales it per parameter" in rule


def test_batch_and_length_move_the_rate_by_the_familys_default_rules():
    found = transfer(config(), target({"hidden_size": 256}, {"batch_size": 128, "steps": 2500})).config
    assert found.optimizer.lr == pytest.approx(2.0 * sqrt(4) * 2**-0.32)
    assert found.optimizer.weight_decay == pytest.approx(0.1 * 4 * 2**-0.473)
    assert found.schedule.warmup_steps == 25


def test_rules_are_the_callers():
    to = target({"hidden_size": 256}, {"batch_size": 64, "steps": 5000})
    assert transfer(config(), to, KEEP).config.optimizer.lr == 2.0
    sde = transfer(config(), to, HorizonRules("sde", "none", "timescale")).config.optimizer
    assert sde.lr == pytest.approx(2 * sqrt(2))
    assert sde.betas == pytest.approx((0.8, 0.9))
    assert sde.eps is None  # unit-scaled gradients have moved by themselves
    mup = config("mup", {"hidden_size": 256})
    assert transfer(mup, to, HorizonRules("sde", "none", "none")).config.optimizer.eps == pytest.approx(1e-8 / sqrt(2))
    with pytest.raises(PlanError, match=r"horizon.batch: unknown rule 'sed'"):
        transfer(config(), to, HorizonRules("sed", "none", "none"))


@pytest.mark.parametrize("name", ["adamw", "adam", "nadam", "radam", "sgd", "adafactor"])
def test_every_optimizer_of_a_run_has_default_rules(name):
    found = transfer(config(optimizer={"name": name}), target(train={"batch_size": 64})).config.optimizer
    factor = 2**0.5  # for unit-scaled gradients SGD's linear rule is this, too
    length = 2**-0.32 if DEFAULT_RULES[name].length == "power" else 1
    assert found.lr == pytest.approx(2.0 * factor * length)
    assert found.betas == (0.9, 0.95)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_transfers_to_a_config_that_has_a_plan(scheme):
    row = SCHEMES[scheme]
    proxy = config(scheme, {"hidden_size": 256, "num_layers": 4} if row.needs_base else None)
    found = transfer(proxy, target({"num_layers": 8, "norm_placement": row.norm_placements[0]}))
    plan = plan_for(found.config)
    assert plan.scheme == scheme
    assert ("parametrization.base" in moved(found)) == row.needs_base
    assert (found.config.parametrization.base is not None) == row.needs_base


def test_a_relative_scheme_gets_the_proxy_as_its_base_with_every_side():
    proxy = config("mup", None, model={"num_kv_heads": 2})
    found = transfer(proxy, target({"hidden_size": 1024, "num_layers": 8, "num_kv_heads": 4})).config
    base = found.parametrization.base
    assert (base.hidden_size, base.num_layers, base.head_dim, base.num_kv_heads) == (256, 4, 64, 2)
    assert base_shape_of(shape_of(found.model), base).intermediate_size == shape_of(proxy.model).intermediate_size
    assert plan_for(found).params["layers.0.attn.k.weight"]["lr"] == 1 / 4


def test_a_base_narrower_than_the_proxy_stays_what_it_was_for_the_proxy():
    """Its kv heads followed the proxy's ratio, and must not follow the target's."""
    proxy = config("mup", {"hidden_size": 128}, model={"num_kv_heads": 2})
    found = transfer(proxy, target({"hidden_size": 1024, "num_kv_heads": 2})).config
    before = base_shape_of(shape_of(proxy.model), proxy.parametrization.base)
    after = base_shape_of(shape_of(found.model), found.parametrization.base)
    assert (after.num_kv_heads, after.intermediate_size) == (before.num_kv_heads, before.intermediate_size) == (1, 344)


def test_the_targets_own_numbers_are_replaced_and_said_so():
    found = transfer(
        config(), target(optimizer={"lr": 1e-3, "weight_decay": 0.1, "state_dtype": "bf16"}, schedule={"name": "wsd"})
    )
    assert found.replaced["optimizer.lr"] == 1e-3
    assert found.replaced["schedule.name"] == "wsd"
    assert "optimizer.state_dtype" not in found.replaced
    assert (found.config.optimizer.state_dtype, found.config.schedule.name) == ("bf16", "cosine")
    assert transfer(config(), target()).replaced == {}
    assert transfer(config(), target(train={"grad_clip": 1.0})).replaced == {"train.grad_clip": 1.0}


@pytest.mark.parametrize("section", [{"parametrization": {"scheme": "sp"}}, {"optimizer": {"name": "sgd"}}], ids=str)
def test_another_scheme_or_optimizer_is_refused(section):
    with pytest.raises(ConfigError, match=r"was tuned; remove it from the target"):
        transfer(config(), target(**section))


def test_hyperparameters_clipping_and_schedule_are_the_proxys():
    proxy = config(
        parametrization={"hparams": {"alpha_res": 2.0}},
        train={"grad_clip": 0.5},
        schedule={"name": "wsd", "decay_fraction": 0.3, "warmup_steps": 1},
    )
    found = transfer(proxy, target(train={"steps": 100})).config
    assert found.parametrization.hparams == {"alpha_res": 2.0}
    assert found.train.grad_clip == 0.5
    assert (found.schedule.name, found.schedule.decay_fraction, found.schedule.warmup_steps) == ("wsd", 0.3, 1)


# --- what is said about it ----------------------------------------------------------------------------------------


def test_nothing_is_warned_of_within_tested_ranges():
    assert warnings(config(), transfer(config(), target({"num_layers": 8})).config) == []
    assert set(TESTED) == set(SCHEMES)


@pytest.mark.parametrize(
    ("proxy", "to", "words"),
    [
        ({"model": {"hidden_size": 128}}, {}, "proxy width 128: below 256"),
        ({"model": {"num_layers": 2}}, {}, "proxy depth 2: below 4"),
        ({"train": {"batch_size": 8}}, {}, "proxy sequences per step 8: below 32"),
        ({}, {"model": {"hidden_size": 16384}}, "width grows 64 times; tested up to 32"),
        ({}, {"model": {"num_layers": 32}}, "depth grows 8 times; tested up to 4"),
        ({}, {"train": {"batch_size": 256}}, "batch grows 8 times"),
        ({}, {"train": {"steps": 50000}}, "length grows 10 times"),
        ({}, {"model": {"tie_embeddings": True}}, "the head is tied"),
        ({}, {"model": {"norm_gain": True}}, "norms have trained gains"),
        ({"optimizer": {"independent_weight_decay": False}}, {}, "weight decay is coupled"),
        ({"parametrization": {"scheme": "mup", "base": {"hidden_size": 1024}}}, {}, "base's width 1024 exceeds"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_leaving_tested_ranges_is_warned_of(proxy, to, words):
    tuned = config(**proxy)
    assert words in texts(warnings(tuned, transfer(tuned, target(**to)).config))


def test_what_does_not_transfer_is_said_with_why():
    found = texts(not_transferred(config(), transfer(config(), target()).config))
    assert "weight decay" in found
    assert "learning rate" not in found
    sp = config("sp", train={"grad_clip": 1.0}, model={"dropout": 0.1})
    to = target({"num_layers": 8, "max_seq_len": 256, "head_dim": 128}, precision={"recipe": "bf16"})
    found = texts(not_transferred(sp, transfer(sp, to).config))
    for words in (
        "no width rule",
        "depth: no rate of sp",
        "dropout",
        "grad_clip",
        "max_seq_len: tuned at 128",
        "head_dim",
        "recipe",
    ):
        assert words in found
    umup = texts(not_transferred(config(), transfer(config(), target({"num_layers": 8})).config))
    assert "depth" not in umup


# --- cost ---------------------------------------------------------------------------------------------------------


def test_flops_are_six_per_weight_and_token_and_attentions():
    c = config()
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 688) + 256 * 256
    assert flops_per_token(c) == 6 * weights + 6 * 4 * 128 * 256
    assert cost_of(c).flops == flops_per_token(c) * 5000 * 32 * 128


def test_memory_is_the_memory_tables_and_hours_the_benchs():
    found = cost_of(config(), 1e6)
    assert found.memory_bytes == sum(row.bytes for row in memory_table(config()))
    assert found.gpu_hours == pytest.approx(5000 * 32 * 128 / 1e6 / 3600)
    assert cost_of(config()).gpu_hours is None


def bench_file(folder, layers=4, tokens=32 * 128, variants=("bf16_sp", "bf16_umup", "fp8")):
    rows = [{"variant": v, "tokens_per_second": 1000.0 * (i + 1)} for i, v in enumerate(variants)]
    rows.append({"variant": "fp8_head", "tokens_per_second": None})
    path = folder / "bench.json"
    path.write_text(json.dumps({"machine": "m", "tokens": tokens, "layers": layers, "rows": rows, "rates": None}))
    return path


@pytest.mark.parametrize(
    ("scheme", "recipe", "speed"), [("umup", "bf16", 2000), ("sp", "bf16", 1000), ("umup", "fp8", 3000)]
)
def test_speed_is_that_of_the_recipe_and_kind_of_scheme(tmp_path, scheme, recipe, speed):
    assert bench_speed(bench_file(tmp_path), config(scheme, precision={"recipe": recipe})) == speed


@pytest.mark.parametrize(
    ("file", "recipe", "words"),
    [
        ({"layers": 8}, "bf16", "measured 8 layers and 4096 tokens a pass, the target has 4"),
        ({}, "fp32", "no row runs precision.recipe 'fp32'; measured: bf16_sp"),
        ({}, "fp8_head", "no row runs precision.recipe 'fp8_head'"),
        (None, "bf16", "not the output of umup bench --json"),
    ],
    ids=str,
)
def test_a_bench_of_something_else_is_refused(tmp_path, file, recipe, words):
    path = tmp_path / "bench.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=words):
        bench_speed(path if file is None else bench_file(tmp_path, **file), config(precision={"recipe": recipe}))


# --- studies and the report ---------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """What `umup sweep` leaves."""
    folder = tmp_path / "study"
    folder.mkdir()
    best = {
        "values": {"optimizer.lr": 4.0, "parametrization.hparams.alpha_res": 2.0},
        "loss": 1.25,
        "config": config().model_dump(mode="json"),
        "trials": 9,
        "tokens": 9 * 5000 * 32 * 128,
    }
    (folder / "best.json").write_text(json.dumps(best))
    return folder


def test_a_studys_values_are_laid_over_its_config(study):
    found = load_study(study)
    assert (found.proxy.optimizer.lr, found.proxy.parametrization.hparams) == (4.0, {"alpha_res": 2.0})
    assert (found.loss, found.trials) == (1.25, 9)


def test_the_plan_as_data_text_and_markdown(study, tmp_path):
    to = target({"hidden_size": 1024}, {"steps": 20000}, precision={"recipe": "bf16"}, optimizer={"lr": 1e-3})
    plan = plan_transfer(load_study(study), to, bench=bench_file(tmp_path))
    share = 9 * flops_per_token(config()) / (4 * flops_per_token(plan.transfer.config))
    assert plan.tuning_share == pytest.approx(share)
    body = json.loads(json.dumps(document(plan), allow_nan=False))
    again = parse_config(body["config"])
    assert again == plan.transfer.config
    assert body["cost"]["gpu_hours"] == pytest.approx(20000 * 32 * 128 / 2000 / 3600)
    assert body["tuning"]["share_of_target"] == plan.tuning_share
    for text in (plan_text(plan), markdown(plan)):
        for words in (
            "optimizer.lr",
            "tokens^(8/25)",
            "2603.28743",
            "alpha_res",
            f"{100 * share:.2g}%",
            "GPU hours",
            "weight decay regularises",
        ):
            assert words in text
        assert "1e-3" in text or "0.001" in text
    # A hidden matrix of u-muP: 1/sqrt(fan_in * depth).
    row = next(line for line in markdown(plan).splitlines() if line.startswith("| layers.*.attn.q.weight"))
    assert row.split("|")[2].split()[0] == f"{4 / sqrt(256 * 4):.6g}"
    assert row.split("|")[3].split()[0] == f"{again.optimizer.lr / sqrt(1024 * 4):.6g}"


@pytest.mark.parametrize("smaller", [{"hidden_size": 128}, {"num_layers": 2}], ids=str)
def test_a_target_smaller_than_the_proxy_is_refused(study, smaller):
    with pytest.raises(ConfigError, match=r"is smaller than the proxy's"):
        plan_transfer(load_study(study), target(smaller))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": {"parametrization.hparams.alpha_rse": 1.0}}, "no hyperparameter 'alpha_rse'; did you mean"),
        ({"values": {"optimizer.lrr": 1.0}}, "did you mean 'lr'"),
        ({"tokens": None}, "not a study's best.json"),
        ({"config": {"modle": {}}}, "modle"),
    ],
    ids=str,
)
def test_a_study_that_does_not_fit_together_is_refused(study, change, words):
    body = json.loads((study / "best.json").read_text())
    (study / "best.json").write_text(json.dumps({**body, **change}))
    with pytest.raises(ConfigError, match=words):
        load_study(study)


def test_no_study_and_an_unfinished_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no best.json, which umup sweep writes"):
        load_study(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_yaml(config()))
    with pytest.raises(ConfigError, match=r"has not finished"):
        load_study(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert load_study(tmp_path).tokens == 5000 * 32 * 128
    assert load_config(tmp_path / "config.yaml") == load_study(tmp_path).proxy
