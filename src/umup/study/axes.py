"""How a proxy grows along one axis, before any number moves: width, depth, batch or length, one row each.

Width adds heads of the same size and keeps ratios; a batch grows at constant tokens; length is steps.
Not covered: head size, vocabulary and sequence length, which no rule of transfer follows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from umup.config.sections import RunConfig
from umup.errors import ConfigError


def value_at(config: RunConfig, dotted: str) -> Any:
    """The value of `section.key`."""
    section, key = dotted.split(".")
    return config.model_dump()[section][key]


@dataclass(frozen=True)
class Axis:
    """A direction of growth: `field` is its size, `resize` gives a proxy's config at another, numbers unmoved."""

    name: str
    field: str
    resize: Callable[[RunConfig, int], RunConfig]

    def size(self, config: RunConfig) -> int:
        """The config's size along this axis."""
        found: int = value_at(config, self.field)
        return found


def changed(config: RunConfig, section: str, **fields: object) -> RunConfig:
    """With these fields of a section, not validated."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def _wider(proxy: RunConfig, hidden_size: int) -> RunConfig:
    """Heads are added and keep their size; an explicit MLP width or number of kv heads keeps its ratio."""
    m = proxy.model
    if hidden_size < 1 or hidden_size % m.head_dim:
        near = max(1, round(hidden_size / m.head_dim)) * m.head_dim
        raise ConfigError(
            f"target hidden_size {hidden_size} is not a multiple of model.head_dim {m.head_dim}; write {near}"
        )
    wide = {"hidden_size": hidden_size}
    for field, number in (("intermediate_size", m.intermediate_size), ("num_kv_heads", m.num_kv_heads)):
        if number is not None:
            grown = Fraction(number * hidden_size, m.hidden_size)
            if grown.denominator != 1:
                raise ConfigError(f"target hidden_size {hidden_size}: model.{field} {number} has no whole share there")
            wide[field] = int(grown)
    return changed(proxy, "model", **wide)


def _larger_batch(proxy: RunConfig, batch_size: int) -> RunConfig:
    """At constant tokens: steps change the other way."""
    t = proxy.train
    steps = Fraction(t.steps * t.batch_size, batch_size)
    if steps.denominator != 1:
        raise ConfigError(
            f"target batch_size {batch_size}: train.steps {t.steps} of batch_size {t.batch_size} are no whole number "
            "of its steps; write batch sizes that differ by powers of two"
        )
    return changed(proxy, "train", batch_size=batch_size, steps=int(steps))


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("width", "model.hidden_size", _wider),
        Axis("depth", "model.num_layers", lambda proxy, n: changed(proxy, "model", num_layers=n)),
        Axis("batch", "train.batch_size", _larger_batch),
        Axis("length", "train.steps", lambda proxy, n: changed(proxy, "train", steps=n)),
    )
}
