"""A fresh parameter's law is found from its numbers; where two laws fit, they give the same base std."""

import math

import pytest
import torch
from torch import nn

from umup.adapt.inits import CONSTANT, LAWS, ZERO, identify, measure
from umup.errors import PlanError
from umup.rules.roles import ParamSpec, Role

LAYERS = 3
SQUARE, WIDER, NARROWER, CONV = (128, 128), (512, 128), (128, 512), (128, 64, 3, 3)
SHAPES = {shape: tuple(n // 4 if n > 3 else n for n in shape) for shape in (SQUARE, WIDER, NARROWER, CONV)}
# One side fixed: an input of 16 features, a readout of 16 classes.
SHAPES |= {(512, 16): (128, 16), (16, 512): (16, 128)}


def fan_in(w):
    return w[0].numel()


def cut(w, std, at):
    nn.init.trunc_normal_(w, 0, std, -at * std, at * std)


DRAWS = {
    "torch_default": [lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5))],
    "lecun": [
        lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"),
        lambda w: nn.init.kaiming_uniform_(w, nonlinearity="linear"),
        lambda w: nn.init.trunc_normal_(w, 0, fan_in(w) ** -0.5),
    ],
    "lecun, cut": [lambda w: cut(w, fan_in(w) ** -0.5, 2)],
    "kaiming_fan_in": [
        lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    ],
    "kaiming_fan_out": [
        lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
        lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="relu"),
    ],
    "xavier": [nn.init.xavier_normal_, nn.init.xavier_uniform_],
    "orthogonal": [nn.init.orthogonal_],
    "small": [lambda w: nn.init.normal_(w, 0, math.sqrt(2 / 5 / fan_in(w)))],
    "lecun/sqrt(64)": [lambda w: nn.init.normal_(w, 0, (fan_in(w) * 64) ** -0.5)],
    "std 1": [nn.init.normal_],
    "std 0.02": [lambda w: nn.init.normal_(w, 0, 0.02), lambda w: nn.init.trunc_normal_(w, 0, 0.02)],
    "std 0.02, cut": [lambda w: cut(w, 0.02, 2)],
    "std 0.1": [lambda w: nn.init.normal_(w, 0, 0.1)],
    "std 0.057735": [lambda w: nn.init.uniform_(w, -0.1, 0.1)],
}


def spec(name="h.0.fc.weight", shape=SQUARE, role=Role.HIDDEN):
    return ParamSpec(name, role, shape, math.prod(shape[1:]), shape[0], role in (Role.HIDDEN, Role.HIDDEN_OUT))


def draws(draw, shape=SQUARE, layers=LAYERS):
    weights = {f"h.{i}.fc.weight": torch.empty(shape) for i in range(layers)}
    for w in weights.values():
        draw(w)
    return weights


def laws_of(weights, inits=None, roles=None, layers=LAYERS):
    specs = [spec(name, tuple(w.shape), (roles or {}).get(name, Role.HIDDEN)) for name, w in weights.items()]
    return identify(measure(specs, weights), layers, inits or {})


def ratio(law, shape):
    """What the law's std at the base is to that of the model: all that a plan asks of it."""
    return law.std(spec(shape=SHAPES[shape]), 1) / law.std(spec(shape=shape), LAYERS)


# On 512 x 16, kaiming_fan_out and xavier are a sixtieth apart.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_the_law_or_one_that_scales_alike_is_found(name, shape):
    for draw in DRAWS[name]:
        for seed in range(20):
            torch.manual_seed(seed)
            found = laws_of(draws(draw, shape, 1))["h.0.fc.weight"]
            true = LAWS.get(name.removesuffix(", cut"))
            expected = ratio(true, shape) if true else 1.0
            assert ratio(found, shape) == pytest.approx(expected, rel=0.05), (found.name, seed)


@pytest.mark.parametrize("name", DRAWS)
def test_names_are_told_apart_where_they_differ(name):
    torch.manual_seed(1)
    for draw in DRAWS[name]:
        assert {law.name for law in laws_of(draws(draw, (96, 640))).values()} <= {name, *EQUAL.get(name, ())}


# fan_in is the larger side here.
EQUAL = {"orthogonal": ("lecun",)}


@pytest.mark.parametrize("layers", [2, 3, 8, 32])
@pytest.mark.parametrize("std", [0.02, 0.006, None])
@pytest.mark.parametrize("label", ["", "/sqrt(2L)", "/sqrt(L)", "/sqrt(2(l+1))"])
def test_residual_outputs_are_drawn_like_the_other_matrices_over_depth(layers, std, label):
    """At 2 and 8 layers, GPT-2's 0.02/sqrt(2L) is a round number, too."""
    own = std or 128**-0.5
    factors = {
        "": [1.0] * layers,
        "/sqrt(2L)": [1 / math.sqrt(2 * layers)] * layers,
        "/sqrt(L)": [1 / math.sqrt(layers)] * layers,
        "/sqrt(2(l+1))": [1 / math.sqrt(2 * (i + 1)) for i in range(layers)],
    }[label]
    weights = {f"h.{i}.out.weight": torch.randn(SQUARE) * own * factors[i] for i in range(layers)}
    roles = dict.fromkeys(weights, Role.HIDDEN_OUT)
    weights |= {f"h.{i}.fc.weight": torch.randn(SQUARE) * own for i in range(layers)}
    laws = laws_of(weights, roles=roles, layers=layers)
    for i in range(layers):
        found = laws[f"h.{i}.out.weight"]
        assert found.name == ("lecun" if std is None else f"std {std}") + label
        assert found.std(spec(f"h.{i}.out.weight"), layers) == pytest.approx(own * factors[i])
    deeper = laws["h.0.out.weight"].std(spec("h.0.out.weight"), 4 * layers)
    assert deeper == pytest.approx(own * factors[0] / (2 if label in ("/sqrt(2L)", "/sqrt(L)") else 1))


def test_biases_are_drawn_from_their_matrix_fan_in():
    layers = [nn.Linear(128, 512) for _ in range(4)]
    specs = [ParamSpec(f"h.{i}.fc.bias", Role.BIAS, (512,), 128, 512) for i in range(4)]
    laws = identify(measure(specs, {s.name: m.bias for s, m in zip(specs, layers, strict=True)}), 4, {})
    assert {law.name for law in laws.values()} == {"torch_default"}


def test_zeros_ones_and_padding():
    table = nn.Embedding(33, 2048, padding_idx=0).weight
    weights = {"zeros": torch.zeros(64, 64), "ones": torch.full((999,), 0.1, dtype=torch.float64), "table": table}
    laws = laws_of(weights)
    assert laws["zeros"] is ZERO
    assert laws["ones"] is CONSTANT
    assert laws["table"].name == "std 1"


def test_tiny_parameters_are_never_refused():
    for seed in range(200):
        torch.manual_seed(seed)
        bias = nn.Linear(64, 2).bias
        laws_of({"head.bias": bias})


@pytest.mark.parametrize("factor", [1.3, 0.6])
def test_multiplied_weights_are_refused_by_name(factor):
    weights = draws(lambda w: nn.init.normal_(w, 0, 128**-0.5 * factor))
    with pytest.raises(PlanError, match=r"h\.\*\.fc\.weight has a std of .* no known init.*not a checkpoint"):
        laws_of(weights)


def test_what_the_tables_do_not_know_is_told():
    weights = draws(lambda w: nn.init.normal_(w, 0, 0.0137))
    with pytest.raises(PlanError, match=r"inits=\{'h\.\*\.fc\.weight': 0\.013\d\}"):
        laws_of(weights)
    assert laws_of(weights, {"h.*": 0.0137})["h.2.fc.weight"].std(spec(shape=(7, 7)), 9) == 0.0137
    with pytest.raises(PlanError, match=r"its init 'lecun' gives 0\.08839"):
        laws_of(weights, {"h.*": "lecun"})


def test_a_told_law_wins_over_a_likelier_one():
    weights = draws(lambda w: nn.init.normal_(w, 0, 128**-0.5))
    assert {law.name for law in laws_of(weights, {"*": "orthogonal"}).values()} == {"orthogonal"}


def test_patterns_and_names_that_mean_nothing_are_refused():
    weights = draws(nn.init.xavier_normal_)
    with pytest.raises(PlanError, match="unknown init 'kaiming'; did you mean 'kaiming_fan_in'"):
        laws_of(weights, {"*": "kaiming"})
    with pytest.raises(PlanError, match=r"inits\['layer'\] matches no parameter; names look like 'h.0.fc.weight'"):
        laws_of(weights, {"layer": "xavier"})


def bias_spec(name, weight):
    return ParamSpec(name, Role.BIAS, (weight.shape[0],), weight.shape[1], weight.shape[0])


def laws_of_modules(modules):
    weights = {f"{name}.weight": m.weight for name, m in modules.items()}
    specs = [spec(name, tuple(w.shape)) for name, w in weights.items()]
    with_bias = {name: m for name, m in modules.items() if getattr(m, "bias", None) is not None}
    specs = [*(bias_spec(f"{n}.bias", m.weight) for n, m in with_bias.items()), *specs]
    return identify(measure(specs, weights | {f"{n}.bias": m.bias for n, m in with_bias.items()}), 1, {})


@pytest.mark.parametrize("seed", range(40))
def test_small_tensors_get_the_law_of_large_ones(seed):
    torch.manual_seed(seed)
    modules = {"a": nn.Linear(11, 64), "b": nn.Linear(64, 64), "c": nn.Linear(48, 256), "d": nn.Linear(64, 3)}
    modules["e"] = nn.Conv2d(30, 30, 3, groups=30, bias=False)
    assert {law.name for law in laws_of_modules(modules).values()} == {"torch_default"}


@pytest.mark.parametrize("seed", range(40))
def test_a_bias_beside_another_init_keeps_its_own(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(48, 256)
    nn.init.xavier_uniform_(layer.weight)
    laws = laws_of_modules({"a": layer})
    assert [laws["a.weight"].name, laws["a.bias"].name] == ["xavier", "torch_default"]


@pytest.mark.parametrize("seed", range(20))
def test_a_short_table_is_drawn_like_the_long_one(seed):
    """At width 1024, normal(0.02) of BERT's two token types is sqrt(2/(5 * 1024)), too."""
    torch.manual_seed(seed)
    modules = {"types": nn.Embedding(2, 1024), "words": nn.Embedding(3000, 1024)}
    for module in modules.values():
        nn.init.normal_(module.weight, 0, 0.02)
    assert {law.name for law in laws_of_modules(modules).values()} == {"std 0.02"}


@pytest.mark.parametrize("seed", range(40))
def test_no_uniform_is_orthogonal(seed):
    torch.manual_seed(seed)
    law = laws_of_modules({"a": nn.Conv2d(30, 30, 3, groups=30, bias=False)})["a.weight"]
    assert law.name not in ("orthogonal", "small")
