"""Model families, one row each. A new decoder family is a row; what no row can say is a new column first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from umup.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """What distinguishes decoder families; `norm_gain` and `tied` are defaults that a config may override."""

    name: str
    norm: Literal["rms", "layer"]
    positions: Literal["rotary", "learned"]
    activation: Literal["gated_silu", "silu", "gelu", "gelu_tanh"]
    biases: bool
    norm_gain: bool
    tied: bool
    mlp_ratio: float
    source: str


FAMILIES: Mapping[str, Family] = {
    f.name: f
    for f in (
        Family("llama", "rms", "rotary", "gated_silu", False, True, False, 8 / 3, "2302.13971"),
        Family("gpt2", "layer", "learned", "gelu_tanh", True, True, True, 4.0, "Radford et al. 2019"),
    )
}


def family(name: str) -> Family:
    """The named family, or a ConfigError naming the nearest."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family: unknown family {name!r}; {did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]
