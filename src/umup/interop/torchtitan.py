"""A plan as parameter groups of torchtitan: one regular expression for each group of equal numbers.

torchtitan matches patterns by `re.search`, the first match wins, and a pattern without a match is an error, as is a
parameter without one. The patterns here are anchored and disjoint, and name exactly the plan's parameters, so that
neither order nor a catch-all matters; layers that agree are written as `\\d+`.

torchtitan has had two forms, and both are written:
- factors on one rate and one decay (pull request 2859, April 2026): `multipliers_toml`. It has no place for epsilon.
  torchtitan's configs are Python by now, so the TOML is data for yours, which tomllib reads.
- each group with its own optimizer arguments (later, pull request 3269): `param_groups_python`, lines to paste.

Both are the optimizer's half. The plan's init reaches the weights by `plan.apply(model)` after the model's own, which
also installs what no rate can say (a tied head's multiplier, the softmax scale of heads that grew).

Not covered: optimizers other than Adam and AdamW; frozen parameters and pipeline stages, for which a pattern may match
nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from umup.errors import PlanError
from umup.rules.plan import ParamPlan, Plan
from umup.rules.precision import LAYER

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
# The classes' own default, which groups that state one must multiply.
EPS = 1e-8


@dataclass(frozen=True)
class PatternGroup:
    """Factors on the rate, on decay as torch's AdamW takes it (`w *= 1 - lr*wd`), and on epsilon."""

    pattern: str
    lr: float
    weight_decay: float
    eps: float


def pattern_groups(plan: Plan, base_lr: float) -> list[PatternGroup]:
    """The plan's groups; layers that agree are one pattern.

    base_lr: independent decay is expressed in torch's by dividing by the rate; plans with coupled decay ignore it.
    Raises PlanError for a plan with multipliers in its forward (write plan.fold(), or ModelPlan.folded), and for
    optimizers that torchtitan has not.
    """
    if plan.optimizer not in OPTIMIZERS:
        raise PlanError(f"torchtitan: no groups for optimizer {plan.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    for name, p in plan.stored.items():
        if p["multiplier"] != 1.0:
            raise PlanError(f"torchtitan: {name} has the forward multiplier {p['multiplier']:g}; write plan.fold()")
    by_numbers: dict[tuple[float, float, float], list[str]] = {}
    for pattern, p in _patterns(plan):
        decay = p["weight_decay"] / (base_lr * p["lr"] if plan.independent_weight_decay else 1.0)
        by_numbers.setdefault((p["lr"], decay, p["eps"]), []).append(pattern)
    return [PatternGroup(_either(patterns), *numbers) for numbers, patterns in by_numbers.items()]


def multipliers_toml(plan: Plan, base_lr: float) -> str:
    """TOML tables `[[optimizer.param_groups]]` of `pattern`, `lr_multiplier` and `weight_decay_multiplier`.

    The factors are on torchtitan's own `lr`, which must be `base_lr`, and on its `weight_decay`, which is the plan's.
    """
    tables = (
        f"[[optimizer.param_groups]]\npattern = '{g.pattern}'\nlr_multiplier = {g.lr!r}\n"
        f"weight_decay_multiplier = {g.weight_decay!r}\n"
        for g in pattern_groups(plan, base_lr)
    )
    return "\n".join(tables)


def param_groups_python(plan: Plan, *, lr: float, weight_decay: float = 0.0, eps: float = EPS) -> str:
    """Python: `param_groups=[ParamGroupConfig(...), ...]` with the numbers of `umup.param_groups`.

    What holds for all groups (betas) is to be added to each `optimizer_kwargs`.
    """
    lines = []
    for g in pattern_groups(plan, lr):
        numbers = {"lr": lr * g.lr, "weight_decay": weight_decay * g.weight_decay, "eps": eps * g.eps}
        lines += [
            "    ParamGroupConfig(",
            f'        pattern=r"{g.pattern}",',
            f'        optimizer_name="{OPTIMIZERS[plan.optimizer]}",',
            f"        optimizer_kwargs={numbers!r},",
            "    ),",
        ]
    return "\n".join(["param_groups=[", *lines, "]", ""])


def _patterns(plan: Plan) -> Iterator[tuple[str, ParamPlan]]:
    """Patterns without anchors; one for all layers of a name if they agree on the three numbers, else one each."""
    layers: dict[str, list[str]] = {}
    for name in plan.stored:
        layers.setdefault(LAYER.sub("*", name), []).append(name)
    for collapsed, names in layers.items():
        numbers = {tuple(plan.params[n][q] for q in ("lr", "weight_decay", "eps")) for n in names}
        if len(names) > 1 and len(numbers) == 1:
            yield re.escape(collapsed).replace(r"\*", r"\d+"), plan.params[names[0]]
        else:
            yield from ((re.escape(name), plan.params[name]) for name in names)


def _either(patterns: list[str]) -> str:
    return f"^{patterns[0]}$" if len(patterns) == 1 else f"^({'|'.join(patterns)})$"
