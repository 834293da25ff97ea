"""What a model-zoo config makes of a model: initial distributions, learning-rate factors, forward multipliers.

The table (L layers; m_d, m_f: hidden and filter size over the base's; d: head size), decoder muP of release 2.10:

    role            initializer named by        factor on its std       learning rate
    embedding       embedding_initializer       1                       1
    attention       initializer                 m_d^-1/2                1/m_d
    attention_out   output_layer_initializer    (2L m_d)^-1/2           1/m_d
    ffn_in          ffn_initializer             m_d^-1/2                1/m_d
    ffn_out         ffn_output_layer_init...    (2L m_f)^-1/2           1/m_f
    head            initializer_range, normal   1                       1

    embedding x embeddings_scale, q.k x attention_logits_alpha/d, logits x output_logits_alpha/m_d (or /sqrt(m_d))

The legacy format holds the products themselves. What its documentation, paper and legacy files intend and what release
2.10 computes differ in places; `numbers` gives the intent, or with `faithful` what that release does, and
`faults` the difference in words.

Not covered: T5 and BERT, experts, `lr_adjustment_groups` of a config's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import erf, exp, isclose, pi, sqrt
from typing import Any

from umup.errors import ConfigError
from umup.interop.cerebras.document import Document, number
from umup.interop.cerebras.keys import LEGACY_GROUP

ROLES = ("embedding", "attention", "attention_out", "ffn_in", "ffn_out", "head")
RESIDUAL = ("attention_out", "ffn_out")
# Learning-rate group -> the roles it holds.
GROUP_ROLES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "decoder_attention": ("attention", "attention_out"),
    "decoder_input_ffn": ("ffn_in",),
    "decoder_output_ffn": ("ffn_out",),
    LEGACY_GROUP: ("attention", "attention_out", "ffn_in", "ffn_out"),
}

# Where a role's initializer is read, the first that a config names; after the last comes initializer_range.
INTENDED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sequential": {
        "embedding": ("embedding_initializer",),
        "attention": ("initializer",),
        "attention_out": ("output_layer_initializer", "initializer"),
        "ffn_in": ("ffn_initializer", "initializer"),
        "ffn_out": ("ffn_output_layer_initializer", "output_layer_initializer", "initializer"),
    },
    "parallel": {
        "embedding": ("embedding_initializer",),
        "attention": ("initializer",),
        "attention_out": ("output_layer_initializer",),
        "ffn_in": ("ffn_initializer", "output_layer_initializer"),
        "ffn_out": ("ffn_output_layer_initializer", "output_layer_initializer"),
    },
}
# What release 2.10 does in a run of the current format instead: the GPT-2 class falls back to initializer_range.
RELEASED = {
    **INTENDED,
    "sequential": {
        **INTENDED["sequential"],
        "attention_out": ("output_layer_initializer",),
        "ffn_out": ("ffn_output_layer_initializer",),
    },
}


@dataclass(frozen=True)
class Init:
    """A normal distribution of mean 0; `cut`: at how many stds it is truncated, None: nowhere."""

    std: float
    cut: float | None = None

    @property
    def deviation(self) -> float:
        """The standard deviation of what is drawn."""
        return self.std * (1.0 if self.cut is None else shrinkage(self.cut))

    def times(self, factor: float) -> "Init":
        """The distribution of the draws, multiplied."""
        return replace(self, std=self.std * factor)


@dataclass(frozen=True)
class Numbers:
    """Everything that muP is about, final; `base`: hidden and filter size of the base, None outside of muP.

    `init` has every role, `lr` those but the head. `attention` multiplies q.k, 1/head_dim or 1/sqrt(head_dim) included;
    `logits_root`: logits are divided by the root of the width.
    """

    init: Mapping[str, Init]
    lr: Mapping[str, float]
    embedding: float
    logits: float
    attention: float
    base: tuple[float, float] | None
    logits_root: bool = False


def shrinkage(cut: float) -> float:
    """Standard deviation of a unit normal cut at +-cut: sqrt(1 - 2 c phi(c)/(2 Phi(c) - 1)); 0.8796 at 2."""
    density = exp(-cut * cut / 2) / sqrt(2 * pi)
    return sqrt(1 - 2 * cut * density / erf(cut / sqrt(2)))


def numbers(document: Document, faithful: bool = False) -> Numbers:
    """The numbers of a config, as intended or as release 2.10 computes them. Raises ConfigError."""
    model, head_dim = document.model, document.model["hidden_size"] // document.model["num_heads"]
    alpha = model["output_logits_alpha"] or 1.0
    root = not model["scale_output_logits_by_d"]
    base = _base(document)
    logits = 1.0 if model["output_logits_scale"] is None else model["output_logits_scale"]
    if document.format == "current" and base is not None:
        logits = alpha / (model["hidden_size"] / base[0]) ** (0.5 if root else 1.0)
    return Numbers(
        init=_inits(document, base, faithful),
        lr=_rates(document, base),
        embedding=model["embeddings_scale"],
        logits=logits,
        attention=model["attention_logits_alpha"] * _softmax_scale(document, head_dim, faithful),
        base=base,
        logits_root=root and document.format == "current",
    )


def ratios(document: Document, base: tuple[float, float] | None) -> dict[str, float]:
    """Fan-in over the base's, role by role; 1 for what does not grow."""
    if base is None:
        return dict.fromkeys(ROLES, 1.0)
    hidden, filters = document.model["hidden_size"] / base[0], document.model["filter_size"] / base[1]
    grown = {**dict.fromkeys(("attention", "attention_out", "ffn_in"), hidden), "ffn_out": filters}
    return {**dict.fromkeys(ROLES, 1.0), **grown}


def faults(document: Document) -> list[str]:
    """Where release 2.10 does something else than is intended, one line each, with both numbers."""
    meant, done = numbers(document), numbers(document, faithful=True)
    found = []
    for role in ROLES:
        a, b = meant.init[role].std, done.init[role].std
        if not isclose(a, b, rel_tol=1e-9):
            reason = (
                "it does not scale initializers that a GPT-J config names"
                if document.code == "parallel"
                else "under muP it falls back to initializer_range, not to the initializers that the config names"
            )
            found.append(f"initial std of {role}: {a:.6g}, in release 2.10 {b:.6g} ({reason})")
    if not isclose(meant.attention, done.attention, rel_tol=1e-9):
        found.append(
            f"factor on q.k: {meant.attention:.6g}, in release 2.10 {done.attention:.6g} (its GPT-J class does not "
            "switch scale_qk_dot_by_d on under muP)"
        )
    return found


def _base(document: Document) -> tuple[float, float] | None:
    """Floats are as good as integers: BTLM's base has a filter of 682.6."""
    model = document.model
    if document.format == "current":
        return model["mup_base_hidden_size"], model["mup_base_filter_size"]
    if document.format == "legacy":
        return (
            model["hidden_size"] * document.adjust[LEGACY_GROUP],
            model["filter_size"] * document.adjust[LEGACY_GROUP],
        )
    return None


def _inits(document: Document, base: tuple[float, float] | None, faithful: bool) -> dict[str, Init]:
    released = faithful and document.format == "current"
    sources = (RELEASED if released else INTENDED)[document.code]
    default = document.model["initializer_range"]
    found = {role: _init(document, keys) for role, keys in sources.items()}
    factors = dict.fromkeys(ROLES, 1.0)
    depth = (2 * document.model["num_hidden_layers"]) ** -0.5
    if document.format == "current":
        factors = {role: ratio**-0.5 for role, ratio in ratios(document, base).items()}
        factors |= {role: factors[role] * depth for role in RESIDUAL}
        if released and document.code == "parallel":
            factors |= {role: 1.0 for role, init in found.items() if init is not None}
    elif document.code == "sequential" and found["attention_out"] is None:
        factors |= {role: depth for role in RESIDUAL if found[role] is None}
    drawn = {role: (init or Init(default, 2.0)).times(factors[role]) for role, init in found.items()}
    return {**drawn, "head": Init(default)}


def _init(document: Document, keys: tuple[str, ...]) -> Init | None:
    for key in keys:
        if document.model[key] is not None:
            return read_init(f"model.{key}", document.model[key])
    return None


def read_init(where: str, given: Any) -> Init:
    """An initializer of a config. Raises ConfigError for laws other than a normal around 0, cut or not."""
    spec = {"name": given} if isinstance(given, str) else given
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(f"{where}: expected an initializer such as {{name: truncated_normal, std: 0.02}}")
    name = str(spec["name"]).lower()
    if name not in ("normal", "truncated_normal"):
        raise ConfigError(f"{where}: {name} is no normal distribution; write name: truncated_normal and its std")
    std = number(f"{where}.std", spec.get("std", 0.05))
    if std <= 0:
        raise ConfigError(f"{where}.std: expected a positive number, found {std:g}")
    if number(f"{where}.mean", spec.get("mean") or 0.0) != 0:
        raise ConfigError(f"{where}.mean: expected 0, found {spec['mean']}")
    if name == "normal":
        return Init(std)
    low, high = (number(f"{where}.{side}", spec.get(side, sign * std)) for side, sign in (("a", -2.0), ("b", 2.0)))
    if low >= 0 or not isclose(-low, high, rel_tol=1e-6):
        raise ConfigError(f"{where}: cut at {low:g} and {high:g}; expected a and b of equal size around 0")
    cut = high / std
    return Init(std, 2.0 if isclose(cut, 2.0, rel_tol=1e-6) else cut)


def _rates(document: Document, base: tuple[float, float] | None) -> dict[str, float]:
    rates = {role: 1.0 for role in ROLES if role != "head"}
    if document.format == "current":
        rates = {role: 1 / ratio for role, ratio in ratios(document, base).items() if role != "head"}
    for group, factor in document.adjust.items():
        rates |= dict.fromkeys(GROUP_ROLES[group], factor)
    return rates


def _softmax_scale(document: Document, head_dim: int, faithful: bool) -> float:
    if document.model["attention_type"] == "dot_product":
        return 1.0
    by_d = document.model["scale_qk_dot_by_d"]
    if by_d is None:
        by_d = document.format == "current" and not (faithful and document.code == "parallel")
    return 1 / head_dim if by_d else 1 / sqrt(head_dim)
