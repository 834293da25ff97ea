"""The tables as records of text: what `umup rules` lists, and what others may read from its JSON.

A plan holds the numbers of one model. Here are the formulas behind them, for no model at all: each scheme applied to a
specimen that has one parameter of every role, in and out of a residual branch, and one site of every kind. That goes
through `make_plan`, so that a listing cannot differ from what a run does.

Not covered: what the choices of an option change in the table (formulas are those of the default choices).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from umup.rules.horizon import BATCH_RULES, DECAY_RULES, LENGTH_RULES, Rule
from umup.rules.hparams import HParam
from umup.rules.opscales import Value
from umup.rules.optimizers import OPTIMIZERS, Optimizer
from umup.rules.plan import Plan, make_plan
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import SCHEMES, Scheme

HORIZON: Mapping[str, Mapping[str, Rule]] = {"batch": BATCH_RULES, "length": LENGTH_RULES, "decay": DECAY_RULES}
# Where a parameter can stand; other roles stand in a residual branch or outside.
ONLY_OUTSIDE = (Role.EMBEDDING, Role.POSITION, Role.READOUT, Role.TIED_READOUT)
ONLY_IN_BRANCH = (Role.HIDDEN_OUT,)
# What formulas speak of: a pattern, and the line that explains what it finds.
SYMBOLS: Mapping[str, str] = {
    r"\bfan_in\b": "fan_in: features that the weight reads (an embedding's: the vocabulary)",
    r"\bfan_out\b": "fan_out: features that the weight writes",
    r"\bmax_fan\b": "max_fan: the larger of fan_in and fan_out",
    r"\bmin_fan\b": "min_fan: the smaller of fan_in and fan_out",
    r"\bcolumns\b": "columns: last side of the stored matrix",
    r"\bdepth\b": "depth: layers of the model",
    r"\btokens\b": "tokens: per optimizer step, over all devices",
    r"\bbase_": "base_...: the same at the base shape",
    r"\binterp\(": "interp(w, low, high): high^w * low^(1-w)",
    r"1\+tau\^2": "tau^2: a^2/(depth + sum of a^2 over earlier branches), a = 1 where alpha_res... are 1",
}


@dataclass(frozen=True)
class Formula:
    """A formula as text, and where it comes from."""

    formula: str
    source: str


@dataclass(frozen=True)
class RoleRow:
    """All formulas of a role, in a residual branch or outside, and the optimizer family that trains it.

    Quantities are those of schemes.py, with `eps` in place of `grad` and absent where the family has no epsilon; a tied
    readout has only what happens at its use, and no family.
    """

    role: Role
    in_branch: bool
    trained_by: str | None
    formulas: Mapping[str, Formula]


def role_rows(scheme: Scheme, optimizer: Optimizer) -> list[RoleRow]:
    """The table of a scheme under an optimizer, options at their defaults."""
    independent, coupled = (_plan(scheme, optimizer, choice) for choice in (True, False))
    rows = []
    for name, entry in independent.params.items():
        spec, values, trained_by = entry.spec, dict(entry.values), None
        if spec.tied_to is None:
            family = optimizer.trains(spec)
            trained_by = family.name
            values["decay_independent"] = values.pop("weight_decay")
            values["decay_coupled"] = coupled.params[name].values["weight_decay"]
            if family.eps is None:
                del values["eps"]
        rows.append(RoleRow(spec.role, spec.on_residual, trained_by, _formulas(values)))
    return rows


def site_formulas(scheme: Scheme) -> dict[OpKind, Mapping[str, Formula]]:
    """What a scheme does at each kind of operation site."""
    return {op.site.kind: _formulas(op.values) for op in _plan(scheme, OPTIMIZERS["adamw"], True).ops.values()}


def catalog() -> dict[str, Any]:
    """Every scheme, optimizer and horizon rule, as JSON has it."""
    return {
        "schemes": {name: scheme_record(s) for name, s in SCHEMES.items()},
        "optimizers": {name: optimizer_record(o) for name, o in OPTIMIZERS.items()},
        "horizon": {axis: {n: _horizon_record(r) for n, r in rules.items()} for axis, rules in HORIZON.items()},
    }


def scheme_record(scheme: Scheme) -> dict[str, Any]:
    """A scheme without its table."""
    facts = {k: v for k, v in scheme.__dict__.items() if isinstance(v, bool | str) and k != "name"}
    options = {
        option.name: {
            "default": option.default,
            "choices": {
                name: {"doc": c.doc, "source": c.source, **({"hparams": _hparams(c.hparams)} if c.hparams else {})}
                for name, c in option.choices.items()
            },
        }
        for option in scheme.options
    }
    listed = {**facts, "norm_placements": list(scheme.norm_placements)}
    return {**listed, "hparams": _hparams(scheme.hparams), "options": options}


def _hparams(hparams: Iterable[HParam]) -> dict[str, Any]:
    return {h.name: {k: v for k, v in asdict(h).items() if k != "name"} for h in hparams}


def optimizer_record(optimizer: Optimizer) -> dict[str, Any]:
    """A row of the optimizer table; `rest` names the family of what is no matrix inside the network."""
    eps = None if optimizer.eps is None else str(optimizer.eps)
    return {
        "lr": str(optimizer.lr),
        "eps": eps,
        "rest": optimizer.rest,
        "evidence": optimizer.evidence,
        "source": optimizer.source,
    }


def scheme_table(scheme: Scheme, optimizer: Optimizer) -> dict[str, Any]:
    """A scheme with its table under an optimizer, as JSON has it."""
    sites = {kind: {q: asdict(f) for q, f in found.items()} for kind, found in site_formulas(scheme).items()}
    return {
        "scheme": {"name": scheme.name, **scheme_record(scheme)},
        "optimizer": {"name": optimizer.name, **optimizer_record(optimizer)},
        "parameters": [asdict(row) for row in role_rows(scheme, optimizer)],
        "sites": sites,
    }


def optimizer_table(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer with the tables of every scheme under it, as JSON has it."""
    return {
        "optimizer": {"name": optimizer.name, **optimizer_record(optimizer)},
        "schemes": {name: [asdict(row) for row in role_rows(s, optimizer)] for name, s in SCHEMES.items()},
    }


def _horizon_record(rule: Rule) -> dict[str, Any]:
    def texts(moves: Mapping[str, Any]) -> dict[str, str]:
        return {quantity: str(formula) for quantity, formula in moves.items()}

    return {
        "moves": texts(rule.moves),
        "unit_moves": texts(rule.unit_moves),
        "evidence": rule.evidence,
        "doc": rule.doc,
        "source": rule.source,
    }


def _plan(scheme: Scheme, optimizer: Optimizer, independent: bool) -> Plan:
    specimen = _specimen(scheme.norm_placements[0])
    base = specimen if scheme.needs_base else None
    return make_plan(scheme.name, specimen, base, optimizer=optimizer.name, independent_weight_decay=independent)


def _specimen(norm_placement: str) -> Architecture:
    """One of everything; only the formulas are read, so that its sizes do not matter."""
    params = [
        ParamSpec(
            name=f"{role}.{in_branch}",
            role=role,
            shape=(1, 1),
            fan_in=1,
            fan_out=1,
            on_residual=in_branch,
            tied_to=f"{Role.EMBEDDING}.False" if role is Role.TIED_READOUT else None,
        )
        for role in Role
        for in_branch in (False, True)
        if role not in (ONLY_OUTSIDE if in_branch else ONLY_IN_BRANCH)
    ]
    sites = tuple(OpSite(kind, kind) for kind in OpKind)
    sizes = Sizes(num_layers=1, tokens=1, seq_len=1, head_dim=1, vocab_size=2, norm_placement=norm_placement)
    return Architecture(tuple(params), sites, sizes)


def _formulas(values: Mapping[str, Value]) -> dict[str, Formula]:
    return {quantity: Formula(value.rule, value.source) for quantity, value in values.items()}
