"""Plan -> parameter groups for any torch.optim, and the optimizer's state by parameter name.

Rates are factors: a group's `lr` is the base rate times the plan's number, and a scheduler multiplies it (torch's
schedulers, and ours, through `initial_lr`). Groups of equal numbers are merged; `names` stays in each for logging.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from umup.errors import CheckpointError, PlanError
from umup.rules.plan import Plan


def param_groups(
    plan: Plan, named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, eps: float
) -> list[dict[str, Any]]:
    """Groups with lr, eps and weight_decay per the plan.

    Independent decay (`w *= 1 - wd*lr_t/lr_peak`) is expressed in torch's coupled one by dividing by the peak rate.
    Raises PlanError if the plan and the model do not name the same parameters. Collect the names before
    torch.compile or a wrapper prefixes them.
    """
    parameters = dict(named_parameters)
    odd = sorted(parameters.keys() ^ plan.stored.keys())
    if odd:
        side = "the model" if odd[0] in parameters else "the plan"
        raise PlanError(f"only {side} has the parameter {odd[0]!r}; the plan must be made for this model")
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    for name, p in plan.stored.items():
        rate = lr * p["lr"]
        decay = weight_decay * p["weight_decay"] / (rate if plan.independent_weight_decay else 1.0)
        key = (rate, decay, eps * p["eps"])
        group = groups.setdefault(
            key, {"params": [], "names": [], "lr": key[0], "initial_lr": key[0], "weight_decay": key[1], "eps": key[2]}
        )
        group["params"].append(parameters[name])
        group["names"].append(name)
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
