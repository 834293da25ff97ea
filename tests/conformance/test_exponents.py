"""How each cell moves when width or depth doubles: exponents written by hand from the papers.

A network of one parameter per role; a role's exponent is the slope of log2(number) against log2(size).
"""

from fractions import Fraction
from itertools import product
from math import log2

import pytest

from umup.config.sections import BaseShape, ModelConfig
from umup.models.specs import architecture, base_architecture, shape_of
from umup.rules.plan import Plan, make_plan
from umup.rules.roles import OpKind, Role
from umup.rules.schemes import SCHEMES

H = Fraction(1, 2)
LOOKUP, HIDDEN = (Role.EMBEDDING, Role.POSITION), (Role.HIDDEN, Role.HIDDEN_OUT)
VECTORS = (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
# The columns of the tables of width.
COLUMNS = (LOOKUP, (Role.INPUT,), HIDDEN, (Role.READOUT,), VECTORS, (Role.SCALAR,))
# An update of theirs is as large as Adam's: its rates are theirs.
LIKE_ADAM = ("adam", "adamw", "nadam", "radam", "lion", "signsgd")
LIKE_MUP = ("mup", "depth_mup", "completep")
ONE_RATE = ("sp", "ntp", "unit")
MATRIX_OPTIMIZERS = ("muon", "muon_match_rms_adamw", "shampoo", "soap")

# (init_std, multiplier) of lookups, inputs, hidden, readout; vectors and scalars do not move. Under every optimizer.
FORMS = {
    "sp": ((0, 0), (0, 0), (0, 0), (0, 0)),  # GPT-2: normal 0.02
    "ntp": ((0, 0), (0, 0), (0, -H), (0, -H)),  # 1806.07572: 1/sqrt(fan_in) in front of N(0, 1)
    # 2203.03466 table 8: variances 1, 1, 1/fan_in, 1 and multipliers 1, 1, 1, 1/fan_in
    **dict.fromkeys(LIKE_MUP, ((0, 0), (0, 0), (-H, 0), (0, -1))),
    # 2310.17813: sqrt(min(fan_in, fan_out))/fan_in, which is 2203.03466 table 3: variances 1, 1, 1/fan_in, 1/fan_in^2
    "spectral": ((0, 0), (0, 0), (-H, 0), (-1, 0)),
    "unit": ((0, 0), (0, 0), (0, -H), (0, -H)),  # 2303.11257: every product by 1/sqrt(fan_in)
    "umup": ((0, 0), (0, 0), (0, -H), (0, -1)),  # 2407.17465 abc table, A and B
    "mus": ((0, 0), (0, 0), (0, -H), (0, -1)),  # 2502.05967
}

# Rates of lookups, inputs, hidden, readout, vectors, scalars.
NOTHING = (0, 0, 0, 0, 0, 0)
RATES = {
    **{(s, o): NOTHING for s in ONE_RATE for o in (*LIKE_ADAM, *MATRIX_OPTIMIZERS, "sgd", "adafactor")},
    # 2203.03466 table 8: fan_out, fan_out, 1, fan_in
    **{(s, "sgd"): (1, 1, 0, 1, 1, 0) for s in LIKE_MUP},
    # 2203.03466 table 8: 1, 1, 1/fan_in, 1
    **{(s, o): (0, 0, -1, 0, 0, 0) for s in LIKE_MUP for o in LIKE_ADAM},
    # 2407.05872: relative steps take the initial 1/sqrt(fan_in) out of Adam's 1/fan_in
    **{(s, "adafactor"): (0, 0, -H, 0, 0, 0) for s in LIKE_MUP},
    # 2512.05620: sqrt(fan_out/fan_in) for Muon, Shampoo and SOAP; all but hidden matrices by Adam
    **{(s, o): NOTHING for s in LIKE_MUP for o in ("muon", "shampoo", "soap")},
    # 2502.16982: an update already sqrt(max(fan_in, fan_out)) times orthogonal needs 1/sqrt(width)
    **{(s, "muon_match_rms_adamw"): (0, 0, -H, 0, 0, 0) for s in LIKE_MUP},
    # 2310.17813: fan_out/fan_in, which is 2203.03466 table 3: fan_out, 1, 1/fan_in
    ("spectral", "sgd"): (1, 1, 0, -1, 1, 0),
    # 2310.17813: 1/fan_in, which is 2203.03466 table 3
    **{("spectral", o): (0, 0, -1, -1, 0, 0) for o in LIKE_ADAM},
    ("spectral", "adafactor"): (0, 0, -H, 0, 0, 0),  # Adam's over the initial weights of FORMS
    **{("spectral", o): (0, 0, 0, -1, 0, 0) for o in ("muon", "shampoo", "soap")},
    ("spectral", "muon_match_rms_adamw"): (0, 0, -H, -1, 0, 0),
    # 2407.17465 abc table, C; inputs of a fixed fan_in do not move. Gradients and weights are of size 1, so that SGD's
    # rates (the unit-scaling library, `lr_scale_func_sgd`) and Adafactor's are Adam's.
    **{("umup", o): (-H, 0, -H, 0, 0, 0) for o in (*LIKE_ADAM, "sgd", "adafactor")},
    # The multiplier 1/sqrt(fan_in) is to meet an update of spectral norm sqrt(fan_out).
    **{("umup", o): (-H, 0, H, 0, 0, 0) for o in ("muon", "shampoo", "soap")},
    ("umup", "muon_match_rms_adamw"): (-H, 0, 0, 0, 0, 0),  # Toto 2.0: no 1/sqrt(fan_in), it would count twice
    # 2502.05967: 1/sqrt(fan_in) for hidden matrices alone
    **{("mus", o): (0, 0, -H, 0, 0, 0) for o in (*LIKE_ADAM, "sgd", "adafactor")},
    **{("mus", o): (0, 0, H, 0, 0, 0) for o in ("muon", "shampoo", "soap")},
    ("mus", "muon_match_rms_adamw"): NOTHING,
}

# Epsilons: what they are compared with.
EPSILONS = {
    # 2203.03466 app. B.3, 2505.01618 table 1 and 2512.22382 (embedding): like the gradient, 1/width
    **{(s, o): (-1, -1, -1, -1, -1, 0) for s in LIKE_MUP for o in ("adam", "adamw", "nadam", "radam")},
    # 2512.05620, released code: sqrt(fan_in/fan_out) for Muon and SOAP, its square for Shampoo
    **{(s, o): (-1, -1, 0, -1, -1, 0) for s in LIKE_MUP for o in MATRIX_OPTIMIZERS},
    **{(s, "adafactor"): (0, 0, -H, 0, 0, 0) for s in LIKE_MUP},  # 1804.04235: the RMS of the weights
    ("spectral", "adamw"): (-1, -1, -1, 0, -1, 0),  # logits have gradients of size 1, and no multiplier here
    ("umup", "adamw"): NOTHING,  # unit gradients
    ("umup", "muon"): (0, 0, 1, 0, 0, 0),  # their Frobenius norm
    ("umup", "shampoo"): (0, 0, 2, 0, 0, 0),
    **{("umup", o): NOTHING for o in ("sgd", "lion", "signsgd", "adafactor")},
}


def slope(small: float, large: float, doublings: int) -> float:
    return log2(large / small) / doublings if small or large else 0.0


def assert_slopes(wide: list[Plan], quantity: str, exponents: dict[Role, Fraction | int]) -> None:
    for doublings, plan in enumerate(wide[1:], 1):
        for role, exponent in exponents.items():
            numbers = (p.params[role][quantity] for p in (wide[0], plan))
            assert slope(*numbers, doublings) == pytest.approx(float(exponent), abs=1e-9), (role, quantity)


def by_role(row: tuple) -> dict[Role, Fraction | int]:
    return {role: exponent for roles, exponent in zip(COLUMNS, row, strict=True) for role in roles}


@pytest.mark.parametrize(("scheme", "optimizer"), RATES)
def test_width_moves_rates(plan_of, scheme, optimizer):
    assert_slopes(
        [plan_of(scheme, optimizer, width) for width in (64, 128, 256)], "lr", by_role(RATES[scheme, optimizer])
    )


@pytest.mark.parametrize(("scheme", "optimizer"), RATES)
def test_width_moves_initial_weights_and_multipliers_alike_under_every_optimizer(plan_of, scheme, optimizer):
    wide = [plan_of(scheme, optimizer, width) for width in (64, 128, 256)]
    for quantity, pick in (("init_std", 0), ("multiplier", 1)):
        assert_slopes(wide, quantity, by_role((*(form[pick] for form in FORMS[scheme]), 0, 0)))


@pytest.mark.parametrize(("scheme", "optimizer"), EPSILONS)
def test_width_moves_epsilons(plan_of, scheme, optimizer):
    wide = [plan_of(scheme, optimizer, width) for width in (64, 128, 256)]
    assert_slopes(wide, "eps", by_role(EPSILONS[scheme, optimizer]))


@pytest.mark.parametrize("scheme", ["mup", "completep", "depth_mup", "spectral"])
def test_width_leaves_decay_alone_but_for_what_the_rate_took(plan_of, scheme):
    """Coupled: 2505.01618 table 1, m_N for hidden matrices; spectral's readout has a rate of 1/fan_in, too."""
    coupled = (0, 0, 1, 1 if scheme == "spectral" else 0, 0, 0)
    for independent, row in ((True, NOTHING), (False, coupled)):
        wide = [plan_of(scheme, "adamw", width, independent=independent) for width in (64, 128)]
        assert_slopes(wide, "weight_decay", by_role(row))


# --- depth ------------------------------------------------------------------------------------------------------

# In a branch: the branch's weight, Adam's rate, SGD's, Adam's epsilon, decay independent and coupled; None: no power.
DEPTH = {
    **{(s, None): (0, 0, 0, 0, 0, 0) for s in (*ONE_RATE, "mup", "spectral", "mus")},
    # 2310.02244: branches by 1/sqrt(L), Adam's rate by 1/sqrt(L), SGD's by 1
    ("depth_mup", None): (-H, -H, 0, -H, 0, 0),
    # 2505.01618 table 1: L^-alpha, L^(alpha-1), epsilon L^-alpha, coupled decay 1; SGD: 2512.05620, released code
    ("completep", ("depth_alpha", "1")): (-1, 0, 1, -1, 0, 0),
    ("completep", ("depth_alpha", "0.5")): (-H, -H, 0, -H, -H, 0),
    # 2407.17465 app. G: rates by 1/sqrt(L); branch weights follow a closed form, and keep gradients of size 1
    ("umup", None): (None, -H, -H, 0, 0, 0),
    ("umup", ("depth_count", "2L")): (None, -H, -H, 0, 0, 0),
}
IN_BRANCH = tuple(f"branch.{role}" for role in (*HIDDEN, *VECTORS))
RESIDUALS = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)


@pytest.mark.parametrize(("scheme", "option"), DEPTH)
def test_depth(plan_of, scheme, option):
    branch, *columns = DEPTH[scheme, option]

    def deep(optimizer: str, independent: bool = True) -> list[Plan]:
        return [plan_of(scheme, optimizer, 128, d, independent, option=option) for d in (2, 4, 8)]

    adam, sgd, coupled = deep("adamw"), deep("sgd"), deep("adamw", independent=False)
    cases = [(adam, "lr"), (sgd, "lr"), (adam, "eps"), (adam, "weight_decay"), (coupled, "weight_decay")]
    for (plans, quantity), exponent in zip(cases, columns, strict=True):
        for k, name in product((1, 2), plans[0].stored):
            found = slope(plans[0].params[name][quantity], plans[k].params[name][quantity], k)
            vector = quantity == "weight_decay" and plans[0].params[name].spec.role in VECTORS
            expected = float(exponent) if name in IN_BRANCH and not vector else 0.0
            assert found == pytest.approx(expected, abs=1e-9), (name, quantity)
    if branch is not None:
        for kind in RESIDUALS:
            weights = [p.ops[f"layers.0.{kind}"]["branch"] for p in adam]
            assert slope(weights[0], weights[2], 2) == pytest.approx(float(branch), abs=1e-9)


@pytest.mark.parametrize(
    ("scheme", "exponent"),
    # GPT-2's 1/sqrt(2L) on what writes to the stream; where branches shrink, initial weights keep their size.
    [("sp", -H), ("mup", -H), ("depth_mup", 0), ("completep", 0), ("umup", 0), ("spectral", 0), ("ntp", 0)],
)
def test_depth_and_initial_weights(plan_of, scheme, exponent):
    shallow, deep = (plan_of(scheme, "adamw", 128, d) for d in (2, 8))
    for name, p in shallow.stored.items():
        expected = float(exponent) if p.spec.role is Role.HIDDEN_OUT else 0.0
        assert slope(p["init_std"], deep.params[name]["init_std"], 2) == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize(
    ("scheme", "exponent"),
    [("sp", -H), ("mup", -1), ("depth_mup", -1), ("completep", -1), ("umup", -1), ("spectral", -1)],
)
def test_head_size_and_attention_logits(scheme, exponent):
    """2203.03466 definition 4.1: 1/d instead of 1/sqrt(d)."""
    logits = []
    for d in (16, 64):
        shape = shape_of(ModelConfig(hidden_size=256, head_dim=d))
        base = base_architecture(shape, BaseShape(hidden_size=64, head_dim=32), 64)
        plan = make_plan(scheme, architecture(shape, 64), base if SCHEMES[scheme].needs_base else None)
        logits += [op["logits"] for op in plan.ops.values() if op.site.kind is OpKind.SDPA][:1]
    assert slope(*logits, 2) == pytest.approx(float(exponent), abs=1e-9)
