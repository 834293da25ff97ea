"""Next-token cross entropy: the value is always nats per token, the gradient is what the plan says."""

import torch.nn.functional as F
from torch import Tensor

from umup.ops.scaled import scale, scale_fwd


def cross_entropy(logits: Tensor, targets: Tensor, multiplier: float, grad: float, stacked: bool = False) -> Tensor:
    """Mean of `-log softmax(multiplier*logits)[target]`, whose gradient at the logits is `grad*(softmax - onehot)`.

    logits: (..., vocab); targets: (...) integers. `grad = multiplier/tokens` is the exact gradient of the mean over the
    optimizer step's tokens, however many microbatches share it. `stacked`: axis 0 is a model axis, the result (models).
    """
    scaled = scale_fwd(logits.float() if logits.element_size() < 4 else logits, multiplier)
    losses = F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    total = losses.flatten(1).sum(1) if stacked else losses.sum()
    return scale(total, total.numel() / targets.numel(), grad)
