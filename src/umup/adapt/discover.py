"""The role of every parameter of any `nn.Module`, found by comparing two widths of it.

A parametrization asks one thing of a weight: which of its sides grow with width. Build the model twice, at the size
it shall have and at the base's (on the meta device: only shapes are read), and a side grows if it differs:

    with torch.device("meta"):
        found = discover(GPT(width=4096), GPT(width=256))

What growth does not show comes from tables: which side is the input (readings.py), which matrices write to the
residual stream (blocks.py), which tables hold positions (below). Inside a residual block a matrix whose output stays
fixed (keys and values under grouped queries) is hidden all the same; outside it is a readout.

Without a base, or where nothing grew (`compared` is False), growth is guessed (pairing.py); such roles deserve a look.

Not covered, each a PlanError: mixture-of-experts and state-space layers; a raw `nn.Parameter` of two or more sides
with no telling name; one storage in two roles. Not seen: weights made in `forward`, norms that add 1 to a stored gain
(Gemma), how often a shared block runs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from umup.adapt.blocks import Blocks, find_blocks, parent, prefixes
from umup.adapt.pairing import Growth, Pair, growth, lone_sides, pair, survey, unsure_writers
from umup.adapt.readings import Kind
from umup.adapt.sharing import check_shared, shared_names
from umup.errors import PlanError, did_you_mean
from umup.rules.roles import ParamSpec, Role

# Matched against the telling part of a parameter's name: "wpe" in transformer.wpe.weight, "cls_token" in vit.cls_token.
POSITION_TABLE = re.compile(r"(^|_)(pos(?!t)|wpe|relative|token_type|type|segment|quer)")
RAW_TABLE = re.compile(rf"{POSITION_TABLE.pattern}|(^|_)(cls|token|latent|prompt|prefix|register|memory|embed)")
RAW_GAIN = re.compile(r"^(gain|gamma|scale|g|layer_scale\w*|lambda_?\d?)$")

# What a plan would get wrong, by class and by the last part of a module's name.
NO_RULE = "no published rule here yet; plan a dense model, or write the role of each of its parameters in overrides"
REFUSED = (
    (
        "mup's readout",
        "it divides by the width in its forward, and a plan would do so again; write nn.Linear in its place",
        re.compile(r"^Mu(Shared)?Readout$"),
        re.compile(r"(?!)"),
    ),
    (
        "a mixture-of-experts layer",
        NO_RULE,
        re.compile(r"Router|Experts?(?![a-z])|Mo[Ee](Block|Layer|MLP|FeedForward|FFN)?$"),
        re.compile(r"^(router|experts)$"),
    ),
    (
        "a parametrization (weight_norm and the like)",
        "no plan knows its parts; first torch.nn.utils.parametrize.remove_parametrizations(module, name)",
        re.compile(r"^ParametrizationList$"),
        re.compile(r"(?!)"),
    ),
    (
        "a state-space or linear-attention layer",
        NO_RULE,
        re.compile(r"Mamba|(?<![A-Z])(SSM|S4D?)(?![a-z])|R[Ww][Kk][Vv]|DeltaNet"),
        re.compile(r"^(mamba|ssm)$"),
    ),
)

# A tied head is found by its storage, never declared.
OVERRIDES = {role.value: role for role in Role if role is not Role.TIED_READOUT}


@dataclass(frozen=True)
class Discovery:
    """What `discover` found.

    `params` and `base` have the same names, roles and order. A parameter used under several names has one spec per
    name; `tied_to` names its owner, which for a tied head is the embedding even if the head is registered first.
    `head_dims` maps attention modules whose head size differs to (target, base). `own_factors` maps parameters to what
    the forward around them multiplies by, (target, base), for a plan to divide out. `fused` maps weights and biases
    that stack equal matrices along fan_out to their number; their fan_out is that of one part. `unwritten` names blocks
    in which no HIDDEN_OUT was found, and `unsure` hidden matrices that may write to the stream beside one that does:
    depth rules would miss them. `lone` maps matrices to a side, (target, base), that grows as no other layer's does;
    `unknown_heads` names attention modules whose head size was not found. `compared` is False if growth was guessed.
    """

    params: tuple[ParamSpec, ...]
    base: tuple[ParamSpec, ...]
    num_layers: int
    base_num_layers: int
    head_dims: Mapping[str, tuple[int, int]]
    own_factors: Mapping[str, tuple[float, float]]
    fused: Mapping[str, int]
    unwritten: tuple[str, ...]
    unsure: tuple[str, ...]
    lone: Mapping[str, tuple[int, int]]
    unknown_heads: tuple[str, ...]
    compared: bool


def discover(
    model: nn.Module, base: nn.Module | None = None, *, overrides: Mapping[str, str] | None = None
) -> Discovery:
    """Roles and fans of every parameter of `model`, and of the same parameters at the base's widths.

    The base may be narrower or wider, shallower or deeper. `overrides` maps patterns (fnmatch, on full parameter
    names) to role names; the last match wins. A raw parameter overridden to hidden is read as (out, in), to input,
    readout or a table by which of its sides grow.
    Raises PlanError for different module trees, for layers without a published rule, for what cannot be decided, for
    shared storage that a plan cannot express, and for overrides that match nothing or name no role.
    """
    target = survey(model)
    chosen = _overrides(overrides or {}, target.readings)
    _refuse_unruled(target.modules, (name for name in target.readings if name not in chosen))
    writers = {name for name, role in chosen.items() if role is Role.HIDDEN_OUT}
    blocks = find_blocks(target.modules, target.readings, writers, chosen.keys() - writers)
    pairing = pair(target, target if base is None else survey(base), blocks)
    shared = shared_names(target.parameters)
    pairs = _informed(pairing.pairs(), shared)
    grows = growth(pairs)
    owners = _owners(pairs, shared)
    roles = {}
    for name, sides in pairs.items():
        tied = sides[0].kind is Kind.MATRIX and name in owners and pairs[owners[name]][0].kind is Kind.TABLE
        found = Role.TIED_READOUT if tied else None
        roles[name] = chosen.get(name) or found or _role(name, sides, grows, blocks)

    def specs(which: int) -> tuple[ParamSpec, ...]:
        return tuple(_spec(n, roles[n], pairs[n], which, grows, blocks, owners.get(n)) for n in pairs)

    params = specs(0)
    check_shared(params)
    return Discovery(
        params=params,
        base=specs(1),
        num_layers=len(blocks.containers),
        base_num_layers=pairing.base_num_layers,
        head_dims=pairing.head_dims(),
        own_factors=pairing.own_factors(),
        fused={name: r.parts for name, (r, _) in pairs.items() if r.parts > 1},
        unwritten=blocks.unwritten,
        unsure=tuple(name for name in unsure_writers(pairs, grows, blocks) if name not in chosen),
        lone={name: side for name, side in lone_sides(pairs, grows, blocks).items() if name not in chosen},
        unknown_heads=pairing.unknown_heads(grows),
        compared=grows.compared,
    )


def _overrides(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, Role]:
    chosen: dict[str, Role] = {}
    for pattern, role in patterns.items():
        if role not in OVERRIDES:
            raise PlanError(f"overrides[{pattern!r}]: unknown role {role!r}; {did_you_mean(role, OVERRIDES)}")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            example = next(iter(names), "none")
            raise PlanError(f"overrides[{pattern!r}] matches no parameter; names look like {example!r}")
        chosen.update(dict.fromkeys(matches, OVERRIDES[role]))
    return chosen


def _refuse_unruled(modules: Mapping[str, nn.Module], undecided: Iterable[str]) -> None:
    owners = dict.fromkeys(parent(name) for name in undecided)
    for name in dict.fromkeys(outer for owner in owners for outer in ("", *reversed([*prefixes(owner)]))):
        class_name, label = type(modules[name]).__name__, name.rpartition(".")[2]
        routes = label == "gate" and "num_experts" in {**vars(modules[name]), **vars(modules[parent(name)])}
        for what, why, by_class, by_label in REFUSED:
            if by_class.search(class_name) or by_label.search(label) or (routes and why is NO_RULE):
                raise PlanError(f"{name or 'the model'} ({class_name}) is {what}: {why}")


def _informed(pairs: dict[str, Pair], shared: Iterable[list[str]]) -> dict[str, Pair]:
    """A raw use of a parameter that another module knows is read as that module reads it."""
    for names in shared:
        known = next((pairs[name] for name in names if pairs[name][0].kind is not Kind.RAW), None)
        if known is not None:
            pairs.update((name, known) for name in names if pairs[name][0].kind is Kind.RAW)
    return pairs


def _owners(pairs: Mapping[str, Pair], shared: Iterable[list[str]]) -> dict[str, str]:
    owners: dict[str, str] = {}
    for names in shared:
        owner = next((name for name in names if pairs[name][0].kind is Kind.TABLE), names[0])
        owners.update((name, owner) for name in names if name != owner)
    return owners


def _role(name: str, sides: Pair, grows: Growth, blocks: Blocks) -> Role:
    match sides[0].kind:
        case Kind.TABLE:
            return Role.POSITION if POSITION_TABLE.search(_label(name)) else Role.EMBEDDING
        case Kind.MATRIX:
            return _matrix_role(name, sides, grows, blocks)
        case Kind.BIAS:
            return Role.BIAS
        case Kind.GAIN:
            return Role.NORM_GAIN
        case Kind.SHIFT:
            return Role.NORM_BIAS
        case Kind.RAW:
            return _raw_role(name, sides, grows)


def _matrix_role(name: str, sides: Pair, grows: Growth, blocks: Blocks) -> Role:
    mine, base = sides
    if name in blocks.writers:
        return Role.HIDDEN_OUT
    wide_in, wide_out = grows(mine.features_in, base.features_in), grows(mine.fan_out, base.fan_out)
    if wide_out:
        return Role.HIDDEN if wide_in else Role.INPUT
    if not wide_in:
        return Role.SCALAR
    block = blocks.block_of(name)
    if block in blocks.unwritten:
        raise _undecided(name, sides, f"takes width to a fixed size in {block}, not known to be residual", "hidden")
    return Role.READOUT if block is None else Role.HIDDEN


def _raw_role(name: str, sides: Pair, grows: Growth) -> Role:
    label = _label(name)
    lengths = [both for both in zip(sides[0].shape, sides[1].shape, strict=True) if max(both) > 1]
    wide = [grows(*both) for both in lengths]
    if "bias" in label:
        return Role.BIAS
    if len(lengths) == 1 and RAW_GAIN.search(label):
        return Role.NORM_GAIN
    if len(lengths) < 2:
        return Role.BIAS if any(wide) else Role.SCALAR
    if any(wide) and RAW_TABLE.search(label):
        return Role.POSITION
    if not any(wide) and grows.compared:
        return Role.SCALAR
    if all(wide) and len(lengths) == 2 and lengths[0] == lengths[1]:
        return Role.HIDDEN
    raise _undecided(name, sides, "is a raw parameter whose shape tells no role", "hidden" if all(wide) else "position")


def _spec(
    name: str, role: Role, sides: Pair, which: int, grows: Growth, blocks: Blocks, owner: str | None
) -> ParamSpec:
    reading = sides[which]
    fan_in, fan_out = reading.fan_in, reading.fan_out
    if reading.kind is Kind.RAW:
        fan_in, fan_out = _raw_fans(name, role, sides, which, grows)
    inside = blocks.block_of(name) is not None
    return ParamSpec(name, role, reading.shape, fan_in, fan_out, on_residual=inside, tied_to=owner)


def _raw_fans(name: str, role: Role, sides: Pair, which: int, grows: Growth) -> tuple[int, int]:
    """Fans of a parameter whose module the tables do not know, by its role and by which of its sides grow."""
    shape = sides[which].shape
    wide = [both[which] for both in zip(sides[0].shape, sides[1].shape, strict=True) if grows(*both)]
    size, width = prod(shape), prod(wide)
    match role:
        case Role.NORM_GAIN | Role.NORM_BIAS | Role.SCALAR:
            return size, size
        case Role.BIAS:
            return 1, width if wide else size
        case Role.EMBEDDING | Role.POSITION:
            last = wide[-1] if wide else shape[-1]
            return size // last, last
        case Role.INPUT if wide:
            return size // width, width
        case Role.READOUT if wide:
            return width, size // width
    lengths = [length for length in shape if length > 1]
    if len(lengths) != 2:
        raise PlanError(f"{name}: {role} cannot be read off the shape {shape}; store one matrix per parameter")
    return lengths[1], lengths[0]


def _label(name: str) -> str:
    """The telling part of a parameter's name: `wpe` of `h.wpe.weight`, `cls_token` of `vit.cls_token`."""
    leaf = name.rpartition(".")[2]
    return parent(name).rpartition(".")[2] or leaf if leaf == "weight" else leaf


def _undecided(name: str, sides: Pair, what: str, guess: str) -> PlanError:
    return PlanError(
        f"{name}, {sides[0].shape} here and {sides[1].shape} in the base, {what}; "
        f"write overrides={{{name!r}: {guess!r}}}, or what is true of: {', '.join(OVERRIDES)}"
    )
