"""Model families, one row each. A new decoder family is a row; what no row can say is a new column first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from umup.errors import ConfigError, did_you_mean

NormPlacement = Literal["pre", "post", "res_post"]
Parallel = Literal["none", "shared_norm", "two_norms"]
Positions = Literal["rotary", "learned", "alibi", "none"]
Activation = Literal["gated_silu", "gated_gelu", "gated_gelu_tanh", "silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Traits:
    """What distinguishes networks of equal sizes. Every column is a field of the config's model section, too.

    `norm_bias` speaks of layer norms with gains. `norm_placement`: the input of a branch (pre), the sum (post) or the
    branch's output (res_post). `parallel`: both branches read the block's input, through one norm or one each.
    """

    norm: Literal["rms", "layer"] = "layer"
    norm_gain: bool = True
    norm_bias: bool = True
    norm_placement: NormPlacement = "pre"
    embedding_norm: bool = False
    parallel: Parallel = "none"
    positions: Positions = "learned"
    rotary_interleaved: bool = False
    activation: Activation = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tie_embeddings: bool = True


@dataclass(frozen=True)
class Family:
    """A row: traits, and how sizes that a config leaves out follow from the others."""

    name: str
    source: str
    traits: Traits
    mlp_ratio: float = 4.0
    multi_query: bool = False
    rotary_fraction: float = 1.0


FAMILIES: Mapping[str, Family] = {
    f.name: f
    for f in (
        Family(
            "llama",
            "2302.13971",
            Traits(
                norm="rms",
                positions="rotary",
                activation="gated_silu",
                attention_bias=False,
                mlp_bias=False,
                tie_embeddings=False,
            ),
            mlp_ratio=8 / 3,
        ),
        Family("gpt2", "Radford et al. 2019", Traits(activation="gelu_tanh")),
        Family("gpt3", "2005.14165", Traits()),
        Family(
            "gptj",
            "Wang and Komatsuzaki 2021",
            Traits(
                parallel="shared_norm",
                positions="rotary",
                rotary_interleaved=True,
                activation="gelu_tanh",
                attention_bias=False,
                head_bias=True,
                tie_embeddings=False,
            ),
            rotary_fraction=1 / 4,
        ),
        Family("bloom", "2211.05100", Traits(embedding_norm=True, positions="alibi", activation="gelu_tanh")),
        Family(
            "falcon",
            "2311.16867",
            Traits(parallel="shared_norm", positions="rotary", attention_bias=False, mlp_bias=False),
            multi_query=True,
        ),
        Family("starcoder", "2305.06161", Traits(activation="gelu_tanh"), multi_query=True),
        Family(
            "mpt",
            "MosaicML 2023",
            Traits(norm_bias=False, positions="alibi", attention_bias=False, mlp_bias=False),
        ),
    )
}


def family(name: str) -> Family:
    """The named family, or a ConfigError naming the nearest."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family: unknown family {name!r}; {did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]
