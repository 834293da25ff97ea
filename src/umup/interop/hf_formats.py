"""The architectures of transformers that umup's decoder is: what each key of their config.json says here, both ways.

A row of `FORMATS` has parts (keys of theirs and the fields of ours that they say) and keys that must have a certain
value, because the decoder has no such feature. What no part says is the family's own trait. No torch.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from umup.errors import ConfigError


class Keys:
    """A config.json: values by name (`attn_config.alibi` for nested ones), what was asked for, and notes."""

    def __init__(self, path: Path, body: Mapping[str, Any]) -> None:
        nested = body.get("attn_config")
        inner = {f"attn_config.{k}": v for k, v in nested.items()} if isinstance(nested, dict) else {}
        self.path, self.values = path, {**body, **inner}
        self.asked: set[str] = {"attn_config"}
        self.notes: list[str] = []

    def get(self, names: tuple[str, ...], default: Any = None) -> Any:
        """The value under the first of the names that has one; null is no value."""
        self.asked.update(names)
        return next((self.values[n] for n in names if self.values.get(n) is not None), default)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self.get((name,), default)
        if not isinstance(value, bool):
            raise self.refuse(name, "is no truth value; write true or false")
        return value

    def number(self, name: str, default: float) -> float:
        """A factor."""
        value = self.get((name,), default)
        if not isinstance(value, int | float) or not isfinite(value) or value == 0:
            raise self.refuse(name, "is no factor; write a number other than 0")
        return float(value)

    def size(self, names: tuple[str, ...]) -> int:
        """A positive integer that must be there."""
        value = self.get(names)
        if type(value) is not int or value < 1:
            found = "is missing" if value is None else f"is {value!r}"
            raise ConfigError(f"{self.path}: {names[0]!r} {found}; write a positive number")
        return value

    def refuse(self, key: str, why: str) -> ConfigError:
        """What a reader raises for a value that the decoder has nothing for."""
        return ConfigError(f"{self.path}: {key}: {json.dumps(self.values.get(key))} {why}")


@dataclass(frozen=True)
class Part:
    """Keys of theirs that say fields of ours: read(keys) -> ours, write(ours) -> theirs."""

    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """An architecture of transformers. `families` are those of ours that it is, the first match being its name.

    `only`: key -> the values with which the network is ours. `multipliers`: the numbers it keeps in its config, by our
    name for them (interop/fold.py). `fp8`: whether its linears are plain ones, which `compressed.py` can encode.
    """

    model_type: str
    architecture: str
    families: tuple[str, ...]
    parts: tuple[Part, ...]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    multipliers: Mapping[str, str] = field(default_factory=dict)
    fp8: bool = False


# --- kinds of parts ----------------------------------------------------------------------------------------------


def same(ours: str, *theirs: str, default: Any = None, choices: Mapping[str, str] | None = None) -> Part:
    """One field under other names; `choices`: what their words are called here, the first of several being written."""

    def read(keys: Keys) -> dict[str, Any]:
        value = keys.get(theirs, default)
        if choices is None:
            return {ours: value}
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(choices)
            raise ConfigError(f"{keys.path}: {theirs[0]}: {value!r} is not among what umup has for it ({known})")
        return {ours: choices[value]}

    def write(mine: Mapping[str, Any]) -> dict[str, Any]:
        if choices is None:
            return {theirs[0]: mine[ours]}
        named = [name for name, meaning in choices.items() if meaning == mine[ours]]
        return {theirs[0]: named[0]} if named else {}

    return Part(read, write)


def size(ours: str, *theirs: str) -> Part:
    """A size that must be given."""
    return Part(lambda keys: {ours: keys.size(theirs)}, lambda mine: {theirs[0]: mine[ours]})


def heads(hidden: tuple[str, ...], *theirs: str) -> Part:
    """The number of heads, for which we say their size."""

    def read(keys: Keys) -> dict[str, Any]:
        width, count = keys.size(hidden), keys.size(theirs)
        head_dim = keys.get(("head_dim",), width // count)
        if width % count or head_dim != width // count:
            raise ConfigError(f"{keys.path}: {count} heads of {head_dim} do not make {hidden[0]} {width}")
        return {"head_dim": head_dim}

    return Part(read, lambda mine: {theirs[0]: mine["num_heads"]})


def inner(hidden: tuple[str, ...], *theirs: str) -> Part:
    """The MLP's width: four times the model's where it is not given, or, without names, always."""

    def read(keys: Keys) -> dict[str, Any]:
        return {"intermediate_size": keys.get(theirs, 4 * keys.size(hidden))}

    return Part(read, lambda mine: {theirs[0]: mine["intermediate_size"]} if theirs else {})


def _read_rope(keys: Keys) -> dict[str, Any]:
    """transformers 5 has one dictionary, older ones a number and, where frequencies are scaled, a dictionary."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(value := keys.get((key,), {}), dict):
            raise keys.refuse(key, "is no object")
        given |= value
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{keys.path}: rope_scaling: frequencies of type {kind!r} are not supported (only default)")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{keys.path}: partial_rotary_factor is not supported for this model_type")
    return {"rope_theta": given.get("rope_theta", keys.get(("rope_theta",), 10000.0))}


def _write_rope(mine: Mapping[str, Any]) -> dict[str, Any]:
    theta = mine["rope_theta"]
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


ROPE = Part(_read_rope, _write_rope)


def dropouts(*theirs: str, default: float = 0.0, complete: bool = False) -> Part:
    """Rates that transformers has one by one and we as one. `complete`: they are all that ours acts on."""

    def read(keys: Keys) -> dict[str, Any]:
        rates = {name: keys.get((name,), default) for name in theirs}
        first, *others = rates.values()
        if complete and all(rate == first for rate in others):
            return {"dropout": first}
        if any(rates.values()):
            listed = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            keys.notes.append(f"dropout is left at 0 (the file says {listed}); model.dropout acts on all places alike")
        return {}

    return Part(read, lambda mine: dict.fromkeys(theirs, mine["dropout"]) if complete else {})


def _read_multi_query(keys: Keys) -> dict[str, Any]:
    heads = keys.size(("n_head", "num_attention_heads"))
    return {"num_kv_heads": 1 if keys.flag("multi_query", True) else heads}


MULTI_QUERY = Part(_read_multi_query, lambda mine: {"multi_query": mine["num_kv_heads"] == 1})


def _read_falcon(keys: Keys) -> dict[str, Any]:
    """7B: one norm, one key head. 40B ("new"): two norms or one, several key heads. RW: one branch after the other."""
    new, parallel = keys.flag("new_decoder_architecture", False), keys.flag("parallel_attn", True)
    norms, multi_query = keys.get(("num_ln_in_parallel_attn",)), keys.flag("multi_query", True)
    heads, kv_heads = keys.size(("num_attention_heads", "n_head")), keys.get(("num_kv_heads", "n_head_kv"))
    if new and not parallel:
        raise keys.refuse("parallel_attn", "does not go with new_decoder_architecture")
    if norms == 2 and parallel and not new:
        raise keys.refuse("num_ln_in_parallel_attn", "goes with new_decoder_architecture only")
    if new:
        return {"parallel": "shared_norm" if norms == 1 else "two_norms", "num_kv_heads": kv_heads or heads}
    return {"parallel": "shared_norm" if parallel else "none", "num_kv_heads": 1 if multi_query else heads}


def _write_falcon(mine: Mapping[str, Any]) -> dict[str, Any]:
    kind, kv_heads = mine["parallel"], mine["num_kv_heads"]
    grouped = kv_heads not in (1, mine["num_heads"])
    new = kind == "two_norms" or (kind == "shared_norm" and grouped)
    body = {"new_decoder_architecture": new, "parallel_attn": kind != "none", "multi_query": kv_heads == 1}
    return {**body, "num_kv_heads": kv_heads, "num_ln_in_parallel_attn": {"two_norms": 2}.get(kind, 1) if new else None}


FALCON_BLOCKS = Part(_read_falcon, _write_falcon)


def _read_bias(keys: Keys) -> dict[str, Any]:
    return dict.fromkeys(("attention_bias", "mlp_bias"), keys.flag("bias", False))


# Where only one of the two has biases, the other gets zeros.
BOTH_BIASES = Part(_read_bias, lambda mine: {"bias": mine["attention_bias"] or mine["mlp_bias"]})

# --- the tables --------------------------------------------------------------------------------------------------

GATED = {"silu": "gated_silu", "gelu": "gated_gelu", "gelu_pytorch_tanh": "gated_gelu_tanh", "swish": "gated_silu"}
GATED |= {"gelu_new": "gated_gelu_tanh"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
PLAIN |= {"swish": "silu"}
HIDDEN = ("hidden_size",)
N_EMBD = ("n_embd", "hidden_size")

_llama = (
    size("vocab_size", "vocab_size"),
    size("hidden_size", "hidden_size"),
    size("num_layers", "num_hidden_layers"),
    heads(HIDDEN, "num_attention_heads"),
    same("num_kv_heads", "num_key_value_heads"),
    size("intermediate_size", "intermediate_size"),
    same("max_seq_len", "max_position_embeddings", default=2048),
    same("norm_eps", "rms_norm_eps", default=1e-6),
    same("activation", "hidden_act", default="silu", choices=GATED),
    same("attention_bias", "attention_bias", default=False),
    same("mlp_bias", "mlp_bias", default=False),
    same("tie_embeddings", "tie_word_embeddings", default=False),
    ROPE,
    dropouts("attention_dropout"),
)


def _gpt2_sizes(activation: str, tied: bool, rate: float) -> tuple[Part, ...]:
    """GPT-2's names, which GPT-J and GPTBigCode have too."""
    return (
        size("vocab_size", "vocab_size"),
        size("hidden_size", *N_EMBD),
        size("num_layers", "n_layer", "num_hidden_layers"),
        heads(N_EMBD, "n_head", "num_attention_heads"),
        inner(N_EMBD, "n_inner"),
        same("max_seq_len", "n_positions", "max_position_embeddings", default=1024),
        same("norm_eps", "layer_norm_epsilon", default=1e-5),
        same("activation", "activation_function", default=activation, choices=PLAIN),
        same("tie_embeddings", "tie_word_embeddings", default=tied),
        dropouts("resid_pdrop", "embd_pdrop", "attn_pdrop", default=rate, complete=True),
    )


FORMATS: Mapping[str, Format] = {
    "llama": Format("llama", "LlamaForCausalLM", ("llama",), _llama, fp8=True),
    "granite": Format(
        "granite",
        "GraniteForCausalLM",
        ("llama",),
        _llama,
        multipliers={
            "embedding": "embedding_multiplier",
            "attention": "attention_multiplier",
            "residual": "residual_multiplier",
            "logits": "logits_scaling",
        },
        fp8=True,
    ),
    "gpt2": Format(
        "gpt2",
        "GPT2LMHeadModel",
        ("gpt2", "gpt3"),
        _gpt2_sizes("gelu_new", True, 0.1),
        only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    ),
    "gptj": Format(
        "gptj",
        "GPTJForCausalLM",
        ("gptj",),
        (*_gpt2_sizes("gelu_new", False, 0.0), same("rotary_dim", "rotary_dim", default=64)),
    ),
    "bloom": Format(
        "bloom",
        "BloomForCausalLM",
        ("bloom",),
        (
            size("vocab_size", "vocab_size"),
            size("hidden_size", "hidden_size", "n_embed"),
            size("num_layers", "n_layer", "num_hidden_layers"),
            heads(("hidden_size", "n_embed"), "n_head", "num_attention_heads"),
            inner(("hidden_size", "n_embed")),
            same("max_seq_len", "seq_length", default=2048),
            same("norm_eps", "layer_norm_epsilon", default=1e-5),
            same("tie_embeddings", "tie_word_embeddings", default=True),
            dropouts("hidden_dropout", "attention_dropout"),
        ),
        only={"apply_residual_connection_post_layernorm": (False,)},
    ),
    "falcon": Format(
        "falcon",
        "FalconForCausalLM",
        ("falcon",),
        (
            size("vocab_size", "vocab_size"),
            size("hidden_size", "hidden_size", "n_embed"),
            size("num_layers", "num_hidden_layers", "n_layer"),
            heads(("hidden_size", "n_embed"), "num_attention_heads", "n_head"),
            inner(("hidden_size", "n_embed"), "ffn_hidden_size"),
            same("max_seq_len", "max_position_embeddings", default=2048),
            same("norm_eps", "layer_norm_epsilon", default=1e-5),
            same("activation", "activation", default="gelu", choices=PLAIN),
            same("tie_embeddings", "tie_word_embeddings", default=True),
            FALCON_BLOCKS,
            BOTH_BIASES,
            ROPE,
            dropouts("hidden_dropout", "attention_dropout"),
        ),
        only={"alibi": (False,)},
    ),
    "starcoder": Format(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        ("starcoder",),
        (*_gpt2_sizes("gelu_pytorch_tanh", True, 0.1), MULTI_QUERY),
        only={"scale_attn_weights": (True,)},
    ),
    "mpt": Format(
        "mpt",
        "MptForCausalLM",
        ("mpt",),
        (
            size("vocab_size", "vocab_size"),
            size("hidden_size", "d_model", "hidden_size"),
            size("num_layers", "n_layers", "num_hidden_layers"),
            heads(("d_model", "hidden_size"), "n_heads", "num_attention_heads"),
            inner(("d_model", "hidden_size")),
            same("max_seq_len", "max_seq_len", default=2048),
            same("norm_eps", "layer_norm_epsilon", default=1e-5),
            same("tie_embeddings", "tie_word_embeddings", default=True),
            dropouts("resid_pdrop", "emb_pdrop", "attn_config.attn_pdrop"),
        ),
        # transformers' class has ALiBi, no biases and a fourfold MLP whatever these say, other programs' have not.
        only={
            "expansion_ratio": (4,),
            "no_bias": (True,),
            "norm_type": ("low_precision_layernorm", "layernorm"),
            "attn_config.alibi": (True,),
            "attn_config.alibi_bias_max": (8,),
            "attn_config.attn_type": ("multihead_attention",),
            "attn_config.clip_qkv": (0,),
            "attn_config.prefix_lm": (False,),
            "attn_config.qk_ln": (False,),
            "attn_config.softmax_scale": (),
            "attn_config.attn_uses_sequence_id": (False,),
        },
    ),
}

# What other networks have and these have not, whatever the model_type: key -> the values that mean "not here".
ONLY: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (0,)),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (0, 1)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "is_encoder_decoder", "add_cross_attention"), (False,)),
    **dict.fromkeys(("logit_scale", "embedding_multiplier", "residual_multiplier", "logits_scaling"), (1,)),
    **dict.fromkeys(("partial_rotary_factor", "mup_width_scale", "mup_embeddings_scale"), (1,)),
    "attention_multiplier": (),
    "adapters": (),
}

# Keys that change no logit of these networks.
HARMLESS = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "tokenizer_class", "task_specific_params"),
        *("use_cache", "initializer_range", "pretraining_tp", "slow_but_exact", "gradient_checkpointing", "n_ctx"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "reorder_and_upcast_attn", "init_device"),
        *("attn_impl", "attn_implementation", "embedding_fraction", "learned_pos_emb", "rotary", "num_key_value_heads"),
        *("masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "id2label", "label2id"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type"),
        *("max_window_layers", "quantization_config", "layer_types"),
    }
)
