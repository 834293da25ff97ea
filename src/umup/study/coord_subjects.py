"""What a coordinate check trains: umup's decoders by config, any module by `umup.plan`.

A plan is both what the network is built with and what it is held against. The two can be told apart: the power
benchmark builds with a plan that it spoiled. What a plan expects of each number goes into the rows (coordinates.py):

    weight                   the initial std, where it is random
    update                   the rate (Adam and its kin: the update's entries are as large as the rate)
    decay                    rate times decay, as the optimizer applies it
    effective, of a lookup   rate times multiplier: u-muP's embedding rate falls as 1/sqrt(width), and its effect too
    effective, of a tied head   the same times fan_in: its storage moves at the embedding's rate
    scale                    the softmax scale

and of a residual branch of weight c in a network of L layers, what theory lets an entry of it be, which is a constant
at one depth (coord_verdict.py):

    output, of what writes to the stream   1/(c sqrt(L))
    effective, of all in the branch        1/(c L)

Numbers that no short run shows are read off: factors in umup's own modules, and rate, epsilon and decay in the
optimizer's groups. Not covered: factors inside foreign modules, which only their outputs show.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from umup.adapt.model_plan import plan as plan_of
from umup.config.load import parse_config
from umup.config.sections import BaseShape, OptimizerConfig, RunConfig
from umup.errors import ConfigError, PlanError
from umup.models.build import build
from umup.models.decoder import Branch
from umup.models.specs import Shape, plan_for, shape_of
from umup.nn.modules import Attention, Embedding, LayerNorm, Linear, Residual, RMSNorm, UseScales
from umup.optim.adamw import make_optimizer
from umup.optim.groups import param_groups
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import Plan
from umup.rules.roles import OpKind, Role
from umup.rules.schemes import scheme as find_scheme
from umup.study.coord_verdict import SIZES
from umup.study.coordinates import Make, Point, Subject

Constant = tuple[str, str, float, float]
LOOKUPS = (Role.EMBEDDING, Role.POSITION)
# Few tokens: what updates do by chance and not by alignment falls as sqrt(tokens/width), and would hide the limit.
BATCH, LENGTH = 2, 16
# Optimizers whose update's entries are as large as the rate.
SIGN_LIKE = ("adamw", "adam", "nadam", "radam", "lion", "signsgd")


def sized(config: RunConfig, point: Point) -> RunConfig:
    """The config at another width, depth or head size; a config that needs a base and has none becomes the base.

    At the config's own head size heads are added, else their number stays. Key heads keep their share, in multi-query
    attention too: one head for a growing number of queries is not flat (docs/models.md). ConfigError where sizes do not
    divide.
    """
    m, shape = config.model, shape_of(config.model)
    body = config.model_dump()
    if find_scheme(config.parametrization.scheme).needs_base and config.parametrization.base is None:
        base = BaseShape(
            hidden_size=m.hidden_size,
            num_layers=m.num_layers,
            head_dim=m.head_dim,
            num_kv_heads=shape.num_kv_heads,
            intermediate_size=shape.intermediate_size,
        )
        body["parametrization"]["base"] = base.model_dump()
    model = body["model"]
    model |= {"hidden_size": point.width, "num_layers": point.depth, "head_dim": point.head_dim, "dropout": 0.0}
    if m.intermediate_size is not None:
        model["intermediate_size"] = _share("intermediate_size", m.intermediate_size * point.width, m.hidden_size)
    if shape.num_kv_heads < shape.num_heads:
        model["num_kv_heads"] = point.num_kv_heads or _kv_heads(shape, point.width // point.head_dim)
        if (given := config.parametrization.base) is not None and given.num_kv_heads is None:
            heads = given.hidden_size // (given.head_dim or m.head_dim)
            body["parametrization"]["base"]["num_kv_heads"] = _kv_heads(shape, heads)
    model["max_seq_len"] = min(m.max_seq_len, LENGTH)
    body["train"] |= {"seed": point.seed, "device": "cpu", "batch_size": BATCH, "grad_accum": 1}
    body["precision"] = {"recipe": "fp32"}
    body["optimizer"] |= {"state_dtype": "fp32", "master_dtype": "fp32"}
    if point.eps is not None:
        body["optimizer"]["eps"] = point.eps
    if point.weight_decay is not None:
        body["optimizer"]["weight_decay"] = point.weight_decay
    return parse_config(body)


def _kv_heads(shape: Shape, heads: int) -> int:
    return max(1, shape.num_kv_heads * heads // shape.num_heads)


def _share(field: str, numerator: int, denominator: int) -> int:
    if numerator % denominator:
        raise ConfigError(
            f"coord-check: model.{field} has no whole share at this width; write widths that are multiples"
        )
    return numerator // denominator


def config_subject(config: RunConfig, plan: Plan | None = None) -> Subject:
    """The config's decoder, built and trained by `plan` (its own if none is given), held against its own."""
    reference, used = plan_for(config), plan or plan_for(config)
    model, o = build(config, used), config.optimizer
    groups = _groups(used, model, o)
    optimizer = make_optimizer(o, groups)
    return audited(
        Subject(model, optimizer, lambda batch: model.loss(*batch), lambda batch: model(batch[0])), reference, config
    )


def audited(subject: Subject, reference: Plan, config: RunConfig) -> Subject:
    """The subject with what the reference expects and what its model and optimizer hold now."""
    groups = _groups(reference, subject.model, config.optimizer)
    constants = (*_factors(subject.model, reference), *_rates(subject, groups))
    expected = {**_branches(subject.model, reference), **_expected(reference, groups), **_scales(reference)}
    return replace(subject, roles=roles_of(reference), expected=expected, constants=constants)


def _groups(plan: Plan, model: nn.Module, o: OptimizerConfig) -> list[dict[str, Any]]:
    return param_groups(plan, model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, eps=o.eps)


def module_subject(
    make_model: Callable[[int], nn.Module],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: OptimizerConfig,
    make_optimizer_: Callable[[nn.Module], torch.optim.Optimizer] | None,
    axis: str,
    base: int,
    planned: Mapping[str, Any],
) -> Make:
    """Any module: planned by `umup.plan` with `planned`, or, with an optimizer of the user's, as it comes.

    `axis`: what make_model's argument is.
    """

    def make(point: Point) -> Subject:
        torch.manual_seed(point.seed)
        model = make_model(SIZES[axis](point))

        def loss(batch: Any) -> Tensor:
            return loss_fn(model, batch)

        if make_optimizer_ is not None:
            return Subject(model, make_optimizer_(model), loss, loss, _guessed_roles(model, make_model, base))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the base itself needs no plan
            plan = plan_of(model, base=lambda: make_model(base), **planned)
        plan.apply(model)
        eps = optimizer.eps if point.eps is None else point.eps
        decay = optimizer.weight_decay if point.weight_decay is None else point.weight_decay
        numbers: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": decay, "eps": eps}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a raised decay is meant to be large
            groups = plan.param_groups(model, **numbers)
        made = Subject(model, make_optimizer(optimizer, groups), loss, loss)
        constants = tuple(_rates(made, groups))
        expected = _expected(plan.folded, groups)
        if find_scheme(plan.plan.scheme).keeps_init:
            expected = {key: value for key, value in expected.items() if key[1] != "weight"}
        return replace(made, roles=roles_of(plan.folded), expected=expected, constants=constants)

    return make


def roles_of(plan: Plan) -> dict[str, str]:
    """Parameters and the modules that own them -> role; a matrix tells more of its module than its bias."""
    found: dict[str, str] = {}
    for name, p in plan.params.items():
        found[name] = p.spec.role
        found.setdefault(name.rpartition(".")[0], p.spec.role)
    return found


def _guessed_roles(model: nn.Module, make_model: Callable[[int], nn.Module], base: int) -> dict[str, str]:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return roles_of(plan_of(model, base=make_model(base), scheme="ntp").folded)
    except PlanError:  # roles only sharpen what is said of a module
        return {}


def _expected(plan: Plan, groups: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    found = {}
    rates = {name: (g["lr"], g["lr"] * g["weight_decay"]) for g in groups for name in g["names"]}
    for name, (rate, decay) in rates.items():
        p = plan.params[name]
        if p["init_std"]:
            found[name, "weight"] = p["init_std"]
        if OPTIMIZERS[plan.optimizer].trains(p.spec).name in SIGN_LIKE:
            found[name, "update"] = rate
        found[name, "decay"] = decay
        if p.spec.role in LOOKUPS:
            found[name.rpartition(".")[0], "effective"] = rate * p["multiplier"]
    for name, p in plan.params.items():
        if p.spec.tied_to in rates:
            found[name.rpartition(".")[0], "effective"] = rates[p.spec.tied_to][0] * p["multiplier"] * p.spec.fan_in
    return found


def _scales(plan: Plan) -> dict[tuple[str, str], float]:
    return {(name, "scale"): op["logits"] for name, op in plan.ops.items() if op.site.kind is OpKind.SDPA}


def _branches(model: nn.Module, plan: Plan) -> dict[tuple[str, str], float]:
    """By the weight that a branch has in the model, whatever the plan says of it."""
    depth = plan.sizes.num_layers
    found: dict[tuple[str, str], float] = {}
    writers = {name.rpartition(".")[0] for name, p in plan.params.items() if p.spec.role is Role.HIDDEN_OUT}
    for name, module in model.named_modules():
        if isinstance(module, Branch):
            inside = dict.fromkeys(n.rpartition(".")[0] for n, _ in module.named_parameters(prefix=name))
            writer = f"{name}.norm" if module.norm_last else next(n for n in inside if n in writers)
            found |= {(n, "effective"): 1 / (module.residual.branch * depth) for n in inside}
            found[writer, "output"] = 1 / (module.residual.branch * sqrt(depth))
    return found


def _rates(subject: Subject, groups: list[dict[str, Any]]) -> Iterator[Constant]:
    """Rate, epsilon and decay of every parameter: those in the optimizer, those of the plan."""
    names = {id(p): name for name, p in subject.model.named_parameters()}
    wanted = {name: g for g in groups for name in g["names"]}
    for group in subject.optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            yield name, "lr", group["lr"], wanted[name]["lr"]
            if isinstance(wanted[name].get("eps"), float):
                yield name, "eps", group["eps"], wanted[name]["eps"]
            decay = wanted[name]["lr"] * wanted[name]["weight_decay"]
            yield name, "weight_decay", group["lr"] * group["weight_decay"], decay


def _factors(model: nn.Module, plan: Plan) -> Iterator[Constant]:
    """Factors in umup's own modules, and those of the plan."""
    for name, module in model.named_modules():
        for parameter, scales in _uses(module):
            yield (
                f"{name}.{parameter}",
                "multiplier",
                scales.multiplier,
                plan.params[f"{name}.{parameter}"]["multiplier"],
            )
        if isinstance(module, Attention):
            yield name, "logit_factor", module.logits, plan.ops[name]["logits"]
            yield name, "output_factor", module.output, plan.ops[name]["output"]
        elif isinstance(module, Residual):
            yield name, "branch", module.branch, plan.ops[name]["branch"]
            yield name, "skip", module.skip, plan.ops[name]["skip"]


def _uses(module: nn.Module) -> Iterator[tuple[str, UseScales]]:
    if isinstance(module, Linear):
        yield "weight", module.scales
        if module.bias_scales is not None:
            yield "bias", module.bias_scales
    elif isinstance(module, Embedding):
        yield "weight", module.scales
    elif isinstance(module, RMSNorm | LayerNorm) and module.weight is not None:
        yield "weight", module.gain
        if isinstance(module, LayerNorm) and module.bias is not None:
            yield "bias", module.shift
