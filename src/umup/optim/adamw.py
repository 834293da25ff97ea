"""AdamW whose memory and parameters may be bfloat16, and how far one of its steps can move a weight.

Bytes per parameter (parameter + gradient + two moments), which is what decides whether a model fits:

    float32 everywhere                 4 + 4 + 4 + 4 = 16
    bfloat16 moments                   4 + 4 + 2 + 2 = 12
    bfloat16 moments and parameters    2 + 2 + 2 + 2 =  8

A step computes in float32 whatever is stored, and rounds what is bfloat16 stochastically: to nearest, small updates
would vanish (numerics/rounding.py). The noise is a function of the step and the parameter's place among all groups, so
that resuming is exact and replicas agree. On CUDA a step is one Triton kernel per parameter.

Not covered: amsgrad, maximize, sparse and complex gradients, learning rates that are tensors, DTensors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from umup.config.sections import OptimizerConfig
from umup.errors import ConfigError
from umup.numerics.rounding import Key, noise, stochastic_bfloat16
from umup.rules.optimizers import optimizer as find_optimizer

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")
# Stochastic rounding moves a bfloat16 by less than one unit in the last place.
BFLOAT16_STEP = 2.0**-7


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The config's optimizer over `param_groups`: torch's own where all is float32.

    Parameters must already be of `master_dtype`. Raises ConfigError for families that torch has no single class for,
    and for bfloat16 moments or parameters of another optimizer than AdamW.
    """
    check_name(config)
    if config.state_dtype == config.master_dtype == "fp32":
        return TORCH[config.name](config, groups)
    if config.name != "adamw":
        raise ConfigError(
            f"optimizer: state_dtype and master_dtype bf16 are AdamW's; write fp32 for both, or not {config.name!r}"
        )
    return AdamW(groups, betas=config.betas, state_dtype=STATE_DTYPES[config.state_dtype])


def check_name(config: OptimizerConfig) -> None:
    """Raises PlanError for an unknown name, and ConfigError for families that torch has no single class for."""
    if find_optimizer(config.name).name not in TORCH:
        raise ConfigError(
            f"optimizer.name: a run trains with {', '.join(TORCH)}; {config.name!r} has rules (`umup explain`) for a "
            "loop of your own (umup.plan)"
        )


TORCH: Mapping[str, Callable[[OptimizerConfig, list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda config, groups: torch.optim.AdamW(groups, betas=config.betas),
    "adam": lambda config, groups: torch.optim.Adam(groups, betas=config.betas),
    "nadam": lambda config, groups: torch.optim.NAdam(groups, betas=config.betas),
    "radam": lambda config, groups: torch.optim.RAdam(groups, betas=config.betas),
    "sgd": lambda config, groups: torch.optim.SGD(groups, momentum=config.betas[0]),
    "adafactor": lambda config, groups: torch.optim.Adafactor(groups),
}


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's numbers, groups and state entries, with moments stored in `state_dtype`.

    Parameters may be float32 or bfloat16, gradients of either dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, index)
                index += 1
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for entry in MOMENTS:
                state[entry] = torch.zeros_like(p, dtype=group["state_dtype"])
        state["step"] += 1
        kernel = _fused() if p.is_cuda and p.is_contiguous() else step_eager
        kernel(
            p,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            Key(index, int(state["step"].item())),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, whose cast of every state tensor to the parameter's dtype is undone from the source."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        owned = [(p, group["state_dtype"]) for group in self.param_groups for p in group["params"]]
        for i, (p, dtype) in zip(saved, owned, strict=True):
            for entry in MOMENTS if i in state_dict["state"] else ():
                value = state_dict["state"][i][entry]
                self.state[p][entry] = value.to(p.device, dtype, copy=True)


def step_eager(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    key: Key,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step number `key.step` of AdamW, in place on `p`, `m` and `v`; each is float32 or bfloat16.

    In the order of torch's single-tensor path, whose bits it reproduces in float32.
    """
    beta1, beta2 = betas
    p32, g32, m32, v32 = p.float(), grad.float(), m.float(), v.float()
    p32.mul_(1.0 - lr * weight_decay)
    m32.lerp_(g32, 1.0 - beta1)
    v32.mul_(beta2).addcmul_(g32, g32, value=1.0 - beta2)
    denominator = (v32.sqrt() / sqrt(1.0 - beta2**key.step)).add_(eps)
    p32.addcdiv_(m32, denominator, value=-lr / (1.0 - beta1**key.step))
    if m.dtype == torch.bfloat16:
        bits = noise(p.shape, key, 0, p.device)
        m.copy_(stochastic_bfloat16(m32, bits & 0xFFFF))
        v.copy_(stochastic_bfloat16(v32, bits >> 16))
    if p.dtype == torch.bfloat16:
        p.copy_(stochastic_bfloat16(p32, noise(p.shape, key, 1, p.device) & 0xFFFF))


@cache
def _fused() -> Callable[..., None]:
    """The Triton kernel; the eager step where torch came without triton."""
    if find_spec("triton") is None:
        return step_eager
    from umup.numerics.kernels.adamw import adamw_

    return adamw_


@dataclass(frozen=True)
class StepBound:
    """|change of an element w in one step| <= absolute + relative * |w|."""

    absolute: float
    relative: float


def step_bound(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> StepBound | None:
    """What one AdamW step can do to any element of the group at its present rate; None for other optimizers.

    With r = beta1^2/beta2, Cauchy-Schwarz over the sums that make up m and v gives, after bias correction at step t,

        (m/sqrt(v))^2 <= (1-beta1)^2/(1-beta2) (1-r^t)/(1-r) (1-beta2^t)/(1-beta1^t)^2,

    with equality for gradients g_i ~ (beta2/beta1)^i. As (1-r^t)(1-beta2^t) <= (1-beta1^t)^2 by the inequality of the
    means, no step exceeds lr (1-beta1)/sqrt((1-beta2)(1-r)): 1.17 lr at (0.9, 0.95), 7.3 lr at (0.9, 0.999). Kingma and
    Ba (1412.6980, section 2.1) bound one case, a gradient after zeros, by (1-beta1)/sqrt(1-beta2). For
    beta1^2 >= beta2 there is no bound. Rounding of bfloat16 moments (m up, v down, each time) is in r, that of bfloat16
    parameters in both numbers; rounding of float32 is left out.
    """
    if not isinstance(optimizer, torch.optim.AdamW | AdamW):
        return None
    lr, (beta1, beta2) = group["lr"], group["betas"]
    half = group.get("state_dtype") == torch.bfloat16
    ratio = beta1**2 / beta2 if beta1 else 0.0
    ratio *= (1.0 + BFLOAT16_STEP) ** 2 / (1.0 - BFLOAT16_STEP) if half else 1.0
    growth = (1.0 - beta1) / sqrt((1.0 - beta2) * (1.0 - ratio)) if ratio < 1.0 else inf
    rounding = BFLOAT16_STEP if any(p.dtype == torch.bfloat16 for p in group["params"]) else 0.0
    return StepBound(lr * growth * (1.0 + rounding), lr * group["weight_decay"] + rounding)
