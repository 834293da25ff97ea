"""Where a run's memory goes before the first activation: bytes per parameter by component, from config and plan alone.

Gradients have the dtype of their parameters. BF16 products cast their weights on the way and keep no copy; a product in
a format of its own keeps its encoded weight in two layouts, refreshed after every step.

Not covered: activations, which depend on what is compiled and recomputed; what kernels and allocators take for
themselves; tables and counters, which are a millionth of the rest.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

from umup.config.sections import RunConfig
from umup.models.specs import plan_for, products_for
from umup.rules.explain import table

BYTES = {"fp32": 4, "bf16": 2, "E4M3": 1, "E5M2": 1}
LAYOUTS = 2
GIB = 2**30


@dataclass(frozen=True)
class MemoryRow:
    """One component: `elements` of `dtype`, `bytes` in all, and its share of bytes for each parameter of the model."""

    component: str
    dtype: str
    elements: int
    bytes: int
    bytes_per_parameter: float


def memory_table(config: RunConfig) -> list[MemoryRow]:
    """Components in the order of a step: parameters, their encoded copies, gradients, Adam's moments.

    Raises ConfigError and PlanError as `plan_for` and `products_for` do.
    """
    plan = plan_for(config)
    count = sum(prod(p.spec.shape) for p in plan.stored.values())
    copies: Counter[str] = Counter()
    for product in products_for(config, plan).values():
        if product.forward is not None:
            stored = "fp32" if product.simulated else product.forward
            copies[stored] += LAYOUTS * product.fan_in * product.fan_out
    master, state = config.optimizer.master_dtype, config.optimizer.state_dtype
    parts: list[tuple[str, str, int]] = [
        ("parameters", master, count),
        *(("weights of products", name, elements) for name, elements in copies.items()),
        ("gradients", master, count),
        ("exp_avg", state, count),
        ("exp_avg_sq", state, count),
    ]
    sized = [(*part, part[2] * BYTES[part[1]]) for part in parts]
    return [MemoryRow(*part, part[-1] / count) for part in sized]


def memory_text(config: RunConfig) -> str:
    """`memory_table` with its totals, aligned."""
    rows = memory_table(config)
    total = sum(row.bytes for row in rows)
    shown = [(r.component, r.dtype, f"{r.bytes_per_parameter:.2f}", f"{r.bytes / GIB:.4g}") for r in rows]
    shown.append(("total", "", f"{sum(r.bytes_per_parameter for r in rows):.2f}", f"{total / GIB:.4g}"))
    lines = table([("component", "dtype", "bytes per parameter", "GiB"), *shown])
    return f"{rows[0].elements:,} parameters; activations come on top\n\n{lines}"
