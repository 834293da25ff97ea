"""What a run will cost: FLOPs from its products and attention, bytes from memory.py, hours from a measured speed.

    FLOPs per token = 6 * (weights of all products) + 6 * layers * sequence length * hidden_size

Every weight multiplies and adds once forward and twice backward; causal attention reads half of the sequence.

Not covered: activations (memory.py says why); recomputation; evaluation and checkpoints; several GPUs, over which hours
divide at best.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.models.memory import MemoryRow, memory_table
from umup.models.specs import plan_for, products_for
from umup.rules.schemes import scheme as find_scheme
from umup.study.bench_variants import VARIANTS
from umup.study.evidence import tokens


@dataclass(frozen=True)
class Cost:
    """Of one run. `memory` is per GPU, unsharded; `tokens_per_second` and `gpu_hours` are None without a bench."""

    parameters: int
    tokens: int
    flops: float
    memory: tuple[MemoryRow, ...]
    tokens_per_second: float | None
    gpu_hours: float | None

    @property
    def memory_bytes(self) -> int:
        """Of all components."""
        return sum(row.bytes for row in self.memory)


def flops_per_token(config: RunConfig) -> float:
    """Forward and backward: the formula above."""
    weights = sum(p.fan_in * p.fan_out for p in products_for(config, plan_for(config)).values())
    return 6.0 * (weights + config.model.num_layers * config.model.max_seq_len * config.model.hidden_size)


def cost_of(config: RunConfig, speed: float | None = None) -> Cost:
    """Predict; `speed` in tokens per second. Raises ConfigError as `memory_table` does."""
    count, total = sum(prod(p.spec.shape) for p in plan_for(config).stored.values()), tokens(config)
    hours = None if speed is None else total / speed / 3600
    return Cost(count, total, flops_per_token(config) * total, tuple(memory_table(config)), speed, hours)


def bench_speed(path: Path, config: RunConfig) -> float:
    """Tokens per second of the config's recipe in the output of `umup bench --json`.

    Raises ConfigError for a file that is no such output, was measured at another size, or lacks the recipe.
    """
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        layers, per_pass = body["layers"], body["tokens"]
        speeds = {row["variant"]: row["tokens_per_second"] for row in body["rows"] if row["tokens_per_second"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--bench {path}: not the output of umup bench --json; write that file") from None
    wanted = (config.model.num_layers, config.train.batch_size * config.model.max_seq_len)
    if (layers, per_pass) != wanted:
        raise ConfigError(
            f"--bench {path}: measured {layers} layers and {per_pass} tokens a pass, the target has {wanted[0]} and "
            f"{wanted[1]}; write umup bench --shape TARGET --json"
        )
    rows = [name for name in _variants(config) if name in speeds]
    if not rows:
        known = ", ".join(speeds) or "none"
        raise ConfigError(
            f"--bench {path}: no row runs precision.recipe {config.precision.recipe!r}; measured: {known}; write "
            "umup bench --variants all"
        )
    return float(speeds[rows[0]])


def _variants(config: RunConfig) -> list[str]:
    """Rows of the bench in the config's formats, those of a scheme of its kind first."""
    p, unit = config.precision, find_scheme(config.parametrization.scheme).unit_scaled
    alike: Mapping[str, bool] = {
        v.name: find_scheme(v.scheme).unit_scaled == unit
        for v in VARIANTS.values()
        if v.recipe == p.recipe
        and v.compact == p.compact
        and not v.stock
        and (v.recipe == "bf16" or _same_scales(v.scales, p.scales))
    }
    return sorted(alike, key=lambda name: not alike[name])


def _same_scales(measured: str, wanted: str) -> bool:
    """Constants, watched or not, cost the same; scales from every tensor's maximum do not."""
    return (measured == "dynamic") == (wanted == "dynamic")
