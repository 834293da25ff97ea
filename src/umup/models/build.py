"""Config + plan -> module. With adapt/apply.py the only place where rules and tensors meet."""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.models.decoder import MLP, Block, Decoder, Frame, GatedMLP, LearnedPositions, ParallelBlock, SelfAttention
from umup.models.specs import Shape, has_norm_bias, plan_for, products_for, shape_of
from umup.nn.fp8 import convert, formats_of
from umup.nn.modules import Attention, Dropout, Embedding, LayerNorm, Linear, Residual, RMSNorm, UseScales
from umup.ops.activation import gated_gelu, gated_silu, gelu, relu, silu
from umup.ops.attention import alibi_slopes, rotary_tables
from umup.rules.plan import CUT, USE_QUANTITIES, Plan
from umup.rules.precision import find_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
}
GATED_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gated_silu": gated_silu,
    "gated_gelu": gated_gelu,
    "gated_gelu_tanh": partial(gated_gelu, approximate="tanh"),
}


def build(config: RunConfig, plan: Plan | None = None, device: torch.device | str = "cpu") -> Decoder:
    """The config's model on `device`, initialised by the plan (the config's own if none is given) and `train.seed`.

    Raises ConfigError where the device cannot run the config's number formats.
    """
    plan = plan or plan_for(config)
    products = products_for(config, plan)
    model = decoder(shape_of(config.model), plan, stream_of(config))
    initialise(model, plan, config.train.seed)
    device = torch.device(device)
    model = model.to(device)
    for p in model.parameters():
        p.data = p.data.to(DTYPES[config.optimizer.master_dtype])
    convert(model, formats_of(products.values(), device, config.precision))
    if config.precision.compact:
        _keep_compact(model)
    return model


def _keep_compact(model: Decoder) -> None:
    """Raises ConfigError where no MLP has what `precision.compact` speaks of."""
    for layer in model.layers:
        if not isinstance(layer.mlp, GatedMLP) or layer.mlp.segment is None:
            raise ConfigError(
                "precision.compact keeps gate and up of gated MLPs whose products are all in FP8 with static scales; "
                "write precision.compact: false, or precision.recipe: fp8 under model.family: llama"
            )
        layer.mlp.compact = True


def stream_of(config: RunConfig) -> torch.dtype:
    """The dtype of activations."""
    return DTYPES[find_recipe(config.precision.recipe).stream]


def decoder(shape: Shape, plan: Plan, dtype: torch.dtype = torch.float32) -> Decoder:
    """The shape's decoder with the plan's floats; parameters are uninitialised. `dtype` is that of activations."""
    parts, traits = _Parts(shape, plan), shape.traits
    embed = Embedding(shape.vocab_size, shape.hidden_size, parts.use("embed.weight"))
    head = Linear(
        shape.hidden_size,
        shape.vocab_size,
        parts.use("head.weight"),
        parts.use("head.bias") if traits.head_bias else None,
    )
    if traits.tie_embeddings:
        head.weight = embed.weight
    turns = traits.positions == "rotary"
    return Decoder(
        embed=embed,
        positions=parts.positions() if traits.positions == "learned" else None,
        embed_norm=parts.norm("embed_norm") if traits.embedding_norm else None,
        rotary_tables=rotary_tables(shape.rotary_dim, shape.max_seq_len, shape.rope_theta) if turns else None,
        slopes=alibi_slopes(shape.num_heads) if traits.positions == "alibi" else None,
        dropout=parts.dropout("embed"),
        layers=[parts.block(i) for i in range(shape.num_layers)],
        norm=parts.norm("norm") if not shape.post_norm else None,
        head=head,
        loss=(plan.ops["loss"]["logits"], plan.ops["loss"]["grad"]),
        dtype=dtype,
    )


@torch.no_grad()
def initialise(model: nn.Module, plan: Plan, seed: int) -> None:
    """Fill every stored parameter with normal(init_mean, init_std) of its plan, cut where the plan says so.

    Each parameter has a generator of its own, seeded by (seed, name): one layer more or another scheme changes no
    other parameter's draw, so that runs of equal seed are paired.
    """
    parameters = dict(model.named_parameters())
    for name in plan.stored:
        parameters[name].copy_(initial_value(plan, name, seed))


def initial_value(plan: Plan, name: str, seed: int) -> Tensor:
    """One parameter's, float32 on the CPU."""
    p = plan.stored[name]
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    draw = torch.empty(p.spec.shape)
    if CUT in p.values:
        nn.init.trunc_normal_(draw, 0.0, 1.0, -p[CUT], p[CUT], generator=generator)
    else:
        draw.normal_(generator=generator)
    return draw * p["init_std"] + p["init_mean"]


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class _Parts:
    """Modules by name, with the plan's numbers looked up."""

    def __init__(self, shape: Shape, plan: Plan) -> None:
        self.shape, self.plan = shape, plan

    def use(self, name: str) -> UseScales:
        p = self.plan.params[name]
        return UseScales(*(p[quantity] for quantity in USE_QUANTITIES))

    def linear(self, name: str, fan_in: int, fan_out: int, bias: bool) -> Linear:
        return Linear(fan_in, fan_out, self.use(f"{name}.weight"), self.use(f"{name}.bias") if bias else None)

    def norm(self, name: str) -> nn.Module:
        s = self.shape
        gain = self.use(f"{name}.weight") if s.traits.norm_gain else None
        if s.traits.norm == "rms":
            return RMSNorm(s.hidden_size, s.norm_eps, gain)
        return LayerNorm(s.hidden_size, s.norm_eps, gain, self.use(f"{name}.bias") if has_norm_bias(s.traits) else None)

    def positions(self) -> LearnedPositions:
        table = Embedding(self.shape.max_seq_len, self.shape.hidden_size, self.use("positions.weight"))
        return LearnedPositions(table, self.plan.ops["embed.add"]["output"])

    def dropout(self, owner: str) -> nn.Module:
        if not self.shape.dropout:
            return nn.Identity()
        return Dropout(self.shape.dropout, self.plan.ops[f"{owner}.dropout"]["output"])

    def block(self, layer: int) -> Block | ParallelBlock:
        name = f"layers.{layer}"
        attn, mlp = self.attention(layer, f"{name}.attn"), self.mlp(f"{name}.mlp")
        if self.shape.traits.parallel != "none":
            return ParallelBlock(self.norm(f"{name}.norm") if self.shape.shared_norm else nn.Identity(), attn, mlp)
        after = (f"{name}.attn_norm", f"{name}.mlp_norm")
        return Block(attn, mlp, *(nn.Identity() if self.shape.branch_norms else self.norm(n) for n in after))

    def frame(self, branch: str) -> Frame:
        norm = self.norm(f"{branch}.norm") if self.shape.branch_norms else nn.Identity()
        op = self.plan.ops[f"{branch}.residual"]
        residual = Residual(op["branch"], op["skip"], op["split_grad"], op["branch_grad"])
        return Frame(norm, self.shape.traits.norm_placement == "res_post", self.dropout(branch), residual)

    def attention(self, layer: int, name: str) -> SelfAttention:
        s, bias = self.shape, self.shape.traits.attention_bias
        op = self.plan.ops[f"{name}.sdpa"]
        return SelfAttention(
            self.frame(name),
            layer,
            s.head_dim,
            s.traits.rotary_interleaved,
            self.linear(f"{name}.q", s.hidden_size, s.hidden_size, bias),
            self.linear(f"{name}.k", s.hidden_size, s.kv_size, bias),
            self.linear(f"{name}.v", s.hidden_size, s.kv_size, bias),
            Attention(op["logits"], op["output"], s.dropout),
            self.linear(f"{name}.out", s.hidden_size, s.hidden_size, bias),
        )

    def mlp(self, name: str) -> MLP | GatedMLP:
        s, bias = self.shape, self.shape.traits.mlp_bias
        up = self.linear(f"{name}.up", s.hidden_size, s.intermediate_size, bias)
        down = self.linear(f"{name}.down", s.intermediate_size, s.hidden_size, bias)
        factors = {key: value.number for key, value in self.plan.ops[f"{name}.act"].values.items()}
        activation = s.traits.activation
        if not s.gated:
            return MLP(self.frame(name), up, partial(ACTIVATIONS[activation], **factors), down)
        gate = self.linear(f"{name}.gate", s.hidden_size, s.intermediate_size, bias)
        act = partial(GATED_ACTIVATIONS[activation], **factors)
        silu = (factors["mult"], factors["output"]) if activation == "gated_silu" else None
        return GatedMLP(self.frame(name), gate, up, act, silu, down)
