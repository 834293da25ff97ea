"""Step -> factor on every learning rate. Stateless: resuming needs the step and nothing else."""

from math import cos, pi

import torch

from umup.config.sections import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of optimizer step `step` in 0..steps-1: `final_factor` is reached at the last one."""
    warmup, final = schedule.warmup_steps, schedule.final_factor
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return 1.0 - (1.0 - final) * progress
    if schedule.name == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + cos(pi * progress))
    decaying = max(1.0, schedule.decay_fraction * steps)
    return 1.0 - (1.0 - final) * max(0.0, 1.0 - (steps - 1 - step) / decaying)


def apply_factor(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Multiply every group's peak rate by `value`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * value
