"""config.json and our model section say each other, and what one cannot say of the other is an error that names it."""

import json

import pytest

from umup.config.sections import ModelConfig
from umup.errors import ConfigError
from umup.interop.hf_config import expressible, native, plain, read_config, read_directory, write
from umup.interop.hf_formats import FORMATS
from umup.models.families import FAMILIES
from umup.models.specs import shape_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4}
MPT = {"model_type": "mpt", "vocab_size": 100, "d_model": 64, "n_layers": 2, "n_heads": 4}
FALCON = {k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"model_type": "falcon"}
BLOOM = {"model_type": "bloom", "vocab_size": 100, "n_embed": 64, "n_layer": 2, "num_attention_heads": 4}


@pytest.fixture
def model_of(tmp_path):
    """The model section of a config.json with this body."""

    def read(body):
        (tmp_path / "config.json").write_text(json.dumps(body))
        return read_config(tmp_path).model

    return read


@pytest.mark.parametrize("family", [family for family in FAMILIES if native(family)])
def test_a_family_s_own_format_says_all_of_it(family, model_of):
    config = ModelConfig(
        family=family, hidden_size=64, num_layers=3, head_dim=16, vocab_size=99, max_seq_len=33, norm_eps=1e-4
    )
    form = FORMATS[native(family)]
    shape = shape_of(config)
    back = model_of(write(form, shape, plain(shape)))
    assert back.family == family
    assert shape_of(back) == shape
    assert shape_of(back).traits == expressible(native(family), shape).traits


def test_what_files_leave_out_is_the_class_s_default(model_of):
    llama, gpt2 = model_of(LLAMA), model_of(GPT2)
    assert (llama.norm_eps, llama.max_seq_len, llama.num_kv_heads, llama.rope_theta) == (1e-6, 2048, None, 10000.0)
    assert (gpt2.norm_eps, gpt2.max_seq_len, gpt2.intermediate_size, gpt2.dropout) == (1e-5, 1024, 256, 0.1)
    assert model_of(MPT).family == "mpt"
    falcon, bloom = model_of(FALCON), model_of(BLOOM)
    assert (falcon.num_kv_heads, shape_of(falcon).traits.parallel) == (1, "shared_norm")
    assert (bloom.hidden_size, bloom.intermediate_size, bloom.head_dim) == (64, 256, 16)


def test_both_spellings_of_rotary_are_read(model_of):
    old = {"rope_theta": 5e5, "rope_scaling": None}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert model_of({**LLAMA, **old}).rope_theta == model_of({**LLAMA, **new}).rope_theta == 5e5


def test_the_family_is_the_one_that_leaves_the_least_to_say(model_of):
    assert model_of({**GPT2, "activation_function": "gelu"}).family == "gpt3"
    relu = model_of({**GPT2, "activation_function": "relu"})
    assert (relu.family, relu.activation) == ("gpt2", "relu")


@pytest.mark.parametrize(
    ("keys", "parallel", "kv_heads"),
    [
        ({}, "shared_norm", 1),
        ({"multi_query": False}, "shared_norm", 4),
        ({"parallel_attn": False}, "none", 1),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, "two_norms", 2),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, "shared_norm", 2),
    ],
)
def test_falcon_s_switches(keys, parallel, kv_heads, model_of):
    shape = shape_of(model_of({**FALCON, **keys}))
    assert (shape.traits.parallel, shape.num_kv_heads) == (parallel, kv_heads)
    again = write(FORMATS["falcon"], shape, plain(shape))
    assert all(again[key] == value for key, value in keys.items())


def test_keys_that_nobody_knows_are_told_and_harmless_ones_are_not(tmp_path):
    body = {**LLAMA, "torch_dtype": "bfloat16", "eos_token_id": 2, "use_cache": True, "warp_factor": 9, "nothing": None}
    (tmp_path / "config.json").write_text(json.dumps(body))
    (note,) = read_directory(tmp_path).notes
    assert note.endswith("leaves out of account: warp_factor")


def test_rates_of_dropout_that_differ_are_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "attn_pdrop": 0.0}))
    (note,) = read_directory(tmp_path).notes
    assert "attn_pdrop 0.0" in note
    assert read_config(tmp_path).model.dropout == 0.0


REFUSED = {
    "scaled rotary": ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling", "llama3"),
    "scaled rotary, old": ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling", "linear"),
    "scaled rotary, new": ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, "rope_scaling", "yarn"),
    "rotary of no kind": ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling", "linear"),
    "partial rotary": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "sliding window": ({**LLAMA, "sliding_window": 4096}, "sliding_window", "4096"),
    "layer types": ({**LLAMA, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types", "sliding"),
    "soft caps": ({**LLAMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "50.0"),
    "experts": ({**LLAMA, "num_local_experts": 8}, "num_local_experts", "8"),
    "normed queries": ({**LLAMA, "use_qk_norm": True}, "use_qk_norm", "true"),
    "multipliers": ({**LLAMA, "embedding_multiplier": 12.0}, "embedding_multiplier", "12.0"),
    "head size": ({**LLAMA, "head_dim": 32}, "4 heads of 32", "hidden_size 64"),
    "layer scaling": ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", "true"),
    "unscaled attention": ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights", "false"),
    "cross-attention": ({**GPT2, "add_cross_attention": True}, "add_cross_attention", "true"),
    "post-norm residual": (
        {**BLOOM, "apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm",
        "true",
    ),
    "falcon's ALiBi": ({**FALCON, "alibi": True}, "alibi", "true"),
    "falcon's mixture": ({**FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn", "2"),
    "falcon, both": ({**FALCON, "new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn", "false"),
    "clipped": ({**MPT, "attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv", "6.0"),
    "no ALiBi": ({**MPT, "attn_config": {"alibi": False}}, "attn_config.alibi", "false"),
    "prefix": ({**MPT, "attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm", "true"),
    "mpt's biases": ({**MPT, "no_bias": False}, "no_bias", "false"),
    "expansion": ({**MPT, "expansion_ratio": 8}, "expansion_ratio", "8"),
    "activation": ({**LLAMA, "hidden_act": "mish"}, "hidden_act", "'mish'"),
    "activation of no kind": ({**LLAMA, "hidden_act": ["silu"]}, "hidden_act", "silu"),
    "unknown type": ({**LLAMA, "model_type": "lama"}, "model_type 'lama'", "did you mean 'llama'"),
    "no type": ({"vocab_size": 3}, "model_type None", "known: llama"),
    "missing size": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "'hidden_size' is missing", "write"),
    "size of no kind": ({**LLAMA, "num_hidden_layers": "two"}, "'num_hidden_layers' is 'two'", "positive number"),
    "zero heads": ({**LLAMA, "num_attention_heads": 0}, "'num_attention_heads' is 0", "positive number"),
    "heads": ({**LLAMA, "num_attention_heads": 3}, "3 heads", "hidden_size 64"),
    "kv heads": ({**LLAMA, "num_key_value_heads": 3}, "model.num_kv_heads 3", "4 query heads"),
    "epsilon": ({**LLAMA, "rms_norm_eps": "tiny"}, "model.norm_eps", "'tiny'"),
    "theta": ({**LLAMA, "rope_theta": -1}, "model.rope_theta", "greater than 0"),
    "tied": ({**LLAMA, "tie_word_embeddings": "yes"}, "model.tie_embeddings", "'yes'"),
    "switch": ({**FALCON, "multi_query": "yes"}, "multi_query", "write true or false"),
    "granite's factor": ({**LLAMA, "model_type": "granite", "logits_scaling": 0}, "logits_scaling", "other than 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_decoder_has_not_is_refused_by_name(case, model_of, tmp_path):
    body, *named = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        model_of(body)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "config.json"))
    assert "\n" not in line
    assert all(text in line for text in named), line


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "cannot be read as JSON"), ("[1]", "expected an object"), ("\xff\xfe", "model_type")],
)
def test_what_is_no_config_is_refused(text, named, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=named if text != "\xff\xfe" else "cannot be read as JSON"):
        read_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "config.json")


def test_multipliers_that_a_config_cannot_hold_are_refused(model_of):
    granite = {**LLAMA, "model_type": "granite"}
    with pytest.raises(ConfigError, match=r"attention_multiplier has no place in a config; umup export --to umup"):
        model_of(granite)  # whose class's default is 1, not 1/sqrt(head_dim)
    assert model_of({**granite, "attention_multiplier": 0.25}).family == "llama"
