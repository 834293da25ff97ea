"""Plan -> parameter groups for any torch.optim, and the optimizer's state by parameter name.

Rates are factors: a group's `lr` is the base rate times the plan's number, and a scheduler multiplies it (torch's
schedulers, and ours, through `initial_lr`). Groups of equal numbers are merged; `names` stays in each for logging.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umup.errors import CheckpointError, PlanError
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import Plan


@dataclass(frozen=True)
class Family:
    """How an optimizer family's classes take epsilon: its usual value, and the group entries that say it."""

    eps: float
    entries: Callable[[float], dict[str, Any]] = lambda eps: {"eps": eps}


def _decoupled(eps: float) -> dict[str, Any]:
    return {"eps": eps, "decoupled_weight_decay": True}


# Entries of a group overrule an optimizer's arguments, so that decay and scale are those that the plan was made for.
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("sgd", "lion", "signsgd"), Family(0.0, lambda eps: {})),
    "adamw": Family(1e-8),
    **dict.fromkeys(("adam", "nadam", "radam"), Family(1e-8, _decoupled)),
    "adafactor": Family(1e-3, lambda eps: {"eps": (None, eps)}),
    "muon": Family(1e-7, lambda eps: {"eps": eps, "adjust_lr_fn": "original"}),
    "muon_match_rms_adamw": Family(1e-7, lambda eps: {"eps": eps, "adjust_lr_fn": "match_rms_adamw"}),
    "shampoo": Family(1e-12),
    "soap": Family(1e-8),
}


def param_groups(
    plan: Plan,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    eps: float | None = None,
    part: str | None = None,
) -> list[dict[str, Any]]:
    """Groups with lr, weight_decay and epsilon per the plan; frozen parameters are left out.

    eps: that of the optimizer at the plan's factor 1; default: torch's. part: where two families share the parameters
    (muon and adamw), the one that these groups are for.
    Independent decay (`w *= 1 - wd*lr_t/lr_peak`) is expressed in torch's coupled one by dividing by the peak rate.
    Raises PlanError if the plan and the model do not name the same parameters, for a rate that is not above 0, and for
    a part that trains none. Collect the names before torch.compile or a wrapper prefixes them.
    """
    if not lr > 0:
        raise PlanError(f"param_groups: lr must be above 0, not {lr}; a schedule may start lower")
    parameters = dict(named_parameters)
    odd = sorted(parameters.keys() ^ plan.stored.keys())
    if odd:
        side = "the model" if odd[0] in parameters else "the plan"
        raise PlanError(f"only {side} has the parameter {odd[0]!r}; the plan must be made for this model")
    family = OPTIMIZERS[plan.optimizer]
    parts = [family.name] if family.rest is None else [family.name, family.rest]
    if part not in (parts if family.rest else [None, family.name]):
        both = " and ".join(f"part={name!r}" for name in parts)
        raise PlanError(f"param_groups: optimizer {plan.optimizer!r} is made of {both}; ask for one at a time")
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    for name, p in plan.stored.items():
        trained_by = family.trains(p.spec).name
        if not parameters[name].requires_grad or part not in (None, trained_by):
            continue
        rate = lr * p["lr"]
        decay = weight_decay * p["weight_decay"] / (rate if plan.independent_weight_decay else 1.0)
        form = FAMILIES[trained_by]
        epsilon = (form.eps if eps is None else eps) * p["eps"]
        numbers = {"lr": rate, "initial_lr": rate, "weight_decay": decay, **form.entries(epsilon)}
        group = groups.setdefault((rate, decay, epsilon), {"params": [], "names": [], **numbers})
        group["params"].append(parameters[name])
        group["names"].append(name)
    if family.rest and part == family.name and not groups:
        raise PlanError(
            f"param_groups: part={part!r} has no parameters: it trains matrices inside the network; convolutions and "
            f"vectors go to part={family.rest!r}"
        )
    return list(groups.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as `entry/parameter` -> tensor; scalars (Adam's step) become 0-d tensors."""
    return {
        f"{entry}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, p in _named(optimizer)
        for entry, value in optimizer.state[p].items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `state_tensors` gave. Raises CheckpointError for a tensor that no parameter claims."""
    parameters = dict(_named(optimizer))
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"optimizer state {key!r} belongs to no parameter of this model")
        optimizer.state[parameters[name]][entry] = value.to(parameters[name].device) if value.ndim else value.clone()


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
