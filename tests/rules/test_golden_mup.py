"""The mup table equals Microsoft's `mup` package (Adam), number by number, below, at and above the base width."""

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from umup.config.sections import ModelConfig
from umup.models.specs import Shape, architecture, shape_of
from umup.rules.plan import Plan, make_plan
from umup.rules.roles import Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mup
    import mup.init

BASE, WIDTHS, DEPTHS = 128, (64, 128, 192, 512, 1024), (1, 2, 5)
VOCAB, LR, DECAY, SIGMA, ALPHA_OUT = 48, 0.003, 0.1, 0.02, 0.7
NO_DECAY = (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)

every_case = pytest.mark.parametrize(
    ("width", "depth", "tied"), [(w, d, t) for w in WIDTHS for d in DEPTHS for t in (False, True)]
)


def shape(width: int, depth: int, tied: bool) -> Shape:
    """A GPT-2 whose MLP and heads grow by other factors than its width: no two fans share one ratio."""
    full = shape_of(
        ModelConfig(
            family="gpt2",
            hidden_size=width,
            num_layers=depth,
            head_dim=32,
            num_kv_heads=1,
            intermediate_size=4 * width + 96,
            vocab_size=VOCAB,
            max_seq_len=16,
            tie_embeddings=tied,
        )
    )
    return replace(full, head_dim=width // 2)


@cache
def plan(width: int, depth: int, tied: bool) -> Plan:
    target, base = (architecture(shape(w, depth, tied), tokens=512) for w in (width, BASE))
    return make_plan(
        "mup", target, base, independent_weight_decay=False, hparams={"sigma_init": SIGMA, "alpha_out": ALPHA_OUT}
    )


class Reference(nn.Module):
    """The same parameters in plain torch and mup's readouts, under the same names with `_` for `.`."""

    def __init__(self, width: int, depth: int, tied: bool) -> None:
        super().__init__()
        inner, kv = 4 * width + 96, width // 2
        self.embed, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(16, width)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attn = {"norm": nn.LayerNorm(width), "q": nn.Linear(width, width), "k": nn.Linear(width, kv)}
            attn |= {"v": nn.Linear(width, kv), "out": nn.Linear(width, width)}
            mlp = {"norm": nn.LayerNorm(width), "up": nn.Linear(width, inner), "down": nn.Linear(inner, width)}
            self.layers.append(nn.ModuleDict({"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)}))
        self.norm = nn.LayerNorm(width)
        if tied:
            self.head: nn.Module = mup.MuSharedReadout(self.embed.weight, bias=False, output_mult=ALPHA_OUT)
        else:
            self.head = mup.MuReadout(width, VOCAB, bias=False, output_mult=ALPHA_OUT)


@cache
def reference(width: int, depth: int, tied: bool, rescale: bool = False) -> Reference:
    model = Reference(width, depth, tied)
    mup.set_base_shapes(model, Reference(BASE, depth, tied), rescale, Reference(2 * BASE, depth, tied))
    return model


def groups_of(model: nn.Module, plan: Plan) -> dict[str, dict]:
    """MuAdamW's group of each parameter; no decay on vectors is the package's user's own choice."""
    named = dict(model.named_parameters())
    vectors = [p for name, p in named.items() if plan.params[name].spec.role in NO_DECAY]
    matrices = [p for p in named.values() if all(p is not v for v in vectors)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = mup.MuAdamW(groups, lr=LR)
    of_tensor = {id(p): group for group in adam.param_groups for p in group["params"]}
    return {name: of_tensor[id(p)] for name, p in named.items()}


def test_every_role_is_compared():
    roles = {p.spec.role for tied in (True, False) for p in plan(256, 2, tied).params.values()}
    assert roles == set(Role) - {Role.INPUT, Role.SCALAR}  # for those, test_golden_mup_optimizers.py


@every_case
def test_learning_rates_and_coupled_decay(width, depth, tied):
    ours = plan(width, depth, tied)
    groups = groups_of(reference(width, depth, tied), ours)
    assert set(groups) == set(ours.stored)
    for name, p in ours.stored.items():
        assert LR * p["lr"] == pytest.approx(groups[name]["lr"], rel=1e-12), name
        assert DECAY * p["weight_decay"] == pytest.approx(groups[name]["weight_decay"], rel=1e-12), name


@every_case
def test_initial_standard_deviations(width, depth, tied, monkeypatch):
    drawn: list[float] = []
    monkeypatch.setattr(mup.init, "_no_grad_normal_", lambda tensor, mean, std: drawn.append(std))
    ours = plan(width, depth, tied)
    for name, parameter in reference(width, depth, tied).named_parameters():
        role = ours.params[name].spec.role
        if role in NO_DECAY:
            continue
        # The package's GPT-2 example passes 0.02/sqrt(2L) for matrices that write to the residual stream.
        mup.init.normal_(parameter, std=SIGMA / (2 * depth) ** 0.5 if role is Role.HIDDEN_OUT else SIGMA)
        assert ours.params[name]["init_std"] == pytest.approx(drawn[-1], rel=1e-12), name
    assert len(drawn) == 3 + 6 * depth - tied


@every_case
def test_forward_multiplier_of_the_readout(width, depth, tied):
    head = reference(width, depth, tied).head
    stored: Any = head.get_parameter("weight")
    x, weight = torch.randn(3, width, dtype=torch.float64), stored.detach().double()
    weight.infshape = stored.infshape
    multiplier = plan(width, depth, tied).params["head.weight"]["multiplier"]
    torch.testing.assert_close(
        torch.func.functional_call(head, {"weight": weight}, (x,)), multiplier * (x @ weight.T), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_package_makes_the_readouts_init_as_constant_in_width_as_ours(width):
    """set_base_shapes turns torch's 1/sqrt(width) into a constant by a factor sqrt(width/base)."""
    model = Reference(width, 1, tied=False)
    before = model.head.get_parameter("weight").detach().double()
    mup.set_base_shapes(model, Reference(BASE, 1, False), delta=Reference(2 * BASE, 1, False))
    factor = (model.head.get_parameter("weight") / before).median().item()
    ours, base = (plan(w, 1, False).params["head.weight"]["init_std"] for w in (width, BASE))
    assert ours / base == pytest.approx(factor * (BASE / width) ** 0.5, rel=1e-6)


def test_the_comparison_can_fail():
    """A width taken for the other side of an uneven matrix is seen."""
    wrong = plan(512, 1, False).params["layers.0.mlp.up.weight"]["lr"]
    right = groups_of(reference(512, 1, False), plan(512, 1, False))["layers.0.mlp.down.weight"]["lr"]
    assert wrong * LR != pytest.approx(right, rel=1e-3)
