"""What the rates are for: an aligned update moves a layer's output alike at every width and depth.

Independent of the tables' formulas: a layer `y = multiplier * W @ x` with x of unit entries gets the gradient that a
network of this scheme would hand it, an optimizer makes its step of it, and the change of y is measured.
Entries are +-1 times their size, so that nothing is left to sampling.
"""

from math import sqrt

import pytest
import torch
from torch import Tensor

from umup.optim.groups import FAMILIES
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import OpPlan, ParamPlan, Plan, make_plan
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import SCHEMES

WIDTHS, DEPTHS, LOGITS, INPUTS = (64, 256, 1024), (2, 8, 32), 8, 12


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def orthogonal(gradient: Tensor) -> Tensor:
    """u @ v.T of singular values 1: a gradient of one sample has rank one."""
    return gradient / gradient.norm()


def muon(weight: Tensor, gradient: Tensor) -> Tensor:
    rows, columns = weight.shape
    return sqrt(max(1, rows / columns)) * orthogonal(gradient)


def muon_match_rms(weight: Tensor, gradient: Tensor) -> Tensor:
    return 0.2 * sqrt(max(weight.shape)) * orthogonal(gradient)


# The step of rate 1 from a weight and its gradient.
STEPS = {
    "sgd": lambda weight, gradient: gradient,
    **dict.fromkeys(
        ("adam", "adamw", "nadam", "radam", "lion", "signsgd"), lambda weight, gradient: gradient / gradient.abs()
    ),
    "adafactor": lambda weight, gradient: rms(weight) * gradient / gradient.abs(),
    "muon": muon,
    "muon_match_rms_adamw": muon_match_rms,
    # (G @ G.T)^(-1/4) @ G @ (G.T @ G)^(-1/4); in the basis of G's own singular vectors Adam makes the same of it.
    **dict.fromkeys(("shampoo", "soap"), lambda weight, gradient: orthogonal(gradient)),
}


def layer(role: Role, fan_in: int, fan_out: int, in_branch: bool = False) -> ParamSpec:
    return ParamSpec("w", role, (fan_out, fan_in), fan_in, fan_out, in_branch)


LAYERS = {
    "square": lambda n: layer(Role.HIDDEN, n, n),
    "up": lambda n: layer(Role.HIDDEN, n, 2 * n),
    "down": lambda n: layer(Role.HIDDEN_OUT, 2 * n, n),
    "keys": lambda n: layer(Role.HIDDEN, n, 8 * int(sqrt(n))),  # fewer and fewer heads for keys
    "input": lambda n: layer(Role.INPUT, INPUTS, n),
    "readout": lambda n: layer(Role.READOUT, n, LOGITS),
    "embedding": lambda n: ParamSpec("w", Role.EMBEDDING, (INPUTS, n), INPUTS, n),
    "bias": lambda n: ParamSpec("w", Role.BIAS, (n,), n, n),
    "gain": lambda n: ParamSpec("w", Role.NORM_GAIN, (n,), n, n),
}
RULED = [name for name, table in SCHEMES.items() if not table.one_rate]
# 2407.17465 changes muP's rule: the embedding's rate falls as 1/sqrt(fan_out).
FALLING = {("umup", "embedding"): -0.5}


def plan_of(scheme: str, optimizer: str, spec: ParamSpec, base: ParamSpec, depth: int = 2, **options: str) -> Plan:
    kinds = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)

    def network(one: ParamSpec, layers: int) -> Architecture:
        sites = tuple(OpSite(f"layers.{i}.{kind}", kind) for i in range(layers) for kind in kinds)
        sizes = Sizes(layers, 128, 16, 8, 32, norm_placement=SCHEMES[scheme].norm_placements[0])
        return Architecture((one,), sites, sizes)

    small = network(base, 2) if SCHEMES[scheme].needs_base else None
    return make_plan(scheme, network(spec, depth), small, optimizer=optimizer, options=options)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(sum(shape))) * 2.0 - 1.0


def gradient_at_output(scheme: str, spec: ParamSpec, upstream: float) -> Tensor:
    """Of the loss of one sample at a layer's output: 1 at each logit, hence 1/width at each feature before.

    Unit scaling hands every layer gradients of size 1.
    """
    size = 1.0 if SCHEMES[scheme].unit_scaled or spec.role is Role.READOUT else upstream / spec.fan_out
    return size * signs(spec.fan_out)


def moved(scheme: str, optimizer: str, p: ParamPlan, upstream: float = 1.0) -> float:
    """RMS of the change of the layer's output. `upstream`: weight of the branch on the gradient's way to the layer."""
    spec, y_grad = p.spec, gradient_at_output(scheme, p.spec, upstream)
    # A weight's gradient is a sum over tokens in unit scaling, of size 1 by its own factor.
    factor = 1.0 if SCHEMES[scheme].unit_scaled else p["multiplier"]
    weight = (p["init_std"] or 1.0) * signs(*spec.shape)
    if spec.role is Role.EMBEDDING:
        gradient, read = factor * y_grad.expand(spec.shape), lambda update: update[0]  # every row was some token's
    elif len(spec.shape) == 1:
        gradient, read = factor * y_grad, lambda update: update
    else:
        x = signs(spec.fan_in)
        gradient, read = factor * torch.outer(y_grad, x), lambda update: update @ x
    update = p["lr"] * STEPS[OPTIMIZERS[optimizer].trains(spec).name](weight, gradient)
    return (p["multiplier"] * rms(read(update))).item()


@pytest.mark.parametrize("scheme", RULED)
@pytest.mark.parametrize("optimizer", STEPS)
def test_an_update_moves_outputs_alike_at_every_width(scheme, optimizer):
    for name, spec in LAYERS.items():
        sizes = []
        for n in WIDTHS:
            plan = plan_of(scheme, optimizer, spec(n), base=spec(WIDTHS[1]))
            sizes.append(moved(scheme, optimizer, plan.params["w"]) * n ** -FALLING.get((scheme, name), 0.0))
        assert sizes == pytest.approx([sizes[0]] * len(WIDTHS), rel=1e-5), name


@pytest.mark.parametrize("optimizer", STEPS)
def test_umups_embedding_with_mups_rate_moves_alike_too(optimizer):
    spec = LAYERS["embedding"]
    plans = [plan_of("umup", optimizer, spec(n), spec(n), embedding_lr="constant") for n in WIDTHS]
    sizes = [moved("umup", optimizer, plan.params["w"]) for plan in plans]
    assert sizes == pytest.approx([sizes[0]] * len(WIDTHS), rel=1e-5)


@pytest.mark.parametrize("scheme", ["sp", "ntp", "unit"])
def test_with_one_rate_for_all_an_update_moves_more_with_width(scheme):
    """What the test above can see."""
    spec = LAYERS["square"]
    sizes = [moved(scheme, "adamw", plan_of(scheme, "adamw", spec(n), spec(n)).params["w"]) for n in WIDTHS]
    assert sizes[-1] > 3 * sizes[0]


# --- depth ------------------------------------------------------------------------------------------------------

DEEP = [("depth_mup", {}), ("completep", {"depth_alpha": "1"}), ("completep", {"depth_alpha": "0.5"}), ("umup", {})]


def at_the_end(branches: list[OpPlan]) -> list[float]:
    """The weight of every branch's output in the stream after the last one."""
    weights, later = [], 1.0
    for op in reversed(branches):
        weights.append(op["branch"] * later)
        later *= op["skip"]
    return weights


@pytest.mark.parametrize(("scheme", "options"), DEEP, ids=str)
@pytest.mark.parametrize("optimizer", STEPS)
@pytest.mark.parametrize("name", ["square", "down", "bias", "gain"])
def test_updates_of_all_branches_move_the_stream_alike_at_every_depth(scheme, options, optimizer, name):
    sizes = []
    for depth in DEPTHS:
        spec = LAYERS[name](64)
        spec = ParamSpec(spec.name, spec.role, spec.shape, spec.fan_in, spec.fan_out, on_residual=True)
        plan = plan_of(scheme, optimizer, spec, spec, depth, **options)
        branches = list(plan.ops.values())
        one = moved(scheme, optimizer, plan.params["w"], upstream=branches[0]["branch"])
        sizes.append(one * sum(at_the_end(branches)))
    assert sizes == pytest.approx([sizes[0]] * len(DEPTHS), rel=1e-5)


# --- the steps above are torch's --------------------------------------------------------------------------------

TORCHS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    # Not RAdam: its first five steps are SGD's.
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
    "muon_match_rms_adamw": torch.optim.Muon,
}


@pytest.mark.parametrize("optimizer", TORCHS)
def test_torch_makes_the_same_step_up_to_a_constant(optimizer):
    """Given the group entries that param_groups makes."""
    constants = []
    for rows, columns, std in ((64, 64, 0.3), (256, 64, 1.0), (64, 256, 2.0)):
        weight, gradient = std * signs(rows, columns), torch.outer(signs(rows), signs(columns))
        p = torch.nn.Parameter(weight.clone())
        p.grad = gradient.clone()
        group = {"params": [p], "lr": 0.1, "weight_decay": 0.0, **FAMILIES[optimizer].entries(1e-12)}
        TORCHS[optimizer]([group]).step()
        constants.append((rms(p.detach() - weight) / rms(0.1 * STEPS[optimizer](weight, gradient))).item())
    # Muon iterates in bfloat16.
    assert constants == pytest.approx([constants[0]] * 3, rel=0.02 if "muon" in optimizer else 1e-4)
