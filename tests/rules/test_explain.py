"""The tables for human eyes: alignment, folding, wrapping."""

from umup.rules.explain import narrow_table, table

PROSE = "a text that is as long as it takes to be wrapped where the table would be wider than it may be"


def test_columns_are_aligned_and_cells_may_have_lines():
    assert table([("a", "b"), ("long", "x\ny")]).splitlines() == ["a     b", "long  x", "      y"]


def test_a_narrow_table_wraps_its_last_column():
    lines = narrow_table([("name", "what"), ("row", PROSE)], 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(line[6:].strip() for line in lines[1:]) == PROSE


def test_a_narrow_table_folds_formulas_at_factors_and_keeps_exponents_whole():
    formula = "sqrt(base_fan_in)*parameters^(527/1000)*depth/(base_depth*sqrt(fan_in))"
    lines = narrow_table([("lr", "what"), (formula, "source")], 20).splitlines()
    cells = [line.split("  ")[0] for line in lines[1:]]
    assert len(cells) > 1
    assert "".join(cells) == formula
    assert any("parameters^(527/1000)" in cell for cell in cells)


def test_nothing_is_folded_that_fits():
    rows = [("a*b", "c, d", "e"), ("a/b", "c", "f")]
    assert narrow_table(rows, 120) == table(rows)
