"""A plan for human eyes: numbers by name, layers that agree collapsed, then every rule behind them with its source."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from umup.rules.opscales import Value
from umup.rules.optimizers import optimizer as find_optimizer
from umup.rules.plan import STORAGE_QUANTITIES, USE_QUANTITIES, Plan
from umup.rules.precision import LAYER, Product

T = TypeVar("T")
COLUMNS = ("init_std", *USE_QUANTITIES, *(q for q in STORAGE_QUANTITIES if not q.startswith("init")))
# Most of a column that is folded, least of the last one; tried in turn.
ROOMS = ((120, 36), (60, 36), (48, 36), (40, 36), (34, 30), (28, 30), (28, 24), (22, 24), (20, 20), (16, 20))
# After a comma or a factor, before a denominator; an exponent (8/25) stays whole.
BREAKS = re.compile(r"(?<=,)|(?<=\*)(?!,)|(?=/[a-z(])")


@dataclass(frozen=True)
class ExplainRow:
    """All numbers of a parameter or site; `name` stands for every layer where they hold.

    `trained_by` is a parameter's optimizer family; none trains a site or a tied use.
    """

    name: str
    role: str
    values: Mapping[str, Value]
    trained_by: str | None = None


def parameter_rows(plan: Plan) -> list[ExplainRow]:
    """The plan's parameters; layers that agree on all numbers are one row."""
    families = trained_by(plan)
    entries = {name: (str(p.spec.role), p.values, families.get(name)) for name, p in plan.params.items()}
    return [ExplainRow(shown, *entry) for shown, entry in _collapse(entries)]


def trained_by(plan: Plan) -> dict[str, str]:
    """The optimizer family of every stored parameter: under a hybrid (Muon, say) there is more than one."""
    family = find_optimizer(plan.optimizer)
    return {name: family.trains(p.spec).name for name, p in plan.stored.items()}


def site_rows(plan: Plan) -> list[ExplainRow]:
    """The plan's operation sites, likewise."""
    entries = {name: (str(op.site.kind), op.values) for name, op in plan.ops.items()}
    return [ExplainRow(shown, *entry) for shown, entry in _collapse(entries)]


def product_rows(products: Mapping[str, Product]) -> list[Product]:
    """The products, likewise; a row's name stands for every layer where the rest holds."""
    entries = {name: replace(p, name="") for name, p in products.items()}
    return [replace(product, name=shown) for shown, product in _collapse(entries)]


def explain_text(plan: Plan, products: Mapping[str, Product] | None = None) -> str:
    """The plan as aligned tables: parameters, sites, products where given, and the rule and source of every number."""
    params, sites = parameter_rows(plan), site_rows(plan)
    at_sites = [(r.name, r.role, "  ".join(f"{q} {v.number:.6g}" for q, v in r.values.items())) for r in sites]
    rules = dict.fromkeys((r.role, q, v.rule, v.source) for r in [*params, *sites] for q, v in r.values.items())
    tables = (
        _parameter_table(params),
        table([("site", "kind", "numbers"), *at_sites]),
        *([_product_table(products)] if products else []),
        table([("role", "quantity", "rule", "source"), *rules]),
    )
    return "\n\n".join([_headline(plan), *tables])


def diff_text(left: Plan, right: Plan) -> str:
    """Where two plans differ, layers collapsed; the number columns are named after the plans' schemes."""
    found: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for name, quantity, a, b in left.diff(right):
        found.setdefault((LAYER.sub("*", name), quantity), {})[name] = (_plain(a), _plain(b))
    if not found:
        return f"{left.scheme} and {right.scheme} agree on every number here"
    rows = []
    for (pattern, quantity), by_name in found.items():
        same = len(set(by_name.values())) == 1
        shown = {pattern: next(iter(by_name.values()))} if same else by_name
        rows += [(name, quantity, *numbers) for name, numbers in shown.items()]
    return table([("name", "quantity", left.scheme, right.scheme), *rows])


def table(rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart; a cell may have several lines."""
    cells = [[text.split("\n") for text in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    lines = [line for row in cells for line in zip_longest(*row, fillvalue="")]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def narrow_table(rows: Iterable[Sequence[str]], width: int) -> str:
    """A table of at most `width` where that is possible: the last column is wrapped, the others folded.

    Folds are at commas and between the factors of a formula, no more of them than it takes.
    """
    cells = list(rows)
    longest = max(len(row[-1]) for row in cells)
    for room, least in ROOMS:
        last = min(least, longest)
        folded = [[_fold(text, room) for text in row[:-1]] for row in cells]
        columns = zip(*folded, strict=True)
        left = sum(max(len(line) + 2 for text in column for line in text.split("\n")) for column in columns)
        if left + last <= width:
            break
    wrapped = [textwrap.fill(row[-1], max(last, width - left), break_on_hyphens=False) for row in cells]
    return table([*row, text] for row, text in zip(folded, wrapped, strict=True))


def _fold(text: str, room: int) -> str:
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for piece in BREAKS.split(line):
            if lines[-1] and len(lines[-1] + piece) > room:
                lines.append("")
            lines[-1] += piece if lines[-1] else piece.lstrip()
    return "\n".join(lines)


def _parameter_table(params: Sequence[ExplainRow]) -> str:
    hybrid = len({r.trained_by for r in params if r.trained_by}) > 1
    rows: list[list[str]] = [["parameter", "role", *(["trained by"] if hybrid else []), *COLUMNS]]
    for r in params:
        family = [r.trained_by or "-"] if hybrid else []
        rows.append([r.name, r.role, *family, *(_number(_initial(r.values).get(q)) for q in COLUMNS)])
    return table(rows)


def _product_table(products: Mapping[str, Product]) -> str:
    rows = [("product", "role", "x and w", "gradient", "stream", "why")]
    for p in product_rows(products):
        how = " simulated" * p.simulated
        formats = ((p.forward or p.stream) + how, (p.gradient or p.stream) + how)
        rows.append((p.name, str(p.role), *formats, p.stream, p.reason))
    return table(rows)


def _collapse(entries: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    patterns: dict[str, list[str]] = {}
    for name in entries:
        patterns.setdefault(LAYER.sub("*", name), []).append(name)
    for pattern, names in patterns.items():
        same = all(entries[n] == entries[names[0]] for n in names)
        for shown, name in [(pattern, names[0])] if same else [(n, n) for n in names]:
            yield shown, entries[name]


def _initial(values: Mapping[str, Value]) -> dict[str, Value]:
    """Constant initial values (a gain's 1) stand in the init column, in place of their std of zero."""
    shown = dict(values)
    if "init_std" in shown and shown["init_std"].number == 0:
        shown["init_std"] = Value(shown["init_mean"].number, "constant", shown["init_mean"].source)
    return shown


def _headline(plan: Plan) -> str:
    decay = "independent" if plan.independent_weight_decay else "lr-coupled"
    given = ", ".join(f"{name} {value}" for name, value in {**plan.hparams, **plan.options}.items())
    return f"scheme {plan.scheme}, optimizer {plan.optimizer}, {decay} weight decay\n{given}"


def _number(value: Value | None) -> str:
    return _plain(None if value is None else value.number)


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
