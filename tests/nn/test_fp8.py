"""Converted products: which share, what their weights are encoded as, and that a model of them is still a model."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

from umup.cli.main import main
from umup.config.load import dump_yaml, parse_config
from umup.errors import ConfigError, DataError
from umup.models.build import build
from umup.nn.fp8 import StaticMatmul, convert, encoded, refresh_weights, write_weights
from umup.nn.modules import Linear, Matmul, UseScales, project, share_matmul
from umup.numerics.formats import E4M3, E5M2, find_format, quantise
from umup.numerics.gemm import Formats
from umup.ops.loss import cross_entropy

WIDTH, SIDES = 32, {"q": 32, "k": 16, "v": 16}
USE = UseScales(0.7, 1.3, 0.4)
FP8 = Formats(E4M3, E5M2, "emulate")
REAL = Formats(E4M3, E5M2, "scaled_mm")
NARROW = Formats(E4M3, E4M3, "emulate")
SIMULATED = Formats(find_format("E3M2"), find_format("E3M2"), "emulate")


class Projections(nn.Module):
    """Linears of one input, as attention has them."""

    def __init__(self, shared=True, use=(USE, USE, USE), bias=False):
        super().__init__()
        self.parts = nn.ModuleDict(
            {n: Linear(WIDTH, side, u, u if bias else None) for (n, side), u in zip(SIDES.items(), use, strict=True)}
        )
        for i, parameter in enumerate(self.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        if shared:
            share_matmul(*self.parts.values())

    def forward(self, x):
        return torch.cat(project(x, *self.parts.values()), -1)


def converted(formats, **fields):
    """`formats` by linear; None leaves one alone."""
    model = Projections(**fields)
    convert(model, {f"parts.{name}": f for name, f in zip(SIDES, formats, strict=True) if f is not None})
    return model


def at_weight_exponent(model, exponent=3):
    """The same scale for all weights."""
    for p in encoded(model):
        p.matmul.set_exponents(torch.tensor([0, 0, exponent]))
        write_weights(p)
    return model


def results(model, dtype=torch.float32, x=None):
    """Outputs, the input's gradient, and the parameters' by name."""
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(2, 8, WIDTH, generator=generator) if x is None else x
    x = x.to(dtype).requires_grad_()
    y = model(x)
    upstream = torch.randn(y.shape, generator=generator).to(dtype)
    names = dict(model.named_parameters())
    dx, *gradients = torch.autograd.grad(y, (x, *names.values()), upstream)
    return {"y": y.detach(), "dx": dx, **dict(zip(names, gradients, strict=True))}


def assert_equal(mine, reference, tolerance=1e-6):
    assert mine.keys() == reference.keys()
    for name, expected in reference.items():
        assert mine[name].dtype == expected.dtype
        assert (mine[name] - expected).abs().max() <= tolerance * expected.abs().max(), name


def matmuls(model):
    return [part.matmul for part in model.parts.values()]


# Which linears run as one product.


@pytest.mark.parametrize("bias", [False, True])
def test_linears_that_share_a_product_give_what_each_gives_alone(bias):
    together, apart = Projections(bias=bias), Projections(shared=False, bias=bias)
    assert len(set(matmuls(together))) == 1
    assert len(set(matmuls(apart))) == 3
    assert_equal(results(together), results(apart))


@pytest.mark.parametrize("formats", [FP8, REAL, NARROW, SIMULATED], ids=["fp8", "scaled_mm", "e4m3", "simulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_fp8_they_do_so_too_given_one_scale_for_the_weights(formats, dtype):
    together = at_weight_exponent(converted([formats] * 3))
    apart = at_weight_exponent(converted([formats] * 3, shared=False))
    assert [len(encoded(model)) for model in (together, apart)] == [1, 3]
    # Apart, the input's gradient is a sum of three that are rounded to the stream's dtype.
    assert_equal(results(together, dtype), results(apart, dtype), 1e-6 if dtype == torch.float32 else 2.0**-6)


def test_decoding_gives_the_outputs_of_training():
    model, x = Projections(), torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        without = model(x)
    torch.testing.assert_close(without, model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chosen", list(product([None, FP8, NARROW], repeat=3)), ids=str)
def test_linears_share_while_their_formats_agree(chosen):
    mixed = at_weight_exponent(converted(chosen))
    for (a, f), (b, g) in product(zip(matmuls(mixed), chosen, strict=True), repeat=2):
        assert (a is b) == (f == g)
    assert_equal(results(mixed), results(at_weight_exponent(converted(chosen, shared=False))))


def test_linears_of_other_scales_do_not_share():
    other = UseScales(0.7, 1.3, 0.5)
    model = Projections(use=(USE, USE, other))
    assert len(set(matmuls(model))) == 3
    assert len(encoded(converted([FP8] * 3, use=(USE, USE, other)))) == 3


def test_a_shared_product_is_named_by_all_its_linears():
    (shared,) = encoded(converted([FP8] * 3))
    assert shared.names == ("parts.q", "parts.k", "parts.v")
    assert shared.name == "parts.q+k+v"
    assert [p.name for p in encoded(converted([FP8, None, FP8]))] == ["parts.q+v"]


# The model around them.


def test_parameters_and_the_state_dict_are_those_of_an_unconverted_model():
    plain, model = Projections(), converted([FP8] * 3)
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not [n for n, p in plain.state_dict().items() if not torch.equal(p, model.state_dict()[n])]


@pytest.mark.parametrize("make", [Projections, lambda: converted([FP8] * 3), lambda: converted([FP8, None, FP8])])
def test_a_copy_shares_as_its_original_does_and_nothing_with_it(make):
    model = make()
    copy = deepcopy(model)
    sharing = [[a is b for a, b in product(matmuls(m), repeat=2)] for m in (model, copy)]
    assert sharing[0] == sharing[1]
    assert not set(matmuls(model)) & set(matmuls(copy))
    before = results(model)
    assert_equal(results(copy), before, 0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(3)
    refresh_weights(encoded(copy))
    assert_equal(results(model), before, 0)
    assert not torch.equal(results(copy)["y"], before["y"])


def test_moving_a_model_moves_every_buffer_once_and_keeps_the_sharing():
    model = converted([FP8] * 3).to("meta")
    (shared,) = encoded(model)
    assert all(b.is_meta for b in model.buffers())
    assert shared.matmul.row.shape == (sum(SIDES.values()), WIDTH)
    assert_equal(results(converted([FP8] * 3).to("cpu")), results(converted([FP8] * 3)), 0)


def test_names_that_are_no_linears_are_refused():
    with pytest.raises(ConfigError, match=r"no linear 'parts.w' in the model; did you mean 'parts") as e:
        convert(Projections(), {"parts.w": FP8})
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="no linear 'parts'"):
        convert(Projections(), {"parts": FP8})


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="empty batch"):
        converted([FP8] * 3)(torch.zeros(0, WIDTH))


# The encoded weights.


def decoded(p):
    return p.matmul.row.double() * 2.0 ** -p.matmul.exponents[2].double()


def joined(p):
    return torch.cat([w.detach() for w in p.weights]).double()


@pytest.mark.parametrize("formats", [FP8, SIMULATED], ids=["fp8", "simulated"])
@pytest.mark.parametrize("size", [1e-12, 1.0, 448.0, 449.0, 1e12])
def test_weights_are_encoded_at_the_largest_scale_that_holds_them_in_two_layouts(formats, size):
    model = Projections()
    largest = max(w.abs().max() for w in model.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(size / largest)
    (p,) = convert(model, {f"parts.{n}": formats for n in SIDES})
    limit, exponent = formats.forward.max, int(p.matmul.exponents[2])
    amax = joined(p).abs().max().item()
    assert amax * 2.0**exponent <= limit < amax * 2.0 ** (exponent + 1)
    assert p.matmul.amax.item() == amax
    assert torch.equal(p.matmul.row.double(), quantise(joined(p) * 2.0**exponent, formats.forward))
    assert torch.equal(p.matmul.column.double(), p.matmul.row.double().t())


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
def test_refreshed_weights_are_those_of_a_new_conversion(master):
    model = converted([FP8, FP8, None])
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.data = (weight * 37 + i).to(master)
    stale = [decoded(p) for p in encoded(model)]
    refresh_weights(encoded(model))
    fresh = deepcopy(model)
    convert(fresh, {"parts.q": FP8, "parts.k": FP8})
    for old, mine, reference in zip(stale, encoded(model), encoded(fresh), strict=True):
        assert not torch.equal(old, decoded(mine))
        assert torch.equal(decoded(mine), decoded(reference))
        assert torch.equal(mine.matmul.scales_table, reference.matmul.scales_table)


@pytest.mark.parametrize("steps", [1, 20])
def test_with_a_bound_on_growth_no_weight_ever_clips_though_none_is_looked_at_twice(steps):
    """Each weight moves by all that it may, the largest outwards; the scale must have been ready for it."""
    model = converted([FP8] * 3)
    (p,) = encoded(model)
    growth = {p.weights[0]: (0.5, 0.01), p.weights[1]: (0.1, 0.2), p.weights[2]: (0.0, 0.0)}
    for _ in range(steps):
        with torch.no_grad():
            for weight, (absolute, relative) in growth.items():
                weight.add_(weight.sign() * (absolute + relative * weight.abs()))
        seen = p.matmul.amax.item()
        refresh_weights([p], growth)
        amax, exponent = joined(p).abs().max().item(), int(p.matmul.exponents[2])
        bound = seen * 1.2 + 0.5
        assert amax <= bound
        assert bound * 2.0**exponent <= E4M3.max < bound * 2.0 ** (exponent + 1)
        assert p.matmul.amax.item() == amax
        assert torch.equal(p.matmul.row.double(), quantise(joined(p) * 2.0**exponent, E4M3))


def test_shrunken_weights_get_their_scale_back():
    (p,) = encoded(converted([FP8] * 3))
    before = int(p.matmul.exponents[2])
    with torch.no_grad():
        for weight in p.weights:
            weight.mul_(2.0**-6)
    growth = dict.fromkeys(p.weights, (0.0, 0.0))
    refresh_weights([p], growth)
    assert int(p.matmul.exponents[2]) == before
    refresh_weights([p], growth)
    assert int(p.matmul.exponents[2]) == before + 6


def test_weights_that_are_no_numbers_are_encoded_as_such():
    model = converted([FP8] * 3)
    with torch.no_grad():
        model.parts["k"].weight[2, 3] = float("inf")
    refresh_weights(encoded(model))
    with torch.no_grad():
        assert model(torch.randn(4, WIDTH))[:, SIDES["q"] + 2].isnan().all()
    model.parts["k"].weight.data[2, 3] = float("nan")
    refresh_weights(encoded(model))
    with torch.no_grad():
        assert model(torch.randn(4, WIDTH))[:, SIDES["q"] + 2].isnan().all()


def test_moved_exponents_reach_the_operands_and_leave_values_in_range_alone():
    model = converted([FP8] * 3)
    (p,) = encoded(model)
    before, x = results(model), torch.randn(4, WIDTH)
    p.matmul.set_exponents(p.matmul.exponents + torch.tensor([2, -1, 0]))
    assert_equal(results(model), before, 0.02)
    # Beyond the range, everything saturates: the exponent has reached the cast.
    p.matmul.set_exponents(torch.tensor([40, 0, int(p.matmul.exponents[2])]))
    assert model(x).abs().max() < 1e-6


def test_a_spared_product_runs_in_the_streams_dtype_and_is_not_refreshed():
    model, plain = converted([FP8] * 3), Projections()
    (p,) = encoded(model)
    p.matmul.spared = True
    assert_equal(results(model, torch.bfloat16), results(plain, torch.bfloat16), 0)
    before = p.matmul.row.clone()
    with torch.no_grad():
        model.parts["q"].weight.mul_(5)
    refresh_weights([p])
    assert torch.equal(p.matmul.row.view(torch.uint8), before.view(torch.uint8))


def test_a_heads_loss_is_that_of_its_logits_spared_or_not():
    head = Linear(WIDTH, 48, USE)
    nn.init.normal_(head.weight)
    (p,) = convert(nn.ModuleDict({"head": head}), {"head": FP8})
    x, targets = torch.randn(20, WIDTH), torch.randint(48, (20,))
    losses = []
    for p.matmul.spared in (False, True):
        losses.append(head.matmul.loss(x, head.weight, targets, 1.7, 0.3).item())
        assert losses[-1] == pytest.approx(cross_entropy(head(x), targets, 1.7, 0.3).item(), rel=1e-6)
    assert losses[0] != losses[1]


# Models by config.


def config_of(recipe, family="llama", backend="emulate", overrides=None, **model):
    sizes = {"family": family, "hidden_size": 48, "num_layers": 2, "head_dim": 16, "vocab_size": 64}
    return parse_config(
        {
            "model": {**sizes, "max_seq_len": 8, **model},
            "train": {"batch_size": 2},
            "precision": {"recipe": recipe, "backend": backend, "overrides": overrides or {}},
        }
    )


def loss_and_gradients(model):
    tokens, targets = torch.randint(64, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    loss = model.loss(tokens, targets)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


SHARED = {"llama": (["q+k+v", "out"], ["gate+up", "down"]), "gpt2": (["q+k+v", "out"], ["up", "down"])}


@pytest.mark.parametrize("family", SHARED)
def test_the_decoder_joins_queries_keys_and_values_and_gate_and_up(family):
    model = build(config_of("fp8_head", family))
    attention, mlp = SHARED[family]
    layers = [[f"layers.{i}.attn.{n}" for n in attention] + [f"layers.{i}.mlp.{n}" for n in mlp] for i in range(2)]
    assert [p.name for p in encoded(model)] == [*layers[0], *layers[1], "head"]


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize("recipe", ["fp8", "fp8_partial", "fp8_e4m3", "fp8_head", "simulate:E4M3", "simulate:E4M5"])
@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
def test_every_recipe_trains_close_to_its_stream(recipe, family, backend):
    reference, exact = loss_and_gradients(build(config_of("fp32", family)))
    loss, gradients = loss_and_gradients(build(config_of(recipe, family, backend)))
    assert loss == pytest.approx(reference, rel=0.03)
    for mine, theirs in zip(gradients, exact, strict=True):
        # A key's bias has no gradient but rounding noise; queries and keys have little but noise at initialisation.
        if theirs.norm() > 1e-3 * max(g.norm() for g in exact):
            assert nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.8


@pytest.mark.parametrize("spared", ["*.attn.q", "*.attn.k", "*.attn.v", "*.mlp.gate", "*.mlp.up", "layers.1.*"])
def test_sparing_a_linear_leaves_those_it_shared_with_in_fp8(spared):
    model = build(config_of("fp8", overrides={spared: "bf16"}))
    low = {name for p in encoded(model) for name in p.names}
    last = spared.rpartition(".")[2]
    if last != "*":
        assert not [name for name in low if name.endswith(last)]
        assert len(low) == 2 * 6
        assert type(model.layers[0].get_submodule(spared.removeprefix("*.")).matmul) is Matmul
    loss, gradients = loss_and_gradients(model)
    assert loss == pytest.approx(loss_and_gradients(build(config_of("bf16")))[0], rel=0.03)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("recipe", ["simulate:E4M3", "simulate:E5M2", "simulate:E3M3"])
def test_a_simulated_format_takes_any_width(recipe):
    model = build(config_of(recipe, hidden_size=24, head_dim=12))
    loss, _ = loss_and_gradients(model)
    assert loss == pytest.approx(loss_and_gradients(build(config_of("fp32", hidden_size=24, head_dim=12)))[0], rel=0.1)


def test_only_fp8_recipes_make_static_products():
    for recipe in ("fp32", "bf16", "fp16"):
        assert not any(isinstance(m, StaticMatmul) for m in build(config_of(recipe, backend="auto")).modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_without_a_gpu_is_refused_by_train_in_one_line(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(2):
        (corpus / f"{i}.py").write_text(f"x = {i}\n" * 200)
    config = config_of("fp8", backend="auto", vocab_size=256)
    data = config.data.model_copy(update={"source": str(corpus), "cache_dir": str(tmp_path / "cache")})
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config.model_copy(update={"data": data})))
    assert main(["train", str(path), "--train.device", "cpu", "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("umup: precision.backend: FP8 products need a GPU and this run is on cpu; write ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
