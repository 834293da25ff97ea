"""The parametrizations, each one table: role x quantity -> formula and source.

Quantities of a row (rows are read by plan.py; nothing else interprets them):

    init_std, init_mean   the initial values are normal(mean, std)
    multiplier            the forward factor on the parameter's product ("A" of abc)
    grad_input            backward factor towards the input; absent: the multiplier, i.e. the exact gradient
    grad_weight           backward factor towards the parameter; absent: the multiplier
    lr                    factor on Adam's learning rate ("C"): the size of an update's entries
    grad                  size of an entry of the gradient: Adam's epsilon, and every other optimizer's rate, follow it
    eps                   factor on epsilon; absent: what `grad` says
    init_cut              the normal distribution is cut at this many stds; absent: it is not
    decay_independent     factor on weight decay when `w *= 1 - wd * lr_t/lr_peak`
    decay_coupled         factor on weight decay when `w *= 1 - lr_t * wd`, for Adam's lr

Other optimizers need no column here: optimizers.py derives theirs from `lr`, `grad` and `init_std`.
`on_residual` multiplies further factors into parameters that lie on a residual branch.
Symbols: fan_in, fan_out, min_fan, max_fan, depth, tokens, base_fan_in, ..., and the scheme's hyperparameters by name.
`depth` is the number of layers times the depth_count option.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from umup.errors import PlanError, did_you_mean
from umup.rules.hparams import Cell, Choice, HParam, Option, Place, resolve_options
from umup.rules.monomial import Monomial, constant, power, ratio
from umup.rules.opscales import (
    FIXED_UNIT_OPS,
    MUP_OPS,
    MUS_OPS,
    SP_OPS,
    SPECTRAL_OPS,
    UNIT_OPS,
    OpRule,
    depth_residual,
)
from umup.rules.roles import OpKind, Role

ONE, ZERO = constant(1.0), constant(0.0)


Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Scheme:
    """A parametrization.

    `one_rate`: every optimizer gives all parameters the same rate. `keeps_init`: a module's own initial weights are
    this scheme's. `needs_base`: formulas are relative to a base shape; `needs_base_depth`: to its depth, too. A
    `unit_scaled` one keeps tensors near RMS 1, so that FP8 and FP16 need no measured scale, and works only with
    operations that carry its numbers. `norm_placements`: where blocks may normalise, the usual place first.
    """

    name: str
    title: str
    source: str
    rows: Mapping[Role, Row]
    ops: Mapping[OpKind, OpRule]
    hparams: tuple[HParam, ...] = ()
    options: tuple[Option, ...] = ()
    one_rate: bool = False
    keeps_init: bool = False
    needs_base: bool = False
    needs_base_depth: bool = False
    unit_scaled: bool = False
    norm_placements: tuple[str, ...] = ("pre", "post")
    on_residual: Mapping[str, Cell] = field(default_factory=dict)
    factors: Mapping[Place, Cell] = field(default_factory=dict)


def scheme(name: str) -> Scheme:
    """The named scheme, or a PlanError naming the nearest."""
    if name not in SCHEMES:
        raise PlanError(f"parametrization.scheme: unknown scheme {name!r}; {did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]


def hparams_of(name: str, options: Mapping[str, str]) -> tuple[HParam, ...]:
    """The scheme's hyperparameters and those of the given choices. Raises PlanError for what does not exist."""
    table = scheme(name)
    chosen = resolve_options(name, table.options, options)
    return (*table.hparams, *(h for o in table.options for h in o.choices[chosen[o.name]].hparams))


def _row(
    source: str,
    init_std: Monomial,
    multiplier: Monomial = ONE,
    lr: Monomial = ONE,
    grad: Monomial = ONE,
    decay: Monomial = ONE,
    decay_coupled: Monomial | None = None,
    init_mean: Monomial = ZERO,
    **gradients: Monomial,
) -> Row:
    formulas = {
        "init_std": init_std,
        "init_mean": init_mean,
        "multiplier": multiplier,
        "lr": lr,
        "grad": grad,
        "decay_independent": decay,
        "decay_coupled": decay if decay_coupled is None else decay_coupled,
        **gradients,
    }
    return {quantity: Cell(formula, source) for quantity, formula in formulas.items()}


def _vectors(source: str, **cells: Monomial) -> dict[Role, Row]:
    """Gains start at 1, biases at 0; none decays."""
    bias = _row(source, ZERO, decay=ZERO, **cells)
    gain = _row(source, ZERO, decay=ZERO, init_mean=ONE, **cells)
    return {Role.NORM_GAIN: gain, Role.NORM_BIAS: bias, Role.BIAS: bias}


# --- SP: GPT-2's standard parametrization ----------------------------------------------------------------------

GPT2 = "GPT-2 (Radford et al. 2019, section 2.3)"
SIGMA = power("sigma_init")
# Two branches per layer write to the stream: 1/sqrt(2L).
HALF = Monomial(2**-0.5)
SIGMA_OUT = SIGMA * HALF * power("depth", "-1/2")
SIGMA_INIT = HParam("sigma_init", 0.02, 0.002, 0.2, "with muP: across width", "std of the initial weights", GPT2)

CEREBRAS = "2304.03208; Cerebras model zoo 2.10"
LOOKUPS, READOUTS = (Role.EMBEDDING, Role.POSITION), (Role.READOUT, Role.TIED_READOUT)
INIT = Option(
    "init",
    "normal",
    {
        "normal": Choice("initial weights are normal", GPT2),
        "truncated": Choice(
            "cut at two stds, which leaves a deviation of 0.8796 of the std; an untied head is not",
            CEREBRAS,
            cells={
                (role, "init_cut"): Cell(constant(2.0), CEREBRAS)
                for role in (*LOOKUPS, Role.INPUT, Role.HIDDEN, Role.HIDDEN_OUT)
            },
        ),
    },
)

_sp_matrix = _row(GPT2, SIGMA)

SP = Scheme(
    name="sp",
    title="standard parametrization",
    source=GPT2,
    hparams=(SIGMA_INIT,),
    options=(INIT,),
    ops=SP_OPS,
    one_rate=True,
    keeps_init=True,
    rows={
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION, Role.INPUT, Role.HIDDEN), _sp_matrix),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT, Role.SCALAR), _sp_matrix),
        Role.HIDDEN_OUT: _row(GPT2, SIGMA_OUT),
        **_vectors(GPT2),
    },
)

# --- NTP: the neural tangent parametrization --------------------------------------------------------------------

NTK = "1806.07572"
INV_SQRT_IN = power("fan_in", "-1/2")

_ntp_matrix = _row(NTK, ONE, INV_SQRT_IN)
_ntp_table = _row(NTK, ONE)

NTP = Scheme(
    name="ntp",
    title="neural tangent parametrization",
    source=NTK,
    ops=SP_OPS,
    one_rate=True,
    rows={
        # A lookup reads one row: its product has one term, not fan_in.
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION, Role.SCALAR), _ntp_table),
        **dict.fromkeys((Role.INPUT, Role.HIDDEN, Role.HIDDEN_OUT, Role.READOUT, Role.TIED_READOUT), _ntp_matrix),
        **_vectors(NTK),
    },
)

# --- muP: Tensor Programs V, table 8 (table 3 is this plan folded) ---------------------------------------------

TP5 = "2203.03466 table 8"
# A gradient's entry: that of the output (1/fan_out inside the network, 1 at the logits) times the multiplier.
PER_OUT, PER_IN = ratio("fan_out", -1), ratio("fan_in", -1)
MUP_HPARAMS = (
    SIGMA_INIT,
    HParam("alpha_emb", 1.0, 0.1, 100.0, "across width", "multiplier of the embedding", "2203.03466 app. F.4"),
    HParam("eta_emb", 1.0, 0.1, 10.0, "across width", "learning-rate factor of the embedding", "2407.17465"),
    HParam("alpha_attn", 1.0, 0.25, 4.0, "across width", "multiplier of attention logits", "2203.03466 app. F.4"),
    HParam("alpha_out", 1.0, 0.1, 10.0, "across width", "multiplier of the output logits", "2203.03466 app. F.4"),
)


def _mup_rows(sigma_out: Monomial) -> dict[Role, Row]:
    def hidden(sigma: Monomial) -> Row:
        std = sigma * ratio("fan_in", "-1/2")
        return _row(TP5, std, lr=PER_IN, grad=PER_OUT, decay_coupled=ratio("fan_in"))

    lookup = _row(TP5, SIGMA, power("alpha_emb"), lr=power("eta_emb"), grad=PER_OUT)
    readout = _row(TP5, SIGMA, power("alpha_out") * PER_IN, grad=PER_IN)
    return {
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), lookup),
        Role.INPUT: _row(TP5, SIGMA, grad=PER_OUT),
        Role.HIDDEN: hidden(SIGMA),
        Role.HIDDEN_OUT: hidden(sigma_out),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT), readout),
        **_vectors(TP5, grad=PER_OUT),
        Role.SCALAR: _row(TP5, SIGMA),
    }


NANO = "EleutherAI nanoGPT-mup"
# What the config formats of others name role by role: hyperparameter -> the place of its factor.
ROLE_STDS: Mapping[str, tuple[Place, ...]] = {
    "std_emb": tuple((None, role, "init_std") for role in LOOKUPS),
    "std_attn_out": ((OpKind.RESIDUAL_ATTN, Role.HIDDEN_OUT, "init_std"),),
    "std_ffn_in": ((OpKind.RESIDUAL_MLP, Role.HIDDEN, "init_std"),),
    "std_ffn_out": ((OpKind.RESIDUAL_MLP, Role.HIDDEN_OUT, "init_std"),),
    "std_head": ((None, Role.READOUT, "init_std"),),
}
ROLE_RATES: Mapping[str, tuple[Place, ...]] = {
    "eta_attn": tuple((OpKind.RESIDUAL_ATTN, role, "lr") for role in (Role.HIDDEN, Role.HIDDEN_OUT)),
    "eta_ffn_in": ((OpKind.RESIDUAL_MLP, Role.HIDDEN, "lr"),),
    "eta_ffn_out": ((OpKind.RESIDUAL_MLP, Role.HIDDEN_OUT, "lr"),),
}
ROLE_FACTORS = Option(
    "roles",
    "together",
    {
        "together": Choice("one initial std and one rate for all roles, but for the embedding's rate", TP5),
        "apart": Choice(
            "a factor on the initial std and on the rate of every kind of matrix, as other programs' configs have it",
            CEREBRAS,
            hparams=(
                *(
                    HParam(name, 1.0, 0.1, 10.0, "across width", f"initial std of {what} over sigma_init", CEREBRAS)
                    for name, what in zip(
                        ROLE_STDS,
                        ("embeddings", "attention outputs", "MLP inputs", "MLP outputs", "an untied head"),
                        strict=True,
                    )
                ),
                *(
                    HParam(name, 1.0, 0.1, 10.0, "across width", f"learning-rate factor of {what}", CEREBRAS)
                    for name, what in zip(ROLE_RATES, ("attention", "MLP inputs", "MLP outputs"), strict=True)
                ),
            ),
            factors={
                place: Cell(power(name), CEREBRAS)
                for name, places in {**ROLE_STDS, **ROLE_RATES}.items()
                for place in places
            },
        ),
    },
)


def _mup_options() -> tuple[Option, ...]:
    """On what muP's implementations differ; the defaults are the paper's and what follows from it."""
    hidden = (Role.HIDDEN, Role.HIDDEN_OUT)
    with_rate = {
        **{(role, "decay_coupled"): Cell(ONE, CEREBRAS) for role in hidden},
        **{(role, "decay_independent"): Cell(PER_IN, CEREBRAS) for role in hidden},
        **{(role, "decay_independent"): Cell(power("eta_emb"), CEREBRAS) for role in LOOKUPS},
    }
    root = Cell(power("alpha_out") * ratio("fan_in", "-1/2"), CEREBRAS)
    return (
        Option(
            "eps",
            "inv_width",
            {
                "inv_width": Choice("epsilon falls with the gradient, 1/width", "2203.03466 app. B.3"),
                "constant": Choice(
                    "one epsilon, which a fall of gradients below it makes felt at large widths",
                    f"microsoft/mup; {CEREBRAS}; {NANO}; llm.c",
                    cells={(role, "eps"): Cell(ONE, CEREBRAS) for role in Role},
                ),
            },
        ),
        Option(
            "decay",
            "constant",
            {
                "constant": Choice("what a step takes of a weight does not depend on width", "2203.03466; llm.c"),
                "with_rate": Choice(
                    "decay acts through each parameter's own rate, so that hidden matrices lose 1/width as much",
                    f"{CEREBRAS}; {NANO}",
                    cells=with_rate,
                ),
            },
        ),
        Option(
            "logits",
            "inv_width",
            {
                "inv_width": Choice("logits by 1/width", TP5),
                "inv_sqrt_width": Choice(
                    "logits by 1/sqrt(width): scale_output_logits_by_d false",
                    CEREBRAS,
                    cells={
                        **{(role, "multiplier"): root for role in READOUTS},
                        **{(role, "grad"): Cell(ratio("fan_in", "-1/2"), CEREBRAS) for role in READOUTS},
                    },
                ),
            },
        ),
        INIT,
        ROLE_FACTORS,
    )


MUP = Scheme(
    name="mup",
    title="maximal update parametrization",
    source="2203.03466",
    needs_base=True,
    ops=MUP_OPS,
    hparams=MUP_HPARAMS,
    options=_mup_options(),
    rows=_mup_rows(SIGMA_OUT),
)

# --- muP with depth: residual branches shrink, so the initial weights keep the base's depth ---------------------

TP6 = "2310.02244"
COMPLETE = "2505.01618 table 1"
DEPTH_ROWS = _mup_rows(SIGMA * HALF * power("base_depth", "-1/2"))


def _depth_ops(alpha: float, source: str) -> dict[OpKind, OpRule]:
    return dict.fromkeys((OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP), depth_residual(alpha, source))


DEPTH_MUP = Scheme(
    name="depth_mup",
    title="muP with branches and rates of 1/sqrt(depth)",
    source=TP6,
    needs_base=True,
    needs_base_depth=True,
    ops={**MUP_OPS, **_depth_ops(0.5, TP6)},
    hparams=MUP_HPARAMS,
    rows=DEPTH_ROWS,
    on_residual={"lr": Cell(ratio("depth", "-1/2"), TP6), "grad": Cell(ratio("depth", "-1/2"), TP6)},
)


def _complete(alpha: str, doc: str) -> Choice:
    a = Fraction(alpha)
    fewer = Cell(ratio("depth", a - 1), COMPLETE)
    return Choice(
        doc,
        COMPLETE,
        # Coupled decay follows the rate by itself; in the table it has no depth factor of its own.
        on_residual={"lr": fewer, "decay_independent": fewer, "grad": Cell(ratio("depth", -a), COMPLETE)},
        ops=_depth_ops(float(a), COMPLETE),
    )


COMPLETEP = Scheme(
    name="completep",
    title="CompleteP: muP with branches of depth^-alpha and rates of depth^(alpha-1)",
    source="2505.01618",
    needs_base=True,
    needs_base_depth=True,
    ops=MUP_OPS,
    hparams=MUP_HPARAMS,
    rows=DEPTH_ROWS,
    options=(
        Option(
            "depth_alpha",
            "1",
            {
                "1": _complete("1", "branches of 1/depth: no layer becomes lazy"),
                "0.5": _complete("1/2", "branches of 1/sqrt(depth); 2512.22382 finds that it transfers, too"),
            },
        ),
        Option(
            "embedding_eps",
            "inv_width",
            {
                "inv_width": Choice("epsilon of the embedding falls with its gradient, 1/width", "2512.22382"),
                "constant": Choice(
                    "epsilon of the embedding stays, which fails a coordinate check where epsilon matters",
                    "2505.01618, released code, according to 2512.22382",
                    cells={
                        (role, "grad"): Cell(ONE, "2505.01618, released code")
                        for role in (Role.EMBEDDING, Role.POSITION)
                    },
                ),
            },
        ),
        ROLE_FACTORS,
    ),
)

# --- spectral: initial weights and updates of spectral norm sqrt(fan_out/fan_in), without a base ----------------

NORMS = "2310.17813"
# std/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)): what a random matrix needs for that norm.
SPECTRAL_STD = power("min_fan", "1/2") * power("fan_in", -1)
_spectral_matrix = _row(
    NORMS, SPECTRAL_STD, lr=power("fan_in", -1), grad=power("fan_out", -1), decay_coupled=power("fan_in")
)
_spectral_table = _row(NORMS, ONE, grad=power("fan_out", -1))

SPECTRAL = Scheme(
    name="spectral",
    title="spectral condition: muP without a base shape",
    source=NORMS,
    ops=SPECTRAL_OPS,
    hparams=(HParam("alpha_attn", 1.0, 0.25, 16.0, "across width", "multiplier of attention logits", "2203.03466"),),
    rows={
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), _spectral_table),
        **dict.fromkeys((Role.INPUT, Role.HIDDEN, Role.HIDDEN_OUT, Role.READOUT), _spectral_matrix),
        # The embedding's entries have size 1: the factor does what the init does elsewhere.
        Role.TIED_READOUT: _row(NORMS, ONE, SPECTRAL_STD),
        **_vectors(NORMS, grad=power("fan_out", -1)),
        Role.SCALAR: _row(NORMS, ONE),
    },
)

# --- u-muP: unit-scaled muP -------------------------------------------------------------------------------------

U = "2407.17465 abc table"
U_GRAD = "2407.17465 app. B"
UNIT_LIBRARY = "the unit-scaling library"
PER_TOKEN = power("tokens", "-1/2")
# Each row of a lookup table sees tokens/fan_in gradients.
PER_LOOKUP = power("fan_in", "1/2") * PER_TOKEN


def _alpha(name: str, doc: str) -> HParam:
    return HParam(name, 1.0, 0.125, 8.0, "across width, depth, batch and length (2407.17465)", doc, U)


_unit_linear = {"grad_input": INV_SQRT_IN, "grad_weight": PER_TOKEN}
_unit_cut = {"grad_input": power("fan_out", "-1/2"), "grad_weight": PER_TOKEN}
_umup_lookup = _row(U, ONE, lr=power("fan_out", "-1/2"), grad_weight=PER_LOOKUP)
_umup_hidden = _row(U, ONE, INV_SQRT_IN, lr=INV_SQRT_IN, **_unit_linear)
# A cut edge may scale its two directions differently; nothing else may.
_umup_readout = _row(U, ONE, power("fan_in", -1), **_unit_cut)
DEPTH_COUNT = Option(
    "depth_count",
    "L",
    {
        "L": Choice("depth counts layers", UNIT_LIBRARY),
        "2L": Choice("depth counts branches", "the scaling library of Aleph Alpha, default", depth_per_layer=2.0),
    },
)

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
        DEPTH_COUNT,
        Option(
            "embedding_lr",
            "inv_sqrt_fan_out",
            {
                "inv_sqrt_fan_out": Choice("u-muP's changed rule", U),
                "constant": Choice(
                    "muP's rule; 2605.21486 finds that a large embedding rate is most of muP's benefit",
                    TP5,
                    cells={(role, "lr"): Cell(ONE, TP5) for role in (Role.EMBEDDING, Role.POSITION)},
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
                    UNIT_LIBRARY,
                    cells={(Role.BIAS, "multiplier"): Cell(INV_SQRT_IN, UNIT_LIBRARY)},
                ),
            },
        ),
    ),
    on_residual={"lr": Cell(power("depth", "-1/2"), "2407.17465 app. G; 2310.02244")},
    rows={
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), _umup_lookup),
        # Of a fixed fan_in, whose share in the rate is the library's: every weight but the readout has it.
        **dict.fromkeys((Role.INPUT, Role.HIDDEN, Role.HIDDEN_OUT), _umup_hidden),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT), _umup_readout),
        **_vectors(U_GRAD, grad_weight=PER_TOKEN),
        Role.SCALAR: _row(U_GRAD, ONE, grad_weight=PER_TOKEN),
    },
)

# --- unit scaling alone, and with muP's rates for res-post-norm networks ----------------------------------------

UNIT_SCALING = "2303.11257"
MUNIT = "2502.05967"

_unit_lookup = _row(UNIT_SCALING, ONE, grad_weight=PER_LOOKUP)
_unit_hidden = _row(UNIT_SCALING, ONE, INV_SQRT_IN, **_unit_linear)
_unit_readout = _row(UNIT_SCALING, ONE, INV_SQRT_IN, **_unit_cut)
_unit_vectors = {
    **_vectors(UNIT_SCALING, grad_weight=PER_TOKEN),
    Role.SCALAR: _row(UNIT_SCALING, ONE, grad_weight=PER_TOKEN),
}


def _tau(default: float, doc: str, source: str) -> HParam:
    return HParam("tau", default, 0.01, 0.9, doc, "share of a branch's variance in the stream", source, largest=0.999)


UNIT = Scheme(
    name="unit",
    title="unit scaling, one rate for all parameters",
    source=UNIT_SCALING,
    unit_scaled=True,
    one_rate=True,
    ops=FIXED_UNIT_OPS,
    hparams=(_tau(0.2, "does not: tuned per depth", UNIT_SCALING),),
    rows={
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), _unit_lookup),
        **dict.fromkeys((Role.INPUT, Role.HIDDEN, Role.HIDDEN_OUT), _unit_hidden),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT), _unit_readout),
        **_unit_vectors,
    },
)

MUS = Scheme(
    name="mus",
    title="munit scaling: fixed residual weights and res-post-norm",
    source=MUNIT,
    unit_scaled=True,
    norm_placements=("res_post",),
    ops=MUS_OPS,
    hparams=(_tau(0.4, "across width; falls with depth (0.4 at 4 layers)", MUNIT),),
    rows={
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), _row(MUNIT, ONE, grad_weight=PER_LOOKUP)),
        **dict.fromkeys((Role.HIDDEN, Role.HIDDEN_OUT), _row(MUNIT, ONE, INV_SQRT_IN, lr=INV_SQRT_IN, **_unit_linear)),
        Role.INPUT: _row(MUNIT, ONE, INV_SQRT_IN, **_unit_linear),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT), _row(MUNIT, ONE, power("fan_in", -1), **_unit_cut)),
        **_unit_vectors,
    },
)

SCHEMES: Mapping[str, Scheme] = {s.name: s for s in (SP, NTP, MUP, UMUP, UNIT, DEPTH_MUP, COMPLETEP, MUS, SPECTRAL)}
