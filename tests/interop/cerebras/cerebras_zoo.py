"""Model-zoo configs of our own, small, in the structure of the zoo's files; and where the golden ones lie."""

from copy import deepcopy
from pathlib import Path

import pytest

GOLDEN = next(
    (p for p in (Path(__file__).parents[n] / "shared/golden/cerebras" for n in range(3, 6)) if p.is_dir()), None
)
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="the golden data (../shared/golden/cerebras) are not here")


def normal(std, cut=2.0):
    return {"name": "truncated_normal", "mean": 0.0, "std": std, "a": -cut * std, "b": cut * std}


GPT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "position_embedding_type": "learned",
    "share_embedding_weights": True,
    "max_position_embeddings": 64,
    "num_hidden_layers": 8,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1.0e-5,
    "num_heads": 4,
    "attention_type": "scaled_dot_product",
    "attention_dropout_rate": 0.0,
    "use_projection_bias_in_attention": True,
    "use_ffn_bias_in_attention": True,
    "filter_size": 512,
    "nonlinearity": "gelu",
    "use_ffn_bias": True,
    "use_bias_in_output": False,
    "embedding_initializer": normal(0.02),
    "initializer": normal(0.02),
    "output_layer_initializer": normal(0.005),
}
WARMUP = {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 6.0e-4, "total_iters": 10}
DECAY = {"scheduler": "CosineDecay", "initial_learning_rate": 6.0e-4, "end_learning_rate": 6.0e-5, "total_iters": 90}
# What makes a family of the GPT above: changes to the model section, None to remove a key.
UNBIASED = {"use_projection_bias_in_attention": False, "use_ffn_bias_in_attention": False, "use_ffn_bias": False}
MULTI_QUERY = {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 1}}
GROUPED = {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 2}}
ROTARY = {"position_embedding_type": "rotary", "rotary_dim": 32}
PARALLEL = {"dropout_rate": None, "residual_dropout_rate": 0.0, "embedding_dropout_rate": 0.0}
FAMILIES = {
    "gpt2": {"nonlinearity": "gelu_new"},
    "gpt3": {},
    "gptj": {
        **PARALLEL,
        **UNBIASED,
        **ROTARY,
        "rotary_dim": 8,
        "nonlinearity": "gelu_new",
        "use_ffn_bias": True,
        "use_bias_in_output": True,
        "share_embedding_weights": False,
    },
    "bloom": {"position_embedding_type": "alibi", "embedding_layer_norm": True, "nonlinearity": "gelu_new"},
    "llama": {
        **UNBIASED,
        **ROTARY,
        **GROUPED,
        "norm_type": "rmsnorm",
        "nonlinearity": "swiglu",
        "share_embedding_weights": False,
    },
    "falcon": {**PARALLEL, **UNBIASED, **ROTARY, **MULTI_QUERY, "use_untied_layer_norm": False},
    "starcoder": {**MULTI_QUERY, "nonlinearity": "gelu_new"},
    "mpt": {**UNBIASED, "position_embedding_type": "alibi", "norm_type": "biasless-layernorm"},
}
MUP = {
    "mup_base_hidden_size": 32,
    "mup_base_filter_size": 64,
    "embeddings_scale": 10.0,
    "output_logits_alpha": 1.5,
    "scale_qk_dot_by_d": True,
    "embedding_initializer": normal(0.08),
    "initializer": normal(0.06),
    "output_layer_initializer": normal(0.05),
    "ffn_initializer": normal(0.04),
    "ffn_output_layer_initializer": normal(0.03),
}


def changed(section, changes):
    return {key: value for key, value in {**section, **changes}.items() if value is not None}


def flat(model=None, optimizer=None, **sections):
    """A config of the layout up to 2.2."""
    body = {
        "train_input": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "./train/", "batch_size": 16},
        "eval_input": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "./val/", "batch_size": 16},
        "model": {**changed(GPT, model or {}), "mixed_precision": True, "fp16_type": "bfloat16"},
        "optimizer": changed(
            {
                "optimizer_type": "AdamW",
                "betas": [0.9, 0.95],
                "eps": 1.0e-8,
                "weight_decay": 0.1,
                "max_gradient_norm": 1.0,
                "learning_rate": [WARMUP, DECAY],
            },
            optimizer or {},
        ),
        "runconfig": {"max_steps": 100, "checkpoint_steps": 50, "eval_frequency": 50, "seed": 1},
        **sections,
    }
    return deepcopy(body)


def trainer(model=None, optimizer=None, name="gpt3", schedulers=None, **sections):
    """A config of the layout from 2.3."""
    linear = {key: value for key, value in WARMUP.items() if key != "scheduler"}
    cosine = {key: value for key, value in DECAY.items() if key != "scheduler"}
    legs = [{"LinearLR": linear}, {"CosineDecayLR": cosine}]
    init = {
        "seed": 1,
        "model": {"name": name, **changed(GPT, model or {})},
        "optimizer": {"AdamW": changed({"betas": [0.9, 0.95], "eps": 1.0e-8, "weight_decay": 0.1}, optimizer or {})},
        "schedulers": schedulers or [{"SequentialLR": {"schedulers": legs}}],
        "precision": {"enabled": True, "fp16_type": "bfloat16", "max_gradient_norm": 1.0},
        "loop": {"max_steps": 100, "eval_frequency": 50},
        "checkpoint": {"steps": 50},
        **sections,
    }
    loader = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "./train/", "batch_size": 16}
    return deepcopy({"trainer": {"init": init, "fit": {"train_dataloader": loader}}})


def differences(expected, found, where="", rel=1e-12):
    """Paths at which two bodies differ; numbers to a relative 1e-12, keys in any order."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = {**expected, **found}
        return [d for key in keys for d in differences(expected.get(key), found.get(key), f"{where}.{key}", rel)]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]", rel)]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (expected, found))
    if numbers and abs(expected - found) <= rel * abs(expected):
        return []
    return [] if type(expected) is type(found) and expected == found else [f"{where}: {expected!r} {found!r}"]
