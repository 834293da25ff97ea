"""Activations with a temperature `mult` inside and one factor `output` outside; their gradients are exact."""

import torch
import torch.nn.functional as F
from torch import Tensor

from umup.ops.scaled import scale


def gated_silu(gate: Tensor, up: Tensor, mult: float, output: float) -> Tensor:
    """`output * up * gate * sigmoid(mult*gate)` (SwiGLU, 2002.05202)."""
    activated = F.silu(gate) if mult == 1.0 else gate * torch.sigmoid(gate * mult)
    return scale(activated * up, output, output)


def gated_gelu(gate: Tensor, up: Tensor, mult: float, output: float, approximate: str = "none") -> Tensor:
    """`output * up * gelu(mult*gate) / mult` (GEGLU, 2002.05202)."""
    activated = F.gelu(gate if mult == 1.0 else gate * mult, approximate=approximate)
    return scale(activated * up, output / mult, output / mult)


def relu(x: Tensor, output: float) -> Tensor:
    """`output * relu(x)`, for which a temperature would be another output."""
    return scale(F.relu(x), output, output)


def silu(x: Tensor, mult: float, output: float) -> Tensor:
    """`output * x * sigmoid(mult*x)`."""
    activated = F.silu(x) if mult == 1.0 else x * torch.sigmoid(x * mult)
    return scale(activated, output, output)


def gelu(x: Tensor, mult: float, output: float, approximate: str = "none") -> Tensor:
    """`output * gelu(mult*x) / mult` (1606.08415); approximate: "none" (erf) or "tanh" (GPT-2's)."""
    if mult == 1.0:
        return scale(F.gelu(x, approximate=approximate), output, output)
    return F.gelu(x * mult, approximate=approximate) * (output / mult)


def dropout(x: Tensor, probability: float, output: float, training: bool) -> Tensor:
    """torch's dropout (which divides by 1 - p while training), times `output` always.

    `output` stays at inference, as in the unit-scaling library: the network was trained around it.
    """
    return scale(F.dropout(x, probability, training), output, output)
