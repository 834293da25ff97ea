"""What `umup bench` compares: the variants, the shapes, the text, and a plain-torch twin of our decoder for the peers.

All variants share shape, tokens, attention, chunked cross entropy and torch.compile, hold bfloat16 parameters (so that
none pays a cast of master weights) and have no norm gains. `stock` is the same network as others write it: nn.Linear
modules with q, k, v and gate, up joined, which is what torchao converts, all linears but the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from umup.config.load import parse_config
from umup.config.sections import OptimizerConfig, ParametrizationConfig, PrecisionConfig, RunConfig
from umup.data.corpus import STDLIB, load_corpus
from umup.errors import ConfigError
from umup.models.build import build
from umup.models.families import family
from umup.models.specs import Shape, plan_for, shape_of
from umup.numerics.gemm import Gemm
from umup.ops.activation import gated_silu
from umup.ops.attention import attention, rotary, rotary_tables
from umup.ops.loss import linear_cross_entropy
from umup.ops.norm import rms_norm
from umup.optim.groups import param_groups
from umup.rules.precision import Scales


@dataclass(frozen=True)
class Variant:
    """A row of the table. `lr` is near the best of its scheme; `torchao` names a float8 recipe of the stock twin."""

    name: str
    scheme: str
    recipe: str
    lr: float
    stock: bool = False
    torchao: str | None = None
    scales: Scales = "adapt"
    compact: bool = False


SP_LR, UMUP_LR = 2.0**-10, 2.0

VARIANTS: Mapping[str, Variant] = {
    v.name: v
    for v in (
        Variant("bf16_sp", "sp", "bf16", SP_LR),
        Variant("bf16_stock", "sp", "bf16", SP_LR, stock=True),
        Variant("bf16_umup", "umup", "bf16", UMUP_LR),
        Variant("torchao_tensorwise", "sp", "fp8", SP_LR, stock=True, torchao="tensorwise"),
        Variant("torchao_tensorwise_fast", "sp", "fp8", SP_LR, stock=True, torchao="tensorwise_fast"),
        Variant("torchao_rowwise", "sp", "fp8", SP_LR, stock=True, torchao="rowwise"),
        Variant("fp8", "umup", "fp8", UMUP_LR),
        Variant("fp8_head", "umup", "fp8_head", UMUP_LR),
        Variant("fp8_head_compact", "umup", "fp8_head", UMUP_LR, compact=True),
        Variant("fp8_partial", "umup", "fp8_partial", UMUP_LR),
        Variant("fp8_e4m3", "umup", "fp8_e4m3", UMUP_LR),
        Variant("fp8_dynamic", "umup", "fp8", UMUP_LR, scales="dynamic"),
    )
}
REFERENCE = "bf16_sp"
DEFAULT_VARIANTS = tuple(list(VARIANTS)[:8])

SHAPES: Mapping[str, dict[str, Any]] = {
    "7b": {
        "model": {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 4, "head_dim": 128}
        | {"vocab_size": 32768, "max_seq_len": 4096},
        "train": {"batch_size": 4},
    },
    "1b": {
        "model": {"hidden_size": 2048, "intermediate_size": 5632, "num_layers": 8, "head_dim": 128}
        | {"vocab_size": 32768, "max_seq_len": 4096},
        "train": {"batch_size": 4},
    },
    "tiny": {
        "model": {"hidden_size": 64, "intermediate_size": 176, "num_layers": 2, "head_dim": 16}
        | {"vocab_size": 512, "max_seq_len": 64},
        "train": {"batch_size": 2},
    },
}


def bench_shape(config: RunConfig) -> RunConfig:
    """A config's model and microbatch as the benchmark runs them. Raises ConfigError for what the twin has not."""
    s = shape_of(config.model)
    llama = replace(family("llama").traits, norm_gain=s.traits.norm_gain)
    if (s.traits, s.rotary_dim, s.dropout) != (llama, s.head_dim, 0.0):
        raise ConfigError(
            "bench: only decoders like llama, without tied embeddings or dropout, have a twin in plain torch; write "
            "model.family: llama, or ask --advise"
        )
    return RunConfig(model=config.model.model_copy(update={"norm_gain": False}), train=config.train)


def named_shape(name: str) -> RunConfig:
    """A row of SHAPES as a config."""
    return bench_shape(parse_config(SHAPES[name]))


def config_of(variant: Variant, shape: RunConfig, device: str) -> RunConfig:
    """The variant's complete config on a device ("cuda" or "cpu", where FP8 is emulated)."""
    backend: Any = "auto" if device == "cuda" else "emulate"
    return shape.model_copy(
        update={
            "parametrization": ParametrizationConfig(scheme=variant.scheme),
            "optimizer": OptimizerConfig(lr=variant.lr, state_dtype="bf16", master_dtype="bf16"),
            "precision": PrecisionConfig(
                recipe="bf16" if variant.stock else variant.recipe,
                scales=variant.scales,
                compact=variant.compact,
                backend=backend,
            ),
        }
    )


class Trainee(NamedTuple):
    """A model with `loss(tokens, targets)`, and parameter groups for an optimizer."""

    model: nn.Module
    groups: list[dict[str, Any]]


def trainee(variant: Variant, config: RunConfig, device: str) -> Trainee:
    """The variant, initialised on the device. Raises ConfigError where torchao is needed and absent."""
    if variant.stock:
        with torch.device(device):
            model: nn.Module = StockDecoder(shape_of(config.model)).to(torch.bfloat16)
        model.rotate(device)  # type: ignore[operator]
        if variant.torchao is not None:
            to_torchao(model, variant.torchao, emulate=device == "cpu")
        return Trainee(model, [{"params": list(model.parameters()), "lr": variant.lr, "initial_lr": variant.lr}])
    plan = plan_for(config)
    model = build(config, plan, device)
    o = config.optimizer
    return Trainee(model, param_groups(plan, model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, eps=o.eps))


def text_batches(shape: RunConfig, steps: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets), the same for all: the text of Python's library, two bytes an id, modulo the vocabulary."""
    batch, length, vocab = shape.train.batch_size, shape.model.max_seq_len, shape.model.vocab_size
    wanted = 2 * steps * batch * (length + 1)
    text = bytearray()
    for document in load_corpus(STDLIB).documents:
        text += document.path.read_bytes()
        if len(text) >= wanted:
            break
    text *= -(-wanted // len(text))
    pairs = torch.frombuffer(text[:wanted], dtype=torch.uint8).view(-1, 2).long()
    ids = ((pairs[:, 0] * 256 + pairs[:, 1]) % vocab).view(steps, batch, length + 1).to(device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]


class StockBlock(nn.Module):
    """One Llama layer of plain nn.Linear modules."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        linear = partial(nn.Linear, bias=False)
        self.qkv = linear(s.hidden_size, s.hidden_size + 2 * s.kv_size)
        self.out = linear(s.hidden_size, s.hidden_size)
        self.gate_up = linear(s.hidden_size, 2 * s.intermediate_size)
        self.down = linear(s.intermediate_size, s.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        s = self.shape
        joined = self.qkv(rms_norm(x, None, s.norm_eps))
        q, k, v = (
            part.view(*x.shape[:-1], -1, s.head_dim).transpose(1, 2)
            for part in joined.split([s.hidden_size, s.kv_size, s.kv_size], -1)
        )
        mixed = attention(rotary(q, cos, sin), rotary(k, cos, sin), v, s.head_dim**-0.5, 1.0)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(rms_norm(x, None, s.norm_eps)).chunk(2, -1)
        result: Tensor = x + self.down(gated_silu(gate, up, 1.0, 1.0))
        return result


class StockDecoder(nn.Module):
    """The decoder of scheme `sp` in plain torch: GPT-2's init, exact gradients."""

    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(StockBlock(s) for _ in range(s.num_layers))
        self.head = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        for name, p in self.named_parameters():
            writes = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 * ((2 * s.num_layers) ** -0.5 if writes else 1.0))

    def rotate(self, device: str) -> None:
        """Make the rotary tables, in float32 whatever the parameters are."""
        s = self.shape
        for name, table in zip(("cos", "sin"), rotary_tables(s.head_dim, s.max_seq_len, s.rope_theta), strict=True):
            self.register_buffer(name, table.to(device), persistent=False)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, S), (B, S) -> mean cross entropy."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = rms_norm(x, None, self.shape.norm_eps)
        return linear_cross_entropy(x, self.head.weight, targets, Gemm(1.0, 1.0, 1.0), 1.0, 1.0 / targets.numel())


def to_torchao(model: nn.Module, recipe: str, emulate: bool) -> None:
    """torchao's float8 training on all linears but the head; `tensorwise_fast` accumulates fast in all products."""
    if find_spec("torchao") is None:
        raise ConfigError("torchao is not installed; write: pip install torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]
    from torchao.float8.config import Float8GemmConfig  # type: ignore[import-not-found]

    config = Float8LinearConfig.from_recipe_name(recipe.removesuffix("_fast"))
    if recipe.endswith("_fast"):
        fast = Float8GemmConfig(use_fast_accum=True)
        config = replace(config, gemm_config_grad_input=fast, gemm_config_grad_weight=fast)
    config = replace(config, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "head")
