"""The parametrizations, each one table: role x quantity -> formula and source.

Quantities of a row (rows are read by plan.py; nothing else interprets them):

    init_std, init_mean   the initial values are normal(mean, std)
    multiplier            the forward factor on the parameter's product ("A" of abc)
    grad_input            backward factor towards the input; absent: the multiplier, i.e. the exact gradient
    grad_weight           backward factor towards the parameter; absent: the multiplier
    lr, eps               factors on the optimizer's learning rate ("C") and epsilon, one cell per optimizer column
    decay_independent     factor on weight decay when `w *= 1 - wd * lr_t/lr_peak`
    decay_coupled         factor on weight decay when `w *= 1 - lr_t * wd`

`on_residual` multiplies further factors into parameters that lie on a residual branch.
Symbols: fan_in, fan_out, depth, tokens, base_fan_in, base_fan_out, and the scheme's hyperparameters by name.
`depth` is the number of layers times the depth_count option.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from umup.errors import PlanError, did_you_mean
from umup.rules.hparams import Cell, Choice, HParam, Option
from umup.rules.monomial import Monomial, constant, power, ratio
from umup.rules.opscales import MUP_OPS, SP_OPS, UNIT_OPS, OpRule
from umup.rules.roles import OpKind, Role

ONE, ZERO = constant(1.0), constant(0.0)


@dataclass(frozen=True)
class Row:
    """The cells of one role; a missing gradient cell means the exact gradient."""

    init_std: Cell
    multiplier: Cell
    lr: Mapping[str, Cell]
    eps: Mapping[str, Cell]
    decay_independent: Cell
    decay_coupled: Cell
    init_mean: Cell = field(default=Cell(ZERO, "zero mean"))
    grad_input: Cell | None = None
    grad_weight: Cell | None = None


@dataclass(frozen=True)
class Scheme:
    """A parametrization; a `unit_scaled` one keeps tensors near RMS 1, so that FP8 and FP16 need no measured scale."""

    name: str
    title: str
    source: str
    rows: Mapping[Role, Row]
    ops: Mapping[OpKind, OpRule]
    hparams: tuple[HParam, ...] = ()
    options: tuple[Option, ...] = ()
    needs_base: bool = False
    unit_scaled: bool = False
    on_residual: Mapping[str, Cell] = field(default_factory=dict)


def scheme(name: str) -> Scheme:
    """The named scheme, or a PlanError naming the nearest."""
    if name not in SCHEMES:
        raise PlanError(f"parametrization.scheme: unknown scheme {name!r}; {did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]


def _row(
    source: str,
    init_std: Monomial,
    multiplier: Monomial = ONE,
    lr: Monomial = ONE,
    eps: Monomial = ONE,
    decay: Monomial = ONE,
    decay_coupled: Monomial | None = None,
    init_mean: Monomial = ZERO,
    grad_input: Monomial | None = None,
    grad_weight: Monomial | None = None,
) -> Row:
    def cell(formula: Monomial) -> Cell:
        return Cell(formula, source)

    return Row(
        init_std=cell(init_std),
        multiplier=cell(multiplier),
        lr={"adam": cell(lr)},
        eps={"adam": cell(eps)},
        decay_independent=cell(decay),
        decay_coupled=cell(decay if decay_coupled is None else decay_coupled),
        init_mean=cell(init_mean),
        grad_input=None if grad_input is None else cell(grad_input),
        grad_weight=None if grad_weight is None else cell(grad_weight),
    )


# --- SP: GPT-2's standard parametrization ----------------------------------------------------------------------

GPT2 = "GPT-2 (Radford et al. 2019, section 2.3)"
SIGMA = power("sigma_init")
# Two branches per layer write to the stream: 1/sqrt(2L).
SIGMA_OUT = SIGMA * Monomial(2**-0.5) * power("depth", "-1/2")
SIGMA_INIT = HParam("sigma_init", 0.02, 0.002, 0.2, "with muP: across width", "std of the initial weights", GPT2)

SP = Scheme(
    name="sp",
    title="standard parametrization",
    source=GPT2,
    hparams=(SIGMA_INIT,),
    ops=SP_OPS,
    rows={
        Role.EMBEDDING: _row(GPT2, SIGMA),
        Role.POSITION: _row(GPT2, SIGMA),
        Role.HIDDEN: _row(GPT2, SIGMA),
        Role.HIDDEN_OUT: _row(GPT2, SIGMA_OUT),
        Role.READOUT: _row(GPT2, SIGMA),
        Role.TIED_READOUT: _row(GPT2, SIGMA),
        Role.NORM_GAIN: _row(GPT2, ZERO, init_mean=ONE, decay=ZERO),
        Role.NORM_BIAS: _row(GPT2, ZERO, decay=ZERO),
        Role.BIAS: _row(GPT2, ZERO, decay=ZERO),
    },
)

# --- muP: Tensor Programs V, table 8 (table 3 is this plan folded) ---------------------------------------------

TP5 = "2203.03466 table 8"
# All gradients fall as 1/width, and Adam divides them out only where they are large against epsilon.
TP5_EPS = {"in": ratio("fan_in", -1), "out": ratio("fan_out", -1)}


def _mup_readout(init_std: Monomial) -> Row:
    return _row(TP5, init_std, power("alpha_out") * ratio("fan_in", -1), eps=TP5_EPS["in"])


MUP = Scheme(
    name="mup",
    title="maximal update parametrization",
    source="2203.03466",
    needs_base=True,
    ops=MUP_OPS,
    hparams=(
        SIGMA_INIT,
        HParam("alpha_emb", 1.0, 0.1, 100.0, "across width", "multiplier of the embedding", "2203.03466 app. F.4"),
        HParam("eta_emb", 1.0, 0.1, 10.0, "across width", "learning-rate factor of the embedding", "2407.17465"),
        HParam("alpha_attn", 1.0, 0.25, 4.0, "across width", "multiplier of attention logits", "2203.03466 app. F.4"),
        HParam("alpha_out", 1.0, 0.1, 10.0, "across width", "multiplier of the output logits", "2203.03466 app. F.4"),
    ),
    rows={
        Role.EMBEDDING: _row(TP5, SIGMA, power("alpha_emb"), lr=power("eta_emb"), eps=TP5_EPS["out"]),
        Role.POSITION: _row(TP5, SIGMA, power("alpha_emb"), lr=power("eta_emb"), eps=TP5_EPS["out"]),
        Role.HIDDEN: _row(
            TP5,
            SIGMA * ratio("fan_in", "-1/2"),
            lr=ratio("fan_in", -1),
            eps=TP5_EPS["in"],
            decay_coupled=ratio("fan_in"),
        ),
        Role.HIDDEN_OUT: _row(
            TP5,
            SIGMA_OUT * ratio("fan_in", "-1/2"),
            lr=ratio("fan_in", -1),
            eps=TP5_EPS["in"],
            decay_coupled=ratio("fan_in"),
        ),
        Role.READOUT: _mup_readout(SIGMA),
        Role.TIED_READOUT: _mup_readout(SIGMA),
        Role.NORM_GAIN: _row(TP5, ZERO, eps=TP5_EPS["out"], init_mean=ONE, decay=ZERO),
        Role.NORM_BIAS: _row(TP5, ZERO, eps=TP5_EPS["out"], decay=ZERO),
        Role.BIAS: _row(TP5, ZERO, eps=TP5_EPS["out"], decay=ZERO),
    },
)

# --- u-muP: unit-scaled muP -------------------------------------------------------------------------------------

U = "2407.17465 abc table"
U_GRAD = "2407.17465 app. B"
PER_TOKEN = power("tokens", "-1/2")
# Each row of a lookup table sees tokens/fan_in gradients.
PER_LOOKUP = power("fan_in", "1/2") * PER_TOKEN
INV_SQRT_IN = power("fan_in", "-1/2")


def _alpha(name: str, doc: str) -> HParam:
    return HParam(name, 1.0, 0.125, 8.0, "across width, depth, batch and length (2407.17465)", doc, U)


_umup_lookup = _row(U, ONE, lr=power("fan_out", "-1/2"), grad_weight=PER_LOOKUP)
_umup_hidden = _row(U, ONE, INV_SQRT_IN, lr=INV_SQRT_IN, grad_input=INV_SQRT_IN, grad_weight=PER_TOKEN)
# A cut edge may scale its two directions differently; nothing else may.
_umup_readout = _row(U, ONE, power("fan_in", -1), grad_input=power("fan_out", "-1/2"), grad_weight=PER_TOKEN)

UMUP = Scheme(
    name="umup",
    title="unit-scaled maximal update parametrization",
    source="2407.17465",
    unit_scaled=True,
    ops=UNIT_OPS,
    hparams=(
        _alpha("alpha_ffn_act", "temperature of the MLP's activation"),
        _alpha("alpha_attn_softmax", "multiplier of attention logits"),
        _alpha("alpha_res", "strength of all residual branches against the embedding"),
        _alpha("alpha_res_attn_ratio", "strength of attention branches against MLP branches"),
        _alpha("alpha_loss_softmax", "multiplier of the output logits"),
    ),
    options=(
        Option(
            "depth_count",
            "L",
            {
                "L": Choice("depth counts layers", "the unit-scaling library"),
                "2L": Choice(
                    "depth counts branches", "the scaling library of Aleph Alpha, default", depth_per_layer=2.0
                ),
            },
        ),
        Option(
            "embedding_lr",
            "inv_sqrt_fan_out",
            {
                "inv_sqrt_fan_out": Choice("u-muP's changed rule", U),
                "constant": Choice(
                    "muP's rule; 2605.21486 finds that a large embedding rate is most of muP's benefit",
                    TP5,
                    cells={
                        (Role.EMBEDDING, "lr.adam"): Cell(ONE, TP5),
                        (Role.POSITION, "lr.adam"): Cell(ONE, TP5),
                    },
                ),
            },
        ),
        Option(
            "bias_multiplier",
            "one",
            {
                "one": Choice("biases are added after the multiplier, as in muP", TP5),
                "inv_sqrt_fan_in": Choice(
                    "biases are added before the multiplier, so that their step shrinks with width",
                    "the unit-scaling library",
                    cells={(Role.BIAS, "multiplier"): Cell(INV_SQRT_IN, "the unit-scaling library")},
                ),
            },
        ),
    ),
    on_residual={"lr.adam": Cell(power("depth", "-1/2"), "2407.17465 app. G; 2310.02244")},
    rows={
        Role.EMBEDDING: _umup_lookup,
        Role.POSITION: _umup_lookup,
        Role.HIDDEN: _umup_hidden,
        Role.HIDDEN_OUT: _umup_hidden,
        Role.READOUT: _umup_readout,
        Role.TIED_READOUT: _umup_readout,
        Role.NORM_GAIN: _row(U_GRAD, ZERO, init_mean=ONE, decay=ZERO, grad_weight=PER_TOKEN),
        Role.NORM_BIAS: _row(U_GRAD, ZERO, decay=ZERO, grad_weight=PER_TOKEN),
        Role.BIAS: _row(U_GRAD, ZERO, decay=ZERO, grad_weight=PER_TOKEN),
    },
)

SCHEMES: Mapping[str, Scheme] = {s.name: s for s in (SP, MUP, UMUP)}
