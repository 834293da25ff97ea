"""The gated MLP as one FP8 segment: equal to its parts, what it keeps, what a compiler makes of it, and who uses it."""

import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks

from umup.config.load import parse_config
from umup.models import decoder
from umup.models.build import build
from umup.nn.fp8 import encoded
from umup.nn.modules import UseScales
from umup.numerics.formats import E4M3, E5M2, encode
from umup.numerics.gemm import W_ENCODE, Formats, Gemm, GemmState, entry, scale_table
from umup.ops.activation import gated_silu
from umup.ops.gated_mlp import gated_mlp
from umup.ops.linear import linear
from umup.train.look import measure_operands

TOKENS, WIDTH, INNER = 32, 48, 80
GEMMS = (0.7, 1.3, 0.4), (1.1, 0.6, 0.9)
EXPONENTS = (1, -2, 3), (-1, 2, 1)
PAIRS = {
    "E5M2": ((E4M3, E5M2), (E4M3, E5M2)),
    "E4M3": ((E4M3, E4M3), (E4M3, E4M3)),
    "mixed": ((E5M2, E4M3), (E4M3, E5M2)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
torch_warns_itself = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo and Inductor do


def state_of(weight, gemm, exponents):
    scales = scale_table(gemm, torch.tensor(exponents, dtype=torch.int32))
    row = encode(weight.detach(), entry(scales, W_ENCODE), gemm.formats.forward)
    return GemmState(row, row.view(torch.uint8).t().contiguous().view(row.dtype), scales)


class Case:
    """Leaves, an upstream gradient, and the two products."""

    def __init__(self, pair="E5M2", backend="emulate", dtype=torch.float32, master=torch.float32, act=(1.0, 1.7)):
        torch.manual_seed(0)
        self.x = torch.randn(2, TOKENS // 2, WIDTH).to(dtype).requires_grad_()
        self.weights = tuple(
            (torch.randn(shape) / 4).to(master).requires_grad_() for shape in ((2 * INNER, WIDTH), (WIDTH, INNER))
        )
        self.upstream = torch.randn(2, TOKENS // 2, WIDTH).to(dtype)
        self.gemms = tuple(Gemm(*g, Formats(*p, backend)) for g, p in zip(GEMMS, PAIRS[pair], strict=True))
        self.states = tuple(map(state_of, self.weights, self.gemms, EXPONENTS))
        self.act = act

    def fused(self, x, compact=False):
        formats = tuple(gemm.formats for gemm in self.gemms)
        return gated_mlp(x, self.weights, formats, self.states, *self.act, compact)

    def parts(self, x):
        (first, last), (a, b) = self.gemms, self.states
        gate, up = linear(x, self.weights[0], *first, a).chunk(2, -1)
        return linear(gated_silu(gate, up, *self.act), self.weights[1], *last, b)

    def run(self, function):
        """y, dx, d_gate_up, d_down."""
        y = function(self.x)
        return y, *torch.autograd.grad(y, (self.x, *self.weights), self.upstream)


def error(found, expected):
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# Equal to its parts.


@every_pair
@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
@pytest.mark.parametrize("mult", [1.0, 0.6])
def test_in_float32_it_is_its_parts(pair, backend, mult):
    case = Case(pair, backend, act=(mult, 1.7))
    (y, *gradients), (reference, *others) = case.run(case.fused), case.run(case.parts)
    assert torch.equal(y, reference)
    for mine, theirs in zip(gradients, others, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert error(mine, theirs) < 1e-6


@every_pair
def test_in_bfloat16_it_differs_by_roundings_of_its_gradients(pair):
    case = Case(pair, dtype=torch.bfloat16, act=(0.6, 1.7))
    (y, *gradients), (reference, *others) = case.run(case.fused), case.run(case.parts)
    assert torch.equal(y, reference)
    for mine, theirs in zip(gradients, others, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) < 0.03
    wide = Case(pair, act=(0.6, 1.7))
    wide.x = case.x.detach().float().requires_grad_()
    wide.upstream = case.upstream.float()
    exact = wide.run(wide.parts)[1:]
    for mine, theirs, right in zip(gradients, others, exact, strict=True):  # and not by more than the parts do
        assert error(mine, right) < 1.1 * error(theirs, right)


def test_gradients_of_weights_have_their_dtype():
    case = Case(dtype=torch.bfloat16, master=torch.bfloat16)
    assert [g.dtype for g in case.run(case.fused)] == [torch.bfloat16] * 4


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for_are_computed(frozen):
    case = Case()
    everything = case.run(case.fused)[1:]
    leaves = [case.x, *case.weights]
    leaves[frozen].requires_grad_(False)
    rest = [i for i in range(3) if i != frozen]
    found = torch.autograd.grad(case.fused(case.x), [leaves[i] for i in rest], case.upstream)
    for i, gradient in zip(rest, found, strict=True):
        assert torch.equal(gradient, everything[i])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(bad, compact):
    case = Case()
    case.x.data[0, 3, 5] = bad
    y, dx, d_gate_up, _ = case.run(lambda x: case.fused(x, compact))
    assert y[0, 3].isnan().all()
    assert dx[0, 3].isnan().all()
    assert d_gate_up[:, 5].isnan().all()
    case = Case()
    case.upstream[1, 2, 7] = bad
    _, dx, _, d_down = case.run(lambda x: case.fused(x, compact))
    assert dx[1, 2].isnan().all()
    assert d_down[7].isnan().all()
    assert dx[0].isfinite().all()


# Compact.


def test_compact_is_exact_where_gate_and_up_are_on_the_grid():
    case = Case()
    case.gemms = (Gemm(1.0, 1.3, 0.4, case.gemms[0].formats), case.gemms[1])
    for tensor in (case.x, case.weights[0]):
        tensor.data = torch.randint_like(tensor, -1, 2) * (torch.rand_like(tensor) < 0.3)
    case.states = tuple(map(state_of, case.weights, case.gemms, EXPONENTS))
    for mine, theirs in zip(case.run(lambda x: case.fused(x, True)), case.run(case.fused), strict=True):
        assert torch.equal(mine, theirs)


def test_compact_is_the_gradient_at_the_encoded_gate_and_up():
    case = Case()
    (y, *gradients), (reference, *others) = case.run(lambda x: case.fused(x, True)), case.run(case.fused)
    assert torch.equal(y, reference)
    for mine, theirs in zip(gradients, others, strict=True):
        assert 0.002 < error(mine, theirs) < 0.08


@pytest.mark.parametrize(("compact", "dtype"), [(False, torch.bfloat16), (True, E4M3.dtype)])
def test_what_is_kept(compact, dtype):
    case, kept = Case(dtype=torch.bfloat16), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.fused(case.x, compact)
    found = {(tuple(t.shape), t.dtype) for t in kept if t.numel() > 32}
    weights = {(tuple(s.column.shape), E4M3.dtype) for s in case.states}
    assert found == weights | {((TOKENS, WIDTH), E4M3.dtype), ((TOKENS, 2 * INNER), dtype)}


# Compiled.


@torch_warns_itself
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_has_eagers_gradients(backend, dtype, compact):
    torch.compiler.reset()
    case = Case(dtype=dtype)
    compiled = torch.compile(lambda x: case.fused(x, compact), fullgraph=True, dynamic=False, backend=backend)
    for mine, eager in zip(case.run(compiled), case.run(lambda x: case.fused(x, compact)), strict=True):
        assert mine.dtype == eager.dtype
        assert error(mine, eager) < (1e-5 if dtype == torch.float32 else 0.03)


@torch_warns_itself
@pytest.mark.parametrize(("compact", "dtype"), [(False, torch.bfloat16), (True, E4M3.dtype)])
def test_a_compiler_keeps_what_eager_keeps(compact, dtype):
    handed = []

    def forward(module, _):
        handed.extend(node.meta["val"] for node in module.graph.output_node().args[0])
        return make_boxed_func(module)

    def backward(module, _):
        return make_boxed_func(module)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    case = Case(dtype=torch.bfloat16, backend="scaled_mm")
    torch.compile(lambda x: case.fused(x, compact), fullgraph=True, backend=backend)(case.x)
    found = [(tuple(t.shape), t.dtype) for t in handed if isinstance(t, torch.Tensor)]
    assert [d for shape, d in found if 2 * INNER in shape and TOKENS in shape] == [dtype]
    assert [d for shape, d in found if shape == (TOKENS, INNER)] == []


# In the decoder.


def model_of(recipe="fp8", family="llama", **precision):
    model = {"family": family, "hidden_size": 32, "num_layers": 2, "head_dim": 16, "vocab_size": 64}
    sections = {"model": model | {"intermediate_size": 64, "max_seq_len": 32}, "parametrization": {"scheme": "umup"}}
    return build(parse_config(sections | {"precision": {"recipe": recipe, "backend": "emulate"} | precision}))


@pytest.fixture
def calls(monkeypatch):
    """Grows by one at each fused MLP."""
    found = []

    def count(*args):
        found.append(args[-1])
        return gated_mlp(*args)

    monkeypatch.setattr(decoder, "gated_mlp", count)
    return found


def loss_of(model, length=16):
    ids = torch.randint(64, (2, length + 1), generator=torch.Generator().manual_seed(0))
    return model.loss(ids[:, :-1], ids[:, 1:])


def step(model, length=16):
    loss = loss_of(model, length)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("recipe", ["fp8", "fp8_e4m3"])
def test_the_decoder_fuses_and_learns_the_same(recipe, calls):
    model = model_of(recipe)
    loss, gradients = step(model)
    assert len(calls) == 2
    for layer in model.layers:
        layer.mlp.down.matmul.watched = True
    reference, others = step(model)
    assert len(calls) == 2
    assert torch.equal(loss, reference)
    for mine, theirs in zip(gradients, others, strict=True):
        assert error(mine, theirs) < 0.2  # roundings, through two layers


@pytest.mark.parametrize(
    "model",
    [
        lambda: model_of("bf16"),
        lambda: model_of("fp8_partial"),
        lambda: model_of("simulate:E3M2"),
        lambda: model_of(scales="dynamic"),
        lambda: model_of(overrides={"layers.*.mlp.up": "bf16"}),
    ],
)
def test_what_is_not_all_in_static_fp8_runs_in_parts(model, calls):
    step(model())
    assert calls == []


def test_a_spared_product_unfuses_its_layer(calls):
    model = model_of()
    model.layers[0].mlp.down.matmul.spared = True
    step(model)
    model.layers[1].mlp.gate.matmul.spared = True
    step(model)
    assert len(calls) == 1


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_a_bias_unfuses_its_layer(part, calls):
    model = model_of()
    biased = getattr(model.layers[0].mlp, part)
    biased.bias, biased.bias_scales = torch.nn.Parameter(torch.zeros(len(biased.weight))), UseScales()
    loss_of(model)
    assert len(calls) == 1


def test_odd_token_counts_and_inference_run_in_parts(calls):
    model = model_of()
    step(model, 15)
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long))
    assert calls == []


def test_a_layer_that_is_looked_at_shows_its_operands(calls):
    model = model_of()
    products = [(p.name, p.matmul, p.weights) for p in encoded(model)]
    found = measure_operands(products, lambda: loss_of(model))
    assert calls == []
    assert found.keys() == {(name, operand) for name, _, _ in products for operand in "xgw"}
    step(model)
    assert calls == [False, False]


def test_a_compact_layer_says_so(calls):
    model = model_of()
    model.layers[1].mlp.compact = True
    step(model)
    assert calls == [False, True]
