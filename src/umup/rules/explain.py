"""A plan for human eyes: layers that agree collapse into one row, every number with its rule and source."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from umup.rules.opscales import Value
from umup.rules.plan import Plan

LAYER = re.compile(r"(?<=layers\.)\d+")


@dataclass(frozen=True)
class ExplainRow:
    """One number of a plan; `name` stands for every layer where it holds."""

    name: str
    role: str
    quantity: str
    number: float
    rule: str
    source: str


def explain_rows(plan: Plan) -> list[ExplainRow]:
    """Every number of the plan, parameters first; layers that agree on all numbers are one row."""
    params = {name: (str(p.spec.role), p.values) for name, p in plan.params.items()}
    ops = {name: (str(op.site.kind), op.values) for name, op in plan.ops.items()}
    return [*_rows(params), *_rows(ops)]


def explain_text(plan: Plan) -> str:
    """The rows of `explain_rows` as an aligned table, gradients and exact ones left out where they say nothing."""
    lines = [f"scheme {plan.scheme}, optimizer {plan.optimizer}, {_settings(plan)}", ""]
    header = ("name", "role", "quantity", "value", "rule", "source")
    cells = [(r.name, r.role, r.quantity, f"{r.number:.6g}", r.rule, r.source) for r in explain_rows(plan)]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines += [
        "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in [header, *cells]
    ]
    return "\n".join(lines)


def diff_text(left: Plan, right: Plan) -> str:
    """Where two plans differ, layers collapsed; columns name the plans' schemes."""
    rows: dict[tuple[str, str, str, str], None] = {}
    for name, quantity, a, b in left.diff(right):
        rows[LAYER.sub("*", name), quantity, _number(a), _number(b)] = None
    table = [("name", "quantity", left.scheme, right.scheme), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _rows(entries: Mapping[str, tuple[str, Mapping[str, Value]]]) -> Iterable[ExplainRow]:
    patterns: dict[str, list[str]] = {}
    for name in entries:
        patterns.setdefault(LAYER.sub("*", name), []).append(name)
    for pattern, names in patterns.items():
        same = all(entries[n][1] == entries[names[0]][1] for n in names)
        for shown, name in [(pattern, names[0])] if same else [(n, n) for n in names]:
            role, values = entries[name]
            for quantity, value in values.items():
                yield ExplainRow(shown, role, quantity, value.number, value.rule, value.source)


def _settings(plan: Plan) -> str:
    decay = "independent" if plan.independent_weight_decay else "lr-coupled"
    given = {**plan.hparams, **plan.options}
    return ", ".join([f"{decay} weight decay", *(f"{k} {v}" for k, v in given.items())])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
