"""Scales that are not monomials: closed-form op scales and residual weights.

Each public function is a formula on floats; each `*_ops` table maps a kind of site to the numbers that its op takes:

    ADD                    output                                sum multiplied by this
    RESIDUAL_*             branch, skip                          weights of the two paths, forward
                           split_grad, branch_grad               backward factors at the branch's start and end
    SDPA                   logits, output                        factor on q.k, factor on the result
    GATED_*, SILU, GELU    mult, output                          temperature inside, factor on the result
    RELU                   output                                factor on the result
    DROPOUT                output                                factor on torch's (already rescaled) dropout
    LOSS                   logits, grad                          factor on logits, gradient of the summed loss

The empirical models are those of the unit-scaling library (2303.11257, appendix; 2407.17465, appendix B).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import asin, exp, log, pi, sqrt

from umup.rules.roles import OpKind, OpSite, Sizes

UMUP_G = "2407.17465 app. G"
UMUP_OPS = "2407.17465 app. B; the unit-scaling library"
TRUE_GRADIENT = "exact gradient of the mean loss"


@dataclass(frozen=True)
class Value:
    """A number, the rule that gave it and where the rule comes from."""

    number: float
    rule: str
    source: str


@dataclass(frozen=True)
class OpContext:
    """What an op rule may look at: every site in execution order, sizes, depths, base head size, hyperparameters."""

    sites: Sequence[OpSite]
    sizes: Sizes
    depth: float
    base_depth: float
    base_head_dim: int
    hparams: Mapping[str, float]


OpRule = Callable[[OpSite, OpContext], dict[str, Value]]


def log_interpolate(weight: float, low: float, high: float) -> float:
    """`high^weight * low^(1 - weight)`."""
    return exp(weight * log(high) + (1 - weight) * log(low))


def gated_silu_scale(mult: float) -> float:
    """1/std of `u * g * sigmoid(mult*g)` on unit inputs: 2 where the gate is flat, sqrt(2) where it is a step."""
    return log_interpolate(1 / (1 + 1 / mult**2), 2.0, sqrt(2.0))


def gated_gelu_scale(mult: float) -> float:
    """1/std of `u * gelu(mult*g)/mult` on unit inputs, exactly.

    E[(g Phi(mg))^2] = 1/4 + asin(m^2/(1+m^2))/(2 pi) + m^2/(pi (1+m^2) sqrt(1+2m^2)), from Owen's integrals of products
    of normal distribution functions (1980).
    """
    square = mult**2
    energy = 1 / 4 + asin(square / (1 + square)) / (2 * pi) + square / (pi * (1 + square) * sqrt(1 + 2 * square))
    return 1 / sqrt(energy)


def activation_scale(mult: float) -> float:
    """1/std of SiLU or GELU at temperature `mult` on unit inputs: 2 (linear) to that of ReLU, sqrt(2/(1-1/pi))."""
    return log_interpolate(1 / (1 + 0.25 / mult**2), 2.0, sqrt(2 / (1 - 1 / pi)))


def attention_scale(mult: float, head_dim: int, seq_len: int, dropout: float) -> float:
    """1/std of causal attention over `seq_len` unit values; flat attention averages ln(s)/s of them."""
    flat = sqrt(log(seq_len) / seq_len) if seq_len > 1 else 1.0
    return sqrt(1 - dropout) / log_interpolate(1 / (1 + 4 * head_dim / mult**2), flat, 1.0)


def residual_weights(site: OpSite, ctx: OpContext) -> tuple[float, float]:
    """(branch, skip) of a branch: tau/sqrt(1+tau^2) and 1/sqrt(1+tau^2), tau^2 = a^2/(depth + sum of earlier a^2).

    With both hyperparameters 1 the embedding, all attention and all MLP branches contribute equal variance.
    """
    ratio = ctx.hparams["alpha_res_attn_ratio"]
    a_mlp = ctx.hparams["alpha_res"] * sqrt(2 / (1 + ratio**2))
    a = {OpKind.RESIDUAL_ATTN: ratio * a_mlp, OpKind.RESIDUAL_MLP: a_mlp}
    branches = [s for s in ctx.sites if s.kind in a]
    earlier = sum(a[s.kind] ** 2 for s in branches[: branches.index(site)])
    tau = a[site.kind] / sqrt(ctx.depth + earlier)
    return tau / sqrt(1 + tau**2), 1 / sqrt(1 + tau**2)


def _plain_loss(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {
        "logits": Value(1.0, "1", "plain"),
        "grad": Value(1 / ctx.sizes.tokens, "1/tokens", TRUE_GRADIENT),
    }


def _plain_activation(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {"mult": Value(1.0, "1", "plain"), "output": Value(1.0, "1", "plain")}


def _plain_output(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {"output": Value(1.0, "1", "plain")}


def _plain_residual(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    one = Value(1.0, "1", "plain")
    return {"branch": one, "skip": one, "split_grad": one, "branch_grad": one}


def _sp_sdpa(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {
        "logits": Value(1 / sqrt(ctx.sizes.head_dim), "1/sqrt(head_dim)", "1706.03762"),
        "output": Value(1.0, "1", "plain"),
    }


def _mup_sdpa(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    # 1/d instead of 1/sqrt(d), equal to it at the base; written so that d = base gives SP's bits.
    scale = sqrt(ctx.base_head_dim / ctx.sizes.head_dim) / sqrt(ctx.sizes.head_dim)
    return {
        "logits": Value(
            ctx.hparams["alpha_attn"] * scale, "alpha_attn*sqrt(base_head_dim)/head_dim", "2203.03466 def. 4.1"
        ),
        "output": Value(1.0, "1", "plain"),
    }


def _inverse_sdpa(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    logits = Value(ctx.hparams["alpha_attn"] / ctx.sizes.head_dim, "alpha_attn/head_dim", "2203.03466 def. 4.1")
    return {"logits": logits, "output": Value(1.0, "1", "plain")}


def depth_residual(alpha: float, source: str) -> OpRule:
    """Branches weigh (base_depth/depth)^alpha, the skip 1; gradients are exact."""

    def rule(site: OpSite, ctx: OpContext) -> dict[str, Value]:
        branch = Value((ctx.base_depth / ctx.depth) ** alpha, f"(base_depth/depth)^{alpha:g}", source)
        return {**_plain_residual(site, ctx), "branch": branch, "branch_grad": branch}

    return rule


def _fixed_residual(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    tau, source = ctx.hparams["tau"], "2303.11257; 2502.05967"
    branch, skip = Value(sqrt(tau), "sqrt(tau)", source), Value(sqrt(1 - tau), "sqrt(1-tau)", source)
    # The branch's factor is delayed to its input, so that gradients inside stay unit.
    return {"branch": branch, "skip": skip, "split_grad": branch, "branch_grad": Value(1.0, "1", source)}


def _unit_sqrt_sdpa(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    d, s = ctx.sizes.head_dim, ctx.sizes.seq_len
    scale = attention_scale(sqrt(d), d, s, ctx.sizes.dropout)
    return {
        "logits": Value(1 / sqrt(d), "1/sqrt(head_dim)", "1706.03762"),
        "output": Value(scale, "sqrt(1-dropout)/interp(1/5, sqrt(ln(seq_len)/seq_len), 1)", UMUP_OPS),
    }


def _unit_sdpa(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    mult, d, s = ctx.hparams["alpha_attn_softmax"], ctx.sizes.head_dim, ctx.sizes.seq_len
    return {
        "logits": Value(mult / d, "alpha_attn_softmax/head_dim", UMUP_OPS),
        "output": Value(
            attention_scale(mult, d, s, ctx.sizes.dropout),
            "sqrt(1-dropout)/interp(1/(1+4*head_dim/alpha_attn_softmax^2), sqrt(ln(seq_len)/seq_len), 1)",
            UMUP_OPS,
        ),
    }


def _unit_gated_silu(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    mult = ctx.hparams.get("alpha_ffn_act", 1.0)
    return {
        "mult": Value(mult, "alpha_ffn_act", UMUP_OPS),
        "output": Value(gated_silu_scale(mult), "interp(1/(1+1/alpha_ffn_act^2), 2, sqrt(2))", UMUP_OPS),
    }


def _unit_gated_gelu(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    mult = ctx.hparams.get("alpha_ffn_act", 1.0)
    return {
        "mult": Value(mult, "alpha_ffn_act", UMUP_OPS),
        "output": Value(gated_gelu_scale(mult), "1/std(u*gelu(alpha_ffn_act*g)/alpha_ffn_act)", "closed form"),
    }


def _unit_relu(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {"output": Value(sqrt(2 / (1 - 1 / pi)), "sqrt(2/(1-1/pi))", UMUP_OPS)}


def _unit_activation(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    mult = ctx.hparams.get("alpha_ffn_act", 1.0)
    return {
        "mult": Value(mult, "alpha_ffn_act", UMUP_OPS),
        "output": Value(activation_scale(mult), "interp(1/(1+0.25/alpha_ffn_act^2), 2, sqrt(2/(1-1/pi)))", UMUP_OPS),
    }


def _unit_residual(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    branch, skip = residual_weights(site, ctx)
    return {
        "branch": Value(branch, "tau/sqrt(1+tau^2)", UMUP_G),
        "skip": Value(skip, "1/sqrt(1+tau^2)", UMUP_G),
        # The branch's factor is delayed to its input, so that gradients inside stay unit.
        "split_grad": Value(branch, "tau/sqrt(1+tau^2)", UMUP_G),
        "branch_grad": Value(1.0, "1", UMUP_G),
    }


def _unit_add(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {"output": Value(sqrt(0.5), "1/sqrt(2)", UMUP_OPS)}


def _unit_dropout(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    return {"output": Value(sqrt(1 - ctx.sizes.dropout), "sqrt(1-dropout)", UMUP_OPS)}


def _unit_loss(site: OpSite, ctx: OpContext) -> dict[str, Value]:
    v = ctx.sizes.vocab_size
    return {
        "logits": Value(ctx.hparams.get("alpha_loss_softmax", 1.0), "alpha_loss_softmax", UMUP_OPS),
        "grad": Value(v / sqrt(v - 1), "vocab_size/sqrt(vocab_size-1)", UMUP_OPS),
    }


SP_OPS: Mapping[OpKind, OpRule] = {
    OpKind.ADD: _plain_output,
    OpKind.RESIDUAL_ATTN: _plain_residual,
    OpKind.RESIDUAL_MLP: _plain_residual,
    OpKind.SDPA: _sp_sdpa,
    OpKind.GATED_SILU: _plain_activation,
    OpKind.GATED_GELU: _plain_activation,
    OpKind.SILU: _plain_activation,
    OpKind.GELU: _plain_activation,
    OpKind.RELU: _plain_output,
    OpKind.DROPOUT: _plain_output,
    OpKind.LOSS: _plain_loss,
}

MUP_OPS: Mapping[OpKind, OpRule] = {**SP_OPS, OpKind.SDPA: _mup_sdpa}
SPECTRAL_OPS: Mapping[OpKind, OpRule] = {**SP_OPS, OpKind.SDPA: _inverse_sdpa}

UNIT_OPS: Mapping[OpKind, OpRule] = {
    OpKind.ADD: _unit_add,
    OpKind.RESIDUAL_ATTN: _unit_residual,
    OpKind.RESIDUAL_MLP: _unit_residual,
    OpKind.SDPA: _unit_sdpa,
    OpKind.GATED_SILU: _unit_gated_silu,
    OpKind.GATED_GELU: _unit_gated_gelu,
    OpKind.SILU: _unit_activation,
    OpKind.GELU: _unit_activation,
    OpKind.RELU: _unit_relu,
    OpKind.DROPOUT: _unit_dropout,
    OpKind.LOSS: _unit_loss,
}

# Unit scaling with one weight for all branches: the scheme's `tau`.
FIXED_UNIT_OPS: Mapping[OpKind, OpRule] = {
    **UNIT_OPS,
    OpKind.SDPA: _unit_sqrt_sdpa,
    OpKind.RESIDUAL_ATTN: _fixed_residual,
    OpKind.RESIDUAL_MLP: _fixed_residual,
}
# With the norm at the branch's end, attention's own scale is undone by it.
MUS_OPS: Mapping[OpKind, OpRule] = {**FIXED_UNIT_OPS, OpKind.SDPA: _sp_sdpa}
