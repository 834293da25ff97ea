"""FP8 in the trainer: scales that follow, are recorded and resumed; what runs, is kept and is refused."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from umup.checkpoint import load_latest
from umup.cli.main import main
from umup.config.load import parse_config
from umup.errors import CheckpointError, DataError, DivergedError
from umup.models.build import build
from umup.models.decoder import Context
from umup.models.specs import plan_for
from umup.nn.fp8 import convert, encoded, keep_products, refresh_weights
from umup.nn.modules import Linear, Matmul, UseScales, join
from umup.numerics.formats import E4M3, E5M2, FP16, encode
from umup.numerics.gemm import W_ENCODE, Formats, entry
from umup.optim.adamw import make_optimizer
from umup.optim.groups import param_groups
from umup.train import loop, precision
from umup.train.look import LookLoss, measure_operands
from umup.train.loop import run_training
from umup.train.precision import ScaleKeeper, read_looks

FP8 = {"recipe": "fp8", "backend": "emulate", "sample_every": 4}
SCALED_MM = Formats(E4M3, E5M2, "scaled_mm")
EMULATE = Formats(E4M3, E5M2, "emulate")


def one_linear(fan_in=32, fan_out=48, formats=EMULATE):
    """A model of a single product, called "l"."""
    linear = Linear(fan_in, fan_out, UseScales())
    nn.init.normal_(linear.weight)
    model = nn.ModuleDict({"l": linear})
    convert(model, {"l": formats})
    return model


def batch(rows=4, length=16, seed=0):
    ids = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def error(found, exact):
    """Relative, in the Frobenius norm."""
    return ((found - exact).norm() / exact.norm()).item()


def gradients(model, tokens, targets):
    model.zero_grad()
    model.loss(tokens, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- scales that follow --------------------------------------------------------------------------------------------


def drift(mode, octaves, operand, record=None):
    """Twenty steps of a product whose input (x) or output gradient (g) drifts by 2^octaves: worst errors of all."""
    model, looks = one_linear(), 20
    linear, worst = model["l"], 0.0
    keeper = ScaleKeeper(model, mode, 1, record)
    x, grad = torch.randn(64, 32), torch.randn(64, 48)
    for step in range(looks):
        by = 2.0 ** (octaves * (step + 1) / looks)
        now = (x * by).requires_grad_() if operand == "x" else x.clone().requires_grad_()
        pull = grad * by if operand == "g" else grad

        def loss(now=now, pull=pull):
            return (linear(now) * pull).sum()

        if keeper.due(step):
            keeper.look(step, loss)
        found = linear(now) if operand == "x" else torch.autograd.grad(loss(), linear.weight)[0]
        exact = now @ linear.weight.T if operand == "x" else pull.T @ now
        worst = max(worst, error(found, exact))
    return worst


@pytest.mark.parametrize("operand", ["x", "g"])
@pytest.mark.parametrize("octaves", [10, -10])
def test_a_drift_is_followed_without_clipping(octaves, operand, tmp_path):
    octaves *= 1 if operand == "x" else 2  # E5M2 reaches further
    record = tmp_path / "ranges.jsonl"
    followed = drift("adapt", octaves, operand, record)
    rows = [row for row in read_looks(record) if row["operand"] == operand]
    assert len(rows) == 20
    assert [row["clip"] for row in rows] == [0.0] * 20
    assert max(row["flush"] for row in rows) < 0.05
    assert 1 <= sum(row["event"] is not None for row in rows) <= 4
    assert followed < 0.1
    assert drift("static", octaves, operand) > 5 * followed
    fixed = tmp_path / "fixed.jsonl"
    assert drift("monitor", octaves, operand, fixed) > 5 * followed
    last = [row for row in read_looks(fixed) if row["operand"] == operand][-1]
    assert last["clip" if octaves > 0 else "flush"] > 0.1


def test_monitor_records_what_adapt_would_do_and_moves_nothing(tiny, tmp_path):
    lines = []
    sections = {"optimizer": {"lr": 4.0}, "train": {"steps": 30}}
    run_training(tiny(**sections, precision={**FP8, "scales": "monitor"}), tmp_path / "m", notice=lines.append)
    rows = read_looks(tmp_path / "m" / "ranges.jsonl")
    assert [row["step"] for row in rows if row["operand"] == "g"][::4] == [0, 1, 2, 4, 8, 12, 16, 20, 24, 28]
    assert {row["exponent"] for row in rows if row["operand"] != "w"} == {0}
    events = [row for row in rows if row["event"]]
    assert len(events) == len(lines) > 0
    assert all("if precision.scales were adapt" in line for line in lines)
    state, _ = load_latest(tmp_path / "m")
    assert all(kept[:2].tolist() == [0, 0] and not kept[3] for kept in state.precision.values())


def test_static_scales_are_not_even_looked_at(tiny, tmp_path):
    run_training(tiny(precision={**FP8, "scales": "static"}), tmp_path / "run")
    assert not (tmp_path / "run" / "ranges.jsonl").exists()


def test_looking_disturbs_no_step(tiny):
    """Dropout's random state apart, a look leaves nothing behind: monitored losses are the static ones."""
    seen = {"static": [], "monitor": []}
    for scales, losses in seen.items():
        run_training(tiny(precision={**FP8, "scales": scales}), observe=lambda m, losses=losses: losses.append(m))
    assert [m.train_loss for m in seen["static"]] == [m.train_loss for m in seen["monitor"]]


def test_a_product_that_no_constant_serves_falls_back_and_says_so():
    model, lines = one_linear(), []
    keeper = ScaleKeeper(model, "adapt", 1, notice=lines.append)
    # Half of the energy sits 2^24 above the other half: no window of E4M3 holds both.
    x = torch.randn(64, 32) * torch.where(torch.arange(32) < 1, 2.0**12, 2.0**-12)
    keeper.look(7, lambda x: model["l"](x).square().sum(), x)
    (line,) = [line for line in lines if "input" in line]
    assert line.startswith("step 7: l input: bf16 (E4M3 at its best ")
    assert torch.equal(model["l"](x), Matmul(UseScales())(x, model["l"].weight))
    twin = one_linear()
    ScaleKeeper(twin, "adapt", 1).load(keeper.state())
    assert twin["l"].matmul.spared
    again = []
    ScaleKeeper(twin, "adapt", 1, notice=again.append).look(8, lambda: twin["l"](x).square().sum())
    assert again == []


# --- resuming ------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(step):
    def observe(metrics):
        if metrics.step == step:
            raise Stopped

    return observe


def outcome(run):
    state, _ = load_latest(run)
    return state, (run / "ranges.jsonl").read_bytes()


def test_a_resumed_run_has_the_same_scales_bit_for_bit(tiny, tmp_path):
    config = tiny(
        model={"num_layers": 2},
        optimizer={"lr": 4.0},
        train={"steps": 40, "checkpoint_every": 10},
        precision={**FP8, "recipe": "fp8_head"},
    )
    run_training(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_training(config, tmp_path / "halves", observe=stop_at(28))
    run_training(config, tmp_path / "halves")
    (whole, ranges), (halves, again) = outcome(tmp_path / "whole"), outcome(tmp_path / "halves")
    assert ranges == again
    moved = [row for row in read_looks(tmp_path / "whole" / "ranges.jsonl") if row["event"]]
    assert any(row["step"] < 20 for row in moved)  # the checkpoint held moved scales
    for part in ("model", "optimizer", "precision"):
        a, b = getattr(whole, part), getattr(halves, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), part


@pytest.mark.parametrize(("first", "then"), [("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8_e4m3"), ("bf16", "fp16")])
def test_a_run_goes_on_in_another_recipe_and_says_what_changes(tiny, tmp_path, first, then):
    run, lines = tmp_path / "run", []
    sections = {"optimizer": {"lr": 0.1}, "train": {"steps": 20, "checkpoint_every": 10}}
    with pytest.raises(Stopped):
        run_training(tiny(**sections, precision={**FP8, "recipe": first}), run, observe=stop_at(15))
    seen = []
    run_training(tiny(**sections, precision={**FP8, "recipe": then}), run, seen.append, lines.append)
    assert lines[0] == f"precision.recipe was {first} and is now {then}"
    said = {
        ("bf16", "fp8"): "new in low precision, starting from the plan's scales",
        ("fp8", "bf16"): "no longer in low precision",
        ("fp8", "fp8_e4m3"): "in other formats or groups, starting from the plan's scales",
    }.get((first, then))
    assert [line for line in lines[1:] if "resuming" not in line and not line.startswith("step ")] == (
        [f"layers.0.attn.k, layers.0.attn.out, layers.0.attn.q ...: {said}"] if said else []
    )
    assert [m.step for m in seen] == list(range(11, 21))
    reference = []
    run_training(tiny(**sections), observe=reference.append)
    assert [m.train_loss for m in seen] == pytest.approx([m.train_loss for m in reference[10:]], abs=0.1)


def test_weights_are_encoded_anew_where_the_formats_differ():
    """2^13, which E5M2 has room for, would clip every weight of E4M3."""
    first, then = (one_linear(formats=Formats(form, E5M2, "emulate")) for form in (E5M2, E4M3))
    keeper = ScaleKeeper(then, "adapt", 1)
    keeper.load(ScaleKeeper(first, "adapt", 1).state())
    assert_encoded(then)


def test_the_order_of_overrides_is_a_change(tiny, tmp_path):
    sections = {"train": {"steps": 2}}
    pairs = [("*.attn.*", "bf16"), ("*.out", "fp8")]
    run_training(tiny(**sections, precision={**FP8, "overrides": dict(pairs)}), tmp_path / "run")
    lines = []
    swapped = {**FP8, "overrides": dict(reversed(pairs)), "sample_every": 3}
    run_training(tiny(**sections, precision=swapped), tmp_path / "run", notice=lines.append)
    assert lines[0] == (
        "precision.overrides was {'*.attn.*': 'bf16', '*.out': 'fp8'} and is now {'*.out': 'fp8', '*.attn.*': 'bf16'}"
    )
    assert lines[1] == "precision.sample_every was 4 and is now 3"
    with pytest.raises(CheckpointError, match=r"optimizer\.lr was 1\.0 and is now 2\.0; choose another --out"):
        run_training(tiny(**sections, optimizer={"lr": 2.0}), tmp_path / "run")


def test_a_damaged_record_of_ranges_is_named_by_its_line(tiny, tmp_path, written, capsys):
    run, config = tmp_path / "run", tiny(train={"steps": 2}, precision=FP8)
    run_training(config, run)
    lines = (run / "ranges.jsonl").read_text().splitlines()
    (run / "ranges.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:], ""]))
    assert main(["train", str(written(config)), "--out", str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"umup: {run / 'ranges.jsonl'}, line 2: ")


# --- weights -------------------------------------------------------------------------------------------------------


def assert_encoded(model, exact_scale=False):
    for p in encoded(model):
        matmul, weight = p.matmul, join(p.weights).detach()
        form, scale = matmul.formats.forward, entry(matmul.scales_table, W_ENCODE)
        assert math.log2(float(scale)) == int(matmul.exponents[2])
        largest = float(weight.abs().max())
        assert largest * float(scale) <= form.max, p.name
        assert not exact_scale or largest * float(scale) > form.max / 2, p.name
        assert float(matmul.amax) == largest
        expected = encode(weight, scale, form)
        assert torch.equal(matmul.row.float(), expected.float()), p.name
        assert torch.equal(matmul.column.float(), expected.float().T), p.name


def make_adamw(config, plan, model):
    o = config.optimizer
    groups = param_groups(plan, model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, eps=o.eps)
    return make_optimizer(o, groups)


OPTIMIZERS = {
    "AdamW": ({}, make_adamw),
    "AdamW in bf16": ({"state_dtype": "bf16", "master_dtype": "bf16"}, make_adamw),
    "AdamW without a bound": ({"betas": (0.99, 0.95)}, make_adamw),
    "SGD": ({}, lambda config, plan, model: torch.optim.SGD(model.parameters(), lr=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("recipe", ["fp8_head", "simulate:E3M4"])
def test_after_every_step_the_encoded_weights_are_the_weights_and_never_clip(tiny, name, recipe):
    given, make = OPTIMIZERS[name]
    config = tiny(optimizer={"lr": 0.3, "weight_decay": 0.1, **given}, precision={**FP8, "recipe": recipe})
    plan = plan_for(config)
    model = build(config, plan)
    assert_encoded(model, exact_scale=True)
    optimizer = make(config, plan, model)
    ScaleKeeper(model, "adapt", 4).follow(optimizer)
    for step in range(12):
        gradients(model, *batch(seed=step))
        optimizer.step()
        assert_encoded(model, exact_scale=name in ("SGD", "AdamW without a bound"))


def test_refreshing_without_the_bound_would_clip():
    """What `growth` is for: the scale of the former weights does not hold the present ones."""
    model = one_linear()
    with torch.no_grad():
        model["l"].weight.mul_(4.0)
    refresh_weights(encoded(model), {model["l"].weight: (0.0, 0.0)})
    with pytest.raises(AssertionError):
        assert_encoded(model)
    with torch.no_grad():
        model["l"].weight.mul_(4.0)
    refresh_weights(encoded(model), {model["l"].weight: (0.0, 3.0)})
    assert_encoded(model)


# --- compiling, accumulating, checkpointing ------------------------------------------------------------------------


def compare_compiled(config, backend):
    model = build(config)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend)
    for step in range(3):
        eager = gradients(model, *batch(seed=step))
        model.zero_grad()
        compiled(*batch(seed=step)).backward()
        for name, p in model.named_parameters():
            assert error(p.grad, eager[name]) < 1e-4, name
        for p in encoded(model):
            p.matmul.set_exponents(p.matmul.exponents + torch.tensor([1, -1, 0], dtype=torch.int32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
@pytest.mark.parametrize("recipe", ["fp8_head", "simulate:E4M3"])
def test_a_moved_scale_recompiles_nothing(tiny, recipe):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compare_compiled(tiny(precision={**FP8, "recipe": recipe}), counter)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_gradients_are_the_eager_ones(tiny):
    torch._dynamo.reset()
    compare_compiled(tiny(precision={**FP8, "recipe": "simulate:E4M3"}), "inductor")


@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
def test_accumulated_gradients_of_fp8_products_stay_in_float32(tiny, backend):
    model = build(tiny(precision={**FP8, "recipe": "fp8_head", "backend": backend}, train={"grad_accum": 3}))
    parts = [gradients(model, *batch(seed=seed)) for seed in range(3)]
    model.zero_grad()
    for seed in range(3):
        model.loss(*batch(seed=seed)).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, parts[0][name] + parts[1][name] + parts[2][name]), name
    # More mantissa than bfloat16 has: the product itself was not rounded on its way.
    for p in encoded(model):
        assert any(not torch.equal(w.grad, w.grad.bfloat16().float()) for w in p.weights), p.name


class Count(TorchDispatchMode):
    """Calls of one operator."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "op"),
    [("scaled_mm", torch.ops.aten._scaled_mm.default), ("emulate", torch.ops.aten.mm.default)],
    ids=["scaled_mm", "emulate"],
)
def test_activation_checkpointing_recomputes_no_product(tiny, backend, op):
    model = build(tiny(precision={**FP8, "recipe": "fp8", "backend": backend}))
    layer, rotation = model.layers[0], (model.cos[:16], model.sin[:16])
    runs = {
        "plain": layer,
        "kept": partial(checkpoint, layer, use_reentrant=False, context_fn=keep_products),
        "recomputed": partial(checkpoint, layer, use_reentrant=False),
    }
    calls, found = {}, {}
    for name, run in runs.items():
        model.zero_grad()
        x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        with Count(op) as count:
            run(x, Context(rotation)).float().square().sum().backward()
        calls[name], found[name] = count.calls, [x.grad, *(p.grad for p in layer.parameters())]
    assert calls["plain"] == calls["kept"] == 4 * 3
    assert calls["recomputed"] > calls["plain"]
    for name in ("kept", "recomputed"):
        assert all(torch.equal(a, b) for a, b in zip(found["plain"], found[name], strict=True)), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "backward"),
    [(None, 8), ({"context_fn": keep_products}, 8)],
    ids=["plain", "kept"],
)
def test_compiled_checkpointing_recomputes_no_product_either(tiny, options, backward):
    torch._dynamo.reset()
    model = build(tiny(precision={**FP8, "backend": "scaled_mm"}))
    layer, rotation, products = model.layers[0], (model.cos[:16], model.sin[:16]), []

    def count(graph, inputs):
        products.append(sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def loss(x):
        run = layer if options is None else partial(checkpoint, layer, use_reentrant=False, **options)
        return run(x, Context(rotation)).float().square().sum()

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch.compile(loss, backend=backend, fullgraph=True)(torch.randn(4, 16, 32).bfloat16().requires_grad_()).backward()
    assert products == [4, backward]


@pytest.mark.parametrize("formats", [EMULATE, SCALED_MM, Formats(E4M3, E5M2, "emulate", dynamic=True)])
def test_an_empty_batch_is_refused_in_one_line(formats):
    linear = one_linear(formats=formats)["l"]
    x, targets = torch.randn(2, 0, 32), torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(DataError, match=r"empty batch, input \(2, 0, 32\); leave empty batches out") as caught:
        linear(x)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="empty batch"):
        linear.matmul.loss(x, linear.weight, targets, 1.0, 1.0)


@pytest.mark.parametrize("formats", [EMULATE, SCALED_MM], ids=["emulate", "scaled_mm"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 31])
def test_any_number_of_tokens_runs(formats, tokens):
    linear = one_linear(formats=formats)["l"]
    x, grad = torch.randn(tokens, 32, requires_grad=True), torch.randn(tokens, 48)
    y = linear(x)
    y.backward(grad)
    exact = (x @ linear.weight.T, grad @ linear.weight, grad.T @ x)
    for found, wanted, shape in zip(
        (y, x.grad, linear.weight.grad), exact, [(tokens, 48), (tokens, 32), (48, 32)], strict=True
    ):
        assert found.shape == shape
        assert error(found, wanted) < 0.12


# --- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp16", "fp8", "simulate:E3M4"])
def test_a_diverged_run_names_the_layer_where_it_began(tiny, recipe, monkeypatch):
    honest = loop.build

    def spoiled(*args):
        model = honest(*args)

        with torch.no_grad():
            model.layers[1].mlp.up.weight[3] = math.inf
        refresh_weights(encoded(model))
        return model

    monkeypatch.setattr(loop, "build", spoiled)
    config = tiny(model={"num_layers": 3}, precision={**FP8, "recipe": recipe, "scales": "static"})
    with pytest.raises(DivergedError, match=r"^step 1: loss became nan; first in the input of layers\.1\.mlp\.down;"):
        run_training(config)


# --- fp16 ----------------------------------------------------------------------------------------------------------


def test_fp16_needs_no_loss_scaling_under_unit_scaling(tiny):
    seen = {"fp32": [], "fp16": []}
    for recipe, losses in seen.items():
        config = tiny(optimizer={"lr": 0.3}, train={"steps": 30}, precision={"recipe": recipe})
        run_training(config, observe=lambda m, losses=losses: losses.append(m))
    assert all(math.isfinite(m.grad_norm) for m in seen["fp16"])
    exact, half = ([m.train_loss for m in seen[recipe]] for recipe in ("fp32", "fp16"))
    assert half != exact
    assert half == pytest.approx(exact, abs=0.02)
    assert half[-1] < half[0] - 1


def flushed(config):
    """Share of the linears' output gradients that fp16 makes zero."""
    model = build(config)
    names = [(n, m.matmul, (m.weight,)) for n, m in model.named_modules() if isinstance(m, Linear)]
    seen = measure_operands(names, LookLoss(model), *batch(length=128))
    return max(r.flush_share(FP16, 0) for (_, operand), r in seen.items() if operand == "g")


def test_fp16_flushes_gradients_without_unit_scaling_only():
    """At 4M tokens per step, as large runs have them: the mean's 1/tokens is what loss scaling is for."""

    def config(scheme):
        return parse_config(
            {
                "model": {"hidden_size": 32, "num_layers": 2, "head_dim": 16, "max_seq_len": 128},
                "parametrization": {"scheme": scheme},
                "train": {"batch_size": 4, "grad_accum": 8192},
            }
        )

    assert flushed(config("sp")) > 0.5
    # Not zero: the query of the first position has no gradient but rounding noise.
    assert flushed(config("umup")) < 1 / 128


def test_the_record_says_what_the_operands_were(tiny, tmp_path):
    run_training(tiny(train={"steps": 2}, precision=FP8), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "ranges.jsonl").read_text().splitlines()]
    assert [tuple(row) for row in rows] == [precision.LOOK] * len(rows)
    assert [(row["product"], row["operand"]) for row in rows[:12]] == [
        (f"layers.0.{name}", operand)
        for name in ("attn.q+k+v", "attn.out", "mlp.gate+up", "mlp.down")
        for operand in ("x", "g", "w")
    ]
