"""Final numbers of a muP run, whatever program computed them -> the parametrization section that gives them here.

Programs that follow Cerebras (its model zoo, nanoGPT-mup) and llm.c differ from the paper in the options of scheme mup,
and in numbers by role, which are hyperparameters under `options: {roles: apart}`. Each hyperparameter is the wanted
number over what the table gives at 1, so that a base of any size will do: a base width that is no integer is rounded,
and the factors make up for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, sqrt
from typing import Any

CLOSE = 1e-12
# Of a base whose width the target's head size does not divide.
HEAD_DIM = 64


@dataclass(frozen=True)
class Sizes:
    """Of the target, as far as the table needs them."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.hidden // self.num_heads


@dataclass(frozen=True)
class Wanted:
    """Final numbers: initial stds and learning-rate factors by role, multipliers, the factor on q.k.

    `std` has embedding, attention, attention_out, ffn_in, ffn_out, and head where it is not tied; `lr` all but head.
    """

    std: Mapping[str, float]
    lr: Mapping[str, float]
    embedding: float
    logits: float
    attention: float
    options: Mapping[str, str]


def base_of(sizes: Sizes, hidden: float, intermediate: float) -> dict[str, int]:
    """A base shape of these sizes, rounded, with heads that fit it."""
    width, heads = max(1, round(hidden)), 0
    base = {"hidden_size": width, "intermediate_size": max(1, round(intermediate))}
    if width % sizes.head_dim == 0:
        heads = width // sizes.head_dim
    else:
        base["head_dim"] = HEAD_DIM if width % HEAD_DIM == 0 else width
        heads = width // base["head_dim"]
    if sizes.num_kv_heads * heads % sizes.num_heads:
        base["num_kv_heads"] = 1
    return base


def parametrization(sizes: Sizes, wanted: Wanted, base: Mapping[str, int], scheme: str = "mup") -> dict[str, Any]:
    """The section; under a scheme whose branches shrink with depth (completep) the base has its number of layers."""
    m = sizes.hidden / base["hidden_size"]
    m_out = sizes.intermediate / base["intermediate_size"]
    # Such a scheme's residual outputs start as at the base's depth, mup's as at the target's.
    branches = 2 * base.get("num_layers", sizes.num_layers)
    sigma = wanted.std["attention"] * sqrt(m)
    power = 0.5 if wanted.options.get("logits") == "inv_sqrt_width" else 1.0
    # Equal to alpha/head_dim and alpha/sqrt(head_dim) alike: the table's factor is sqrt(base head_dim)/head_dim.
    table = sqrt(base.get("head_dim", sizes.head_dim)) / sizes.head_dim
    shared = {
        "sigma_init": (sigma, 0.02),
        "alpha_emb": (wanted.embedding, 1.0),
        "eta_emb": (wanted.lr["embedding"], 1.0),
        "alpha_attn": (wanted.attention / table, 1.0),
        "alpha_out": (wanted.logits * m**power, 1.0),
    }
    apart = {
        "std_emb": wanted.std["embedding"] / sigma,
        "std_attn_out": wanted.std["attention_out"] * sqrt(m * branches) / sigma,
        "std_ffn_in": wanted.std["ffn_in"] * sqrt(m) / sigma,
        "std_ffn_out": wanted.std["ffn_out"] * sqrt(m_out * branches) / sigma,
        "std_head": wanted.std.get("head", sigma) / sigma,
        "eta_attn": wanted.lr["attention"] * m,
        "eta_ffn_in": wanted.lr["ffn_in"] * m,
        "eta_ffn_out": wanted.lr["ffn_out"] * m_out,
    }
    hparams = {name: _clean(value) for name, (value, default) in shared.items() if not _close(value, default)}
    factors = {name: _clean(value) for name, value in apart.items() if not _close(value, 1.0)}
    options = {**wanted.options, **({"roles": "apart"} if factors else {})}
    found = {"scheme": scheme, "hparams": {**hparams, **factors}, "options": options, "base": dict(base)}
    return {key: value for key, value in found.items() if value != {}}


def _close(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=CLOSE)


def _clean(value: float) -> float:
    """Fifteen digits: 0.08, not 0.08000000000000002."""
    return float(f"{value:.15g}")
