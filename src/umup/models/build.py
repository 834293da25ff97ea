"""Config + plan -> module. With adapt/apply.py the only place where rules and tensors meet."""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.models.decoder import MLP, Block, Decoder, GatedMLP, LearnedPositions, SelfAttention
from umup.models.specs import Shape, plan_for, products_for, shape_of
from umup.nn.fp8 import convert, formats_of
from umup.nn.modules import Attention, Dropout, Embedding, LayerNorm, Linear, Residual, RMSNorm, UseScales
from umup.ops.activation import gelu, silu
from umup.ops.attention import rotary_tables
from umup.rules.plan import USE_QUANTITIES, Plan
from umup.rules.precision import find_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
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
    parts = _Parts(shape, plan)
    embed = Embedding(shape.vocab_size, shape.hidden_size, parts.use("embed.weight"))
    head = Linear(shape.hidden_size, shape.vocab_size, parts.use("head.weight"))
    if shape.tied:
        head.weight = embed.weight
    learned = shape.family.positions == "learned"
    return Decoder(
        embed=embed,
        positions=parts.positions() if learned else None,
        rotary_tables=None if learned else rotary_tables(shape.head_dim, shape.max_seq_len, shape.rope_theta),
        dropout=parts.dropout("embed"),
        layers=[Block(parts.attention(i), parts.mlp(i)) for i in range(shape.num_layers)],
        norm=parts.norm("norm"),
        head=head,
        loss=(plan.ops["loss"]["logits"], plan.ops["loss"]["grad"]),
        dtype=dtype,
    )


@torch.no_grad()
def initialise(model: nn.Module, plan: Plan, seed: int) -> None:
    """Fill every stored parameter with normal(init_mean, init_std) of its plan.

    Each parameter has a generator of its own, seeded by (seed, name): one layer more or another scheme changes no
    other parameter's draw, so that runs of equal seed are paired.
    """
    parameters = dict(model.named_parameters())
    for name, p in plan.stored.items():
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        draw = torch.randn(p.spec.shape, generator=generator) * p["init_std"] + p["init_mean"]
        parameters[name].copy_(draw)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class _Parts:
    """Modules by name, with the plan's numbers looked up."""

    def __init__(self, shape: Shape, plan: Plan) -> None:
        self.shape, self.plan = shape, plan

    def use(self, name: str) -> UseScales:
        p = self.plan.params[name]
        return UseScales(*(p[quantity] for quantity in USE_QUANTITIES))

    def linear(self, name: str, fan_in: int, fan_out: int) -> Linear:
        bias = self.use(f"{name}.bias") if self.shape.family.biases else None
        return Linear(fan_in, fan_out, self.use(f"{name}.weight"), bias)

    def norm(self, name: str) -> nn.Module:
        s = self.shape
        gain = self.use(f"{name}.weight") if s.norm_gain else None
        if s.family.norm == "rms":
            return RMSNorm(s.hidden_size, s.norm_eps, gain)
        return LayerNorm(s.hidden_size, s.norm_eps, gain, self.use(f"{name}.bias") if s.norm_gain else None)

    def positions(self) -> LearnedPositions:
        table = Embedding(self.shape.max_seq_len, self.shape.hidden_size, self.use("positions.weight"))
        return LearnedPositions(table, self.plan.ops["embed.add"]["output"])

    def dropout(self, owner: str) -> nn.Module:
        if not self.shape.dropout:
            return nn.Identity()
        return Dropout(self.shape.dropout, self.plan.ops[f"{owner}.dropout"]["output"])

    def residual(self, branch: str) -> Residual:
        op = self.plan.ops[f"{branch}.residual"]
        return Residual(op["branch"], op["skip"], op["split_grad"], op["branch_grad"])

    def attention(self, layer: int) -> SelfAttention:
        s, name = self.shape, f"layers.{layer}.attn"
        op = self.plan.ops[f"{name}.sdpa"]
        return SelfAttention(
            layer,
            s.head_dim,
            self.norm(f"{name}.norm"),
            self.linear(f"{name}.q", s.hidden_size, s.hidden_size),
            self.linear(f"{name}.k", s.hidden_size, s.kv_size),
            self.linear(f"{name}.v", s.hidden_size, s.kv_size),
            Attention(op["logits"], op["output"], s.dropout),
            self.linear(f"{name}.out", s.hidden_size, s.hidden_size),
            s.norm_placement == "res_post",
            self.dropout(name),
            self.residual(name),
        )

    def mlp(self, layer: int) -> MLP | GatedMLP:
        s, name = self.shape, f"layers.{layer}.mlp"
        op = self.plan.ops[f"{name}.act"]
        norm, up = self.norm(f"{name}.norm"), self.linear(f"{name}.up", s.hidden_size, s.intermediate_size)
        down = self.linear(f"{name}.down", s.intermediate_size, s.hidden_size)
        tail = (down, s.norm_placement == "res_post", self.dropout(name), self.residual(name))
        if s.family.activation != "gated_silu":
            activation = partial(ACTIVATIONS[s.family.activation], mult=op["mult"], output=op["output"])
            return MLP(norm, up, activation, *tail)
        gate = self.linear(f"{name}.gate", s.hidden_size, s.intermediate_size)
        return GatedMLP(norm, gate, up, (op["mult"], op["output"]), *tail)
