"""Which matmul runs in which number format, and why one is spared: a recipe is a table, role -> format or reason.

A *product* is the matmul of one linear, named like its module ("layers.0.attn.q", "head"): forward y = m x W^T reads
x and W in the recipe's `forward` format; backward dx = gi g W and dW = gw g^T x read the output gradient g in its
`gradient` format. A spared product runs in the dtype of the stream, as do all other activations.

Static scales are known without looking at the step's data, which only a unit-scaled scheme grants (2303.11257,
2407.17465); elsewhere the scales must be dynamic. `simulate:ExMy` rounds operands and gradients of a float32 run to a
format of x exponent and y mantissa bits, so that nothing else differs from `fp32`.

Not covered: the two matmuls within attention, embeddings, norms and the optimizer never leave the stream or float32.
Features are checked here; token counts, which FP8 kernels want in multiples of 16 too, are padded at run time.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from umup.errors import ConfigError, did_you_mean
from umup.rules.plan import Plan
from umup.rules.roles import Role
from umup.rules.schemes import scheme as find_scheme

Stream = Literal["fp32", "bf16", "fp16"]
Scales = Literal["static", "monitor", "adapt", "dynamic"]

# A copy's number in a name: layers.3.mlp.up, h.0.attn, model.layers.3
LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
SIMULATED = re.compile(r"simulate:(E[2-8]M(?:\d|10))")
PRODUCT_ROLES = (Role.HIDDEN, Role.HIDDEN_OUT, Role.READOUT, Role.TIED_READOUT)
# cuBLASLt's FP8 kernels want both inner and outer sides in multiples of 16.
SIDE = 16


@dataclass(frozen=True)
class Recipe:
    """Formats by role. Roles outside `roles` are `spared`, each for a reason; `why` is the reason of the others.

    `stream` is the dtype of activations and of spared products. `forward` and `gradient` are None where no product
    leaves it. `simulated` formats are rounded to, not computed in.
    """

    name: str
    stream: Stream
    why: str
    source: str
    forward: str | None = None
    gradient: str | None = None
    roles: frozenset[Role] = frozenset()
    spared: Mapping[Role, str] = field(default_factory=dict)
    simulated: bool = False

    def reason(self, role: Role) -> str:
        """Why products of this role run where they do."""
        return self.spared.get(role, f"{self.why} ({self.source})")


@dataclass(frozen=True)
class Product:
    """One linear's matmul; `forward` and `gradient` are None where it runs in the stream's dtype.

    `fan_in` and `fan_out` count features; `reason` says why this format, or why it is spared.
    """

    name: str
    role: Role
    fan_in: int
    fan_out: int
    stream: Stream
    forward: str | None
    gradient: str | None
    simulated: bool
    reason: str


# --- the table ---------------------------------------------------------------------------------------------------

HIDDEN = frozenset({Role.HIDDEN, Role.HIDDEN_OUT})
HEAD = "spared: its weights grow with the learning rate, far from unit scale (2407.17465 keeps it in BF16)"
HEADS = {Role.READOUT: HEAD, Role.TIED_READOUT: HEAD}
CRITICAL = "spared: its input's scale jumps within training (attention-out and FFN-down of 2407.17465)"
FP8 = "operands want precision, gradients range"

RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("fp32", "fp32", "the stream's dtype", "the recipe"),
        Recipe("bf16", "bf16", "the stream's dtype, with float32's range", "1905.12322"),
        Recipe("fp16", "fp16", "the stream's dtype, with unit scales in place of loss scaling", "2303.11257"),
        Recipe("fp8", "bf16", FP8, "2209.05433", "E4M3", "E5M2", HIDDEN, HEADS),
        Recipe(
            "fp8_partial",
            "bf16",
            FP8,
            "2209.05433; 2407.17465",
            "E4M3",
            "E5M2",
            frozenset({Role.HIDDEN}),
            {Role.HIDDEN_OUT: CRITICAL, **HEADS},
        ),
        Recipe(
            "fp8_e4m3",
            "bf16",
            "gradients want precision too, their range being narrow",
            "2412.19437",
            "E4M3",
            "E4M3",
            HIDDEN,
            HEADS,
        ),
        Recipe("fp8_head", "bf16", FP8, "2209.05433", "E4M3", "E5M2", frozenset(PRODUCT_ROLES)),
    )
}


def find_recipe(name: str, where: str = "precision.recipe") -> Recipe:
    """The named recipe, `simulate:ExMy` (2 to 8 exponent bits, 0 to 10 mantissa bits) included.

    Raises ConfigError, saying that the name stands at `where` and naming the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]
    if simulated := SIMULATED.fullmatch(name):
        number_format = simulated[1]
        why = f"rounded to {number_format} in float32"
        return Recipe(name, "fp32", why, "the recipe", number_format, number_format, HIDDEN, HEADS, simulated=True)
    if name.startswith("simulate"):
        raise ConfigError(
            f"{where}: {name!r} is no format; write simulate:ExMy, e.g. simulate:E4M3, with 2 to 8 exponent and 0 to "
            "10 mantissa bits"
        )
    raise ConfigError(f"{where}: unknown recipe {name!r}; {did_you_mean(name, [*RECIPES, 'simulate:ExMy'])}")


# --- the table applied to a plan ---------------------------------------------------------------------------------


def products(plan: Plan, recipe: Recipe, overrides: Mapping[str, str], scales: Scales) -> dict[str, Product]:
    """Every matmul of the plan by name, in the plan's order.

    `overrides` maps glob patterns on product names (`*` crosses dots; later patterns win) to the recipe whose formats
    the product takes whatever its role, or to the stream's name, which spares it.

    Raises ConfigError for an override that matches nothing or names neither; for static formats and FP16 under a
    scheme that is not unit-scaled; and for FP8 products with a side that is not a multiple of 16.
    """
    found = _by_role(plan, recipe)
    for pattern, name in overrides.items():
        found |= _overridden(found, pattern, name, recipe)
    low = [p for p in found.values() if p.forward is not None]
    if not find_scheme(plan.scheme).unit_scaled:
        _check_unscaled(plan.scheme, recipe, low, scales)
    for product in low:
        _check_sides(product)
    return found


def _by_role(plan: Plan, recipe: Recipe) -> dict[str, Product]:
    found = {}
    for param in plan.params.values():
        spec = param.spec
        if spec.role in PRODUCT_ROLES:
            low = spec.role in recipe.roles
            name = spec.name.removesuffix(".weight")
            found[name] = Product(
                name,
                spec.role,
                spec.fan_in,
                spec.fan_out,
                recipe.stream,
                recipe.forward if low else None,
                recipe.gradient if low else None,
                recipe.simulated and low,
                recipe.reason(spec.role),
            )
    return found


def _overridden(found: Mapping[str, Product], pattern: str, name: str, recipe: Recipe) -> dict[str, Product]:
    """The products that match, in the named recipe's formats."""
    where = f"precision.overrides {pattern!r}"
    chosen = find_recipe(name, where)
    if chosen.forward is None and name != recipe.stream:
        low = ", ".join(r.name for r in RECIPES.values() if r.forward)
        raise ConfigError(
            f"{where}: {name} is not the stream of recipe {recipe.name}; write {recipe.stream} to spare the product, "
            f"or one of {low}, simulate:ExMy"
        )
    matching = [p for p in found.values() if fnmatchcase(p.name, pattern)]
    if not matching:
        known = dict.fromkeys(LAYER.sub("*", known) for known in found)
        raise ConfigError(f"{where}: no product has such a name; {did_you_mean(pattern, known)}")
    return {
        p.name: replace(
            p,
            forward=chosen.forward,
            gradient=chosen.gradient,
            simulated=chosen.simulated,
            reason=f"{where}: {name}",
        )
        for p in matching
    }


def _check_unscaled(scheme: str, recipe: Recipe, low: Sequence[Product], scales: Scales) -> None:
    """Raise ConfigError for formats that a scheme without unit scales would underflow or overflow."""
    if recipe.stream == "fp16":
        raise ConfigError(
            f"precision.recipe: fp16 under scheme {scheme!r}, which is not unit-scaled, needs loss scaling, and there "
            "is none; write precision.recipe: bf16 or parametrization.scheme: umup"
        )
    if low and scales != "dynamic":
        without = f"precision.recipe: {recipe.stream}" if recipe.forward else "no such override"
        raise ConfigError(
            f"precision.scales: {scales} scales serve unit-scaled schemes only, and {low[0].name} would run in "
            f"{low[0].forward} under {scheme!r}; write precision.scales: dynamic, parametrization.scheme: umup or "
            f"{without}"
        )


def _check_sides(product: Product) -> None:
    odd = [side for side in (product.fan_in, product.fan_out) if side % SIDE]
    if odd and not product.simulated:
        pattern = LAYER.sub("*", product.name)
        raise ConfigError(
            f"precision: {product.name} maps {product.fan_in} features to {product.fan_out}, and FP8 products take "
            f"multiples of {SIDE}; change {odd[0]} to {-(-odd[0] // SIDE) * SIDE} in the model section, or write "
            f"precision.overrides: {{{pattern!r}: {product.stream}}}"
        )
