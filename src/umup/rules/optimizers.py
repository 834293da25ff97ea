"""Optimizer -> the column of a scheme's table that it reads.

What matters to a parametrization is how an update's size depends on the gradient's: Adam's does not, so all of
its descendants share one column. `sgd`, `sign`, `muon` and others join as rows here plus a column there.
"""

from dataclasses import dataclass

from umup.errors import PlanError, did_you_mean


@dataclass(frozen=True)
class Optimizer:
    """`column` is the key of `Row.lr` and `Row.eps`."""

    name: str
    column: str
    source: str


OPTIMIZERS = {
    "adamw": Optimizer("adamw", "adam", "1711.05101; torch.optim.AdamW"),
}


def optimizer(name: str) -> Optimizer:
    """The named optimizer, or a PlanError naming the nearest."""
    if name not in OPTIMIZERS:
        raise PlanError(f"optimizer.name: unknown optimizer {name!r}; {did_you_mean(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]
