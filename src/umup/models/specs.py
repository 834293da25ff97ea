"""Config -> shape -> what the rules need to know: parameters, sites, sizes. No torch.

`decoder_specs` and `build.py` describe the same network; a test holds them equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from umup.config.sections import BaseShape, ModelConfig, ParametrizationConfig, RunConfig
from umup.errors import ConfigError
from umup.models.families import Family, Traits, family
from umup.rules.plan import Plan, make_plan
from umup.rules.precision import Product, find_recipe, products
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import scheme as find_scheme

ACTIVATION_KINDS = {
    "gated_silu": OpKind.GATED_SILU,
    "gated_gelu": OpKind.GATED_GELU,
    "gated_gelu_tanh": OpKind.GATED_GELU,
    "silu": OpKind.SILU,
    "gelu": OpKind.GELU,
    "gelu_tanh": OpKind.GELU,
    "relu": OpKind.RELU,
}
TRAITS = tuple(field.name for field in fields(Traits))


@dataclass(frozen=True)
class Shape:
    """A decoder with every default filled in."""

    family: Family
    traits: Traits
    hidden_size: int
    num_layers: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    rotary_dim: int
    rope_theta: float
    norm_eps: float
    dropout: float

    @property
    def kv_size(self) -> int:
        """Features of all keys, or of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.traits.activation.startswith("gated")

    @property
    def shared_norm(self) -> bool:
        """Whether one norm feeds both branches of a block. Norms of outputs (res_post) are each branch's own."""
        return self.traits.parallel == "shared_norm" and self.traits.norm_placement == "pre"

    @property
    def post_norm(self) -> bool:
        """Whether blocks normalise the stream; no further norm then precedes the head."""
        return self.traits.norm_placement == "post"

    @property
    def branch_norms(self) -> bool:
        """Whether each branch has a norm of its own."""
        return not (self.shared_norm or self.post_norm)


def shape_of(model: ModelConfig) -> Shape:
    """Fill in the family's defaults. Raises ConfigError for unknown families and traits that exclude each other."""
    row = family(model.family)
    given = {name: value for name in TRAITS if (value := getattr(model, name)) is not None}
    traits = replace(row.traits, **given)
    if traits.parallel != "none" and traits.norm_placement == "post":
        raise ConfigError("model.norm_placement: post normalises one branch's sum; write pre, or model.parallel: none")
    heads = model.hidden_size // model.head_dim
    # Multiples of 16 suit every GEMM, FP8 ones included.
    inner = model.intermediate_size or 16 * round(row.mlp_ratio * model.hidden_size / 16)
    return Shape(
        family=row,
        traits=traits,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        head_dim=model.head_dim,
        num_heads=heads,
        num_kv_heads=model.num_kv_heads or (1 if row.multi_query else heads),
        intermediate_size=inner,
        vocab_size=model.vocab_size,
        max_seq_len=model.max_seq_len,
        rotary_dim=_rotary_dim(model, row, traits),
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        dropout=model.dropout,
    )


def _rotary_dim(model: ModelConfig, row: Family, traits: Traits) -> int:
    """Features of a head that are turned; 0 where positions are others."""
    if traits.positions != "rotary":
        if model.rotary_dim is not None:
            raise ConfigError(f"model.rotary_dim: positions are {traits.positions}; write model.positions: rotary")
        return 0
    turned = model.rotary_dim or round(row.rotary_fraction * model.head_dim)
    name = "head_dim" if model.rotary_dim is None else "rotary_dim"
    if turned % 2:
        raise ConfigError(
            f"model.{name}: {turned} features of a head are turned, and rotary turns pairs; write an even number"
        )
    if turned > model.head_dim:
        raise ConfigError(f"model.rotary_dim {turned} exceeds model.head_dim {model.head_dim}; write at most that")
    return turned


def base_shape_of(shape: Shape, base: BaseShape) -> Shape:
    """The target's network at the base widths; what `base` leaves out keeps the target's ratio, head_dim its value."""
    head_dim = base.head_dim or shape.head_dim
    if base.hidden_size % head_dim:
        raise ConfigError(
            f"parametrization.base.hidden_size {base.hidden_size} is not a multiple of the head size {head_dim}; "
            "write base.head_dim too"
        )
    heads = base.hidden_size // head_dim
    return replace(
        shape,
        hidden_size=base.hidden_size,
        head_dim=head_dim,
        num_heads=heads,
        num_kv_heads=base.num_kv_heads or _kv_heads(shape, heads),
        intermediate_size=base.intermediate_size
        or _in_ratio("intermediate_size", shape.intermediate_size, base.hidden_size, shape.hidden_size),
    )


def _kv_heads(shape: Shape, heads: int) -> int:
    if shape.num_kv_heads == 1:  # multi-query attention at every width
        return 1
    return _in_ratio("num_kv_heads", shape.num_kv_heads, heads, shape.num_heads)


def _in_ratio(field: str, number: int, base: int, target: int) -> int:
    scaled = Fraction(number * base, target)
    if scaled.denominator != 1:
        raise ConfigError(
            f"parametrization.base: model.{field} {number} has no whole share at the base; write base.{field}"
        )
    return int(scaled)


def decoder_specs(shape: Shape) -> tuple[ParamSpec, ...]:
    """Every parameter of the decoder, in the order of the forward pass."""
    return tuple(_parameters(shape))


def _parameters(s: Shape) -> Iterator[ParamSpec]:
    h, t = s.hidden_size, s.traits
    yield ParamSpec("embed.weight", Role.EMBEDDING, (s.vocab_size, h), s.vocab_size, h)
    if t.positions == "learned":
        yield ParamSpec("positions.weight", Role.POSITION, (s.max_seq_len, h), s.max_seq_len, h)
    if t.embedding_norm:
        yield from _norm("embed_norm", s, on_residual=False)
    for i in range(s.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        if s.shared_norm:
            yield from _norm(f"layers.{i}.norm", s, on_residual=True)
        if s.branch_norms:
            yield from _norm(f"{attn}.norm", s, on_residual=True)
        yield from _matrix(f"{attn}.q", Role.HIDDEN, h, h, t.attention_bias)
        yield from _matrix(f"{attn}.k", Role.HIDDEN, h, s.kv_size, t.attention_bias)
        yield from _matrix(f"{attn}.v", Role.HIDDEN, h, s.kv_size, t.attention_bias)
        yield from _matrix(f"{attn}.out", Role.HIDDEN_OUT, h, h, t.attention_bias)
        if s.post_norm:
            yield from _norm(f"layers.{i}.attn_norm", s, on_residual=False)
        if s.branch_norms:
            yield from _norm(f"{mlp}.norm", s, on_residual=True)
        if s.gated:
            yield from _matrix(f"{mlp}.gate", Role.HIDDEN, h, s.intermediate_size, t.mlp_bias)
        yield from _matrix(f"{mlp}.up", Role.HIDDEN, h, s.intermediate_size, t.mlp_bias)
        yield from _matrix(f"{mlp}.down", Role.HIDDEN_OUT, s.intermediate_size, h, t.mlp_bias)
        if s.post_norm:
            yield from _norm(f"layers.{i}.mlp_norm", s, on_residual=False)
    if not s.post_norm:
        yield from _norm("norm", s, on_residual=False)
    role, owner = (Role.TIED_READOUT, "embed.weight") if t.tie_embeddings else (Role.READOUT, None)
    yield ParamSpec("head.weight", role, (s.vocab_size, h), h, s.vocab_size, tied_to=owner)
    if t.head_bias:
        yield ParamSpec("head.bias", Role.BIAS, (s.vocab_size,), h, s.vocab_size)


def _matrix(name: str, role: Role, fan_in: int, fan_out: int, bias: bool) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", role, (fan_out, fan_in), fan_in, fan_out, on_residual=True)
    if bias:
        yield ParamSpec(f"{name}.bias", Role.BIAS, (fan_out,), fan_in, fan_out, on_residual=True)


def _norm(name: str, s: Shape, on_residual: bool) -> Iterator[ParamSpec]:
    h, t = s.hidden_size, s.traits
    if t.norm_gain:
        yield ParamSpec(f"{name}.weight", Role.NORM_GAIN, (h,), h, h, on_residual)
        if has_norm_bias(t):
            yield ParamSpec(f"{name}.bias", Role.NORM_BIAS, (h,), h, h, on_residual)


def has_norm_bias(traits: Traits) -> bool:
    """Whether norms have biases: layer norms with gains do, unless they are told not to."""
    return traits.norm == "layer" and traits.norm_gain and traits.norm_bias


def decoder_sites(s: Shape) -> tuple[OpSite, ...]:
    """Every operation site of the decoder, in execution order."""
    sites = []
    if s.traits.positions == "learned":
        sites.append(OpSite("embed.add", OpKind.ADD))
    if s.dropout:
        sites.append(OpSite("embed.dropout", OpKind.DROPOUT))
    for i in range(s.num_layers):
        branches = (
            ("attn", "sdpa", OpKind.SDPA, OpKind.RESIDUAL_ATTN),
            ("mlp", "act", ACTIVATION_KINDS[s.traits.activation], OpKind.RESIDUAL_MLP),
        )
        for branch, op, kind, residual in branches:
            sites.append(OpSite(f"layers.{i}.{branch}.{op}", kind))
            if s.dropout:
                sites.append(OpSite(f"layers.{i}.{branch}.dropout", OpKind.DROPOUT))
            sites.append(OpSite(f"layers.{i}.{branch}.residual", residual))
    return (*sites, OpSite("loss", OpKind.LOSS))


def architecture(shape: Shape, tokens: int) -> Architecture:
    """The decoder as the rules see it; `tokens` is global, per optimizer step."""
    sizes = Sizes(
        num_layers=shape.num_layers,
        tokens=tokens,
        seq_len=shape.max_seq_len,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        dropout=shape.dropout,
        norm_placement=shape.traits.norm_placement,
    )
    return Architecture(decoder_specs(shape), decoder_sites(shape), sizes)


def base_architecture(shape: Shape, base: BaseShape, tokens: int) -> Architecture:
    """The decoder at the base shape: all layers of the target at the base widths, and in its sizes the base's depth."""
    found = architecture(base_shape_of(shape, base), tokens)
    return replace(found, sizes=replace(found.sizes, num_layers=base.num_layers or shape.num_layers))


def plan_for(config: RunConfig) -> Plan:
    """The plan of a run: its scheme's table applied to its model. Raises ConfigError and PlanError."""
    shape, p = shape_of(config.model), config.parametrization
    if p.base is not None and p.base.num_layers is None and find_scheme(p.scheme).needs_base_depth:
        raise ConfigError(
            f"parametrization.base: scheme {p.scheme!r} is relative to a depth, too; write base.num_layers (of the "
            "model whose hyperparameters were tuned)"
        )
    tokens = config.tokens_per_step
    return make_plan(
        p.scheme,
        architecture(shape, tokens),
        None if p.base is None else base_architecture(shape, p.base, tokens),
        optimizer=config.optimizer.name,
        independent_weight_decay=config.optimizer.independent_weight_decay,
        hparams=p.hparams,
        options=p.options,
    )


def products_for(config: RunConfig, plan: Plan) -> dict[str, Product]:
    """Every matmul of a run and its number format. Raises ConfigError, see `rules.precision.products`."""
    p = config.precision
    return products(plan, find_recipe(p.recipe), p.overrides, p.scales)


def plan_under(config: RunConfig, scheme: str) -> Plan:
    """The plan of the same run under another scheme, at that scheme's defaults."""
    base = config.parametrization.base if find_scheme(scheme).needs_base else None
    other = ParametrizationConfig(scheme=scheme, base=base)
    return plan_for(config.model_copy(update={"parametrization": other}))
