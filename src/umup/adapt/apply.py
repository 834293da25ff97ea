"""Put a plan's numbers into a model: rescale its fresh init, and install the two things that no init can carry.

A parameter is multiplied by (what the plan wants over the base's own std) / (its own law's std over the base's), so
that an init which already follows width as it should is left alone; a constant one only by a folded multiplier. A tied
head keeps its multiplier as a forward pre-hook that scales its input. Attention whose head size grew gets its softmax
scale, in order of preference, by a factor folded into a query projection of its own, by the module's own scale
attribute, or by a hook on the fused projection that scales its first third. Hooks are instances of the classes below:
deepcopy, pickle, torch.compile and FSDP2 keep them. A digest of the plan stays in the model as a persistent buffer.

Not covered: initial means other than the module's own (gains at 1, biases at 0, or as they were drawn); attention that
divides logits by the head size already; a tied head that no module of its own computes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from umup.adapt.inits import CONSTANT, ZERO, Init, identify, measure
from umup.errors import PlanError
from umup.rules.plan import USE_QUANTITIES, Plan
from umup.rules.precision import LAYER
from umup.rules.roles import ParamSpec

DIGEST = "umup_plan"
SOFTMAX = "2203.03466 def. 4.1"
# Submodules that hold a query projection of their own, and one that holds [query | key | value].
QUERIES = ("q_proj", "q", "query", "wq", "to_q", "q_lin", "linear_q")
THIRDS = ("c_attn", "qkv", "Wqkv", "qkv_proj", "in_proj")
QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "norm_q")
# Attributes that attention modules multiply logits by or, if they are above 1, divide by.
SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor")


@dataclass(frozen=True)
class Applied:
    """What `apply` did: factors on initial weights by name with the law found, and what could not be folded."""

    inits: Mapping[str, str]
    factors: Mapping[str, float]
    installed: tuple[str, ...]

    def __str__(self) -> str:
        moved = dict.fromkeys(
            f"{LAYER.sub('*', n)}: init ({self.inits[n]}) times {f:.4g}" for n, f in self.factors.items() if f != 1.0
        )
        return "\n".join([*moved, *self.installed] or ["nothing to do: the model is as the plan wants it"])


class ScaleInput:
    """A forward pre-hook that multiplies a module's first argument."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments, the first one scaled."""
        return (args[0] * self.factor, *args[1:])


class ScaleFirstThird:
    """A forward hook that multiplies the queries in [query | key | value]."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The output, its first third scaled."""
        third = out.shape[-1] // 3
        return torch.cat((out[..., :third] * self.factor, out[..., third:]), -1)


@dataclass(frozen=True)
class Wanted:
    """The std that a plan wants of a parameter: `amount` times what the module's own init gives at `base`, a shape and
    a number of layers; without a base, `amount` itself. Constant parameters are multiplied by `multiplier` alone."""

    amount: float
    base: tuple[ParamSpec, int] | None
    multiplier: float

    def factor(self, law: Init, spec: ParamSpec, num_layers: int) -> float:
        """What a draw by `law` is multiplied by; nothing makes zeros larger."""
        if law in (ZERO, CONSTANT):
            return 1.0 if law is ZERO else self.multiplier
        own = law.std(spec, num_layers)
        return self.amount / own if self.base is None else self.amount * law.std(*self.base) / own


def fold_softmax(plan: Plan, model: nn.Module, factors: Mapping[str, float]) -> tuple[Plan, dict[str, float]]:
    """Factors on the logits of attention modules, as multipliers of their query projections; and those left over.

    Raises PlanError where neither a projection nor an attribute nor a hook can carry the factor.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    params, left = dict(plan.params), {}
    for name, factor in factors.items():
        leaves = {leaf for leaf, _ in modules[name].named_children()}
        query = next((q for q in QUERIES if q in leaves), None)
        if query is None or leaves & set(QUERY_NORMS):
            _carrier(name, modules[name])
            left[name] = factor
            continue
        for parameter, p in plan.params.items():
            if parameter.startswith(f"{name}.{query}."):
                params[parameter] = p.scaled(dict.fromkeys(USE_QUANTITIES, factor), f"[softmax {factor:g}]", SOFTMAX)
    return replace(plan, params=params), left


def _carrier(name: str, module: nn.Module) -> str:
    """The child or the attribute of an attention module that can carry a softmax factor."""
    children = dict(module.named_children())
    found = [a for a in SCALES if isinstance(vars(module).get(a), float)]
    if not children.keys() & set(QUERY_NORMS):  # a norm would undo what a projection carries
        found += [c for c in THIRDS if c in children and _in_thirds(children[c])]
    if not found:
        raise PlanError(
            f"{name} ({type(module).__name__}): its head size grows, and neither a query projection of its own "
            f"({', '.join(QUERIES)}) nor a scale ({', '.join(SCALES)}) was found to carry sqrt(base head size/head "
            "size); keep the head size and add heads"
        )
    return found[0]


def _in_thirds(projection: nn.Module) -> bool:
    narrow, wide = sorted(projection.get_parameter("weight").shape)
    return bool(wide == 3 * narrow)


@torch.no_grad()
def apply_plan(
    model: nn.Module,
    folded: Plan,
    wanted: Mapping[str, Wanted],
    softmax: Mapping[str, float],
    inits: Mapping[str, str | float],
) -> Applied:
    """Rescale initial weights to what is wanted, install hooks, leave the digest; ModelPlan.apply says more."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check(model, folded, parameters)
    specs = [p.spec for p in folded.stored.values()]
    laws = identify(measure(specs, parameters), folded.sizes.num_layers, inits)
    factors = {}
    for spec in specs:
        factors[spec.name] = factor = wanted[spec.name].factor(laws[spec.name], spec, folded.sizes.num_layers)
        if factor != 1.0:
            parameters[spec.name].mul_(factor)
    installed = [*_hook_heads(model, folded), *_scale_softmax(model, softmax)]
    digest = hashlib.sha256(folded.to_json().encode()).digest()
    device = next(iter(parameters.values())).device
    model.register_buffer(DIGEST, torch.tensor(list(digest), dtype=torch.uint8, device=device))
    return Applied({name: law.name for name, law in laws.items()}, factors, tuple(installed))


def _check(model: nn.Module, folded: Plan, parameters: Mapping[str, Tensor]) -> None:
    if DIGEST in dict(model.named_buffers()):
        raise PlanError("apply: a plan was applied to this model before; build it anew (its init carries the plan)")
    odd = sorted(parameters.keys() ^ folded.params.keys())
    if odd:
        side = "the model" if odd[0] in parameters else "the plan"
        raise PlanError(f"apply: only {side} has the parameter {odd[0]!r}; the plan must be made for this model")
    for name, p in folded.params.items():
        if parameters[name].is_meta:
            raise PlanError(f"apply: {name} is on the meta device; first model.to_empty(device=...), then its own init")
        if tuple(parameters[name].shape) != p.spec.shape:
            raise PlanError(f"apply: {name} is {tuple(parameters[name].shape)} here and {p.spec.shape} in the plan")
    check_ties(folded, parameters)


def check_ties(folded: Plan, parameters: Mapping[str, Tensor]) -> None:
    """Raises PlanError where a parameter that was tied is one of its own now."""
    for name, p in folded.params.items():
        if p.spec.tied_to is not None and parameters[name] is not parameters[p.spec.tied_to]:
            raise PlanError(
                f"{name} was tied to {p.spec.tied_to} and is not any more (to_empty and load_state_dict(assign=True) "
                "untie); assign the one parameter to both modules again"
            )


def _hook_heads(model: nn.Module, folded: Plan) -> Iterator[str]:
    hooked = set()
    for name, p in folded.params.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if p.spec.tied_to is not None and p["multiplier"] != 1.0 and module not in hooked:
            hooked.add(module)
            module.register_forward_pre_hook(ScaleInput(p["multiplier"]))
            yield f"{name} is tied to {p.spec.tied_to}: a forward pre-hook scales its input by {p['multiplier']:.4g}"


def _scale_softmax(model: nn.Module, softmax: Mapping[str, float]) -> Iterator[str]:
    scaled = set()
    for name, factor in softmax.items():
        module = model.get_submodule(name)
        if module in scaled:
            continue
        scaled.add(module)
        carrier = _carrier(name, module)
        if carrier in vars(module):
            scale = vars(module)[carrier]
            setattr(module, carrier, scale * factor if scale <= 1 else scale / factor)
            yield f"{name}.{carrier}, which scales its logits: they are multiplied by {factor:.4g}"
        else:
            module.get_submodule(carrier).register_forward_hook(ScaleFirstThird(factor))
            yield f"{name}.{carrier}: a forward hook scales its queries by {factor:.4g}"
