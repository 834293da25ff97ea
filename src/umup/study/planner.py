"""A proxy's result and a target's size -> the target's complete config, with what moved by which rule.

Here: the width rule. Under muP and u-muP the tuned rate is a factor that the target's plan scales per parameter, so the
number itself is copied; under SP nothing else is known than to copy it too, which is what the comparison shows.

Not covered: depth, batch and length rules, cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from statistics import mean
from typing import Literal

from umup.config.load import parse_config
from umup.config.sections import BaseShape, RunConfig
from umup.errors import ConfigError
from umup.models.specs import shape_of
from umup.rules.schemes import scheme as find_scheme
from umup.study.search import Line

Verdict = Literal["pass", "fail", "undecided"]
TOLERANCE = 0.01


@dataclass(frozen=True)
class Move:
    """One field that changed on the way from proxy to target, and why."""

    field: str
    before: object
    after: object
    rule: str


@dataclass(frozen=True)
class Transfer:
    """The target's config and what was moved."""

    config: RunConfig
    moved: tuple[Move, ...]


def transfer_width(proxy: RunConfig, lr: float, hidden_size: int) -> Transfer:
    """The proxy's config at another width, with its tuned peak rate.

    The head size stays and heads are added; an explicit MLP width or number of kv heads keeps its ratio. A scheme that
    is relative to a base gets the proxy as its base, unless it has one. Raises ConfigError where sizes do not divide.
    """
    m, shape = proxy.model, shape_of(proxy.model)
    if hidden_size % m.head_dim:
        raise ConfigError(f"target hidden_size {hidden_size} is not a multiple of model.head_dim {m.head_dim}")
    wide: dict[str, int] = {"hidden_size": hidden_size}
    moved = [
        Move("model.hidden_size", m.hidden_size, hidden_size, "given"),
        Move("optimizer.lr", lr, lr, _rate_rule(proxy)),
    ]
    for field, number in (("intermediate_size", shape.intermediate_size), ("num_kv_heads", shape.num_kv_heads)):
        if getattr(m, field) is not None:
            grown = Fraction(number * hidden_size, m.hidden_size)
            if grown.denominator != 1:
                raise ConfigError(f"target hidden_size {hidden_size}: model.{field} {number} has no whole share there")
            wide[field] = int(grown)
            moved.append(Move(f"model.{field}", number, int(grown), "ratio to hidden_size kept"))
    model = m.model_copy(update=wide)
    parametrization = proxy.parametrization
    if find_scheme(parametrization.scheme).needs_base and parametrization.base is None:
        base = BaseShape(
            hidden_size=m.hidden_size,
            num_layers=m.num_layers,
            head_dim=m.head_dim,
            num_kv_heads=shape.num_kv_heads,
            intermediate_size=shape.intermediate_size,
        )
        parametrization = parametrization.model_copy(update={"base": base})
        moved.append(Move("parametrization.base", None, m.hidden_size, "the proxy is the base shape"))
    optimizer = proxy.optimizer.model_copy(update={"lr": lr})
    update = {"model": model, "optimizer": optimizer, "parametrization": parametrization}
    target = parse_config(proxy.model_copy(update=update).model_dump())  # a copy is not validated
    return Transfer(target, tuple(moved))


def _rate_rule(proxy: RunConfig) -> str:
    scheme = find_scheme(proxy.parametrization.scheme)
    return f"copied: {scheme.title} " + ("has no width rule" if scheme.one_rate else "scales it per parameter")


@dataclass(frozen=True)
class WidthTransfer:
    """How a scheme's learning rate transferred over widths; everything is measured, in nats and octaves.

    `drift[w]` is log2 of the optimum at width w over the proxy's (parabola fit); `penalty[w]` the loss lost at w by
    using the proxy's best grid rate instead of its own, one number per paired seed.
    """

    scheme: str
    proxy: int
    lines: Mapping[int, Line]

    @property
    def rate(self) -> float:
        """The proxy's best log2 lr: what is transferred."""
        return self.lines[self.proxy].best

    def drift(self, width: int) -> float:
        """Octaves between the optimum at `width` and the proxy's."""
        return self.lines[width].optimum - self.lines[self.proxy].optimum

    def penalty(self, width: int) -> tuple[float, ...]:
        """Loss at the transferred rate minus loss at the width's own best rate, per seed that both have."""
        line = self.lines[width]
        return tuple(a - b for a, b in zip(line.losses[self.rate], line.losses[line.best], strict=False))

    @property
    def verdict(self) -> Verdict:
        """pass: the optimum stays within one grid step of the proxy's at every width. fail: at some width it does not,
        and the transferred rate costs more than TOLERANCE nats there, and something in every seed. undecided: neither,
        or an optimum that its grid does not enclose.
        """
        if any(line.on_edge or not isfinite(line.mean(line.best)) for line in self.lines.values()):
            return "undecided"
        far = [w for w, line in self.lines.items() if abs(self.drift(w)) > line.step]
        if not far:
            return "pass"
        dear = any(self.mean_penalty(w) > TOLERANCE and min(self.penalty(w)) > 0 for w in far)
        return "fail" if dear else "undecided"

    def mean_penalty(self, width: int) -> float:
        """The mean of `penalty`."""
        return mean(self.penalty(width))
