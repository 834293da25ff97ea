"""The architectures people have: every parameter of random transformers models gets a role, without overrides."""

import re

import pytest
import torch

from umup.adapt.discover import discover
from umup.errors import PlanError

pytest.importorskip("transformers")
import transformers

VOCAB, CONTEXT, HEAD = 100, 64, 8
LABELS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2_NAMES = {"n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**LAYERS, "num_key_value_heads": 2}


def gated(width):
    return {"hidden_size": width, "intermediate_size": 3 * width}


def plain(width):
    return {"hidden_size": width, "intermediate_size": 4 * width, "max_position_embeddings": CONTEXT}


# Name -> (model class, config class, fixed sizes, width -> sizes).
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2_NAMES, lambda w: {"n_embd": w}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2_NAMES, "rotary_dim": 4}, lambda w: {"n_embd": w}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LAYERS, plain),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, gated),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LAYERS, "num_key_value_heads": 2, "head_dim": HEAD}, gated),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, gated),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": HEAD}, gated),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LAYERS, "num_key_value_heads": 1, "head_dim": HEAD}, gated),
    "falcon": ("FalconForCausalLM", "FalconConfig", LAYERS, lambda w: {"hidden_size": w}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 4}, lambda w: {"hidden_size": w}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2_NAMES, lambda w: {"n_embd": w}),
    "mpt": ("MptForCausalLM", "MptConfig", {"n_layers": 2, "n_heads": 4}, lambda w: {"d_model": w}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**LAYERS, "max_position_embeddings": CONTEXT},
        lambda w: {"hidden_size": w, "word_embed_proj_dim": w, "ffn_dim": 4 * w},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", LAYERS, plain),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", LAYERS, plain),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"num_layers": 2, "num_heads": 4},
        lambda w: {"d_model": w, "d_ff": 4 * w, "d_kv": w // 4},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**LAYERS, "image_size": 32, "patch_size": 8}, plain),
}
TIED = {"gpt2", "qwen2", "gemma", "falcon", "bloom", "gpt_bigcode", "mpt", "opt", "bert", "roberta", "t5"}

# Representative parameters at width 64 -> (role, fan_in, fan_out).
EXPECTED = {
    "gpt2": {
        "transformer.wpe.weight": ("position", CONTEXT, 64),
        "transformer.h.0.attn.c_attn.weight": ("hidden", 64, 64),
        "transformer.h.1.mlp.c_fc.weight": ("hidden", 64, 256),
        "transformer.h.1.mlp.c_proj.weight": ("hidden_out", 256, 64),
        "transformer.h.1.mlp.c_proj.bias": ("bias", 256, 64),
    },
    "gptj": {
        "transformer.h.0.attn.out_proj.weight": ("hidden_out", 64, 64),
        "transformer.h.0.mlp.fc_out.weight": ("hidden_out", 256, 64),
        "lm_head.bias": ("bias", 64, VOCAB),
    },
    "neox": {
        "gpt_neox.layers.0.attention.query_key_value.weight": ("hidden", 64, 64),
        "gpt_neox.layers.0.attention.dense.weight": ("hidden_out", 64, 64),
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": ("hidden_out", 256, 64),
    },
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": ("hidden", 64, 64),
        "model.layers.0.self_attn.k_proj.weight": ("hidden", 64, 32),
        "model.layers.0.mlp.gate_proj.weight": ("hidden", 64, 192),
        "model.layers.0.mlp.down_proj.weight": ("hidden_out", 192, 64),
        "model.norm.weight": ("norm_gain", 64, 64),
    },
    "mistral": {  # keys and values of a fixed size: not a readout
        "model.layers.0.self_attn.v_proj.weight": ("hidden", 64, 16),
        "model.layers.0.self_attn.o_proj.weight": ("hidden_out", 32, 64),
    },
    "qwen2": {"model.layers.0.self_attn.k_proj.bias": ("bias", 64, 32)},
    "qwen3": {"model.layers.1.self_attn.q_norm.weight": ("norm_gain", HEAD, HEAD)},
    "gemma": {"model.layers.0.self_attn.k_proj.weight": ("hidden", 64, HEAD)},
    "falcon": {
        "transformer.h.0.self_attention.query_key_value.weight": ("hidden", 64, 64 + 2 * 16),
        "transformer.h.0.self_attention.dense.weight": ("hidden_out", 64, 64),
        "transformer.h.0.mlp.dense_4h_to_h.weight": ("hidden_out", 256, 64),
    },
    "bloom": {
        "transformer.word_embeddings_layernorm.bias": ("norm_bias", 64, 64),
        "transformer.h.0.self_attention.dense.weight": ("hidden_out", 64, 64),
    },
    "gpt_bigcode": {
        "transformer.h.0.attn.c_attn.weight": ("hidden", 64, 64 + 2 * 16),
        "transformer.h.0.attn.c_proj.weight": ("hidden_out", 64, 64),
    },
    "mpt": {
        "transformer.blocks.0.attn.Wqkv.weight": ("hidden", 64, 64),
        "transformer.blocks.0.ffn.down_proj.weight": ("hidden_out", 256, 64),
    },
    "opt": {
        "model.decoder.embed_positions.weight": ("position", CONTEXT + 2, 64),
        "model.decoder.layers.0.fc2.weight": ("hidden_out", 256, 64),
        "model.decoder.layers.0.self_attn.out_proj.weight": ("hidden_out", 64, 64),
    },
    "bert": {
        "bert.embeddings.token_type_embeddings.weight": ("position", 2, 64),
        "bert.encoder.layer.0.attention.self.query.weight": ("hidden", 64, 64),
        "bert.encoder.layer.0.attention.output.dense.weight": ("hidden_out", 64, 64),
        "bert.encoder.layer.0.intermediate.dense.weight": ("hidden", 64, 256),
        "bert.encoder.layer.0.output.dense.weight": ("hidden_out", 256, 64),
        "cls.predictions.transform.dense.weight": ("hidden", 64, 64),
        "cls.predictions.bias": ("bias", 64, VOCAB),
    },
    "roberta": {"lm_head.dense.weight": ("hidden", 64, 64), "lm_head.layer_norm.weight": ("norm_gain", 64, 64)},
    "t5": {
        "encoder.embed_tokens.weight": ("embedding", VOCAB, 64),
        "encoder.block.0.layer.0.SelfAttention.o.weight": ("hidden_out", 64, 64),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("bias", 1, 4),
        "decoder.block.1.layer.1.EncDecAttention.o.weight": ("hidden_out", 64, 64),
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": ("hidden_out", 256, 64),
    },
    "vit": {
        "vit.embeddings.cls_token": ("bias", 1, 64),
        "vit.embeddings.position_embeddings": ("position", 17, 64),
        "vit.embeddings.patch_embeddings.projection.weight": ("input", 3 * 8 * 8, 64),
        "classifier.weight": ("readout", 64, 2),
        "classifier.bias": ("bias", 64, 2),
    },
}
# Projections that write to the residual stream, over all of these models.
WRITES = re.compile(
    r"\.(o_proj|out_proj|c_proj|down_proj|fc2|fc_out|dense_4h_to_h|SelfAttention\.o|EncDecAttention\.o|wo"
    r"|(attention|self_attention|attention\.output|layer\.\d\.output)\.dense)\.weight$"
)


def build(name, width):
    model, config, sizes, widths = MODELS[name]
    ids = {} if name == "vit" else LABELS
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**ids, **sizes, **widths(width)))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return request.param, discover(build(request.param, 64), build(request.param, 32))


def test_representative_parameters(case):
    name, found = case
    specs = {s.name: s for s in found.params}
    assert {n: (specs[n].role.value, specs[n].fan_in, specs[n].fan_out) for n in EXPECTED[name]} == EXPECTED[name]


def test_exactly_the_output_projections_write(case):
    name, found = case
    writers = {s.name for s in found.params if s.role.value == "hidden_out"}
    assert writers == {s.name for s in found.params if WRITES.search(s.name)}
    assert found.unwritten == ()
    assert (found.num_layers, found.base_num_layers) == ((4, 4) if name == "t5" else (2, 2))


def test_head_and_embedding(case):
    name, found = case
    readouts = [s for s in found.params if s.role.value in ("readout", "tied_readout")]
    assert [s.role.value for s in readouts] == ["tied_readout" if name in TIED else "readout"]
    embeddings = [s for s in found.params if s.role.value == "embedding" and s.tied_to is None]
    assert len(embeddings) == (0 if name == "vit" else 1)
    assert all(s.tied_to == embeddings[0].name for s in readouts if name in TIED)


def test_residual_marks_and_no_scalars(case):
    _, found = case
    assert "scalar" not in {s.role.value for s in found.params}
    assert all(s.on_residual == bool(re.search(r"\.(h|layers?|blocks?)\.\d+\.", s.name)) for s in found.params)


def test_growing_heads(case):
    name, found = case
    fixed = name in ("mistral", "qwen3", "gemma")
    assert set(found.head_dims.values()) == (set() if fixed else {(16, 8)})


def test_names_cover_the_model(case):
    name, found = case
    stored = {s.name for s in found.params if s.tied_to is None}
    assert stored == dict(build(name, 32).named_parameters()).keys()


def test_one_width_suffices_to_guess(case):
    name, found = case
    guessed = discover(build(name, 64))
    assert (guessed.params, guessed.compared) == (found.params, False)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [("MixtralForCausalLM", "MixtralConfig", "mixture-of-experts"), ("MambaForCausalLM", "MambaConfig", "state-space")],
)
def test_what_has_no_rule_is_refused(model, config, reason):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": VOCAB}
    with torch.device("meta"):
        net = getattr(transformers, model)(getattr(transformers, config)(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(PlanError, match=f"{reason}.*no published rule here yet"):
        discover(net)
