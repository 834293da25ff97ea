"""The one formula type: `c * fan_in^a * fan_out^b * depth^d * tokens^e`, times hyperparameters.

A rule relative to a base shape is the same thing over the symbols `base_fan_in`, ...: `ratio("fan_in", -1)` is
`base_fan_in/fan_in`. Evaluation takes a size and its base as one quotient, numerator and denominator apart, so that
at the base shape it is exactly 1 in floating point, and muP there is SP bit for bit.

Not covered: rules that are sums (residual weights) or closed forms (softmax, GELU); see opscales.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

SIZES = ("fan_in", "fan_out", "min_fan", "max_fan", "columns", "depth", "tokens")


@dataclass(frozen=True)
class Monomial:
    """A coefficient times powers of named symbols; `powers` is sorted by symbol and holds no zero."""

    coefficient: float = 1.0
    powers: tuple[tuple[str, Fraction], ...] = ()

    def __mul__(self, other: "Monomial") -> "Monomial":
        powers = dict(self.powers)
        for symbol, power in other.powers:
            powers[symbol] = powers.get(symbol, Fraction(0)) + power
        return Monomial(self.coefficient * other.coefficient, _normal(powers))

    def __pow__(self, exponent: Fraction | int) -> "Monomial":
        powers = {s: p * exponent for s, p in self.powers}
        return Monomial(self.coefficient ** float(exponent), _normal(powers))

    def substitute(self, formulas: Mapping[str, "Monomial"]) -> "Monomial":
        """Every named symbol replaced by a formula."""
        result = Monomial(self.coefficient)
        for symbol, exponent in self.powers:
            result = result * formulas.get(symbol, power(symbol)) ** exponent
        return result

    def variation(self, relative: bool) -> "Monomial":
        """How it varies with the sizes: no coefficient, no hyperparameter; if `relative`, all sizes over their base."""
        sizes = [(s, p) for s, p in self.powers if s.removeprefix("base_") in SIZES]
        if not relative:
            return Monomial(1.0, tuple(sizes))
        return prod((ratio(s, p) for s, p in sizes if s in SIZES), start=Monomial())

    def evaluate(self, symbols: Mapping[str, float]) -> float:
        """The number, given every symbol's value; an unknown symbol is a KeyError."""
        relative = {s for s, _ in self.powers if f"base_{s}" in dict(self.powers)}
        relative |= {f"base_{s}" for s in relative}
        absolute = _quotient([(s, p) for s, p in self.powers if s not in relative], symbols)
        return self.coefficient * absolute * _quotient([(s, p) for s, p in self.powers if s in relative], symbols)

    def __str__(self) -> str:
        if self.coefficient == 0:
            return "0"
        above = [_factor(s, p) for s, p in self.powers if p > 0]
        below = [_factor(s, -p) for s, p in self.powers if p < 0]
        if self.coefficient != 1.0 or not above:
            above.insert(0, f"{self.coefficient:g}")
        text = "*".join(above)
        if not below:
            return text
        return f"{text}/{below[0]}" if len(below) == 1 else f"{text}/({'*'.join(below)})"


def constant(value: float) -> Monomial:
    """A formula that depends on nothing."""
    return Monomial(value)


def power(symbol: str, exponent: Fraction | int | str = 1) -> Monomial:
    """`symbol^exponent`; write the exponent as "-1/2" to keep it exact."""
    return Monomial(1.0, _normal({symbol: Fraction(exponent)}))


def ratio(size: str, exponent: Fraction | int | str = 1) -> Monomial:
    """`(size/base_size)^exponent`: a rule relative to the base shape."""
    assert size in SIZES
    return power(size, exponent) * power(f"base_{size}", -Fraction(exponent))


def _normal(powers: Mapping[str, Fraction]) -> tuple[tuple[str, Fraction], ...]:
    return tuple(sorted((s, p) for s, p in powers.items() if p != 0))


def _quotient(powers: Sequence[tuple[str, Fraction]], symbols: Mapping[str, float]) -> float:
    # Sorted, so that at the base shape both products round alike.
    above: float = prod(sorted(float(symbols[s]) ** float(p) for s, p in powers if p > 0))
    below: float = prod(sorted(float(symbols[s]) ** float(-p) for s, p in powers if p < 0))
    return above / below


def _factor(symbol: str, exponent: Fraction) -> str:
    if exponent == 1:
        return symbol
    if exponent == Fraction(1, 2):
        return f"sqrt({symbol})"
    return f"{symbol}^{exponent}" if exponent.denominator == 1 else f"{symbol}^({exponent})"
