"""The formula type: arithmetic, printing, and exactness at the base shape."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umup.rules.monomial import SIZES, Monomial, constant, power, ratio
from umup.rules.roles import Role
from umup.rules.schemes import MUP, SIGMA_OUT

SYMBOLS = ("fan_in", "base_fan_in", "depth", "sigma_init")
exponents = st.fractions(-2, 2, max_denominator=4)
values = st.fixed_dictionaries({s: st.floats(1e-2, 1e4) for s in SYMBOLS})
many = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def monomials(draw):
    result = constant(draw(st.floats(0.01, 100)))
    for symbol in draw(st.lists(st.sampled_from(SYMBOLS), max_size=4)):
        result = result * power(symbol, draw(exponents))
    return result


def test_a_monomial_is_its_coefficient_times_powers():
    formula = constant(3.0) * power("fan_in", "-1/2") * power("depth", 2) * power("tokens", "3/2")
    assert formula.evaluate({"fan_in": 16, "depth": 5, "tokens": 4}) == 3 / 4 * 25 * 8


def test_an_unknown_symbol_is_a_key_error():
    with pytest.raises(KeyError, match="depth"):
        power("depth").evaluate({"fan_in": 4})


@many
@given(monomials(), monomials(), values)
def test_the_product_evaluates_to_the_product(a, b, symbols):
    assert (a * b).evaluate(symbols) == pytest.approx(a.evaluate(symbols) * b.evaluate(symbols), rel=1e-12)


@many
@given(monomials(), monomials(), monomials())
def test_multiplication_is_commutative_and_its_powers_associative(a, b, c):
    assert a * b == b * a
    assert (a * (b * c)).powers == ((a * b) * c).powers


def test_powers_that_cancel_leave_nothing():
    assert power("fan_in", "1/3") * power("fan_in", "-1/3") == constant(1.0)
    assert power("depth", 0) == constant(1.0)


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (constant(1.0), "1"),
        (constant(0.5), "0.5"),
        (power("fan_in", -1), "1/fan_in"),
        (power("fan_in", "-1/2"), "1/sqrt(fan_in)"),
        (ratio("fan_in", -1), "base_fan_in/fan_in"),
        (ratio("fan_in", "-1/2"), "sqrt(base_fan_in)/sqrt(fan_in)"),
        (power("depth", "3/4"), "depth^(3/4)"),
        (
            constant(2.0) * power("sigma_init") * power("depth", -1) * power("tokens", -2),
            "2*sigma_init/(depth*tokens^2)",
        ),
    ],
)
def test_it_prints_as_it_would_be_written(formula, text):
    assert str(formula) == text


@pytest.mark.parametrize("exponent", ["-1", "-1/2", "1/2", "1/3", "1", "2"])
@pytest.mark.parametrize("size", SIZES)
def test_a_relative_rule_is_exactly_one_at_the_base(size, exponent):
    rule = ratio(size, exponent)
    assert {rule.evaluate({size: w, f"base_{size}": w}) for w in range(1, 2001)} == {1.0}


@pytest.mark.parametrize("absolute", [power("sigma_init"), SIGMA_OUT, constant(0.1)], ids=str)
def test_a_relative_factor_changes_no_bit_of_an_absolute_one_at_the_base(absolute):
    plain = absolute.evaluate({"sigma_init": 0.02, "depth": 3})
    for exponent in ("-1/2", "-1", "1"):
        rule = absolute * ratio("fan_in", exponent)
        at_base = {
            rule.evaluate({"sigma_init": 0.02, "depth": 3, "fan_in": w, "base_fan_in": w}) for w in range(1, 2001)
        }
        assert at_base == {plain}


def test_a_relative_rule_moves_away_from_the_base():
    """The two tests above would also pass if ratios were ignored."""
    assert ratio("fan_in", -1).evaluate({"fan_in": 512, "base_fan_in": 128}) == 0.25
    assert MUP.rows[Role.EMBEDDING]["grad"].formula.evaluate({"fan_out": 512, "base_fan_out": 128}) == 0.25


def test_exponents_stay_exact():
    third = power("fan_in", "1/3")
    assert (third * third * third).powers == (("fan_in", Fraction(1)),)


def test_a_monomial_is_frozen_and_hashable():
    formula = Monomial(2.0, (("depth", Fraction(1)),))
    assert {formula: 1}[constant(2.0) * power("depth")] == 1
    with pytest.raises(AttributeError):
        formula.coefficient = 3.0  # type: ignore[misc]


def test_a_power_multiplies_exponents():
    assert (constant(4.0) * power("depth", -1)) ** Fraction(1, 2) == constant(2.0) * power("depth", "-1/2")
    assert power("fan_in") ** 0 == Monomial()


def test_symbols_are_replaced_by_formulas():
    found = (power("grad", -1) * power("depth")).substitute({"grad": constant(2.0) * power("fan_out", -1)})
    assert found == constant(0.5) * power("fan_out") * power("depth")


def test_variation_keeps_sizes_alone():
    formula = constant(3.0) * power("sigma_init") * ratio("fan_in", "-1/2") * power("depth", "-1/2")
    assert formula.variation(relative=False) == ratio("fan_in", "-1/2") * power("depth", "-1/2")
    assert formula.variation(relative=True) == ratio("fan_in", "-1/2") * ratio("depth", "-1/2")
    assert power("base_depth", "-1/2").variation(relative=True) == Monomial()
