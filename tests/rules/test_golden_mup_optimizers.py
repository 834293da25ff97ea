"""The tables under SGD, Adam and AdamW equal the packages: microsoft/mup for mup, unit-scaling for umup.

The network is not a transformer: dense and convolutional inputs, uneven shapes, both readouts, and what grows nowhere.
"""

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from umup.rules.plan import Plan, make_plan
from umup.rules.roles import Architecture, ParamSpec, Role, Sizes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mup
    import unit_scaling as uu
    from unit_scaling.optim import lr_scale_func_adam, lr_scale_func_sgd

BASE, WIDTHS, FEATURES, CLASSES = 64, (32, 64, 96, 256, 1000), 12, 10
LR, DECAY, ALPHA_OUT = 0.003, 0.1, 0.7
NO_DECAY = (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
PACKAGES: dict[str, Callable] = {"sgd": mup.MuSGD, "adam": mup.MuAdam, "adamw": mup.MuAdamW}

every_width = pytest.mark.parametrize("width", WIDTHS)
every_optimizer = pytest.mark.parametrize("optimizer", PACKAGES)


class Net(nn.Module):
    """Its sides grow by different factors: width, and an inner one of 3*width + 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 3 * width + 32
        self.dense = nn.Linear(FEATURES, width)
        self.patches = nn.Conv2d(3, width, 5)
        self.depthwise = nn.Conv1d(width, width, 4, groups=width)
        self.embed = nn.Embedding(CLASSES, width)
        self.up = nn.Linear(width, inner)
        self.conv = nn.Conv2d(inner, width, 3)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)
        self.temperature = nn.Parameter(torch.ones(()))
        self.mix = nn.Linear(4, 6, bias=False)
        self.head = mup.MuReadout(width, CLASSES, output_mult=ALPHA_OUT)
        self.shared = mup.MuSharedReadout(self.embed.weight, bias=False, output_mult=ALPHA_OUT)


def architecture(width: int) -> Architecture:
    """The same parameters as the rules see them."""
    inner = 3 * width + 32
    sides = {
        "dense": (Role.INPUT, FEATURES, width),
        "patches": (Role.INPUT, 3 * 25, width),
        "depthwise": (Role.INPUT, 4, width),
        "embed": (Role.EMBEDDING, CLASSES, width),
        "up": (Role.HIDDEN, width, inner),
        "conv": (Role.HIDDEN, 9 * inner, width),
        "down": (Role.HIDDEN, inner, width),
        "mix": (Role.SCALAR, 4, 6),
        "head": (Role.READOUT, width, CLASSES),
    }
    shapes = {name: tuple(p.shape) for name, p in Net(width).named_parameters()}
    params = [ParamSpec(f"{n}.weight", r, shapes[f"{n}.weight"], i, o) for n, (r, i, o) in sides.items()]
    biased = [name.removesuffix(".bias") for name in shapes if name.endswith(".bias") and name != "norm.bias"]
    params += [ParamSpec(f"{n}.bias", Role.BIAS, shapes[f"{n}.bias"], *sides[n][1:]) for n in biased]
    params += [ParamSpec(f"norm.{n}", r, (width,), width, width) for n, r in NORM.items()]
    params.append(ParamSpec("temperature", Role.SCALAR, (), 1, 1))
    tied = ParamSpec("shared.weight", Role.TIED_READOUT, shapes["embed.weight"], width, CLASSES, tied_to="embed.weight")
    return Architecture((*params, tied), (), Sizes(2, 128, 16, 8, CLASSES))


NORM = {"weight": Role.NORM_GAIN, "bias": Role.NORM_BIAS}


@cache
def plan(width: int, optimizer: str) -> Plan:
    return make_plan(
        "mup",
        architecture(width),
        architecture(BASE),
        optimizer=optimizer,
        independent_weight_decay=False,
        hparams={"alpha_out": ALPHA_OUT},
    )


@cache
def reference(width: int) -> Net:
    net = Net(width)
    mup.set_base_shapes(net, Net(BASE), rescale_params=False, delta=Net(2 * BASE))
    return net


def groups_of(net: nn.Module, optimizer: str) -> dict[str, dict]:
    made = PACKAGES[optimizer](net.parameters(), lr=LR, weight_decay=DECAY)
    of_tensor = {id(p): group for group in made.param_groups for p in group["params"]}
    return {name: of_tensor[id(p)] for name, p in net.named_parameters()}


def test_every_role_is_compared_but_positions_and_what_writes_to_a_stream():
    roles = {p.spec.role for p in plan(64, "sgd").params.values()}
    assert roles == set(Role) - {Role.POSITION, Role.HIDDEN_OUT}


@every_width
@every_optimizer
def test_learning_rates(width, optimizer):
    ours, theirs = plan(width, optimizer), groups_of(reference(width), optimizer)
    assert set(theirs) == set(ours.stored)
    for name, p in ours.stored.items():
        assert LR * p["lr"] == pytest.approx(theirs[name]["lr"], rel=1e-12), name


@every_width
@every_optimizer
def test_coupled_decay(width, optimizer):
    """The number alone: the package's Adam adds decay to the gradient, ours decouples it. Ours spares vectors."""
    ours, theirs = plan(width, optimizer), groups_of(reference(width), optimizer)
    for name, p in ours.stored.items():
        decays = p.spec.role not in NO_DECAY
        expected = theirs[name]["weight_decay"] if decays else 0.0
        assert DECAY * p["weight_decay"] == pytest.approx(expected, rel=1e-12), name


@every_width
@every_optimizer
def test_multipliers_of_the_readouts(width, optimizer):
    """The package's readouts divide by the width under SGD, too: table 8 of 2203.03466, whose SGD rate is fan_in."""
    net, ours = reference(width), plan(width, optimizer)
    x = torch.randn(3, width)
    for name, readout, bias in (("head", net.head, net.head.bias), ("shared", net.shared, 0.0)):
        expected = ours.params[f"{name}.weight"]["multiplier"] * (x @ readout.weight.T) + bias
        torch.testing.assert_close(readout(x), expected, rtol=1e-4, atol=1e-6)


def test_sgd_in_numbers():
    """Four times the width, the inner side (3*64+32 -> 3*256+32) by 800/224."""
    inner = 800 / 224
    rates = {name: p["lr"] for name, p in plan(256, "sgd").stored.items()}
    assert rates["dense.weight"] == rates["patches.weight"] == rates["norm.weight"] == rates["head.weight"] == 4.0
    assert rates["up.weight"] == pytest.approx(inner / 4)
    assert rates["down.weight"] == rates["conv.weight"] == pytest.approx(4 / inner)
    assert rates["up.bias"] == pytest.approx(inner)
    assert rates["head.bias"] == rates["temperature"] == rates["mix.weight"] == 1.0


@every_optimizer
def test_a_matrix_stored_transposed_differs_on_purpose(optimizer):
    """The package takes the last side of a matrix for its input, which is wrong for GPT-2's Conv1D: we are told."""

    class Transposed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 3 * width + 32))

    net = Transposed(256)
    mup.set_base_shapes(net, Transposed(BASE), rescale_params=False, delta=Transposed(2 * BASE))
    theirs = groups_of(net, optimizer)["weight"]["lr"]
    assert theirs == pytest.approx(LR * plan(256, optimizer).params["down.weight"]["lr"], rel=1e-12)
    assert theirs != pytest.approx(LR * plan(256, optimizer).params["up.weight"]["lr"], rel=1e-3)


# --- unit-scaling -----------------------------------------------------------------------------------------------

# Role, fan_in, fan_out and the package's module.
UNIT: dict[str, tuple[Role, Callable[[int], tuple[int, int]], Callable[[int, int], nn.Module]]] = {
    "input": (Role.INPUT, lambda n: (FEATURES, n), uu.Linear),
    "hidden": (Role.HIDDEN, lambda n: (n, 3 * n), uu.Linear),
    "readout": (Role.READOUT, lambda n: (n, CLASSES), uu.LinearReadout),
    "embedding": (Role.EMBEDDING, lambda n: (CLASSES, n), uu.Embedding),
    "norm_gain": (Role.NORM_GAIN, lambda n: (n, n), lambda n, _: uu.LayerNorm(n, elementwise_affine=True)),
}
SCALES = {"sgd": lr_scale_func_sgd(None), "adam": lr_scale_func_adam}


@every_width
@pytest.mark.parametrize("name", UNIT)
@pytest.mark.parametrize("optimizer", SCALES)
@pytest.mark.parametrize("depth", [None, 5])
def test_rates_of_unit_scaling(width, name, optimizer, depth):
    """Its SGD with an unconstrained readout, as ours is: gradients have size 1, and the rates are Adam's."""
    role, sides, module = UNIT[name]
    layer = module(*sides(width))
    weight = uu.DepthSequential(*[layer] * depth)[0].weight if depth else layer.weight
    spec = ParamSpec("w", role, tuple(weight.shape), *sides(width), on_residual=depth is not None)
    network = Architecture((spec,), (), Sizes(depth or 1, 128, 16, 8, CLASSES))
    ours = make_plan("umup", network, optimizer=optimizer).params["w"]
    assert ours["lr"] == pytest.approx(SCALES[optimizer](weight), rel=1e-12)
