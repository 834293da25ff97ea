"""`umup.plan`: a parametrization for any `nn.Module`, in three lines of a user's own loop.

    plan = umup.plan(model, base=GPT(width=256), scheme="mup", optimizer="adamw")
    plan.apply(model)                                                   # rescales the fresh init, once
    optimizer = torch.optim.AdamW(plan.param_groups(model, lr=3e-3, weight_decay=3e-4))

A weight's multiplier is folded into its init and rate (the abc-symmetry), so that the module's forward stays as it is;
a residual branch's factor is folded into the matrices that write to the stream. Two things cannot be folded and become
hooks: a tied head's multiplier, and the softmax scale of fused projections whose head size grows (apply.py).

Everything is keyed by parameter name, so that deepcopy, FSDP2, DDP, torch.compile, `to_empty` and
`load_state_dict(assign=True)` lose nothing: make the groups from the wrapped model or from the plain one.

Schemes relative to a base (mup, depth_mup, completep) keep the module's own init at the base's size; absolute ones
(ntp, spectral) replace its size; sp keeps it. Unit-scaled schemes scale every operation and want
`umup.unit_scale(model, ...)` first.
Not covered: mus, whose blocks normalise their output; models whose base has another vocabulary.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import nn

from umup.adapt.apply import Applied, Wanted, apply_plan, check_ties, fold_softmax
from umup.adapt.discover import Discovery, discover
from umup.adapt.unit_scale import UnitScaled
from umup.errors import PlanError
from umup.optim.groups import param_groups
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import USE_QUANTITIES, ParamPlan, Plan, make_plan
from umup.rules.precision import LAYER
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import Scheme
from umup.rules.schemes import scheme as find_scheme

INIT = (
    "init_std: schemes relative to a base keep the module's own init there, and their column shows sigma_init's share "
    "only; apply() returns the factors"
)
# What wrappers put in front of names: torch.compile, DDP, FSDP1.
WRAPPERS = re.compile(r"\.(_orig_mod|module|_fsdp_wrapped_module)(?=\.)")
# Independent decay above this was most likely meant for torch's AdamW, which multiplies it by the rate.
LARGE_DECAY = 0.01
BRANCH = OpSite("residual", OpKind.RESIDUAL_MLP)
OWN = {
    "sigma_init": "the module's own init is the base's; change it there",
    "alpha_attn": "the softmax scale is the module's own; change it there",
}
OWN_OPTIONS = {
    "init": "the module's own init keeps its law; change it there",
    "roles": "initial stds are the module's own, and only umup's decoders know attention from MLP",
}
RATE_TOLERANCE = 1e-6
# Optimizer classes, in lower case, where a family's name and that of its `rest` do not say them.
CLASSES = {"adam": ("adamw",), "muon_match_rms_adamw": ("muon", "adamw")}


@dataclass(frozen=True)
class ModelPlan:
    """A plan for one model.

    `plan` is the table's form, `folded` what runs: multipliers in init and rate. `wanted`: what `apply` makes of each
    initial std. `softmax`: attention modules whose logits get a factor that no init can carry.
    """

    plan: Plan
    folded: Plan
    wanted: Mapping[str, Wanted]
    softmax: Mapping[str, float]
    notes: tuple[str, ...]

    def apply(self, model: nn.Module, inits: Mapping[str, str | float] | None = None) -> Applied:
        """Rescale the model's fresh init in place and install what cannot be folded; returns what was done.

        inits: pattern -> name of an init or its std, for parameters drawn by a law of their own (adapt/inits.py).
        Raises PlanError for a model of other parameters, on the meta device, applied before, or not freshly drawn.
        """
        return apply_plan(model, self.folded, self.wanted, self.softmax, inits or {})

    def param_groups(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float | None = None,
        part: str | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for the plan's optimizer (optim/groups.py), from the model or what wraps it.

        A scheduler must multiply rates, as torch's do; `guard` refuses others.
        """
        if self.plan.independent_weight_decay and weight_decay > LARGE_DECAY:
            warnings.warn(
                f"weight_decay: independent decay takes {100 * weight_decay:g}% of every weight per step; AdamW's "
                f"{weight_decay:g} at lr {lr:g} is {lr * weight_decay:g} here (or plan with "
                "independent_weight_decay=False)",
                stacklevel=2,
            )
        return param_groups(self.folded, self._stored(model), lr=lr, weight_decay=weight_decay, eps=eps, part=part)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on a step raises PlanError if a scheduler wrote rates instead of multiplying the plan's.

        Raises PlanError now if the optimizer is of a family that the plan was not made for.
        """
        _check_family(self.folded.optimizer, optimizer)

        def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            first = [(g["names"][0], g["lr"]) for g in optimizer.param_groups]
            common = {name: float(lr) / self.folded.params[name]["lr"] for name, lr in first}
            low, high = min(common, key=common.__getitem__), max(common, key=common.__getitem__)
            if common[high] - common[low] > RATE_TOLERANCE * common[high]:
                raise PlanError(
                    f"the rates of {low} and {high} are {common[low]:.4g} and {common[high]:.4g} times the plan's: a "
                    "scheduler writes absolute rates; let it multiply, or give it one rate per group in their ratio"
                )

        optimizer.register_step_pre_hook(check)

    def explain(self) -> str:
        """The numbers that run, with rule and source, and what they do not show."""
        return "\n\n".join([self.folded.explain(), "\n".join([INIT, *self.notes])])

    def to_json(self) -> str:
        """The folded plan (rules/plan.py); it travels with a run."""
        return self.folded.to_json()

    def _stored(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        known = {_unwrapped(name): name for name in self.folded.params}
        found = {_unwrapped(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        parameters = {known.get(name, name): p for name, p in found.items()}
        if not self.folded.params.keys() - parameters.keys():
            check_ties(self.folded, parameters)
        uses = self.folded.params.keys() - self.folded.stored.keys()
        return ((name, p) for name, p in parameters.items() if name not in uses)


def _check_family(planned: str, optimizer: torch.optim.Optimizer) -> None:
    """Classes of other libraries may be fused forms of a family, and pass."""
    found = type(optimizer).__name__.lower()
    if found == "adam" and all(g["decoupled_weight_decay"] or not g["weight_decay"] for g in optimizer.param_groups):
        found = "adamw"
    known = found in OPTIMIZERS or type(optimizer).__module__.startswith("torch.optim")
    if known and found not in CLASSES.get(planned, (planned, OPTIMIZERS[planned].rest)):
        raise PlanError(
            f"guard: the plan is for {planned!r}, whose rates are not those of {type(optimizer).__name__}; "
            f"train with that family, or write umup.plan(..., optimizer=<one of {', '.join(OPTIMIZERS)}>)"
        )


def _unwrapped(name: str) -> str:
    return WRAPPERS.sub("", f".{name}").removeprefix(".")


def plan(
    model: nn.Module,
    base: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    scheme: str = "mup",
    optimizer: str = "adamw",
    independent_weight_decay: bool = True,
    hparams: Mapping[str, float] | None = None,
    options: Mapping[str, str | float] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> ModelPlan:
    """The plan of a model: role, init, rate, epsilon and decay of every parameter under a scheme and an optimizer.

    base: the same network at the size whose hyperparameters were tuned, or a function that builds it (called under the
    meta device). overrides: pattern -> role, for parameters that adapt/discover.py cannot decide.
    Raises PlanError, naming the parameter, for trees that differ, roles that cannot be told, and what a scheme refuses.
    """
    table = find_scheme(scheme)
    _check_kind(table, model)
    if base is not None and not isinstance(base, nn.Module):
        with torch.device("meta"):
            base = base()
    if table.needs_base and base is None:
        raise PlanError(f"plan: scheme {scheme!r} is relative to a base; write base=<the model at the size you tuned>")
    for name in OWN.keys() & (hparams or {}).keys():
        raise PlanError(f"plan: hparams.{name}: {OWN[name]}")
    for name in OWN_OPTIONS.keys() & (options or {}).keys():
        raise PlanError(f"plan: options.{name}: {OWN_OPTIONS[name]}")
    found = discover(model, base, overrides=overrides)
    make = partial(
        make_plan,
        scheme,
        optimizer=optimizer,
        independent_weight_decay=independent_weight_decay,
        hparams=hparams,
        options=options,
    )
    target = _architecture(found.params, found.num_layers)
    # Where depth is not the scheme's business, the module's own init keeps its law of depth.
    at_base = _architecture(found.base, found.base_num_layers if table.needs_base_depth else found.num_layers)
    made = make(target, at_base if table.needs_base else None)
    made = made if table.unit_scaled else _into_writers(made, found)
    if not (table.unit_scaled or table.keeps_init):
        made = _around_own_factors(made, found, table.needs_base)
    ratios = {name: _softmax(make, *sizes) for name, sizes in found.head_dims.items()} if table.needs_base else {}
    made, softmax = fold_softmax(made, model, ratios)
    folded = made if table.unit_scaled else made.shift({name: p["multiplier"] for name, p in made.stored.items()})
    start = make(at_base, at_base) if table.needs_base else made
    wanted = {name: _wanted(table, p, made, start, at_base) for name, p in folded.stored.items()}
    return ModelPlan(made, folded, wanted, softmax, _notes(found, base is not None))


def _softmax(make: Callable[..., Plan], head_dim: int, base_head_dim: int) -> float:
    """What a scheme's logits are over those of a module that divides them by sqrt(head_dim), as modules do."""
    site, sizes = OpSite("softmax", OpKind.SDPA), _architecture((), 1).sizes
    target, base = (Architecture((), (site,), replace(sizes, head_dim=d)) for d in (head_dim, base_head_dim))
    return make(target, base).ops[site.name]["logits"] * sqrt(head_dim)


def _wanted(table: Scheme, p: ParamPlan, made: Plan, start: Plan, at_base: Architecture) -> Wanted:
    name, std = p.spec.name, start.params[p.spec.name]["init_std"]
    multiplier = made.params[name]["multiplier"]
    amount = p["init_std"] / std if std else multiplier
    if table.needs_base:
        return Wanted(amount, (start.params[name].spec, at_base.sizes.num_layers), multiplier)
    if table.keeps_init or not std:
        return Wanted(1.0, (p.spec, made.sizes.num_layers), multiplier)
    return Wanted(p["init_std"], None, multiplier)


def _check_kind(table: Scheme, model: nn.Module) -> None:
    scaled = isinstance(model, UnitScaled)
    if "pre" not in table.norm_placements:
        raise PlanError(
            f"plan: scheme {table.name!r} needs blocks that normalise their output; umup's own decoder has them"
        )
    if table.unit_scaled and not scaled:
        raise PlanError(
            f"plan: scheme {table.name!r} scales every operation, which no init or rate can replace; write "
            "umup.plan(umup.unit_scale(model, *example_inputs), ...) or scheme='mup'"
        )
    if scaled and not table.unit_scaled:
        raise PlanError(f"plan: the model is unit-scaled and scheme {table.name!r} is not; write scheme='umup'")


def _architecture(params: tuple[ParamSpec, ...], num_layers: int) -> Architecture:
    """One site stands for all branches. Sizes that only unit scaling reads are those of nothing."""
    sizes = Sizes(num_layers=max(num_layers, 1), tokens=1, seq_len=2, head_dim=1, vocab_size=2)
    return Architecture(params, (BRANCH,), sizes)


def _into_writers(made: Plan, found: Discovery) -> Plan:
    """Residual branches' weights as multipliers of the matrices, and their biases, that write to the stream."""
    branch = made.ops[BRANCH.name]["branch"]
    if branch == 1.0:
        return made
    if found.unwritten:
        raise PlanError(
            f"plan: scheme {made.scheme!r} weighs residual branches, and no matrix of {found.unwritten[0]} is known to "
            "write to the stream; write overrides={'<its output projection>.weight': 'hidden_out'}"
        )
    if found.unsure:
        pattern = LAYER.sub("*", found.unsure[0])
        raise PlanError(
            f"plan: scheme {made.scheme!r} weighs residual branches, and {found.unsure[0]} may write to the stream "
            f"unknown; write overrides={{{pattern!r}: 'hidden_out'}} if it does, 'hidden' if it does not"
        )
    writers = {name for name, p in made.params.items() if p.spec.role is Role.HIDDEN_OUT}
    modules = {name.rpartition(".")[0] for name in writers}
    biases = {n for n, p in made.params.items() if p.spec.role is Role.BIAS and n.rpartition(".")[0] in modules}
    source = made.ops[BRANCH.name].values["branch"].source
    params = {
        name: p.scaled(dict.fromkeys(USE_QUANTITIES, branch), f"[branch {branch:g}]", source)
        if name in writers | biases
        else p
        for name, p in made.params.items()
    }
    return replace(made, params=params)


def _around_own_factors(made: Plan, found: Discovery, relative: bool) -> Plan:
    """Numbers that a module's own forward multiplies by, divided out: of init and rate, or of a tied head's multiplier.

    At the base's size they are part of the network that was tuned; absolute schemes know no base.
    """
    for name, (mine, theirs) in found.own_factors.items():
        factor = mine / theirs if relative else mine
        if made.params[name].spec.tied_to is None:
            made = made.shift({name: 1 / factor})
        use = dict.fromkeys(USE_QUANTITIES, 1 / factor)
        rest = made.params[name].scaled(use, f"[own factor {factor:g}]", "the module's forward")
        made = replace(made, params={**made.params, name: rest})
    return made


def _notes(found: Discovery, has_base: bool) -> tuple[str, ...]:
    notes = []
    if not found.compared:
        notes.append("there is no second width to compare with: roles were guessed from names, shapes and classes")
    pairs = [(p, b) for p, b in zip(found.params, found.base, strict=True) if p.shape != b.shape]
    if has_base and not pairs and found.num_layers == found.base_num_layers:
        warnings.warn("umup.plan: base and model have the same shapes, so the plan changes nothing", stacklevel=3)
        notes.append("base and model have the same shapes")
    if found.compared and any(b.fan_in > p.fan_in or b.fan_out > p.fan_out for p, b in pairs):
        notes.append("the base is wider than the model: rates and inits grow")
    for name, (size, base_size) in found.lone.items():
        notes.append(
            f"{name}: a side of {size} here and {base_size} in the base counts as a width, by a ratio that no other "
            "layer has; if it is no width (classes, vocabulary, features), give the base the same or override the role"
        )
    for name in dict.fromkeys(LAYER.sub("*", name) for name in found.unknown_heads):
        notes.append(
            f"head size of {name or 'the model'} is not known; if it grows, keep it there as self.head_dim, for the "
            "softmax scale to follow"
        )
    return tuple(notes)
