"""A proxy's tuned values and a target's sizes -> the target's complete config, with what moved by which rule.

    size       width and depth: the scheme's table scales rates, decay and epsilon per parameter, so the tuned
               numbers are copied. A scheme that is relative to a base keeps the proxy's, or has the proxy as its base.
    horizon    batch and length: rules/horizon.py moves the numbers themselves, rate, betas, epsilon, decay.
    schedule   its shape is copied, and warmup keeps its share of the run.

Everything else (data, precision, dtypes, evaluation) is the target's. The transfer check
sizes a proxy by axes.py and moves it as here, so that what it measures is what the planner does.

Not covered: what no rule moves, which evidence.py names; sequence length and vocabulary, which are only recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from umup.config.load import parse_config
from umup.config.sections import BaseShape, RunConfig, ScheduleConfig
from umup.errors import ConfigError
from umup.models.specs import base_shape_of, decoder_specs, shape_of
from umup.optim.groups import FAMILIES
from umup.rules.horizon import Horizon, Moved, Settings, move
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.schemes import hparams_of
from umup.rules.schemes import scheme as find_scheme
from umup.study.axes import value_at


@dataclass(frozen=True)
class HorizonRules:
    """Names of rows of rules/horizon.py, one per axis."""

    batch: str
    length: str
    decay: str


# Of each family the best evidence that keeps betas, which no ratio of batches can then push out of range.
DEFAULT_RULES: Mapping[str, HorizonRules] = {
    **dict.fromkeys(OPTIMIZERS, HorizonRules("sqrt", "power", "timescale")),
    **dict.fromkeys(("adamw", "adam", "nadam", "radam"), HorizonRules("sqrt", "power", "tpp")),
    "sgd": HorizonRules("linear", "none", "timescale"),
}
# How many of OptimizerConfig.betas a family reads.
BETAS = {"sgd": 1, "adafactor": 0}
SIZES = (
    *("model.hidden_size", "model.num_layers", "model.head_dim", "model.num_kv_heads", "model.intermediate_size"),
    *("model.vocab_size", "model.max_seq_len", "train.steps", "train.batch_size", "train.grad_accum"),
)
REPLACED = ("parametrization", "optimizer", "schedule")
OWN_DTYPES = ("state_dtype", "master_dtype")


@dataclass(frozen=True)
class Move:
    """One field on the way from proxy to target, moved or copied, and why; `evidence` is a horizon rule's."""

    field: str
    before: object
    after: object
    rule: str
    evidence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Transfer:
    """The target's config, what became of every number, and numbers of the target's own that were replaced."""

    config: RunConfig
    moved: tuple[Move, ...]
    replaced: Mapping[str, object]


def transfer(proxy: RunConfig, target: RunConfig, rules: HorizonRules | None = None) -> Transfer:
    """The target's sizes with the proxy's numbers, moved; `rules` default to those of the optimizer's family.

    Raises ConfigError where the target names another scheme or optimizer than the proxy, ConfigError and PlanError
    for sizes, rules and numbers that make no run.
    """
    for section, field in (("parametrization", "scheme"), ("optimizer", "name")):
        ours, theirs = getattr(proxy, section), getattr(target, section)
        if field in theirs.model_fields_set and getattr(theirs, field) != getattr(ours, field):
            raise ConfigError(
                f"target {section}.{field}: {getattr(theirs, field)!r}, but {getattr(ours, field)!r} was tuned; "
                "remove it from the target, or tune another proxy"
            )
    base, base_moves = _base(proxy)
    optimizer, optimizer_moves = _optimizer(proxy, target, rules or DEFAULT_RULES[proxy.optimizer.name])
    schedule, schedule_moves = _schedule(proxy, target.train.steps)
    body = {
        **target.model_dump(),
        "parametrization": proxy.parametrization.model_copy(update={"base": base}).model_dump(),
        "optimizer": optimizer,
        "schedule": schedule.model_dump(),
    }
    body["train"]["grad_clip"] = proxy.train.grad_clip
    config = parse_config(body)
    moves = (*_sizes(proxy, config), *optimizer_moves, *schedule_moves, *base_moves, *_copied(proxy))
    return Transfer(config, moves, _replaced(target, config))


def _sizes(proxy: RunConfig, target: RunConfig) -> list[Move]:
    return [
        Move(field, value_at(proxy, field), value_at(target, field), "given")
        for field in SIZES
        if value_at(proxy, field) != value_at(target, field)
    ]


def _base(proxy: RunConfig) -> tuple[BaseShape | None, list[Move]]:
    """The proxy's base with every side written out, since what is absent would follow the target's ratios."""
    p, m = proxy.parametrization, proxy.model
    if not find_scheme(p.scheme).needs_base:
        return p.base, []
    shape = shape_of(m) if p.base is None else base_shape_of(shape_of(m), p.base)
    base = BaseShape(
        hidden_size=shape.hidden_size,
        num_layers=m.num_layers if p.base is None else p.base.num_layers or m.num_layers,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
    )
    before = None if p.base is None else p.base.hidden_size
    why = "the proxy is the base shape" if p.base is None else "the base at which the proxy was tuned is kept"
    return base, [Move("parametrization.base", before, shape.hidden_size, why)]


def horizon_of(config: RunConfig) -> Horizon:
    """The run's batch, tokens and number of parameters."""
    specs = decoder_specs(shape_of(config.model))
    count = sum(prod(spec.shape) for spec in specs if spec.tied_to is None)
    return Horizon(config.tokens_per_step, config.tokens_per_step * config.train.steps, count)


def _optimizer(proxy: RunConfig, target: RunConfig, rules: HorizonRules) -> tuple[dict[str, Any], list[Move]]:
    o, default_eps = proxy.optimizer, FAMILIES[proxy.optimizer.name].eps
    row = find_scheme(proxy.parametrization.scheme)
    settings = Settings(
        lr=o.lr,
        weight_decay=o.weight_decay,
        betas=o.betas[: BETAS.get(o.name, 2)],
        eps=default_eps if o.eps is None else o.eps,
        independent_weight_decay=o.independent_weight_decay,
        unit_scaled=row.unit_scaled,
    )
    moved, entries = move(
        settings, horizon_of(proxy), horizon_of(target), batch=rules.batch, length=rules.length, decay=rules.decay
    )
    found = {
        **o.model_dump(),
        **target.optimizer.model_dump(include=set(OWN_DTYPES)),
        "lr": moved.lr,
        "weight_decay": moved.weight_decay,
        "betas": moved.betas + o.betas[len(moved.betas) :],
        "eps": o.eps if moved.eps == settings.eps else moved.eps,
    }
    has_eps = OPTIMIZERS[o.name].eps is not None
    width = "has no width rule" if row.one_rate else "scales it per parameter"
    notes = {"lr": f"{row.title} {width}"}
    return found, [_horizon_move(e, notes.get(e.quantity)) for e in entries if e.quantity != "eps" or has_eps]


def _horizon_move(entry: Moved, note: str | None) -> Move:
    kept = "copied" if entry.formula == "1" else f"* {entry.formula}"
    names = ", ".join(rule.name for rule in entry.rules)
    rule = "; ".join([kept + (f" by rule {names}" if names else ""), *([note] if note else [])])
    evidence = "" if entry.evidence is None else str(entry.evidence)
    return Move(f"optimizer.{entry.quantity}", entry.old, entry.new, rule, evidence, entry.source)


def _schedule(proxy: RunConfig, steps: int) -> tuple[ScheduleConfig, list[Move]]:
    s = proxy.schedule
    warmup = min(steps - 1, max(round(s.warmup_steps * steps / proxy.train.steps), min(s.warmup_steps, 1)))
    rule = "share of the run kept; no published rule moves it"
    shape = Move("schedule.name", s.name, s.name, "copied with its final factor and decay fraction")
    return s.model_copy(update={"warmup_steps": warmup}), [
        shape,
        Move("schedule.warmup_steps", s.warmup_steps, warmup, rule),
    ]


def _copied(proxy: RunConfig) -> list[Move]:
    """The scheme's hyperparameters and options, and the clipping threshold."""
    p = proxy.parametrization
    moves = [
        Move(
            f"parametrization.hparams.{h.name}",
            p.hparams.get(h.name, h.default),
            p.hparams.get(h.name, h.default),
            f"copied; transfers: {h.transfers}",
            source=h.source,
        )
        for h in hparams_of(p.scheme, p.options)
    ]
    moves += [Move(f"parametrization.options.{name}", choice, choice, "copied") for name, choice in p.options.items()]
    clip = proxy.train.grad_clip
    return [*moves, *([Move("train.grad_clip", clip, clip, "copied: no rule moves it")] if clip else [])]


def _replaced(target: RunConfig, config: RunConfig) -> dict[str, object]:
    """What the target says itself, in fields that transfer writes, and says otherwise than the result."""
    before, after = target.model_dump(), config.model_dump()
    given = {section: set(getattr(target, section).model_fields_set) for section in REPLACED}
    given["train"] = {"grad_clip"} & target.train.model_fields_set
    return {
        f"{section}.{field}": before[section][field]
        for section, fields in given.items()
        for field in before[section]
        if field in fields and before[section][field] != after[section][field]
    }
