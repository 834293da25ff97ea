"""SP to muP as the tutorial has it, and the zoo's own program; legacy to current; muP to SP."""

import json
from math import sqrt

import pytest
from cerebras_zoo import DECAY, FAMILIES, GOLDEN, GPT, MUP, WARMUP, differences, flat, needs_golden, normal, trainer

from umup.config.load import dump_body, read_yaml
from umup.errors import ConfigError
from umup.interop.cerebras.convert import Tuned, mup_to_current, sp_to_mup, to_sp
from umup.interop.cerebras.document import read_document
from umup.interop.cerebras.layout import to_trainer
from umup.interop.cerebras.numbers import ROLES, numbers

TUNED = Tuned(width=32, lr=3e-3, std=0.05, embedding=12.5)
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/output.yaml")) if GOLDEN else ["absent"]
QUIRKS = ("quirk-warmup-from-nonzero", "quirk-already-mup")


def mup(body, tuned=TUNED, current=False, faithful=False):
    return sp_to_mup(read_document(body), tuned, current, faithful)


def legacy(**model):
    return mup(flat(model)).body


# --- the tutorial's rule, by hand ---------------------------------------------------------------------------------


def test_the_tutorials_rule():
    """2304.03208 table 14: m = 4, L = 8."""
    body = mup(flat()).body
    model, optimizer = body["model"], body["optimizer"]
    assert model["embedding_initializer"] == normal(0.05)
    assert differences(normal(0.05 / 2), model["initializer"]) == []
    assert differences(normal(0.05 / sqrt(2 * 8 * 4)), model["output_layer_initializer"]) == []
    found = {key: model[key] for key in ("output_logits_scale", "embeddings_scale", "scale_qk_dot_by_d")}
    assert found == {"output_logits_scale": 0.25, "embeddings_scale": 12.5, "scale_qk_dot_by_d": True}
    assert optimizer["adjust_learning_rate"] == {"decoder_kernel": 0.25}
    rates = [(leg["initial_learning_rate"], leg["end_learning_rate"]) for leg in optimizer["learning_rate"]]
    assert rates == [(0.0, 3e-3), (3e-3, pytest.approx(3e-4, rel=1e-12))]


def test_nothing_else_is_touched():
    before, after = flat(), mup(flat()).body
    changed = differences(before, after)
    places = ("initializer", "learning_rate", "output_logits_scale", "embeddings_scale", "scale_qk_dot_by_d")
    assert all(any(place in line for place in places) for line in changed), changed
    assert list(after["model"])[: len(before["model"])] == list(before["model"])


def test_the_output_multiplier():
    assert mup(flat(), Tuned(width=32, logits=2.2)).body["model"]["output_logits_scale"] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (2e-4, 3e-3),
        (None, 3e-3),
        ([{"scheduler": "Constant", "learning_rate": 2e-4}], [{"scheduler": "Constant", "learning_rate": 3e-3}]),
        (
            [WARMUP, DECAY, {"scheduler": "Constant", "learning_rate": 6.0e-6}],
            [
                {**WARMUP, "end_learning_rate": 3e-3},
                {**DECAY, "initial_learning_rate": 3e-3, "end_learning_rate": 3e-4},
                {"scheduler": "Constant", "learning_rate": 3e-5},
            ],
        ),
        (
            [{"scheduler": "PiecewiseConstant", "learning_rates": [4e-4, 2e-4], "milestones": [50]}],
            [{"scheduler": "PiecewiseConstant", "learning_rates": [3e-3, 1.5e-3], "milestones": [50]}],
        ),
        (
            {"scheduler": "Exponential", "initial_learning_rate": 1e-3, "decay_rate": 0.9, "total_iters": 7},
            {"scheduler": "Exponential", "initial_learning_rate": 3e-3, "decay_rate": 0.9, "total_iters": 7},
        ),
    ],
)
def test_any_schedule_is_moved_to_the_new_peak(schedule, expected):
    body = mup(flat(optimizer={"learning_rate": schedule})).body
    assert differences(expected, body["optimizer"]["learning_rate"]) == []


def test_rates_in_quotes_are_numbers():
    """PyYAML takes 6e-05 for text, and the zoo's script falls over it."""
    decay = {**DECAY, "end_learning_rate": "6e-05"}
    body = mup(flat(optimizer={"learning_rate": [WARMUP, decay]})).body
    assert body["optimizer"]["learning_rate"][1]["end_learning_rate"] == pytest.approx(3e-4, rel=1e-12)


def test_a_warmup_from_above_zero_keeps_its_shape_and_says_so():
    body = flat(optimizer={"learning_rate": [{**WARMUP, "initial_learning_rate": 6e-7}, DECAY]})
    converted = mup(body)
    first = converted.body["optimizer"]["learning_rate"][0]
    assert first["initial_learning_rate"] == pytest.approx(3e-6)
    assert first["end_learning_rate"] == pytest.approx(3e-3)
    assert any("ends at 3 (--faithful does that)" in note for note in converted.notes)
    faithful = mup(body, faithful=True).body["optimizer"]["learning_rate"][0]
    assert (faithful["initial_learning_rate"], faithful["end_learning_rate"]) == (3e-3, pytest.approx(3.0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            flat(optimizer={"learning_rate": [{**WARMUP, "end_learning_rate": 5e-4}, DECAY]}),
            "the warm-up ends at 0.0005",
        ),
        (flat(optimizer={"learning_rate": 0.0}), "its highest learning rate is 0"),
        (flat(optimizer={"optimizer_type": "SGD"}), "muP's rates are Adam's"),
        (flat({**FAMILIES["falcon"]}), "write --layout current"),
        (legacy(), "muP already \\(legacy format, base width 32\\)"),
        (trainer(MUP), "muP already \\(current format, base width 32\\)"),
    ],
)
def test_what_is_refused(body, message):
    with pytest.raises(ConfigError, match=message):
        mup(body)


def test_an_untied_head_is_mentioned():
    assert any("untied head" in note for note in mup(flat({"share_embedding_weights": False})).notes)


# --- the formats mean the same --------------------------------------------------------------------------------------


def assert_same_numbers(a, b):
    a, b = numbers(read_document(a)), numbers(read_document(b))
    for role in ROLES:
        assert a.init[role].std == pytest.approx(b.init[role].std, rel=1e-12), role
        assert a.init[role].cut == b.init[role].cut, role
    assert a.lr == pytest.approx(b.lr, rel=1e-12)
    ours, theirs = ((n.embedding, n.logits, n.attention, *n.base) for n in (a, b))
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_the_current_format_means_what_the_legacy_one_does():
    converted = mup_to_current(read_document(legacy()))
    model = converted.body["trainer"]["init"]["model"]
    assert model["ffn_output_layer_initializer"] == normal(0.05)
    assert model["mup_base_hidden_size"] == 32
    assert_same_numbers(legacy(), converted.body)
    assert_same_numbers(mup(flat(), current=True).body, converted.body)
    assert any("ffn_output_layer_initializer is written out" in note for note in converted.notes)


def test_faithfully_release_2_10_starts_ffn_outputs_elsewhere():
    faithful = mup_to_current(read_document(legacy()), faithful=True)
    assert "ffn_output_layer_initializer" not in faithful.body["trainer"]["init"]["model"]
    done = numbers(read_document(faithful.body), faithful=True)
    assert done.init["ffn_out"].std == pytest.approx(0.02 / sqrt(2 * 8 * 4))
    assert any("in release 2.10 0.0025" in note for note in faithful.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_the_current_layout(family):
    source = trainer(FAMILIES[family], name=family)
    body = mup(source).body
    again = read_document(body)
    assert again.format == "current"
    model = body["trainer"]["init"]["model"]
    assert (model["mup_base_hidden_size"], model["mup_base_filter_size"]) == (32, 128)
    found, depth = numbers(again), sqrt(2 * 8)
    assert found.init["attention"].std == pytest.approx(0.025)
    assert found.init["ffn_out"].std == pytest.approx(0.025 / depth)
    assert found.init["head"].std == 0.02
    assert found.lr == pytest.approx({**dict.fromkeys(found.lr, 0.25), "embedding": 1.0})
    assert found.attention == pytest.approx(1 / 32)
    assert model["scale_qk_dot_by_d"] is True
    assert model["share_embedding_weights"] is (family not in ("gptj", "llama"))
    rates = body["trainer"]["init"]["schedulers"][0]["SequentialLR"]["schedulers"]
    assert rates[0]["LinearLR"]["end_learning_rate"] == pytest.approx(3e-3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gptj", "falcon")])
def test_every_sequential_family_in_the_flat_layout(family):
    converted = mup(flat(FAMILIES[family]))
    assert read_document(converted.body).format == "legacy"
    assert_same_numbers(converted.body, mup(flat(FAMILIES[family]), current=True).body)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flat_layout_knows_families_by_their_keys(family):
    named = {"gpt3": "gpt2"}.get(family, family)
    assert read_document(flat(FAMILIES[family])).family == named


def test_aliases_are_replaced_where_they_stand():
    body = trainer({**FAMILIES["gptj"], "initializer": None, "attention_initializer": normal(0.02)}, name="gptj")
    model = mup(body).body["trainer"]["init"]["model"]
    assert model["attention_initializer"] == normal(0.05)
    assert "initializer" not in model


# --- back, and the layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [legacy(), trainer(MUP)], ids=["legacy", "current"])
def test_muP_back_to_sp(body):
    converted = to_sp(read_document(body), 6e-4, 0.02, current=False)
    document = read_document(converted.body)
    assert document.format == "standard"
    found = numbers(document)
    assert (found.embedding, found.logits, found.attention) == (1.0, 1.0, pytest.approx(32**-0.5))
    assert set(found.lr.values()) == {1.0}
    assert found.init["ffn_out"].std == pytest.approx(0.02 / 4)
    assert found.init["attention"] == found.init["embedding"]
    assert (document.layout == "flat") == ("model" in body)


def test_a_trip_to_muP_and_back_changes_nothing():
    assert differences(flat(), to_sp(read_document(legacy()), 6e-4, 0.02, current=False).body) == []


def test_sp_needs_a_rate_and_something_to_do():
    with pytest.raises(ConfigError, match="--base-lr RATE"):
        to_sp(read_document(legacy()), None, 0.02, current=False)
    with pytest.raises(ConfigError, match="nothing to convert"):
        to_sp(read_document(flat()), 6e-4, 0.02, current=False)


def test_the_flat_layout_moves_key_by_key():
    body = flat(
        optimizer={"log_summaries": True, "loss_scaling_factor": "dynamic"},
        runconfig={"max_steps": 100, "log_steps": 5, "max_checkpoints": 3, "checkpoint_path": "x.mdl", "mode": "train"},
    )
    body["train_input"]["micro_batch_size"] = 4
    moved = to_trainer(read_document(body), body)["trainer"]
    init = moved["init"]
    assert init["optimizer"] == {"AdamW": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}
    assert init["loop"] == {"max_steps": 100}
    assert init["logging"] == {"log_steps": 5}
    assert init["callbacks"] == [
        {"ScopedTrainFlags": {"csx.performance.micro_batch_size": 4}},
        {"ComputeNorm": {}},
        {"KeepNCheckpoints": {"n": 3}},
    ]
    assert "micro_batch_size" not in moved["fit"]["train_dataloader"]
    assert moved["validate"]["val_dataloader"] is moved["fit"]["val_dataloader"]
    assert (moved["fit"]["ckpt_path"], moved["validate_all"]["ckpt_paths"]) == ("x.mdl", "x.mdl")
    assert init["model"]["name"] == "gpt2"
    assert "mixed_precision" not in init["model"]
    assert GPT.items() <= init["model"].items()


def test_a_key_without_a_place_in_the_trainer_layout_is_named():
    body = flat(runconfig={"max_stepz": 1})
    with pytest.raises(ConfigError, match=r"runconfig.max_stepz has no place.*'max_steps'"):
        to_trainer(read_document(body), body)


def test_a_loader_named_twice_stays_one_in_the_file():
    text = dump_body(mup(flat(), current=True).body)
    assert "&id001" in text
    assert read_yaml(text)["trainer"]["validate"]["val_dataloader"]["data_dir"] == "./val/"


# --- the zoo's own programs -----------------------------------------------------------------------------------------


def golden(case):
    folder = GOLDEN / case
    resolved = json.loads((folder / "args.json").read_text())["resolved"]
    tuned = Tuned(resolved["base_layer_width"], resolved["base_lr"], resolved["base_init_std"], resolved["m_embed"])
    bodies = {p.stem: read_yaml(p.read_text()) for p in folder.glob("*.yaml")}
    return bodies["input"], bodies["output"], bodies["output-current"], tuned


@needs_golden
@pytest.mark.parametrize("case", [c for c in CASES if c not in QUIRKS])
def test_the_numbers_of_the_original_script(case):
    source, output, _, tuned = golden(case)
    assert differences(output, mup(source, tuned).body) == []


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_faithfully_its_quirks_too(case):
    source, output, current, tuned = golden(case)
    assert differences(output, mup(source, tuned, faithful=True).body) == []
    assert differences(current, mup(source, tuned, current=True, faithful=True).body) == []
    assert differences(current, mup_to_current(read_document(output), faithful=True).body) == []


@needs_golden
@pytest.mark.parametrize("case", [c for c in CASES if c not in QUIRKS])
def test_the_current_layout_of_the_original_converter_and_one_key_more(case):
    """Without that key their release does not give the numbers of the legacy file."""
    source, output, current, tuned = golden(case)
    for converted in (mup(source, tuned, current=True), mup_to_current(read_document(output))):
        (line,) = differences(current, converted.body)
        assert line.startswith(".trainer.init.model.ffn_output_layer_initializer: None")
        assert_same_numbers(output, converted.body)


@needs_golden
def test_a_warmup_from_above_zero_is_done_better_than_the_original():
    source, output, _, tuned = golden("quirk-warmup-from-nonzero")
    found = differences(output, mup(source, tuned).body)
    assert [line.partition(":")[0] for line in found] == [
        ".optimizer.learning_rate[0].initial_learning_rate",
        ".optimizer.learning_rate[0].end_learning_rate",
    ]
    assert mup(source, tuned).body["optimizer"]["learning_rate"][0]["end_learning_rate"] == 0.006


@needs_golden
def test_a_muP_config_is_not_overwritten():
    source, _, _, tuned = golden("quirk-already-mup")
    with pytest.raises(ConfigError, match="muP already"):
        mup(source, tuned)


# Those of the original's refusals that a user can do something about, and what is said; the others convert.
REFUSED = {
    "duplicate-key": "'hidden_size' stands twice",
    "missing-end-learning-rate": r"learning_rate\[1\].end_learning_rate is missing",
    "missing-hidden-size": "model.hidden_size is missing",
    "missing-initial-learning-rate": r"learning_rate\[0\].initial_learning_rate is missing",
    "trainer-layout": "muP already",
}
CONVERTED = {
    "constant-scheduler": lambda o: o["learning_rate"][2]["learning_rate"],
    "learning-rate-as-text": lambda o: o["learning_rate"][1]["initial_learning_rate"],
    "scalar-learning-rate": lambda o: o["learning_rate"],
}


@needs_golden
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_original_refuses_with_a_better_word(case):
    with pytest.raises(ConfigError, match=REFUSED[case]) as caught:
        mup(read_yaml((GOLDEN / "errors" / case / "input.yaml").read_text()))
    assert "\n" not in str(caught.value)


@needs_golden
@pytest.mark.parametrize("case", CONVERTED)
def test_what_the_original_refuses_and_we_convert(case):
    body = mup(read_yaml((GOLDEN / "errors" / case / "input.yaml").read_text())).body
    rate = CONVERTED[case](body["optimizer"])
    assert rate == pytest.approx(2.84e-6 * 3e-3 / 5.26e-5 if case == "constant-scheduler" else 3e-3)
