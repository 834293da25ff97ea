"""`umup rules [NAME]`: the tables behind every plan, with their sources."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from umup.cli.arguments import Parser
from umup.errors import ConfigError, did_you_mean
from umup.rules.catalog import (
    HORIZON,
    SYMBOLS,
    Formula,
    RoleRow,
    catalog,
    optimizer_table,
    role_rows,
    scheme_table,
    site_formulas,
)
from umup.rules.explain import narrow_table
from umup.rules.horizon import ONE, Rule
from umup.rules.hparams import HParam
from umup.rules.monomial import Monomial
from umup.rules.optimizers import OPTIMIZERS, Optimizer
from umup.rules.schemes import SCHEMES, Scheme

WIDTH = 120
IN_BRANCH = "*"


def run(arguments: list[str]) -> int:
    """Print the catalog, one scheme's table or one optimizer's."""
    parser = Parser("rules", "Schemes, hyperparameters, options, optimizers and horizon rules, each with its source.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a scheme or an optimizer: its whole table")
    parser.add_argument("--optimizer", metavar="NAME", help="with a scheme: the optimizer of its table [adamw]")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    known = parser.parse_strictly(arguments)
    name, chosen = known.name, known.optimizer
    if name is not None and name not in {**SCHEMES, **OPTIMIZERS}:
        tail = did_you_mean(name, [*SCHEMES, *OPTIMIZERS])
        raise ConfigError(f"umup rules: no scheme or optimizer is called {name!r}; {tail}")
    if chosen is not None and name not in SCHEMES:
        raise ConfigError(f"--optimizer goes with a scheme; write umup rules umup --optimizer {chosen}")
    if chosen is not None and chosen not in OPTIMIZERS:
        raise ConfigError(f"--optimizer: unknown optimizer {chosen!r}; {did_you_mean(chosen, OPTIMIZERS)}")
    if name is None:
        print(json.dumps(catalog(), indent=1) if known.json else _catalog_text())
    elif name in SCHEMES:
        scheme, optimizer = SCHEMES[name], OPTIMIZERS[chosen or "adamw"]
        print(json.dumps(scheme_table(scheme, optimizer), indent=1) if known.json else _scheme_text(scheme, optimizer))
    else:
        row = OPTIMIZERS[name]
        print(json.dumps(optimizer_table(row), indent=1) if known.json else _optimizer_text(row))
    return 0


def _catalog_text() -> str:
    parts = [
        _schemes(SCHEMES.values()),
        _hparams(SCHEMES.values()),
        _options(SCHEMES.values()),
        _optimizers(OPTIMIZERS.values()),
        _horizon(),
        "umup rules NAME: the whole table of a scheme (--optimizer NAME: under another than adamw) or of an optimizer",
    ]
    return "\n\n".join(parts)


def _scheme_text(scheme: Scheme, optimizer: Optimizer) -> str:
    rows = role_rows(scheme, optimizer)
    parts = [
        _schemes([scheme]),
        *([_hparams([scheme])] if scheme.hparams else []),
        *([_options([scheme])] if scheme.options else []),
        _values(rows),
        "\n".join(
            [f"under {optimizer.name} [{optimizer.evidence}: {optimizer.source}]", *_families(rows), _rates(rows)]
        ),
        _sites(scheme),
    ]
    return _with_legend("\n\n".join(parts))


def _optimizer_text(optimizer: Optimizer) -> str:
    tables = {s.name: role_rows(s, optimizer) for s in SCHEMES.values()}
    families = _families(row for rows in tables.values() for row in rows)
    rates = [f"under {name} [{SCHEMES[name].source}]\n{_rates(rows)}" for name, rows in tables.items()]
    return _with_legend("\n\n".join(["\n".join([_optimizers([optimizer]), *families]), *rates]))


def _schemes(schemes: Iterable[Scheme]) -> str:
    rows = [
        (
            s.name,
            "width, depth" if s.needs_base_depth else "width" if s.needs_base else "-",
            "yes" if s.unit_scaled else "-",
            "yes" if s.one_rate else "-",
            "/".join(s.norm_placements),
            f"{s.title} [{s.source}]",
        )
        for s in schemes
    ]
    return narrow_table([("scheme", "needs base", "unit-scaled", "one rate", "norms", "what"), *rows], WIDTH)


def _hparams(schemes: Iterable[Scheme]) -> str:
    owners: dict[HParam, list[str]] = {}
    for s in schemes:
        for h in s.hparams:
            owners.setdefault(h, []).append(s.name)
        for option in s.options:
            for name, choice in option.choices.items():
                for h in choice.hparams:
                    owners.setdefault(h, []).append(f"{s.name} ({option.name}: {name})")
    rows = [
        (
            h.name,
            ", ".join(names),
            f"{h.default:g}",
            f"{h.low:g} to {h.high:g}",
            f"{h.doc}; transfers: {h.transfers} [{h.source}]",
        )
        for h, names in owners.items()
    ]
    return narrow_table([("hyperparameter", "schemes", "default", "search", "what"), *rows], WIDTH)


def _options(schemes: Iterable[Scheme]) -> str:
    rows = [
        (option.name, s.name, name + " (default)" * (name == option.default), f"{choice.doc} [{choice.source}]")
        for s in schemes
        for option in s.options
        for name, choice in option.choices.items()
    ]
    return narrow_table([("option", "scheme", "choice", "what"), *rows], WIDTH)


def _optimizers(optimizers: Iterable[Optimizer]) -> str:
    head = ("optimizer", "lr", "eps", "rest", "evidence", "source")
    rows = [
        (o.name, str(o.lr), "-" if o.eps is None else str(o.eps), o.rest or "-", o.evidence, o.source)
        for o in optimizers
    ]
    notes = (
        "lr: factor on the scheme's rate, which is Adam's; eps: what epsilon is measured against",
        "grad, weight: the scheme's size of an entry of the gradient, of the initial weight",
        "rest: the family that trains all but the matrices inside the network",
    )
    return "\n".join([narrow_table([head, *rows], WIDTH), *notes])


def _horizon() -> str:
    rows = [
        (axis, rule.name, _moves(rule), rule.evidence, f"{rule.doc} [{rule.source}]")
        for axis, rules in HORIZON.items()
        for rule in rules.values()
    ]
    note = "batch, tokens (the run's), parameters: target over source; decay_per_step: shrinkage at the peak rate"
    return f"{narrow_table([('horizon', 'rule', 'moves', 'evidence', 'what'), *rows], WIDTH)}\n{note}"


def _moves(rule: Rule) -> str:
    def lines(moves: Mapping[str, Monomial], where: str) -> list[str]:
        return [f"{q} kept{where}" if f == ONE else f"{q} * {f}{where}" for q, f in moves.items()]

    return "\n".join([*lines(rule.moves, ""), *lines(rule.unit_moves, " (unit-scaled)")]) or "nothing"


def _values(rows: Sequence[RoleRow]) -> str:
    """What happens at the start and at every use; backward factors only where some are not the multiplier."""
    factors = ["multiplier", *(q for q in ("grad_input", "grad_weight") if any(_inexact(row, q) for row in rows))]

    def cells(row: RoleRow) -> tuple[str, ...]:
        return (_initial(row), *(_text(row, q) for q in factors), _sources(row, ["init_std", *factors]))

    shown = narrow_table([("role", "init", *factors, "source"), *_by_role(rows, cells)], WIDTH)
    exact = "\ngradients are exact: the backward factors are the multiplier" if len(factors) == 1 else ""
    return shown + exact


def _rates(rows: Sequence[RoleRow]) -> str:
    """What the optimizer is told."""
    quantities = ("lr", "eps", "decay_independent", "decay_coupled")

    def cells(row: RoleRow) -> tuple[str, ...]:
        return (*(_text(row, q) for q in quantities), _sources(row, quantities))

    head = ("role", "lr", "eps", "decay,\nindependent", "decay,\ncoupled", "source")
    found = _by_role([row for row in rows if row.trained_by is not None], cells)
    starred = any(IN_BRANCH in label for label, *_ in found)
    return narrow_table([head, *found], WIDTH) + f"\n{IN_BRANCH} in a residual branch, where that differs" * starred


def _families(rows: Iterable[RoleRow]) -> list[str]:
    """Who trains what; nothing where one family trains all."""
    roles: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.trained_by is not None:
            roles.setdefault(row.trained_by, {})[row.role] = None
    lines = [f"{family} trains {', '.join(names)}" for family, names in roles.items()]
    return lines if len(lines) > 1 else []


def _sites(scheme: Scheme) -> str:
    """Kinds of sites and quantities that share a rule are one row."""
    kinds: dict[tuple[str, Formula], list[str]] = {}
    for kind, formulas in site_formulas(scheme).items():
        for quantity, found in formulas.items():
            kinds.setdefault((quantity, found), []).append(kind)
    quantities: dict[tuple[str, Formula], list[str]] = {}
    for (quantity, found), at in kinds.items():
        quantities.setdefault((", ".join(at), found), []).append(quantity)
    rows = [(at, ", ".join(names), found.formula, found.source) for (at, found), names in quantities.items()]
    return narrow_table([("site", "quantity", "rule", "source"), *rows], WIDTH)


def _by_role(rows: Sequence[RoleRow], cells: Callable[[RoleRow], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Roles whose cells agree are one row; a starred role is in a residual branch and differs from it outside."""
    outside = {row.role: cells(row) for row in rows if not row.in_branch}
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        found = cells(row)
        differs = row.in_branch and outside.get(row.role, found) != found
        groups.setdefault(found, {})[row.role + IN_BRANCH * differs] = None
    return [(", ".join(names), *found) for found, names in groups.items()]


def _initial(row: RoleRow) -> str:
    if row.trained_by is None:
        return "-"
    std, mean = row.formulas["init_std"].formula, row.formulas["init_mean"].formula
    return f"constant {mean}" if std == "0" else std


def _inexact(row: RoleRow, quantity: str) -> bool:
    return row.formulas[quantity].formula != row.formulas["multiplier"].formula


def _text(row: RoleRow, quantity: str) -> str:
    return row.formulas[quantity].formula if quantity in row.formulas else "-"


def _sources(row: RoleRow, quantities: Iterable[str]) -> str:
    """Those of a row's formulas; its optimizer's own stands elsewhere."""
    own = f"; {OPTIMIZERS[row.trained_by].source}" if row.trained_by else ""
    found = [row.formulas[q].source.removesuffix(own) for q in quantities if q in row.formulas]
    return "; ".join(dict.fromkeys(source for text in found for source in text.split("; ")))


def _with_legend(text: str) -> str:
    return "\n".join([text, "", *(line for pattern, line in SYMBOLS.items() if re.search(pattern, text))])
