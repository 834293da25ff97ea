"""What one parameter is to the module that owns it: a lookup table, a matrix, its bias, a norm's gain.

The shape alone does not say which side of a weight is the input: `nn.Linear` keeps (out, in), GPT-2's `Conv1D`
(in, out), a convolution (out, in / groups, *kernel). The owner's class does, and it is looked up here by *name*, so
that transformers need not be imported and a subclass reads as its parent.

Fused weights stack several matrices along fan_out. Where the parts are known to be equal (attention in which
query, key and value have the width; gate and up; the gates of an RNN), `parts` counts them and `fan_out` is that of
one part; else (multi-query attention) fan_out is the whole. Parts may be interleaved by head.

Some forwards multiply by a number of their own that varies with width (Gemma's embeddings by sqrt(hidden_size)); a
plan must divide it out, and OWN_FACTORS knows where it is kept.

Not covered: parameters of classes that are not in the tables (kind RAW; discover.py decides by name and growth), own
factors that a parent applies to its child's output (Whisper's and Marian's `scale_embedding`),
`nn.Bilinear`, parametrizations such as weight norm, the stride of a transposed convolution.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import prod
from typing import Any

from torch import nn

Shape = tuple[int, ...]


class Kind(Enum):
    """What a parameter does in its module."""

    TABLE = auto()  # rows looked up by an index
    MATRIX = auto()  # a matrix or convolution
    BIAS = auto()  # added to a matrix product
    GAIN = auto()  # a norm's weight
    SHIFT = auto()  # a norm's bias
    RAW = auto()  # unknown to the tables below


@dataclass(frozen=True)
class Reading:
    """A parameter's fans in features; `fan_in` counts a kernel's taps, `features_in` does not."""

    kind: Kind
    shape: Shape
    fan_in: int
    fan_out: int
    features_in: int
    parts: int = 1


# Names of fused projections -> how many matrices they stack.
FUSED = {
    "c_attn": 3,
    "query_key_value": 3,
    "Wqkv": 3,
    "qkv": 3,
    "qkv_proj": 3,
    "W_pack": 3,
    "in_proj": 3,
    "gate_up_proj": 2,
}
GAINS = frozenset({"weight", "gamma", "gain", "scale", "g"})
SHIFTS = frozenset({"bias", "beta", "b"})
# LayerNorm, RMSNorm, GroupNorm32, BatchNorm2d, LlamaRMSNorm; not Normalize.
NORM_CLASS = re.compile(r"Norm(?![a-z])")


def _embed_scale(attributes: Mapping[str, Any]) -> float:
    """Gemma keeps the number beside a buffer that the meta device empties; BART has the number alone."""
    return float(attributes.get("scalar_embed_scale", attributes.get("embed_scale")))


def _t5_logits(attributes: Mapping[str, Any]) -> float:
    return float(attributes["model_dim"] ** -0.5) if attributes["config"].scale_decoder_outputs else 1.0


# By class: the parameter (relative to the module) whose product the forward multiplies, and by what.
OWN_FACTORS: tuple[tuple[re.Pattern[str], str, Callable[[Mapping[str, Any]], float]], ...] = (
    (re.compile(r"ScaledWordEmbedding$"), "weight", _embed_scale),
    (re.compile(r"^(T5|LongT5|Pop2Piano)ForConditionalGeneration$"), "lm_head.weight", _t5_logits),
)


def own_factors(name: str, module: nn.Module) -> dict[str, float]:
    """Full parameter names -> the number that the module's forward multiplies their product by."""
    prefix = f"{name}." if name else ""
    return {
        f"{prefix}{parameter}": factor(vars(module))
        for by_class, parameter, factor in OWN_FACTORS
        if by_class.search(type(module).__name__)
    }


def read_module(name: str, module: nn.Module) -> dict[str, Reading]:
    """The module's own parameters (not its children's), by full name; `name` is the module's."""
    shapes = {leaf: tuple(p.shape) for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False)}
    prefix = f"{name}." if name else ""
    label = name.rpartition(".")[2]
    return {f"{prefix}{leaf}": _read(module, label, leaf, shapes) for leaf in shapes}


def _read(module: nn.Module, label: str, leaf: str, shapes: Mapping[str, Shape]) -> Reading:
    shape = shapes[leaf]
    if NORM_CLASS.search(type(module).__name__) and prod(shape) > 1 and leaf in GAINS | SHIFTS:
        return _elementwise(Kind.GAIN if leaf in GAINS else Kind.SHIFT, shape)
    for parent in type(module).__mro__:
        reader = READERS.get(parent.__name__) or READERS.get(f"{parent.__module__}.{parent.__name__}")
        if reader is not None:
            return reader(module, label, leaf, shapes) or _elementwise(Kind.RAW, shape)
    return _elementwise(Kind.RAW, shape)


def _elementwise(kind: Kind, shape: Shape) -> Reading:
    return Reading(kind, shape, prod(shape), prod(shape), prod(shape))


def _matrix(shape: Shape, features_in: int, fan_out: int, taps: int = 1, parts: int = 1) -> Reading:
    return Reading(Kind.MATRIX, shape, features_in * taps, fan_out // parts, features_in, parts)


def _bias_of(weight: Reading, shape: Shape) -> Reading:
    return replace(weight, kind=Kind.BIAS, shape=shape)


def _fused_parts(label: str, fan_in: int, fan_out: int) -> int:
    parts = FUSED.get(label, 1)
    equal = fan_out == 3 * fan_in if parts == 3 else fan_out % parts == 0
    return parts if equal else 1


Reader = Callable[[nn.Module, str, str, Mapping[str, Shape]], Reading | None]


def _weight_and_bias(weight: Callable[[nn.Module, str, Shape], Reading]) -> Reader:
    def read(module: nn.Module, label: str, leaf: str, shapes: Mapping[str, Shape]) -> Reading | None:
        if leaf not in ("weight", "bias") or len(shapes.get("weight", ())) < 2:
            return None
        matrix = weight(module, label, shapes["weight"])
        return matrix if leaf == "weight" else _bias_of(matrix, shapes[leaf])

    return read


def _linear(module: nn.Module, label: str, shape: Shape) -> Reading:
    return _matrix(shape, shape[1], shape[0], parts=_fused_parts(label, shape[1], shape[0]))


def _transposed_linear(module: nn.Module, label: str, shape: Shape) -> Reading:
    return _matrix(shape, shape[0], shape[1], parts=_fused_parts(label, shape[0], shape[1]))


def _conv(module: nn.Module, label: str, shape: Shape) -> Reading:
    return _matrix(shape, shape[1], shape[0], taps=prod(shape[2:]))


def _transposed_conv(module: nn.Module, label: str, shape: Shape) -> Reading:
    groups = int(vars(module)["groups"])
    return _matrix(shape, shape[0] // groups, shape[1] * groups, taps=prod(shape[2:]))


def _embedding(module: nn.Module, label: str, leaf: str, shapes: Mapping[str, Shape]) -> Reading | None:
    """T5's relative_attention_bias is a table in form only: one number per head, added to the logits."""
    if leaf != "weight":
        return None
    rows, width = shapes[leaf]
    if "bias" in label:
        return Reading(Kind.BIAS, shapes[leaf], 1, width, 1)
    return Reading(Kind.TABLE, shapes[leaf], rows, width, rows)


def _multihead_attention(module: nn.Module, label: str, leaf: str, shapes: Mapping[str, Shape]) -> Reading | None:
    """`nn.MultiheadAttention`: in_proj_weight (3d, d), or q, k and v apart; bias_k and bias_v are raw vectors."""
    width = int(vars(module)["embed_dim"])
    if leaf == "in_proj_bias":
        return _bias_of(_matrix(shapes[leaf], width, 3 * width, parts=3), shapes[leaf])
    if not leaf.endswith("proj_weight"):
        return None
    shape = shapes[leaf]
    return _matrix(shape, shape[1], shape[0], parts=shape[0] // width)


def _rnn(module: nn.Module, label: str, leaf: str, shapes: Mapping[str, Shape]) -> Reading | None:
    """weight_ih_l0 (gates * hidden, in), weight_hh_l0, weight_hr_l0 (an LSTM's projection) and their biases."""
    shape = shapes[leaf.replace("bias", "weight")]
    parts = 1 if "_hr" in leaf else shape[0] // int(vars(module)["hidden_size"])
    matrix = _matrix(shape, shape[1], shape[0], parts=parts)
    return _bias_of(matrix, shapes[leaf]) if leaf.startswith("bias") else matrix


READERS: Mapping[str, Reader] = {
    "Linear": _weight_and_bias(_linear),
    "transformers.pytorch_utils.Conv1D": _weight_and_bias(_transposed_linear),
    "_ConvTransposeNd": _weight_and_bias(_transposed_conv),
    "_ConvNd": _weight_and_bias(_conv),
    "Embedding": _embedding,
    "EmbeddingBag": _embedding,
    "MultiheadAttention": _multihead_attention,
    "RNNBase": _rnn,
    "RNNCellBase": _rnn,
}
