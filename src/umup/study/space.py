"""What a sweep searches: an axis per hyperparameter, from the scheme's table or from the user.

By default the axes are `optimizer.lr`, three octaves to either side of the config's, and every hyperparameter of the
scheme over the range that its table gives. A user's axes replace all of them; each is a dotted config key and either a
range `LOW..HIGH` (numbers or powers such as `2^-3`; one grid point per octave, both ends included) or a list of values.

Not covered: axes that are words (`parametrization.options`), conditional axes, linear ranges.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log2
from typing import Any

from umup.config.load import parse_config, read_yaml
from umup.config.sections import RunConfig
from umup.errors import ConfigError, InputError
from umup.models.specs import plan_for
from umup.rules.schemes import hparams_of
from umup.rules.schemes import scheme as find_scheme

Number = int | float
Values = Mapping[str, Number]

LR = "optimizer.lr"
HPARAMS = "parametrization.hparams."
OCTAVES = 3


@dataclass(frozen=True)
class Axis:
    """One hyperparameter: its grid, ascending. Draws are log-uniform between the ends, or `listed` values.

    `grows`: a line whose best value is an end goes on beyond it.
    """

    key: str
    values: tuple[Number, ...]
    listed: bool = False
    grows: bool = False


Space = tuple[Axis, ...]


def name_of(values: Values) -> str:
    """Values as canonical JSON, which identifies them; 1 and 1.0 are one value."""
    return json.dumps({key: float(value) for key, value in values.items()}, sort_keys=True)


def apply_values(config: RunConfig, values: Values) -> RunConfig:
    """The config with values laid over it by dotted key. Raises ConfigError where one does not fit."""
    return parse_config(config.model_dump(), [(key, repr(value)) for key, value in values.items()])


def base_values(config: RunConfig, space: Space) -> dict[str, Number]:
    """What the config itself says on every axis; the axis' middle value where it says nothing."""
    p = config.parametrization
    table = {HPARAMS + h.name: h.default for h in hparams_of(p.scheme, p.options)}
    given = _numbers(config.model_dump())
    return {axis.key: given.get(axis.key, table.get(axis.key, axis.values[len(axis.values) // 2])) for axis in space}


def table_space(config: RunConfig) -> Space:
    """The learning rate around the config's, and the scheme's hyperparameters over their ranges, in octaves."""
    axes = [Axis(LR, tuple(config.optimizer.lr * 2.0**k for k in range(-OCTAVES, OCTAVES + 1)), grows=True)]
    for h in find_scheme(config.parametrization.scheme).hparams:
        own = config.parametrization.hparams.get(h.name, h.default)
        grid = [own * 2.0**k for k in range(-20, 21)]
        axes.append(Axis(HPARAMS + h.name, tuple(v for v in grid if h.low <= v <= h.high or v == own)))
    return tuple(axes)


def parse_space(entries: Mapping[str, Any]) -> Space:
    """Dotted key -> `LOW..HIGH` or a list of numbers. Raises ConfigError for an empty space or a one-point axis."""
    if not entries:
        raise ConfigError("--space: it is empty; write e.g. {optimizer.lr: 2^-3..2^3}")
    return tuple(_axis(key, spec) for key, spec in entries.items())


def check_space(config: RunConfig, space: Space) -> None:
    """Raise InputError, naming the axis, for a value that makes no config or no plan."""
    base = base_values(config, space)
    for axis in space:
        for value in axis.values:
            try:
                plan_for(apply_values(config, {**base, axis.key: value}))
            except InputError as error:
                raise ConfigError(f"--space.{axis.key} {value:g}: {error}") from None


def _axis(key: str, spec: Any) -> Axis:
    parsed = read_yaml(spec) if isinstance(spec, str) else spec
    if isinstance(parsed, list):
        values, listed = tuple(sorted({_number(key, v) for v in parsed})), True
    else:
        low, dots, high = str(parsed).partition("..")
        values, listed = _range(key, _number(key, low), _number(key, high if dots else low)), False
    if len(values) < 2:
        fixed = "".join(f"--{key} {value:g} or " for value in values)
        raise ConfigError(f"--space.{key}: {parsed} is nothing to search; write {fixed}a range 2^-3..2^3")
    return Axis(key, values, listed)


def _range(key: str, low: Number, high: Number) -> tuple[Number, ...]:
    if low == high:
        return (low,)
    if not 0 < low < high:
        raise ConfigError(f"--space.{key}: a range is of positive numbers, low..high, not {low:g}..{high:g}")
    steps = max(1, round(log2(high / low)))
    # Twelve digits, so that an octave is one: 2, not 1.9999999999999998.
    return (low, *(float(f"{low * (high / low) ** (k / steps):.12g}") for k in range(1, steps)), high)


def _number(key: str, given: Any) -> Number:
    """A number, or a power such as 2^-3."""
    value = given
    if isinstance(given, str):
        base, hat, exponent = given.strip().partition("^")
        try:
            parts = [read_yaml(base), read_yaml(exponent) if hat else 1]
            value = parts[0] ** parts[1] if hat else parts[0]
        except (TypeError, ConfigError, ArithmeticError):
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ConfigError(f"--space.{key}: {given!r} is no number; write a range 2^-3..2^3 or a list [0.5, 1, 2]")
    return value


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Number]:
    found: dict[str, Number] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_numbers(value, f"{prefix}{key}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
