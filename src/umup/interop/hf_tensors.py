"""The tensors of transformers' architectures, by our names: one table for each row of `hf_formats.FORMATS`.

Names have the base model's prefix (`transformer.wte.weight`), which files saved from the base class lack. Buffers that
old files hold are in IGNORED.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from umup.interop.keymap import BY_HEAD, TRANSPOSED, Packing, Row, row
from umup.models.specs import Shape

# Masks and frequencies that older versions saved beside the weights.
IGNORED = re.compile(
    r"\.(attn|attention|self_attention)\.(bias|masked_bias|rotary_emb\.inv_freq)$|rotary_emb\.inv_freq$"
)


def _both(theirs: str, *ours: str, packing: Packing | None = None) -> Iterator[Row]:
    """Weight and bias of one linear or norm. Only matrices are transposed."""
    yield row(f"{theirs}.weight", *(f"{name}.weight" for name in ours), packing=packing)
    flat = None if packing is TRANSPOSED else packing
    yield row(f"{theirs}.bias", *(f"{name}.bias" for name in ours), packing=flat)


def _layers(theirs: str, parts: Mapping[str, tuple[str, ...] | str], packing: Mapping[str, Packing]) -> Iterator[Row]:
    """The rows of a layer: what it is called there -> what of `layers.{i}` is in it."""
    for name, ours in parts.items():
        inside = (ours,) if isinstance(ours, str) else ours
        yield from _both(f"{theirs}.{{i}}.{name}", *(f"layers.{{i}}.{o}" for o in inside), packing=packing.get(name))


def _ends(embed: str, norm: str, positions: str | None = None, embed_norm: str | None = None) -> Iterator[Row]:
    yield row(f"{embed}.weight", "embed.weight")
    if positions is not None:
        yield row(f"{positions}.weight", "positions.weight")
    if embed_norm is not None:
        yield from _both(embed_norm, "embed_norm")
    yield from _both(norm, "norm")
    yield from _both("lm_head", "head")


QKV = ("attn.q", "attn.k", "attn.v")

LLAMA = (
    *_ends("model.embed_tokens", "model.norm"),
    *_layers(
        "model.layers",
        {
            "input_layernorm": "attn.norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.out",
            "post_attention_layernorm": "mlp.norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
        },
        {},
    ),
)


def gpt2_rows(packing: Mapping[str, Packing]) -> tuple[Row, ...]:
    """GPT-2's names, which GPTBigCode and nanoGPT have too; they pack differently."""
    parts: dict[str, tuple[str, ...] | str] = {
        "ln_1": "attn.norm",
        "attn.c_attn": QKV,
        "attn.c_proj": "attn.out",
        "ln_2": "mlp.norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    ends = _ends("transformer.wte", "transformer.ln_f", positions="transformer.wpe")
    return (*ends, *_layers("transformer.h", parts, packing))


GPTJ = (
    *_ends("transformer.wte", "transformer.ln_f"),
    *_layers(
        "transformer.h",
        {
            "ln_1": "norm",
            "attn.q_proj": "attn.q",
            "attn.k_proj": "attn.k",
            "attn.v_proj": "attn.v",
            "attn.out_proj": "attn.out",
            "mlp.fc_in": "mlp.up",
            "mlp.fc_out": "mlp.down",
        },
        {},
    ),
)


def _megatron(norms: Mapping[str, tuple[str, ...] | str], embed_norm: str | None = None) -> tuple[Row, ...]:
    """The names that Bloom and Falcon have from Megatron-LM; they differ in their norms."""
    parts = {
        **norms,
        "self_attention.query_key_value": QKV,
        "self_attention.dense": "attn.out",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    }
    ends = _ends("transformer.word_embeddings", "transformer.ln_f", embed_norm=embed_norm)
    return (*ends, *_layers("transformer.h", parts, {"self_attention.query_key_value": BY_HEAD}))


SEQUENTIAL = {"input_layernorm": "attn.norm", "post_attention_layernorm": "mlp.norm"}
BLOOM = _megatron(SEQUENTIAL, embed_norm="transformer.word_embeddings_layernorm")
FALCON = {
    "none": _megatron(SEQUENTIAL),
    "shared_norm": _megatron({"input_layernorm": "norm"}),
    "two_norms": _megatron({"ln_attn": "attn.norm", "ln_mlp": "mlp.norm"}),
}

MPT = (
    *_ends("transformer.wte", "transformer.norm_f"),
    *_layers(
        "transformer.blocks",
        {
            "norm_1": "attn.norm",
            "attn.Wqkv": QKV,
            "attn.out_proj": "attn.out",
            "norm_2": "mlp.norm",
            "ffn.up_proj": "mlp.up",
            "ffn.down_proj": "mlp.down",
        },
        {},
    ),
)

GPT2 = gpt2_rows(dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), TRANSPOSED))
BIGCODE = gpt2_rows({"attn.c_attn": BY_HEAD})

TABLES: Mapping[str, Callable[[Shape], tuple[Row, ...]]] = {
    "llama": lambda shape: LLAMA,
    "granite": lambda shape: LLAMA,
    "gpt2": lambda shape: GPT2,
    "gptj": lambda shape: GPTJ,
    "bloom": lambda shape: BLOOM,
    "falcon": lambda shape: FALCON[shape.traits.parallel],
    "starcoder": lambda shape: BIGCODE,
    "mpt": lambda shape: MPT,
}
