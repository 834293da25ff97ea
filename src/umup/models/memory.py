"""Where a run's memory goes before the first activation: bytes per parameter by component, from config and plan alone.

Gradients have the dtype of their parameters. BF16 products cast their weights on the way and keep no copy; a product in
a format of its own keeps its encoded weight in two layouts, refreshed after every step.

Not covered: activations, which depend on what is compiled and recomputed; what kernels and allocators take for
themselves; tables and counters, which are a millionth of the rest.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.models.specs import plan_for, products_for
from umup.rules.explain import table

BYTES = {"fp32": 4, "bf16": 2, "E4M3": 1, "E5M2": 1}
LAYOUTS = 2

Elements = Callable[[tuple[int, ...]], int]


def _rows(shape: tuple[int, ...]) -> int:
    return prod(shape[:-1]) if len(shape) > 1 else 0


def _columns(shape: tuple[int, ...]) -> int:
    return prod(shape[:-2]) * shape[-1] if len(shape) > 1 else 0


ADAM: Mapping[str, Elements] = {"exp_avg": prod, "exp_avg_sq": prod}
STATE: Mapping[str, Mapping[str, Elements]] = {
    **dict.fromkeys(("adamw", "adam", "nadam", "radam"), ADAM),
    "sgd": {"momentum_buffer": prod},
    # Second moments of matrices are kept by row and by column (1804.04235).
    "adafactor": {"row_var": _rows, "col_var": _columns, "variance": lambda s: 0 if len(s) > 1 else prod(s)},
}
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
    """Components in the order of a step: parameters, their encoded copies, gradients, the optimizer's state.

    Raises ConfigError and PlanError as `plan_for` and `products_for` do, and for optimizers that no run trains with.
    """
    plan = plan_for(config)
    if config.optimizer.name not in STATE:
        raise ConfigError(
            f"optimizer.name: the memory of {config.optimizer.name!r} is not known here; known: {', '.join(STATE)}"
        )
    shapes = [p.spec.shape for p in plan.stored.values()]
    count = sum(map(prod, shapes))
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
        *((entry, state, sum(map(elements, shapes))) for entry, elements in STATE[config.optimizer.name].items()),
    ]
    sized = [(*part, part[2] * BYTES[part[1]]) for part in parts if part[2]]
    return [MemoryRow(*part, part[-1] / count) for part in sized]


def memory_text(config: RunConfig) -> str:
    """`memory_table` with its totals, aligned."""
    rows = memory_table(config)
    total = sum(row.bytes for row in rows)
    shown = [(r.component, r.dtype, f"{r.bytes_per_parameter:.2f}", f"{r.bytes / GIB:.4g}") for r in rows]
    shown.append(("total", "", f"{sum(r.bytes_per_parameter for r in rows):.2f}", f"{total / GIB:.4g}"))
    lines = table([("component", "dtype", "bytes per parameter", "GiB"), *shown])
    return f"{rows[0].elements:,} parameters; activations come on top\n\n{lines}"
