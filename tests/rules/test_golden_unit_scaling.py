"""The umup table equals the unit-scaling package (Adam): factors measured on its modules, forward and backward."""

import warnings
from functools import cache
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from umup.config.sections import ModelConfig
from umup.models.specs import architecture, shape_of
from umup.rules.plan import ParamPlan, Plan, make_plan
from umup.rules.roles import OpKind, Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import unit_scaling as uu
    from unit_scaling._modules import TransformerStack
    from unit_scaling.core.functional import transformer_residual_scaling_rule
    from unit_scaling.optim import lr_scale_func_adam

WIDTHS, DEPTHS, VOCAB, TOKENS, POSITIONS = (32, 48, 64, 128, 256), (1, 3, 8), 40, 96, 16
TABLES = (Role.EMBEDDING, Role.POSITION)
MATRICES = (Role.HIDDEN, Role.HIDDEN_OUT, Role.READOUT)
NORMS = (Role.NORM_GAIN, Role.NORM_BIAS)

every_case = pytest.mark.parametrize(("width", "depth"), [(w, d) for w in WIDTHS for d in DEPTHS])
every_width = pytest.mark.parametrize("width", WIDTHS)


@cache
def plan(width: int, depth: int, bias_multiplier: str = "one") -> Plan:
    model = ModelConfig(
        family="gpt2",
        hidden_size=width,
        num_layers=depth,
        head_dim=16,
        intermediate_size=3 * width,
        vocab_size=VOCAB,
        max_seq_len=POSITIONS,
        tie_embeddings=False,
    )
    return make_plan("umup", architecture(shape_of(model), TOKENS), options={"bias_multiplier": bias_multiplier})


@cache
def reference(width: int, depth: int) -> nn.Module:
    """The package's modules under our parameters' names."""

    def linear(fan_in: int, fan_out: int) -> nn.Module:
        return uu.Linear(fan_in, fan_out, bias=True)

    def norm() -> nn.Module:
        return uu.LayerNorm(width, elementwise_affine=True)

    def layer() -> nn.Module:
        attn = {"norm": norm(), **{name: linear(width, width) for name in ("q", "k", "v", "out")}}
        mlp = {"norm": norm(), "up": linear(width, 3 * width), "down": linear(3 * width, width)}
        return nn.ModuleDict({"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)})

    model = nn.Module()
    model.embed, model.positions = uu.Embedding(VOCAB, width), uu.Embedding(POSITIONS, width)
    model.layers = uu.DepthModuleList([layer() for _ in range(depth)])
    model.norm, model.head = norm(), uu.LinearReadout(width, VOCAB)
    return model


def with_role(width: int, *roles: Role, bias_multiplier: str = "one") -> list[tuple[nn.Module, ParamPlan]]:
    """(float64 module, plan entry) of every parameter with one of the roles in the first layer and outside layers."""
    params = plan(width, 1, bias_multiplier).params
    modules = {name: module.double() for name, module in reference(width, 1).named_modules()}
    return [(modules[n.rpartition(".")[0]], p) for n, p in params.items() if p.spec.role in roles]


def assert_factor(scaled: Tensor | None, factor: float, plain: Tensor) -> None:
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-12, atol=1e-12 * plain.abs().max().item())


# The package ties nothing; a decoder has no dense inputs and no scalars.
LEFT_OUT = {Role.TIED_READOUT, Role.INPUT, Role.SCALAR}


def test_every_role_but_the_tied_readout_is_compared():
    assert {p.spec.role for p in plan(64, 1).params.values()} == set(Role) - LEFT_OUT
    assert {*TABLES, *MATRICES, *NORMS, Role.BIAS} == set(Role) - LEFT_OUT


@every_case
def test_learning_rates(width, depth):
    theirs = dict(reference(width, depth).named_parameters())
    ours = plan(width, depth).params
    assert set(theirs) == set(ours)
    for name, p in ours.items():
        assert p["lr"] == pytest.approx(lr_scale_func_adam(theirs[name]), rel=1e-12), name


def test_initial_weights():
    model = reference(256, 1)
    for name, p in plan(256, 1).params.items():
        weight = model.get_parameter(name).detach()
        if p["init_std"] == 0:
            assert torch.equal(weight, torch.full_like(weight, p["init_mean"])), name
        else:
            error = 4 / sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(p["init_std"], rel=error), name
            assert weight.mean().item() == pytest.approx(p["init_mean"], abs=error), name


@every_width
def test_factors_of_matrices(width):
    for module, p in with_role(width, *MATRICES):
        x = torch.randn(TOKENS, p.spec.fan_in, dtype=torch.float64, requires_grad=True)
        weight = module.get_parameter("weight").detach().clone().requires_grad_()
        out = torch.func.functional_call(module, {"weight": weight}, (x,))
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert_factor(out.detach(), p["multiplier"], (x @ weight.T).detach())
        assert_factor(x.grad, p["grad_input"], upstream @ weight.detach())
        assert_factor(weight.grad, p["grad_weight"], upstream.T @ x.detach())


@every_width
def test_factors_of_tables(width):
    for module, p in with_role(width, *TABLES):
        ids = torch.randint(p.spec.fan_in, (TOKENS,))
        weight = module.get_parameter("weight").detach().clone().requires_grad_()
        out = torch.func.functional_call(module, {"weight": weight}, (ids,))
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert_factor(out.detach(), p["multiplier"], weight.detach()[ids])
        plain = torch.zeros_like(weight.detach()).index_add(0, ids, upstream)
        assert_factor(weight.grad, p["grad_weight"], plain)


@every_width
def test_factors_of_norms(width):
    x = torch.randn(TOKENS, width, dtype=torch.float64)
    normal = torch.nn.functional.layer_norm(x, (width,))
    for module, p in with_role(width, *NORMS):
        gain = torch.randn(width, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(width, dtype=torch.float64, requires_grad=True)
        out = torch.func.functional_call(module, {"weight": gain, "bias": bias}, (x,))
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert_factor(out.detach(), p["multiplier"], (normal * gain + bias).detach())
        if p.spec.role is Role.NORM_GAIN:
            assert_factor(gain.grad, p["grad_weight"], (upstream * normal).sum(0))
        else:
            assert_factor(bias.grad, p["grad_weight"], upstream.sum(0))


@every_width
@pytest.mark.parametrize("option", ["inv_sqrt_fan_in", "one"])
def test_factors_of_biases(width, option):
    for module, p in with_role(width, Role.BIAS, bias_multiplier=option):
        bias = torch.randn(p.spec.fan_out, dtype=torch.float64, requires_grad=True)
        out = torch.func.functional_call(module, {"bias": bias}, (torch.zeros(TOKENS, p.spec.fan_in).double(),))
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert_factor(bias.grad, p["grad_weight"], upstream.sum(0))
        # The default differs: muP adds a bias after the multiplier, so that its step does not shrink with width.
        factor = p["multiplier"] if option == "inv_sqrt_fan_in" else p["multiplier"] / sqrt(p.spec.fan_in)
        assert_factor(out.detach(), factor, bias.detach().expand_as(out))
        assert option == "inv_sqrt_fan_in" or p["multiplier"] == 1.0


def residuals(depth: int, alpha_res: float, ratio: float, **options: str) -> list[tuple[float, float]]:
    """(branch, skip) of every branch in execution order."""
    hparams = {"alpha_res": alpha_res, "alpha_res_attn_ratio": ratio}
    model = ModelConfig(hidden_size=32, head_dim=16, num_layers=depth)
    ours = make_plan("umup", architecture(shape_of(model), TOKENS), hparams=hparams, options=options)
    sites = [op for op in ours.ops.values() if op.site.kind in (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)]
    assert all(op["split_grad"] == op["branch"] and op["branch_grad"] == 1.0 for op in sites)
    return [(op["branch"], op["skip"]) for op in sites]


every_residual = pytest.mark.parametrize(
    ("depth", "alpha_res", "ratio"), [(d, a, r) for d in DEPTHS for a in (0.25, 1.0, 3.0) for r in (0.5, 1.0, 4.0)]
)


@every_residual
def test_residual_weights(depth, alpha_res, ratio):
    rule = transformer_residual_scaling_rule(alpha_res, ratio)
    stack = TransformerStack(depth, rule, hidden_size=8, heads=1, is_causal=True)
    taus = [tau for layer in stack for tau in (layer.mhsa_tau, layer.mlp_tau)]
    expected = [(tau / sqrt(1 + tau**2), 1 / sqrt(1 + tau**2)) for tau in taus]
    assert residuals(depth, alpha_res, ratio) == [pytest.approx(pair, rel=1e-12) for pair in expected]


def aleph_alpha_weights(depth: float, branches: int, mult: float, ratio: float) -> list[tuple[float, float]]:
    """The formula of Aleph-Alpha/scaling, where depth is 2L unless `normalize_depth_to_num_layers`."""
    r_mlp = mult * sqrt(2 / (1 + ratio**2))
    r = [(ratio * r_mlp if k % 2 == 0 else r_mlp) / sqrt(depth) for k in range(branches)]
    tau = [r[k] ** 2 / (1 + sum(x**2 for x in r[:k])) for k in range(branches)]
    return [(sqrt(t / (1 + t)), sqrt(1 / (1 + t))) for t in tau]


@every_residual
@pytest.mark.parametrize("option", ["L", "2L"])
def test_residual_weights_of_the_aleph_alpha_library(depth, alpha_res, ratio, option):
    expected = aleph_alpha_weights(2 * depth if option == "2L" else depth, 2 * depth, alpha_res, ratio)
    ours = residuals(depth, alpha_res, ratio, depth_count=option)
    assert ours == [pytest.approx(pair, rel=1e-12) for pair in expected]


def test_worked_values_of_the_aleph_alpha_library():
    assert residuals(3, 1.0, 1.0)[:3] == [
        pytest.approx((0.5, 0.8660254)),
        pytest.approx((0.4472136, 0.8944272)),
        pytest.approx((0.4082483, 0.9128709)),
    ]


def test_counting_branches_divides_branch_learning_rates_by_sqrt_two():
    sizes = architecture(shape_of(ModelConfig(hidden_size=32, head_dim=16, num_layers=3)), TOKENS)
    layers, branches = (make_plan("umup", sizes, options={"depth_count": o}) for o in ("L", "2L"))
    for name, p in layers.params.items():
        factor = sqrt(0.5) if p.spec.on_residual else 1.0
        assert branches.params[name]["lr"] == pytest.approx(factor * p["lr"], rel=1e-12)


def test_the_comparison_can_fail():
    """The readout, backward, is where forward and backward factors differ."""
    module, p = with_role(64, Role.READOUT)[0]
    x = torch.randn(TOKENS, 64, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    plain = module.get_parameter("weight").detach().sum(0).expand(TOKENS, -1)
    assert_factor(x.grad, p["grad_input"], plain)
    with pytest.raises(AssertionError):
        assert_factor(x.grad, p["multiplier"], plain)
