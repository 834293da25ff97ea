"""Reading model-zoo files: what is recognised, and every kind of bad input by name."""

import re

import pytest
from cerebras_zoo import FAMILIES, GPT, MUP, flat, normal, trainer

from umup.errors import ConfigError
from umup.interop.cerebras.document import is_document, read_document
from umup.interop.cerebras.keys import ALIASES, INIT_SECTIONS, KEYS, MODELS


def test_defaults_are_filled_in_before_anything_is_judged():
    """The zoo ties embeddings and has biases where a config says nothing; GPT-J's FFN has none."""
    bare = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}
    documents = {}
    for name in ("gpt2", "gptj"):
        body = trainer()
        body["trainer"]["init"]["model"] = {"name": name, **bare}
        documents[name] = read_document(body).model
    assert documents["gpt2"]["share_embedding_weights"]
    assert documents["gpt2"]["use_ffn_bias"]
    assert not documents["gptj"]["use_ffn_bias"]
    assert documents["gptj"]["position_embedding_type"] == "rotary"
    assert documents["gpt2"]["filter_size"] == 3072


def test_a_null_is_the_default():
    body = trainer({})
    body["trainer"]["init"]["model"]["use_ffn_bias"] = None
    assert read_document(body).model["use_ffn_bias"] is True


def test_case_and_text_do_not_matter():
    body = flat({"nonlinearity": "GELU", "hidden_size": "128", "layer_norm_epsilon": "1e-05", "use_ffn_bias": "yes"})
    body["optimizer"] |= {"optimizer_type": "ADAMW"}
    body["optimizer"]["learning_rate"][0]["scheduler"] = "linear"
    document = read_document(body)
    model = document.model
    assert (model["nonlinearity"], model["hidden_size"], model["layer_norm_epsilon"]) == ("gelu", 128, 1e-5)
    assert model["use_ffn_bias"] is True
    assert (document.optimizer_name, document.legs[0].kind) == ("adamw", "Linear")


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    value = {"initializer": normal(0.03), "moe": {"num_experts": 1}, "memory_tokens": {}}.get(ALIASES[alias], 0.0)
    model = {key: v for key, v in GPT.items() if key != ALIASES[alias]}
    body = trainer()
    body["trainer"]["init"]["model"] = {"name": "gpt2", **model, alias: value}
    assert read_document(body).model[ALIASES[alias]] == value


def test_what_is_a_model_zoo_file():
    assert is_document(flat())
    assert is_document(trainer())
    assert is_document({"model": {"num_hidden_layers": 2}})
    for other in (None, "text", [1], {}, {"model": {"hidden_size": 64, "num_layers": 2}}, {"model_type": "llama"}):
        assert not is_document(other)


def test_formats():
    assert read_document(flat()).format == "standard"
    assert read_document(trainer(MUP)).format == "current"
    legacy = {"output_logits_scale": 0.25, "embeddings_scale": 10.0, "scale_qk_dot_by_d": True}
    adjust = {"adjust_learning_rate": {"decoder_kernel": 0.25}}
    assert read_document(flat(legacy, adjust)).format == "legacy"
    assert read_document(trainer(legacy, adjust)).format == "legacy"
    # Gemma 2 has a multiplier without muP, and the current class takes 1/d without it, too.
    assert read_document(flat({"embeddings_scale": 59.9})).format == "standard"
    assert read_document(trainer({"scale_qk_dot_by_d": True})).format == "standard"


def test_wrapped_schedulers_are_found():
    inner = {"LinearLR": {"initial_learning_rate": 0.1, "end_learning_rate": 0.0, "total_iters": 5}}
    document = read_document(trainer(schedulers=[{"ScalePerParamLR": {"scheduler": inner}}, {"LinearWD": {"x": 1}}]))
    assert [leg.kind for leg in document.legs] == ["Linear"]


def edited(body, path, value):
    *sections, key = path.split("/")
    node = body
    for section in sections:
        node = node[int(section) if section.isdigit() else section]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return body


INIT = "trainer/init"
BAD = [
    ("text", "expected sections such as 'model:'"),
    (edited(flat(), "modle", {}), "unknown key 'modle'; did you mean 'model'?"),
    (edited(flat(), "model", None), "model is missing"),
    (edited(flat(), "optimizer", None), "optimizer is missing"),
    (edited(flat(), "model", [1]), "model: expected a section with keys, found list"),
    (edited(flat(), "model/hiden_size", 1), "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
    (edited(flat(), "model/hidden_size", None), "model.hidden_size is missing"),
    (edited(flat(), "model/num_hidden_layers", None), "model.num_hidden_layers is missing"),
    (edited(flat(), "model/hidden_size", "wide"), "model.hidden_size: expected a number, found 'wide'"),
    (edited(flat(), "model/hidden_size", 128.5), "model.hidden_size: expected a whole number"),
    (edited(flat(), "model/hidden_size", -128), "model.hidden_size: expected a positive number"),
    (edited(flat(), "model/hidden_size", True), "model.hidden_size: expected a number, found True"),
    (edited(flat(), "model/num_heads", 5), "model.num_heads 5 does not divide model.hidden_size 128"),
    (edited(flat(), "model/use_ffn_bias", "maybe"), "model.use_ffn_bias: expected true or false, found 'maybe'"),
    (edited(flat(), "model/nonlinearity", 3), "model.nonlinearity: expected text, found 3"),
    (edited(flat(), "model/layer_norm_epsilon", float("nan")), "model.layer_norm_epsilon: expected a number"),
    (edited(flat(), "model/mup_base_d_model", 64), "of T5"),
    (edited(flat(), "optimizer/optimizer_type", "AdamWw"), "unknown class 'AdamWw'; did you mean 'adamw'?"),
    (edited(flat(), "optimizer/weight_decai", 0.1), "unknown key 'optimizer.weight_decai'"),
    (
        edited(flat(), "optimizer/learning_rate/0/scheduler", "Linnear"),
        "unknown scheduler 'Linnear'; did you mean 'Linear'?",
    ),
    (
        edited(flat(), "optimizer/learning_rate/0/end_learning_rate", None),
        "learning_rate[0].end_learning_rate is missing",
    ),
    (edited(flat(), "optimizer/learning_rate/1/initial_learning_rate", "fast"), "expected a number, found 'fast'"),
    (edited(flat(), "optimizer/learning_rate", "fast"), "optimizer.learning_rate: expected a number, found 'fast'"),
    (edited(flat(), "optimizer/adjust_learning_rate", {"decoder_kernel": 0.5}), "an incomplete muP config"),
    (edited(flat(), "model/scale_qk_dot_by_d", True), "an incomplete muP config: model.scale_qk_dot_by_d without"),
    (edited(flat(), "model/output_logits_scale", 0.1), "an incomplete muP config: model.output_logits_scale without"),
    (edited(trainer(), "trainer/inti", {}), "unknown key 'trainer.inti'; did you mean 'init'?"),
    (edited(trainer(), f"{INIT}/modell", {}), "unknown key 'trainer.init.modell'"),
    (edited(trainer(), INIT, None), "trainer.init is missing"),
    (edited(trainer(), "trainer", [{}]), "trainer: a list of trainers"),
    (edited(trainer(), f"{INIT}/model/name", None), "model.name is missing"),
    (edited(trainer(), f"{INIT}/model/name", "gpt4"), "model.name: unknown class 'gpt4'; did you mean"),
    (edited(trainer(), f"{INIT}/model/name", "bert"), "model.name 'bert': encoders are not converted"),
    (edited(trainer(), f"{INIT}/optimizer", {"AdamW": {}, "SGD": {}}), "expected one class"),
    (
        edited(trainer(), f"{INIT}/optimizer/AdamW/adjust_learning_rate", {"decoder_ffn": 1}),
        "adjust_learning_rate.decoder_ffn'",
    ),
    (edited(trainer(), f"{INIT}/optimizer/AdamW/adjust_learning_rate", {"embedding": 0}), "expected a positive number"),
    (edited(trainer(MUP), f"{INIT}/model/mup_base_filter_size", None), "model.mup_base_filter_size is missing"),
    (edited(trainer(MUP), f"{INIT}/model/mup_base_hidden_size", 0), "model.mup_base_hidden_size: expected a positive"),
    (
        edited(trainer(MUP), f"{INIT}/model/mup_base_hidden_size", -256),
        "model.mup_base_hidden_size: expected a positive",
    ),
    (edited(trainer(MUP), f"{INIT}/model/output_logits_scale", 0.1), "model.output_logits_scale is of the legacy"),
    (
        edited(trainer(MUP), f"{INIT}/optimizer/AdamW/adjust_learning_rate", {"decoder_kernel": 0.1}),
        "adjust_learning_rate.decoder_kernel is of the legacy",
    ),
    (edited(trainer(), f"{INIT}/schedulers", [{"LinearLR": None}]), "schedulers[0].LinearLR is missing"),
    (
        edited(trainer(), f"{INIT}/schedulers", [{"a": 1, "b": 2}]),
        "schedulers[0]: expected 'scheduler: Linear' or one class",
    ),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_named_in_one_line(body, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_document(body)
    assert "\n" not in str(caught.value)


def test_two_spellings_of_one_key():
    body = edited(flat(), "model/residual_dropout_rate", 0.0)
    with pytest.raises(ConfigError, match="are one key"):
        read_document(body)


def test_the_tables_are_whole():
    assert set(ALIASES.values()) <= set(KEYS)
    assert set(FAMILIES) <= set(MODELS)
    assert "model" in INIT_SECTIONS
    assert all(key.use in ("read", "fixed", "ignored") for key in KEYS.values())
