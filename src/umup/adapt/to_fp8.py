"""FP8 for any unit-scaled module: one made of umup.nn, or an ordinary one under `umup.unit_scale`.

    scaled = umup.unit_scale(model, tokens, targets)
    plan = umup.plan(scaled, scheme="umup")
    umup.to_fp8(scaled, plan)                             # hidden products in E4M3, their gradients in E5M2
    keeper = umup.ScaleKeeper(scaled, mode="adapt", every=100)
    keeper.follow(optimizer)                              # re-encodes the weights after every step

Which product runs in which format, and why one is spared, is rules/precision.py; how its operands follow their scales,
nn/fp8.py and train/precision.py. In an ordinary module the products are its `nn.Linear`s.

Not covered: products of other modules than `nn.Linear` (convolutions, transformers' Conv1D, nn.MultiheadAttention),
which stay in the stream's dtype and are named; linears fused into one product.
"""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from umup.adapt.model_plan import ModelPlan
from umup.adapt.unit_scale import UnitScaled
from umup.config.sections import PrecisionConfig
from umup.nn.fp8 import Encoded, convert, formats_of, install, start
from umup.nn.modules import UseScales
from umup.rules.plan import Plan
from umup.rules.precision import find_recipe, products


def to_fp8(
    model: nn.Module,
    plan: Plan | ModelPlan,
    recipe: str = "fp8",
    *,
    overrides: Mapping[str, str] | None = None,
    scales: Literal["static", "monitor", "adapt", "dynamic"] = "adapt",
    backend: Literal["auto", "scaled_mm", "emulate"] = "auto",
) -> list[Encoded]:
    """Put the model's products on a recipe's formats; returns the products that left the stream's dtype.

    model: on its device, its weights initialised. recipe, overrides, scales, backend: as in a config's `precision`.
    Raises ConfigError as that does: for a scheme that is not unit-scaled, a pattern that matches nothing, sides that
    are no multiple of 16, a device without FP8.
    """
    plan = plan.folded if isinstance(plan, ModelPlan) else plan
    precision = PrecisionConfig(recipe=recipe, overrides=dict(overrides or {}), scales=scales, backend=backend)
    found = products(plan, find_recipe(recipe), precision.overrides, precision.scales)
    if isinstance(model, UnitScaled):
        factors = model.linear_factors()
        found = {name: p for name, p in found.items() if name in factors}
    device = next(model.parameters()).device
    formats = formats_of(found.values(), device, precision)
    if not isinstance(model, UnitScaled):
        return convert(model, formats)
    modules = dict(model.named_modules())
    for name, chosen in formats.items():
        install([modules[name]], UseScales(*factors[name]), chosen)
    model.encode({name: modules[name].matmul for name in formats})
    return start(model)
