"""Stacked runs are the separate runs, and one that diverges touches no other."""

import functools
import importlib.util
import sys
from argparse import Namespace
from math import inf, isfinite, nan
from pathlib import Path

import pytest
import torch

from umup.config.load import parse_config
from umup.data.batches import Batches
from umup.data.tokens import prepare
from umup.errors import ConfigError, DivergedError
from umup.models.build import build
from umup.models.families import FAMILIES
from umup.models.specs import plan_for
from umup.models.stacked import build_stacked, stacked_loss
from umup.optim.adamw import make_optimizer
from umup.optim.schedule import apply_factor
from umup.study.stacked import (
    BLOCK,
    Stack,
    adamw_,
    member_batches,
    member_bytes,
    members_that_fit,
    run_stacked,
    stack_key,
    unstackable,
)
from umup.train.loop import run_training
from umup.train.step import train_step

CPU = torch.device("cpu")
RATES = {"sp": 2.0**-8, "mup": 2.0**-7, "umup": 0.5}
no_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
OPTIONS = {"mup": {"base": {"hidden_size": 16}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(scheme, lr in octaves from a sound rate, sections as keywords) -> a config whose steps take milliseconds."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        (folder / f"{i}.py").write_text("\n".join(f"def f{j}(x):\n    return {i} * x + {j}\n" for j in range(300)))
    body = {
        "model": {"hidden_size": 32, "num_layers": 2, "head_dim": 8, "max_seq_len": 16},
        "data": {"source": str(folder), "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 10, "batch_size": 4, "eval_batches": 2, "device": "cpu"},
    }

    def make(scheme="umup", octaves=0, **sections):
        parametrization = {"parametrization": {"scheme": scheme, **OPTIONS.get(scheme, {})}}
        whole = {**body, **parametrization, "optimizer": {"lr": RATES[scheme] * 2.0**octaves}}
        return parse_config({n: {**whole.get(n, {}), **sections.get(n, {})} for n in {**whole, **sections}})

    return make


def alone(config):
    """(result, metrics) of the run by itself; the result is None where it diverged."""
    rows = []
    try:
        return run_training(config, observe=rows.append), rows
    except DivergedError:
        return None, rows


def check_against_separate_runs(configs, rel=1e-4):
    for config, run in zip(configs, run_stacked(configs), strict=True):
        result, rows = alone(config)
        mine = run.metrics(config, 7.0)
        assert [m.step for m in mine] == [m.step for m in rows]
        assert [m.lr for m in mine] == [m.lr for m in rows]
        assert [m.train_loss for m in mine] == pytest.approx([m.train_loss for m in rows], rel=rel)
        assert [m.grad_norm for m in mine] == pytest.approx([m.grad_norm for m in rows], rel=10 * rel)
        assert [m.step for m in mine if m.val_loss] == [m.step for m in rows if m.val_loss]
        assert [m.val_loss or 0 for m in mine] == pytest.approx([m.val_loss or 0 for m in rows], rel=rel)
        assert (run.val_loss, run.train_loss) == pytest.approx((result.val_loss, result.train_loss), rel=rel)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", RATES)
def test_every_member_is_the_separate_run(tiny, family, scheme):
    model = {"family": family}
    check_against_separate_runs(
        [
            tiny(scheme, model=model),
            tiny(scheme, 1, model=model, train={"seed": 1}),
            tiny(scheme, -2, model=model, optimizer={"weight_decay": 0.01}),
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stacks(tiny, family):
    model = {"family": family}
    check_against_separate_runs([tiny(model=model), tiny("umup", 1, model=model, train={"seed": 1})])


VARIANTS = {
    "evaluations on the way": {"train": {"eval_every": 4}},
    "clipping": {"train": {"grad_clip": 0.5}},
    "microbatches, in more than one block": {"train": {"grad_accum": 2}},
    "grouped keys, gains off": {"model": {"num_kv_heads": 2, "norm_gain": False}},
    "coupled decay": {"optimizer": {"weight_decay": 0.5, "independent_weight_decay": False}},
    "adam": {"optimizer": {"name": "adam", "weight_decay": 0.01, "eps": 1e-4, "betas": (0.8, 0.99)}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_config_may_ask_for_holds_in_a_stack(tiny, name):
    lone = VARIANTS[name]
    check_against_separate_runs(
        [tiny("sp", 1, **lone), tiny("sp", 0, **{**lone, "train": {**lone.get("train", {}), "seed": 3}})]
    )


def test_bfloat16_runs_stack_too(tiny):
    half = {"precision": {"recipe": "bf16"}}
    check_against_separate_runs([tiny(**half), tiny("umup", -1, **half)], rel=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_gradients_are_each_models_own_in_float64(tiny, family):
    config = tiny(model={"family": family, "num_kv_heads": 2})
    plan = plan_for(config)
    stack = build_stacked(config, plan, (0, 5, 0)).double()
    stack.dtype = torch.float64
    tokens, targets = torch.randint(256, (2, 3, 4, 16))
    losses = stacked_loss(stack)(tokens, targets)
    losses.sum().backward()
    for member, seed in enumerate((0, 5, 0)):
        single = build(config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})}), plan)
        single = single.double()
        single.dtype = torch.float64
        loss = single.loss(tokens[member], targets[member])
        loss.backward()
        torch.testing.assert_close(losses[member], loss, rtol=1e-10, atol=0)
        together = dict(stack.named_parameters())
        assert together.keys() == dict(single.named_parameters()).keys()  # tied ones are one
        for name, p in single.named_parameters():
            torch.testing.assert_close(together[name].grad[member], p.grad, rtol=1e-10, atol=1e-12)


def test_a_diverged_member_has_lost_and_touches_no_other(tiny):
    def stack(octaves):
        return [tiny("sp", 0), tiny("sp", octaves, train={"seed": 1}), tiny("sp", 1, train={"seed": 2})]

    sound, broken = run_stacked(stack(0)), run_stacked(stack(100))
    assert (broken[1].val_loss, broken[1].train_loss) == (inf, inf)
    result, rows = alone(stack(100)[1])
    assert result is None
    assert 0 < len(rows) < 10
    assert len(broken[1].metrics(stack(100)[1], 7.0)) == len(rows)
    assert all(map(isfinite, broken[1].losses + broken[1].grad_norms))
    assert broken[0] == sound[0]
    assert broken[2] == sound[2]
    assert isfinite(sound[1].val_loss)


def test_a_frozen_members_weights_stay_and_its_number_comes_from_no_later_step(tiny):
    stack = Stack([tiny(), tiny(train={"seed": 1})], CPU)
    batch = tuple(torch.randint(256, (2, 2, 4, 16)))
    stack.step([batch], 1.0)
    with torch.no_grad():
        stack.model.embed.weight[1, 0, 0] = nan
    before = {name: p.detach().clone() for name, p in stack.model.named_parameters()}
    zeros = torch.zeros_like(batch[0])  # every member looks row 0 up
    stack.step([(zeros, batch[1])], 1.0)
    with torch.no_grad():
        stack.model.embed.weight[1, 0, 0] = before["embed.weight"][1, 0, 0] = 0.0
    stack.step([batch], 1.0)
    assert stack.alive.tolist() == [True, False]
    for name, p in stack.model.named_parameters():
        assert torch.equal(p[1], before[name][1])
        assert not torch.equal(p[0], before[name][0])
    lives, froze = stack.results({3: torch.tensor([2.0, 2.0])})
    assert (lives.val_loss, len(lives.losses)) == (2.0, 3)
    assert (froze.val_loss, len(froze.losses)) == (inf, 1)


@pytest.mark.parametrize("broken", [inf, nan])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_step_takes_no_gradient_that_is_no_number(broken, clip):
    """Members: sound, a gradient that is no number, a loss that is no number, sound but frozen before."""
    p, g = torch.ones(4, 3, 2), torch.ones(4, 3, 2)
    g[1, 2, 0] = broken
    alive = torch.tensor([True, True, True, False])
    factors = torch.full((1, 4), 0.9), torch.full((1, 4), 0.1), torch.tensor(1.0)
    moments, losses = [(torch.zeros_like(p), torch.zeros_like(p))], torch.tensor([1.0, 1.0, broken, 1.0])
    numbers = {"betas": (0.0, 0.0), "epsilons": (0.0,), "grad_clip": clip}
    norms = adamw_([p], [g], moments, alive, losses, *factors, **numbers)
    assert alive.tolist() == [True, False, False, False]
    assert norms[[0, 2, 3]].tolist() == pytest.approx([6**0.5] * 3)
    torch.testing.assert_close(p[0], torch.full((3, 2), 0.9 - 0.1))
    assert torch.equal(p[1:], torch.ones(3, 3, 2))


def test_a_member_that_cannot_be_evaluated_has_lost(tiny):
    stack = Stack([tiny(), tiny()], CPU)
    stack.step([tuple(torch.randint(256, (2, 2, 4, 16)))], 1.0)
    assert [run.val_loss for run in stack.results({1: torch.tensor([nan, 2.0])})] == [inf, 2.0]


def test_an_evaluation_on_the_way_that_is_no_number_ends_a_member_there(tiny):
    stack = Stack([tiny(), tiny()], CPU)
    for _ in range(3):
        stack.step([tuple(torch.randint(256, (2, 2, 4, 16)))], 1.0)
    lost, sound = stack.results({2: torch.tensor([nan, 3.0]), 3: torch.tensor([2.0, 2.5])})
    assert (lost.val_loss, lost.train_loss, len(lost.losses), lost.evaluations) == (inf, inf, 1, {})
    assert (sound.val_loss, len(sound.losses), sound.evaluations) == (2.5, 3, {2: 3.0, 3: 2.5})


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("width", "vocab"), [(32, 256), (128, 64)])
def test_the_guess_of_a_members_memory_is_near_what_it_keeps(tiny, family, recipe, width, vocab):
    """What autograd holds, the logits' gradient, and weights, gradients and moments."""
    config = tiny(
        model={"family": family, "hidden_size": width, "head_dim": 16, "max_seq_len": 128, "vocab_size": vocab},
        train={"batch_size": 16},
        precision={"recipe": recipe},
    )
    stack = build_stacked(config, plan_for(config), (0, 1))
    held, kept = {p.untyped_storage().data_ptr() for p in stack.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(vocab, (2, 16, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stacked_loss(stack)(tokens, tokens)
    activations = sum(size for pointer, size in kept.items() if pointer not in held)
    state = 16 * sum(p.numel() for p in stack.parameters())
    needed = (activations + 2 * 16 * 128 * vocab * 4 + state) / 2
    assert 0.9 < member_bytes(config) / needed < 1.7


def test_members_read_their_own_seeds_batches_in_order(tiny):
    configs = [tiny(train={"seed": seed, "steps": BLOCK + 3}) for seed in (4, 7, 4)]
    files = prepare(configs[0].data, 256, configs[0].tokens_per_batch)
    got = list(member_batches(configs, files))
    assert len(got) == BLOCK + 3
    for member, config in enumerate(configs):
        own = Batches(files.train.load(), 4, 16, config.train.seed)
        position = own.start()
        for inputs, targets in got:
            wanted, wanted_targets, position = own.next(position)
            assert (inputs[member] == wanted).all()
            assert (targets[member] == wanted_targets).all()


@no_warnings
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_stack_is_the_eager_one(tiny, family, monkeypatch):
    """Through the quick backend, which traces forward, backward and update as the slow one does."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def runs(compiled):
        train = {"compile": compiled, "grad_clip": 0.5}
        return run_stacked([tiny(model={"family": family}, train={**train, "seed": s}) for s in (0, 1)])

    for mine, reference in zip(runs(True), runs(False), strict=True):
        assert mine.losses == pytest.approx(reference.losses, rel=1e-5)
        assert mine.val_loss == pytest.approx(reference.val_loss, rel=1e-5)


@no_warnings
def test_a_process_compiles_more_stacks_than_torch_keeps_by_default(tiny, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for length in range(8, 13):  # of each a program that trains and one that evaluates
        config = tiny(model={"max_seq_len": length, "num_layers": 1}, train={"compile": True, "steps": 3})
        assert isfinite(run_stacked([config])[0].val_loss)


@no_warnings
def test_a_second_stack_of_a_shape_compiles_nothing_and_knows_nothing_of_the_first(tiny, monkeypatch):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    def stack(octaves, seed, compiles=True, **model):
        train = {"compile": compiles, "steps": 4}
        return [tiny("sp", o, model=model, train={**train, "seed": seed + i}) for i, o in enumerate(octaves)]

    first = run_stacked(stack((0, 100), 0))
    assert (len(compiled), first[1].val_loss) == (2, inf)  # the model and the update; evaluations need no other
    again = run_stacked(stack((1, -1), 5))
    assert len(compiled) == 2
    for mine, alone in zip(again, run_stacked(stack((1, -1), 5, compiles=False)), strict=True):
        assert mine.losses == pytest.approx(alone.losses, rel=1e-5)
        assert mine.val_loss == pytest.approx(alone.val_loss, rel=1e-5)
    run_stacked(stack((0, 0, 0), 0))
    run_stacked(stack((0, 0), 0, num_layers=1))
    assert len(compiled) == 6
    with pytest.raises(ConfigError, match="a stack of 1 cannot train 2"):
        Stack([tiny()], CPU).begin([tiny(), tiny()])


def test_memory_that_torch_keeps_for_itself_is_free(tiny, monkeypatch):
    need = member_bytes(tiny())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * need, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * need)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: need)
    assert members_that_fit(tiny(), torch.device("cuda")) == 4  # of 5, with a margin


REFUSED = {
    "optimizer.name": {"optimizer": {"name": "sgd"}},
    "state_dtype": {"optimizer": {"state_dtype": "bf16"}},
    "master_dtype": {"optimizer": {"master_dtype": "bf16"}},
    "model.dropout": {"model": {"dropout": 0.1}},
    "precision": {"precision": {"recipe": "fp8", "backend": "emulate"}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stacked_is_refused_by_name(tiny, name):
    config = tiny(**REFUSED[name])
    assert name in unstackable(config)
    with pytest.raises(ConfigError, match=name):
        run_stacked([config, config])


def test_members_may_differ_in_rate_decay_and_seed_alone(tiny):
    one = tiny()
    assert unstackable(one) is None
    assert stack_key(one) == stack_key(tiny("umup", 1, optimizer={"weight_decay": 0.3}, train={"seed": 4}))
    for field, sections in {
        "parametrization.hparams": {"parametrization": {"hparams": {"alpha_attn_softmax": 2.0}}},
        "model.hidden_size": {"model": {"hidden_size": 64}},
        "train.steps": {"train": {"steps": 11}},
    }.items():
        other = tiny(**sections)
        assert stack_key(one) != stack_key(other)
        with pytest.raises(ConfigError, match=f"differ in {field}; .*optimizer.lr"):
            run_stacked([one, other])


@pytest.fixture
def benchmark(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "stacked_sweep.py"
    spec = importlib.util.spec_from_file_location("stacked_sweep", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stacked_sweep", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_prints_every_variant_with_the_loss_of_the_separate_run(benchmark, capsys):
    size = ["--width", "16", "32", "--members", "2", "--depth", "1", "--tokens", "256", "--rounds", "2"]
    benchmark.main([*size, "--device", "cpu", "--eager"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["width", "one", "stacked", "stock", "vmap"] * 2
    losses = [[float(line.split()[-1]) for line in lines[i : i + 4]] for i in (2, 7)]
    for one, stacked, stock, vmap in losses:
        assert stacked == pytest.approx(one, abs=2e-4)
        assert vmap == pytest.approx(stock, abs=2e-4)


def test_the_benchmark_calls_out_a_loss_that_is_another_and_a_row_that_failed(benchmark):
    cost = benchmark.Cost
    costs = {"one": cost(6.0, 3.0), "graphs": cost(2.0, 4.12), "stacked": cost(1.0, 3.01)}
    one, graphs, stacked, vmap = benchmark.rows(costs, {"vmap": "no rule"})
    assert "2.00x stacked  loss 4.1200  NOT 3.0000: no claim" in graphs
    assert "NOT" in benchmark.rows({**costs, "graphs": cost(2.0, nan)}, {})[1]
    assert "NOT" not in one + stacked
    assert vmap.endswith("does not run here: no rule")


def test_the_step_that_is_captured_is_the_trainers_and_stays_in_its_memory(benchmark):
    """All of the CUDA graph but the capture: static buffers, rates as tensors, beginning anew."""
    config = benchmark.config_of(Namespace(depth=1, tokens=512, eager=True, device="cpu"), 16, 0)
    batches = [tuple(torch.randint(256, (2, 2, 256))) for _ in range(3)]
    factors = (1.0, 0.5, 0.25)
    _, groups, loss = benchmark.parts_of(config, "cpu")
    optimizer = make_optimizer(config.optimizer, groups)
    wanted = []
    for batch, scheduled in zip(batches, factors, strict=True):
        apply_factor(optimizer, scheduled)
        wanted.append(train_step(loss, optimizer, [batch], 0.0).loss)

    static = benchmark.StaticStep(config, "cpu", batches[2])
    static(*batches[1])  # as warming up does
    static.restore()

    def addresses():
        state = [part for entry in static.optimizer.state.values() for part in entry.values()]
        rates = [group["lr"] for group in static.optimizer.param_groups]
        return [t.data_ptr() for t in (static.tokens, static.targets, *static.model.parameters(), *state, *rates)]

    before = addresses()
    for _ in range(2):
        found = []
        for batch, scheduled in zip(batches, factors, strict=True):
            static.schedule(scheduled)
            found.append(float(static(*batch)))
        assert found == pytest.approx(wanted, rel=1e-5)
        static.restore()
    assert addresses() == before
