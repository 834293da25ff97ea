"""A table applied once: scheme x parameters x sizes -> a frozen Plan.

A plan holds every number of a run that depends on the parametrization, keyed by the *name* of the parameter or
site, each with its rule and source. Models, optimizers, checks and exports read it and nothing else; it travels
with the run as JSON. Names survive FSDP2, deepcopy and checkpoints, which attributes on tensors do not.

The abc-symmetry: for any theta > 0, (multiplier/theta, init*theta, lr*theta) leaves an Adam run unchanged, given
that epsilon moves with the gradient (eps/theta) and lr-coupled decay with the rate (/theta); powers of two leave it
unchanged bit for bit (2407.17465 section 2.2; 2310.02244 app.). Under another optimizer the rate moves by another power
(`Optimizer.under_shift`). Clipping by a *global* norm is not invariant, because
parameters are measured in new units: `grad_clip` is a threshold on gradients in the units of the plan that trains.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isclose, prod
from typing import Any

from umup.errors import PlanError
from umup.rules.hparams import Cell, Choice, resolve_hparams, resolve_options
from umup.rules.monomial import Monomial
from umup.rules.opscales import OpContext, OpRule, Value
from umup.rules.optimizers import ONE, Optimizer, convert
from umup.rules.optimizers import optimizer as find_optimizer
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import Scheme
from umup.rules.schemes import scheme as find_scheme

VERSION = 1
READOUTS = (Role.READOUT, Role.TIED_READOUT)
RESIDUALS = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)
# What happens at a use of a weight, and what belongs to its storage (a tied use has only the first).
USE_QUANTITIES = ("multiplier", "grad_input", "grad_weight")
STORAGE_QUANTITIES = ("init_std", "init_mean", "lr", "eps", "weight_decay")
# Present where a scheme cuts its normal distributions: at how many of their stds.
CUT = "init_cut"


@dataclass(frozen=True)
class ParamPlan:
    """The numbers of one parameter; `plan.params[name]["lr"]` is the number, `.values["lr"]` knows its rule."""

    spec: ParamSpec
    values: Mapping[str, Value]

    def __getitem__(self, quantity: str) -> float:
        return self.values[quantity].number

    def scaled(self, factors: Mapping[str, float], rule: str, source: str) -> "ParamPlan":
        """A copy with some quantities multiplied, their rules saying by what."""
        values = dict(self.values)
        for quantity, factor in factors.items():
            if factor != 1.0:
                old = values[quantity]
                values[quantity] = Value(old.number * factor, f"{old.rule} {rule}", f"{old.source}; {source}")
        return replace(self, values=values)


@dataclass(frozen=True)
class OpPlan:
    """The numbers of one operation site."""

    site: OpSite
    values: Mapping[str, Value]

    def __getitem__(self, quantity: str) -> float:
        return self.values[quantity].number


@dataclass(frozen=True)
class Plan:
    """Every number of a run that depends on the parametrization."""

    scheme: str
    optimizer: str
    independent_weight_decay: bool
    hparams: Mapping[str, float]
    options: Mapping[str, str]
    sizes: Sizes
    params: Mapping[str, ParamPlan]
    ops: Mapping[str, OpPlan]

    @property
    def stored(self) -> dict[str, ParamPlan]:
        """The parameters that own storage: all but tied uses."""
        return {name: p for name, p in self.params.items() if p.spec.tied_to is None}

    def explain(self) -> str:
        """The plan as a table in plain text: each number with its rule and source."""
        from umup.rules.explain import explain_text

        return explain_text(self)

    def diff(self, other: "Plan") -> list[tuple[str, str, float | None, float | None]]:
        """(name, quantity, here, there) wherever the two plans differ; None where one has no such number."""
        found = []
        for mine, theirs in ((self.params, other.params), (self.ops, other.ops)):
            for name in {**mine, **theirs}:
                a = mine[name].values if name in mine else {}
                b = theirs[name].values if name in theirs else {}
                for quantity in {**a, **b}:
                    left = a[quantity].number if quantity in a else None
                    right = b[quantity].number if quantity in b else None
                    if left != right:
                        found.append((name, quantity, left, right))
        return found

    def shift(self, thetas: Mapping[str, float]) -> "Plan":
        """The abc-symmetry, one theta > 0 per named stored parameter; its tied uses follow.

        Raises PlanError for a name that owns no storage here.
        """
        params = dict(self.params)
        for name, theta in thetas.items():
            if name not in self.stored:
                raise PlanError(f"shift: the plan has no stored parameter {name!r}")
            rule, source = f"[shift {theta:g}]", "abc-symmetry"
            moved = find_optimizer(self.optimizer).trains(params[name].spec).under_shift(theta)
            storage = {"init_std": theta, "init_mean": theta, **moved}
            if not self.independent_weight_decay:
                storage["weight_decay"] = 1 / moved["lr"]
            params[name] = params[name].scaled(storage, rule, source)
            for user, entry in params.items():
                if name in (user, entry.spec.tied_to):
                    params[user] = entry.scaled(dict.fromkeys(USE_QUANTITIES, 1 / theta), rule, source)
        return replace(self, params=params)

    def fold(self) -> "Plan":
        """Forward multipliers moved into init and learning rate; every gradient exact, epsilon making up for it.

        A foreign module then needs no change of its forward or backward at any weight. A tied readout keeps its
        multiplier: its storage is the embedding's. Op sites keep their forward numbers.
        """
        exact = self.exact_gradients()
        return exact.shift({name: p["multiplier"] for name, p in exact.stored.items()})

    def unfold(self) -> "Plan":
        """The unit-scaled form: every random init has std 1, the multiplier carries the rest (what FP8 wants)."""
        return self.shift({name: 1 / p["init_std"] for name, p in self.stored.items() if p["init_std"] > 0})

    def exact_gradients(self) -> "Plan":
        """The same Adam run with every backward factor that of plain autograd.

        Unit scaling hands each parameter its true gradient times a constant G; Adam divides G out once epsilon is
        divided by it, and other optimizers' rates make up for it. Raises PlanError where G is not one constant (tied
        uses that disagree).
        """
        family = find_optimizer(self.optimizer)
        gain = self._gradient_gains()
        params = {}
        for name, p in self.params.items():
            true = {q: Value(p["multiplier"], "multiplier", "exact gradient") for q in ("grad_input", "grad_weight")}
            entry = replace(p, values={**p.values, **true})
            if p.spec.tied_to is None:
                moved = family.trains(p.spec).under_shift(1.0, 1 / gain[name])
                if not self.independent_weight_decay:
                    moved["weight_decay"] = 1 / moved["lr"]
                entry = entry.scaled(moved, "[exact gradient]", "exact gradient")
            elif not isclose(gain[name], gain[p.spec.tied_to], rel_tol=1e-9):
                raise PlanError(f"{name}: its gradient and that of {p.spec.tied_to} have different scales; cannot fold")
            params[name] = entry
        return replace(self, params=params, ops={name: self._exact_op(op) for name, op in self.ops.items()})

    def to_json(self) -> str:
        """Versioned JSON, read back by `from_json` to an equal plan."""
        fields = {name: asdict(value) for name, value in self.params.items()}
        ops = {name: asdict(value) for name, value in self.ops.items()}
        body = {**self.__dict__, "sizes": asdict(self.sizes), "params": fields, "ops": ops}
        return json.dumps({"umup_plan": VERSION, **body}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Raises PlanError for other versions and for text that is no plan."""
        try:
            body = json.loads(text)
            version = body.pop("umup_plan")
            for added in ("precision", "trained_by"):  # by `umup explain --json`: no part of a parametrization
                body.pop(added, None)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise PlanError("not a umup plan: expected JSON with the key 'umup_plan'") from None
        if version != VERSION:
            raise PlanError(f"the plan has version {version}; this umup reads version {VERSION}")
        try:
            return _from_body(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a umup plan: {error!r} in its body") from None

    def _gradient_gains(self) -> dict[str, float]:
        """Actual over true gradient for each parameter, following the backward pass from the loss."""
        loss = next(op for op in self.ops.values() if op.site.kind is OpKind.LOSS)
        at_logits = loss["grad"] / (loss["logits"] / self.sizes.tokens)
        head = next(p for p in self.params.values() if p.spec.role in READOUTS)
        trunk = at_logits * head["grad_input"] / head["multiplier"]
        gains = {}
        for name, p in self.params.items():
            in_head = name.rpartition(".")[0] == head.spec.name.rpartition(".")[0]
            path = at_logits if in_head else trunk * self._branch_gain(name)
            gains[name] = path * p["grad_weight"] / p["multiplier"]
            if p is not head and not isclose(p["grad_input"], p["multiplier"], rel_tol=1e-9):
                raise PlanError(f"{name}: grad_input differs from multiplier inside the network; cannot fold")
        return gains

    def _branch_gain(self, name: str) -> float:
        for op in self.ops.values():
            if op.site.kind in RESIDUALS and name.startswith(op.site.name.removesuffix("residual")):
                return op["branch_grad"] / op["branch"]
        return 1.0

    def _exact_op(self, op: OpPlan) -> OpPlan:
        def true(number: float) -> Value:
            return Value(number, "exact gradient", "exact gradient")

        if op.site.kind is OpKind.LOSS:
            exact = {"grad": true(op["logits"] / self.sizes.tokens)}
        elif op.site.kind in RESIDUALS:
            exact = {"split_grad": true(1.0), "branch_grad": true(op["branch"])}
        else:
            exact = {}
        return replace(op, values={**op.values, **exact})


def make_plan(
    scheme: str,
    architecture: Architecture,
    base: Architecture | None = None,
    *,
    optimizer: str = "adamw",
    independent_weight_decay: bool = True,
    hparams: Mapping[str, float] | None = None,
    options: Mapping[str, str | float] | None = None,
) -> Plan:
    """Apply a scheme's table to an architecture.

    `base` is the architecture at the base shape: the same names, so that a base of another depth is told by its `sizes`
    alone. Schemes that are relative to a base demand it.
    Raises PlanError for unknown schemes, hyperparameters, options and optimizers, and for roles or sites that the
    table does not answer.
    """
    table = find_scheme(scheme)
    _check_shapes(table, architecture, base)
    chosen = resolve_options(scheme, table.options, options or {})
    for option in table.options:
        table = _choose(table, option.choices[chosen[option.name]])
    numbers = resolve_hparams(scheme, table.hparams, hparams or {})
    family = find_optimizer(optimizer)
    per_layer = prod(o.choices[chosen[o.name]].depth_per_layer for o in table.options)
    branches = {s.name.removesuffix("residual"): s.kind for s in architecture.sites if s.kind in RESIDUALS}
    depth, base_depth = (a.sizes.num_layers * per_layer for a in (architecture, base or architecture))
    base_specs = {s.name: s for s in (base or architecture).params}
    symbols = {**numbers, "depth": depth, "base_depth": base_depth, "tokens": float(architecture.sizes.tokens)}
    params = {}
    for spec in architecture.params:
        branch = next((kind for prefix, kind in branches.items() if spec.name.startswith(prefix)), None)
        formulas = _formulas(table, spec, branch, family.trains(spec), independent_weight_decay)
        shapes = {**_sides(spec), **{f"base_{side}": n for side, n in _sides(base_specs[spec.name]).items()}}
        values = {
            quantity: Value(cell.formula.evaluate({**symbols, **shapes}), str(cell.formula), cell.source)
            for quantity, cell in formulas.items()
        }
        params[spec.name] = ParamPlan(spec, values)
    base_head_dim = (base or architecture).sizes.head_dim
    context = OpContext(architecture.sites, architecture.sizes, depth, base_depth, base_head_dim, numbers)
    ops = {site.name: OpPlan(site, _op_rule(table, site.kind)(site, context)) for site in architecture.sites}
    return Plan(scheme, optimizer, independent_weight_decay, numbers, chosen, architecture.sizes, params, ops)


def _check_shapes(table: Scheme, architecture: Architecture, base: Architecture | None) -> None:
    if table.needs_base and base is None:
        raise PlanError(
            f"parametrization.base: scheme {table.name!r} needs a base shape; write base: {{hidden_size: 256}}"
        )
    if base is not None and not table.needs_base:
        raise PlanError(f"parametrization.base: scheme {table.name!r} is absolute and takes no base shape; remove it")
    placed = architecture.sizes.norm_placement
    if placed not in table.norm_placements:
        raise PlanError(
            f"scheme {table.name!r} is made for blocks of norm_placement {' or '.join(table.norm_placements)} and this "
            f"model's is {placed}; write model.norm_placement: {table.norm_placements[0]}"
        )


def _choose(table: Scheme, choice: Choice) -> Scheme:
    """The table with a choice's changes."""
    rows = {
        role: {**row, **{q: cell for (changed, q), cell in choice.cells.items() if changed is role}}
        for role, row in table.rows.items()
    }
    return replace(
        table,
        rows=rows,
        on_residual={**table.on_residual, **choice.on_residual},
        factors={**table.factors, **choice.factors},
        hparams=(*table.hparams, *choice.hparams),
        ops={**table.ops, **choice.ops},
    )


def _op_rule(table: Scheme, kind: OpKind) -> OpRule:
    if kind not in table.ops:
        raise PlanError(f"scheme {table.name!r} has no rule for {kind} sites")
    return table.ops[kind]


def _sides(spec: ParamSpec) -> dict[str, float]:
    fans = (float(spec.fan_in), float(spec.fan_out))
    columns = float(spec.shape[-1]) if spec.shape else 1.0
    return {"fan_in": fans[0], "fan_out": fans[1], "min_fan": min(fans), "max_fan": max(fans), "columns": columns}


def _formulas(
    table: Scheme, spec: ParamSpec, branch: OpKind | None, family: Optimizer, independent: bool
) -> dict[str, Cell]:
    """Quantity -> formula for one parameter under one optimizer family; a tied use has only what happens there."""
    if spec.role not in table.rows:
        raise PlanError(f"scheme {table.name!r} has no rule for role {spec.role} (parameter {spec.name})")
    row = dict(table.rows[spec.role])
    if spec.on_residual:
        row |= {q: row[q] * extra for q, extra in table.on_residual.items()}
    for (kind, role, quantity), extra in table.factors.items():
        if role is spec.role and kind in (None, branch):
            row[quantity] = row[quantity] * extra
    uses = {q: row.get(q, row["multiplier"]) for q in USE_QUANTITIES}
    if spec.tied_to is not None:
        return uses

    def converted(formula: Monomial) -> Cell:
        if table.one_rate:
            return Cell(ONE, "one rate for all")
        found = convert(formula, row["grad"].formula, row["init_std"].formula, table.needs_base)
        return Cell(found, f"{row['grad'].source}; {family.source}")

    factor = converted(family.lr)
    lr = row["lr"] if factor.formula == ONE else row["lr"] * factor
    # Decoupled decay acts through the rate: what the family adds to that is taken out of the coupled factor.
    coupled = Cell(row["decay_coupled"].formula * factor.formula**-1, row["decay_coupled"].source)
    decay = row["decay_independent"] if independent else coupled
    eps = Cell(ONE, f"{family.name} has no epsilon")
    if family.eps is not None:
        eps = row["eps"] if "eps" in row else converted(family.eps)
    initial = {q: row[q] for q in ("init_std", "init_mean", CUT) if q in row}
    return {**initial, **uses, "lr": lr, "eps": eps, "weight_decay": decay}


def _from_body(body: dict[str, Any]) -> Plan:
    def values(raw: dict[str, Any]) -> dict[str, Value]:
        return {quantity: Value(**value) for quantity, value in raw.items()}

    def spec(raw: dict[str, Any]) -> ParamSpec:
        return ParamSpec(**{**raw, "role": Role(raw["role"]), "shape": tuple(raw["shape"])})

    def site(raw: dict[str, Any]) -> OpSite:
        return OpSite(raw["name"], OpKind(raw["kind"]))

    params = {n: ParamPlan(spec(p["spec"]), values(p["values"])) for n, p in body.pop("params").items()}
    ops = {n: OpPlan(site(o["site"]), values(o["values"])) for n, o in body.pop("ops").items()}
    return Plan(**{**body, "sizes": Sizes(**body["sizes"])}, params=params, ops=ops)
