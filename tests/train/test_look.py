"""A look that is recorded says what an eager one says, of the present weights, and is recorded anew when it must be."""

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from umup.config.load import parse_config
from umup.models.build import build
from umup.nn.fp8 import encoded, refresh_weights
from umup.optim.adamw import AdamW
from umup.train import look as looking
from umup.train.look import LookLoss, Looks, in_place
from umup.train.precision import ScaleKeeper

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU with FP8 products")


def model_of(device="cpu", model=None, optimizer=None, **precision):
    backend = "auto" if device == "cuda" else "emulate"
    sizes = {"hidden_size": 64, "num_layers": 2, "head_dim": 32, "max_seq_len": 32, "norm_gain": False}
    body = {
        "model": {**sizes, **(model or {})},
        "optimizer": optimizer or {},
        "precision": {"recipe": "fp8_head", "backend": backend} | precision,
    }
    return build(parse_config(body), device=device)


def batch(seed, rows=2, length=32, device="cpu"):
    ids = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return ids[:, :-1], ids[:, 1:]


def looks_of(model):
    return Looks(model, [(p.name, p.matmul, p.weights) for p in encoded(model)])


class Recorder:
    """A CUDA graph's part on a CPU: a program on tensors that stay in place, run again at every replay."""

    def __init__(self):
        self.recorded, self.replays, self.programs = 0, 0, []

    def __call__(self, program, inputs):
        replayed = in_place(program, inputs, self.record)
        self.programs.append(weakref.ref(replayed))
        return replayed

    def record(self, call):
        self.recorded += 1
        out = torch.full_like(call(), torch.nan)

        def replay():
            self.replays += 1
            out.copy_(call())

        return out, replay


def recording(model):
    looks, recorder = looks_of(model), Recorder()
    looks.recorders = {"cpu": recorder}
    return looks, recorder


def numbers(ranges):
    return {operand: (r.amax, r.nonfinite, r.rms, r.elements, r.counts.tolist()) for operand, r in ranges.items()}


def change_weights(model, seed):
    """In place, as an optimizer does, encodings and scales following."""
    with torch.no_grad():
        for i, w in enumerate(model.parameters()):
            w.mul_(1 + 0.5 * ((seed + i) % 3))
    refresh_weights(encoded(model))


# --- what a recorded look says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [{}, {"recipe": "fp8_partial"}, {"overrides": {"*.attn.k": "fp8_e4m3"}}])
def test_a_replayed_look_is_the_eager_one_at_the_present_weights(precision):
    model = model_of(**precision)
    (looks, recorder), eager = recording(model), looks_of(model)
    for step in range(5):
        tokens = batch(step)
        assert numbers(looks(LookLoss(model), *tokens)) == numbers(eager(LookLoss(model), *tokens)), step
        change_weights(model, step)
        for p in encoded(model):
            p.matmul.set_exponents(p.matmul.exponents + torch.tensor([step % 2, -1, 0], dtype=torch.int32))
    assert (recorder.recorded, recorder.replays) == (1, 4)


def test_scales_move_after_a_replay_as_after_an_eager_look():
    models = [model_of() for _ in range(2)]
    keepers = [ScaleKeeper(model, "adapt", 1) for model in models]
    keepers[1].looks.recorders = {"cpu": (recorder := Recorder())}
    seen = []
    for step in range(6):
        for model, keeper in zip(models, keepers, strict=True):
            with torch.no_grad():
                model.layers[0].mlp.up.weight.mul_(4.0)
            refresh_weights(encoded(model))
            keeper.look(step, LookLoss(model), *batch(step))
        states = [keeper.state() for keeper in keepers]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        seen.append(states[0]["layers.0.mlp.down"][0].item())
    assert seen[5] < seen[3] < seen[1] < seen[0]
    assert recorder.replays > 0


class Count(TorchDispatchMode):
    """FP8 products."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


def test_a_look_makes_no_gradient_that_it_does_not_measure():
    model = model_of(backend="scaled_mm")
    products = len(encoded(model))
    with Count() as count:
        found = looks_of(model)(LookLoss(model), *batch(0))
    assert len(found) == 3 * products
    # Forward, and the input gradients of all but the first: queries, keys and values of the first layer.
    assert count.calls == products + products - 1


def test_frozen_parts_before_a_product_hide_nothing_of_it():
    model = model_of()
    model.embed.weight.requires_grad_(False)
    assert len(looks_of(model)(LookLoss(model), *batch(0))) == 3 * len(encoded(model))


# --- when it is recorded -------------------------------------------------------------------------------------------


def move(model):
    weight = model.layers[0].attn.q.weight
    weight.data = weight.data.clone()


def spare(model):
    model.layers[1].mlp.down.matmul.spared = True


def freeze(model):
    model.layers[0].mlp.up.weight.requires_grad_(False)


def stop_training(model):
    model.eval()


def scales_elsewhere(model):
    matmul = model.layers[0].attn.out.matmul
    matmul.scales_table = matmul.scales_table.clone()


@pytest.mark.parametrize("change", [move, spare, freeze, stop_training, scales_elsewhere])
def test_whatever_a_recording_cannot_see_makes_another(change):
    model = model_of()
    looks, recorder = recording(model)
    for seed in range(3):
        looks(LookLoss(model), *batch(seed))
    change(model)
    first = numbers(looks(LookLoss(model), *batch(3)))
    assert recorder.recorded == 1
    assert recorder.programs[0]() is None  # and what it held is given back
    assert first == numbers(looks_of(model)(LookLoss(model), *batch(3)))
    looks(LookLoss(model), *batch(4))
    looks(LookLoss(model), *batch(5))
    assert (recorder.recorded, recorder.replays) == (2, 2 + 2)


@pytest.mark.parametrize("other", ["shape", "model"])
def test_another_shape_or_model_makes_another(other):
    model = model_of()
    looks, recorder = recording(model)
    second = (model, batch(2, length=16)) if other == "shape" else (model_of(), batch(2))
    for subject, tokens in [(model, batch(0)), (model, batch(1)), second, (model, batch(3)), (model, batch(4))]:
        looks(LookLoss(subject), *tokens)
    assert (recorder.recorded, recorder.replays) == (2, 2)


@pytest.mark.parametrize(
    "inputs", [lambda loss: (loss, *batch(0)), lambda loss: (partial(loss, *batch(0)),)], ids=["of inputs", "of none"]
)
def test_a_loss_of_ones_own_stays_eager(inputs):
    model = model_of()
    looks, recorder = recording(model)
    for _ in range(3):
        looks(*inputs(lambda tokens, targets: model(tokens).float().square().mean()))
    assert recorder.recorded == 0


def test_dropout_stays_eager_while_it_drops():
    model = model_of(model={"dropout": 0.1})
    looks, recorder = recording(model)
    for _ in range(3):
        looks(LookLoss(model), *batch(0))
    assert recorder.recorded == 0
    model.eval()
    for _ in range(2):
        looks(LookLoss(model), *batch(0))
    assert recorder.recorded == 1


@pytest.mark.parametrize(("ranks", "recorded"), [(1, 1), (2, 0)])
def test_several_ranks_stay_eager(ranks, recorded, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(looking, "agreed", lambda measured: measured)
    model = model_of()
    looks, recorder = recording(model)
    for _ in range(3):
        looks(LookLoss(model), *batch(0))
    assert recorder.recorded == recorded


# --- on a GPU ------------------------------------------------------------------------------------------------------


def gradients_close(found, wanted):
    """Attention's backward pass adds up in any order: gradients are equal to rounding, all else exactly."""
    assert found.keys() == wanted.keys()
    for operand, r in found.items():
        if operand[1] != "g":
            assert numbers({operand: r}) == numbers({operand: wanted[operand]}), operand
        assert r.nonfinite == wanted[operand].nonfinite == 0
        assert r.elements == wanted[operand].elements
        assert r.rms == pytest.approx(wanted[operand].rms, rel=1e-2), operand
        assert r.amax == pytest.approx(wanted[operand].amax, rel=5e-2), operand


@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_a_cuda_graph_looks_like_an_eager_look_while_a_run_goes_on(master):
    sizes = {"hidden_size": 256, "num_layers": 3, "head_dim": 64, "max_seq_len": 256}
    model = model_of("cuda", sizes, {"master_dtype": master})
    looks, eager = looks_of(model), looks_of(model)
    eager.recorders = {}
    optimizer = AdamW(model.parameters(), lr=0.3, state_dtype=torch.bfloat16)
    ScaleKeeper(model, "static", 1).follow(optimizer)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    for step in range(8):
        tokens = batch(step, rows=4, length=256, device="cuda")
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        found = looks(LookLoss(model), *tokens)
        assert all(map(torch.equal, before, (torch.cuda.get_rng_state(), torch.get_rng_state())))
        assert all(w.grad is None for w in model.parameters())
        gradients_close(found, eager(LookLoss(model), *tokens))
        loss(*tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert looks.recorded is not None
    assert not isinstance(looks.recorded, partial)


@needs_gpu
def test_scales_follow_a_cuda_graph_and_a_spared_product_is_recorded_anew():
    eager, replayed = model_of("cuda"), model_of("cuda")
    keepers = [ScaleKeeper(model, "adapt", 1) for model in (eager, replayed)]
    keepers[0].looks.recorders = {}
    graphs = set()
    for step in range(10):
        for model, keeper in zip((eager, replayed), keepers, strict=True):
            if step == 5:
                spare(model)
            with torch.no_grad():
                model.layers[0].mlp.up.weight.mul_(2.0)
            refresh_weights(encoded(model))
            keeper.look(step, LookLoss(model), *batch(step, device="cuda"))
        states = [keeper.state() for keeper in keepers]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), step
        graphs.add(keepers[1].looks.recorded)
    assert states[0]["layers.0.mlp.down"][0] < 0
    assert len(graphs) == 3  # none, one, and one after the product was spared


@needs_gpu
def test_a_graph_that_would_keep_too_much_is_not_made(monkeypatch):
    monkeypatch.setattr(looking, "GRAPH_SHARE", 0.0)
    model = model_of("cuda")
    looks = looks_of(model)
    for step in range(3):
        looks(LookLoss(model), *batch(step, device="cuda"))
    assert isinstance(looks.recorded, partial)


@needs_gpu
def test_memory_of_a_dropped_graph_is_given_back():
    model = model_of("cuda", {"hidden_size": 512, "max_seq_len": 512})
    looks = looks_of(model)
    for step in range(3):
        looks(LookLoss(model), *batch(step, length=512, device="cuda"))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    looks.recorded = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
