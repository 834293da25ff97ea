"""One optimizer step, one evaluation, and what to say when the loss is no number."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn

from umup.errors import DivergedError
from umup.train.precision import first_nonfinite

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the step's tokens, and the global gradient norm before clipping, in the plan's units."""

    loss: float
    grad_norm: float


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """numpy (inputs, targets) -> tensors of int64."""
    inputs, targets = (torch.from_numpy(part).to(device, non_blocking=True) for part in batch)
    return inputs, targets


def train_step(
    loss_fn: Loss, optimizer: torch.optim.Optimizer, microbatches: list[tuple[Tensor, Tensor]], grad_clip: float
) -> StepResult:
    """Forward and backward over the microbatches, clip, step.

    The plan's loss gradient counts the step's global tokens, so microbatch gradients simply add. Clipping is by the
    global norm of the gradients as this plan scales them; under an abc-shift of the plan it would act differently.
    The weights are left as they were when the loss or the norm is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for inputs, targets in microbatches:
        loss = loss_fn(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if grad_clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    result = StepResult(float(torch.stack(losses).mean()), float(norm))
    if isfinite(result.loss) and isfinite(result.grad_norm):
        optimizer.step()
    return result


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: Loss, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over equally large batches, dropout off."""
    model.eval()
    losses = [loss_fn(inputs, targets) for inputs, targets in batches]
    model.train()
    return float(torch.stack(losses).mean())


def divergence(
    model: nn.Module, step: int, result: StepResult, last_good: str, batches: Iterable[tuple[Tensor, Tensor]]
) -> DivergedError:
    """The error for a loss or gradient that is not finite over `batches`: where, the largest tensors, what to do."""
    what = f"loss became {result.loss}" if not isfinite(result.loss) else f"gradient norm became {result.grad_norm}"
    weights = _largest((n, p.detach()) for n, p in model.named_parameters())
    gradients = _largest((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    # One sequence at a time: the logits of a whole batch may not fit.
    broken = first_nonfinite(model, lambda: [model(one[None]) for tokens, _ in batches for one in tokens])
    where = f"first in the input of {broken}; " if broken else ""
    return DivergedError(
        f"step {step}: {what}; {where}largest weights: {weights}; largest gradients: {gradients}; {last_good}; "
        "lower optimizer.lr or raise schedule.warmup_steps"
    )


def _largest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    sizes = [(float(t.abs().max()), name) for name, t in tensors]
    ranked = sorted(sizes, key=lambda s: (isfinite(s[0]), -s[0] if isfinite(s[0]) else 0.0))
    return ", ".join(f"{name} {size:.3g}" for size, name in ranked[:3])
