"""Our AdamW is torch's in float32, keeps learning in bfloat16, resumes to the bit, and its step bound is sharp."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch

from umup.config.load import parse_config
from umup.config.sections import OptimizerConfig
from umup.errors import ConfigError
from umup.numerics.rounding import Key
from umup.optim.adamw import AdamW, StepBound, make_optimizer, step_bound, step_eager
from umup.optim.groups import load_state_tensors, state_tensors

SHAPES = [(33, 7), (64,), (5, 3, 2)]
HYPER = {"betas": (0.9, 0.95)}
HALF = torch.bfloat16


def groups_of(dtype=torch.float32, seed=0, device="cpu"):
    """Two groups of different numbers, with the keys of optim/groups.py."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]
    names = [f"p{i}" for i in range(len(params))]
    first = {"lr": 0.1, "initial_lr": 0.1, "eps": 1e-3, "weight_decay": 0.3}
    second = {"lr": 0.02, "initial_lr": 0.02, "eps": 1e-12, "weight_decay": 0.0}
    return [{"params": params[:2], "names": names[:2], **first}, {"params": params[2:], "names": names[2:], **second}]


def train(optimizer, steps, start=0, grad_scale=1.0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (1 + step)
            for p in group["params"]:
                p.grad = (torch.randn(p.shape, generator=generator) * grad_scale).to(p.device, p.dtype)
        optimizer.step()
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("foreach", [True, False])
def test_in_float32_it_is_torchs_to_the_bit(foreach):
    ours, theirs = AdamW(groups_of(), **HYPER), torch.optim.AdamW(groups_of(), **HYPER, foreach=foreach)
    assert all(torch.equal(a, b) for a, b in zip(train(ours, 50), train(theirs, 50), strict=True))
    mine, others = state_tensors(ours), state_tensors(theirs)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], others[key]) for key in mine)


def test_a_checkpoint_of_torchs_adamw_goes_on_in_ours():
    theirs = torch.optim.AdamW(groups_of(), **HYPER)
    train(theirs, 5)
    ours = AdamW(deepcopy(theirs.param_groups), **HYPER)
    load_state_tensors(ours, {key: value.clone() for key, value in state_tensors(theirs).items()})
    assert all(torch.equal(a, b) for a, b in zip(train(ours, 5, 5), train(theirs, 5, 5), strict=True))


def test_parameters_without_gradient_and_closures_are_treated_as_torch_does():
    optimizer = AdamW(groups_of(), **HYPER)
    first = optimizer.param_groups[0]["params"][0]
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]

    def closure():
        loss = first.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    after = [p for g in optimizer.param_groups for p in g["params"]]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert list(optimizer.state) == [first]


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, HALF), (HALF, HALF), (HALF, torch.float32)])
def test_resuming_is_exact_in_every_storage(dtype, state_dtype):
    whole = AdamW(groups_of(dtype), **HYPER, state_dtype=state_dtype)
    through = train(whole, 8)
    first = AdamW(groups_of(dtype), **HYPER, state_dtype=state_dtype)
    train(first, 5)
    saved = {key: value.clone() for key, value in state_tensors(first).items()}
    assert {key.split("/")[0]: v.dtype for key, v in saved.items()} == {
        "step": torch.float32,
        "exp_avg": state_dtype,
        "exp_avg_sq": state_dtype,
    }
    second = AdamW(deepcopy(first.param_groups), **HYPER, state_dtype=state_dtype)
    load_state_tensors(second, saved)
    third = AdamW(deepcopy(first.param_groups), **HYPER, state_dtype=state_dtype)
    third.load_state_dict(deepcopy(first.state_dict()))
    for resumed in (second, third, deepcopy(first)):
        assert all(torch.equal(a, b) for a, b in zip(through, train(resumed, 3, 5), strict=True))


def test_a_bfloat16_second_moment_follows_at_beta2_0999():
    """Rounded to nearest it would stay at 1 (a decay by 0.001 is under half a unit in the last place)."""
    p, m = torch.zeros(4096), torch.zeros(4096, dtype=HALF)
    v = torch.ones(4096, dtype=HALF)
    for step in range(1, 1201):
        step_eager(
            p, torch.full_like(p, 0.1), m, v, Key(0, step), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
    truth = 0.999**1200 + 0.01 * (1 - 0.999**1200)
    assert v.float().mean().item() == pytest.approx(truth, rel=0.005)
    assert v.float().std().item() < 0.1 * truth
    # m takes a plateau of nearest rounding too: its last steps are smaller than half a unit.
    assert m.float().mean().item() == pytest.approx(0.1, rel=1e-3)


def test_a_bfloat16_master_keeps_small_updates():
    """Relative steps of 2^-12 vanish under nearest rounding, which loses all that are below 2^-9."""
    p = torch.ones(4096, dtype=HALF)
    m, v = torch.zeros(4096), torch.zeros(4096)
    for step in range(1, 257):
        step_eager(
            p, torch.ones_like(p), m, v, Key(0, step), lr=2.0**-12, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0
        )
    assert 1 - p.float().mean().item() == pytest.approx(256 * 2.0**-12, rel=0.02)


def test_bfloat16_storage_follows_float32_on_a_quadratic():
    """Noisy gradients of |w - target|^2: the loss agrees and no parameter shares another's noise."""
    target = torch.linspace(-1, 1, 2048)

    def final(dtype, state_dtype):
        w = torch.nn.Parameter(torch.zeros(2048, dtype=dtype))
        optimizer = AdamW([w], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0, state_dtype=state_dtype)
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            w.grad = (w.detach().float() - target + 0.1 * torch.randn(2048, generator=generator)).to(dtype)
            optimizer.step()
        return (w.detach().float() - target).square().mean().item()

    reference = final(torch.float32, torch.float32)
    assert final(torch.float32, HALF) == pytest.approx(reference, rel=0.1)
    assert final(HALF, HALF) == pytest.approx(reference, rel=0.3)


def test_gradients_of_the_other_dtype_are_taken():
    for dtype, other in ((torch.float32, HALF), (HALF, torch.float32)):
        p, q = (torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
        grad = torch.randn(50).to(HALF)
        for tensor, g in ((p, grad.to(dtype)), (q, grad.to(other))):
            moments = [torch.zeros(50, dtype=HALF) for _ in range(2)]
            step_eager(tensor, g, *moments, Key(1, 1), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        assert torch.equal(p, q)


def test_equal_parameters_do_not_share_their_noise():
    params = [torch.nn.Parameter(torch.ones(1000, dtype=HALF)) for _ in range(2)]
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=1e-3, state_dtype=HALF)
    for p in params:
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    assert not torch.equal(*params)


def test_the_config_chooses():
    def made(**fields):
        return make_optimizer(OptimizerConfig(betas=(0.8, 0.9), **fields), groups_of())

    plain = made()
    assert type(plain) is torch.optim.AdamW
    assert plain.param_groups[1]["betas"] == (0.8, 0.9)
    ours = made(state_dtype="bf16")
    assert type(ours) is AdamW
    assert ours.param_groups[1]["betas"] == (0.8, 0.9)
    train(ours, 1)
    assert {v.dtype for k, v in state_tensors(ours).items() if k.startswith("exp")} == {HALF}
    assert type(made(master_dtype="bf16")) is AdamW
    with pytest.raises(ConfigError, match=r"optimizer\.state_dtype.*'fp32' or 'bf16'"):
        parse_config({"optimizer": {"state_dtype": "fp8"}})


# --- how far one step goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.98), (0.5, 0.3), (0.0, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
def test_the_bound_holds_and_is_reached(betas, make):
    """By gradients that go as (beta1/beta2)^age, after so many zeros that no bias is left to correct."""
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = make([p], lr=0.25, betas=betas, eps=1e-30, weight_decay=0.0)
    bound = step_bound(optimizer, optimizer.param_groups[0])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(20_000)
    ratio = betas[0] / betas[1] if betas[0] else 0.0
    steps = []
    for age in reversed(range(60)):
        p.grad = torch.full_like(p, ratio**age)
        p.detach().zero_()
        optimizer.step()
        steps.append(p.detach().abs().max().item())
    assert bound.relative == 0.0
    assert max(steps) <= bound.absolute * (1 + 1e-5)
    assert steps[-1] >= bound.absolute * 0.99


@pytest.mark.parametrize("state_dtype", [torch.float32, HALF])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.99), (0.9, 0.9)])
def test_no_gradients_pass_the_bound(betas, state_dtype):
    """From steady to wildly jumping ones, element by element, from the first step on."""
    p = torch.nn.Parameter(torch.zeros(20000))
    optimizer = AdamW([p], lr=1.0, betas=betas, eps=1e-30, weight_decay=0.0, state_dtype=state_dtype)
    bound = step_bound(optimizer, optimizer.param_groups[0]).absolute
    spread = torch.linspace(0, 4, 20000)
    largest = 0.0
    for _ in range(40):
        p.detach().zero_()
        p.grad = torch.randn(20000) * torch.exp(spread * torch.randn(20000))
        optimizer.step()
        largest = max(largest, p.detach().abs().max().item())
    assert 0.9 < largest <= bound * (1 + 1e-5)


def test_rounding_moves_a_bfloat16_weight_no_further_than_the_bound():
    p = torch.nn.Parameter(torch.randn(20000).to(HALF))
    optimizer = AdamW([p], lr=0.01, betas=(0.9, 0.95), weight_decay=2.0, state_dtype=HALF)
    for step in range(30):
        before = p.detach().float().clone()
        p.grad = torch.randn(20000, generator=torch.Generator().manual_seed(step)).to(HALF)
        optimizer.step()
        bound = step_bound(optimizer, optimizer.param_groups[0])
        moved = (p.detach().float() - before).abs()
        assert (moved <= bound.absolute + bound.relative * before.abs()).all()


def test_the_bound_follows_rate_decay_and_storage():
    def bound(lr=0.5, betas=(0.9, 0.95), weight_decay=0.2, dtype=torch.float32, **kwargs):
        optimizer = AdamW([torch.zeros(3, dtype=dtype)], lr=lr, betas=betas, weight_decay=weight_decay, **kwargs)
        return step_bound(optimizer, optimizer.param_groups[0])

    assert bound() == StepBound(pytest.approx(0.5 * 1.164965, rel=1e-5), 0.1)
    assert bound(lr=1.0).absolute == pytest.approx(1.164965, rel=1e-5)
    assert bound(betas=(0.9, 0.999)).absolute == pytest.approx(0.5 * 7.27, rel=1e-3)
    assert bound(betas=(0.95, 0.9)).absolute == float("inf")
    assert 1.0 < bound(state_dtype=HALF).absolute / bound().absolute < 1.1
    assert bound(dtype=HALF).relative == pytest.approx(0.1 + 2**-7)
    sgd = torch.optim.SGD([torch.zeros(3)], lr=0.1)
    assert step_bound(sgd, sgd.param_groups[0]) is None


# --- the kernel ----------------------------------------------------------------------------------------------------


def kernel_against_eager(device):
    """Both from the same start, over sizes with and without a remainder. Exact up to contracted multiply-adds."""
    from umup.numerics.kernels.adamw import adamw_

    for dtype in (torch.float32, HALF):
        for state_dtype in (torch.float32, HALF):
            for grad_dtype in (torch.float32, HALF):
                for numel in (1, 4099, 8192):
                    torch.manual_seed(numel)
                    tensors = [torch.randn(numel).to(device, dtype), torch.randn(numel).to(device, grad_dtype)]
                    tensors += [torch.randn(numel).to(device, state_dtype)]
                    tensors += [torch.rand(numel).to(device, state_dtype)]
                    tensors[1][-1] = torch.nan
                    hyper = {"lr": 0.3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
                    ours, theirs = [t.clone() for t in tensors], [t.clone() for t in tensors]
                    adamw_(*ours, Key(3, 7), **hyper)
                    step_eager(*theirs, Key(3, 7), **hyper)
                    for a, b in zip(ours, theirs, strict=True):
                        assert a.dtype == b.dtype
                        assert torch.equal(a.isnan(), b.isnan())
                        near = (a - b).float().nan_to_num().abs() <= 1e-5 + 1e-5 * b.float().nan_to_num().abs()
                        if a.dtype == HALF:
                            # A last bit of float32 decides few roundings.
                            assert near.float().mean() > 0.999
                            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-5, equal_nan=True)
                        else:
                            assert near.all()


@pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: its interpreter cannot run the kernel"
)
def test_the_interpreted_kernel_equals_the_eager_step():
    """In a process of its own: triton reads TRITON_INTERPRET when it is first imported."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['kernel_against_eager']('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_equals_the_eager_step():
    kernel_against_eager("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_run_follows_the_cpus():
    for dtype, state_dtype in [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF)]:
        there = AdamW(groups_of(dtype, device="cuda"), **HYPER, state_dtype=state_dtype)
        here = AdamW(groups_of(dtype), **HYPER, state_dtype=state_dtype)
        for a, b in zip(train(there, 20), train(here, 20), strict=True):
            torch.testing.assert_close(
                a.cpu(), b, rtol=2e-5 if dtype != HALF and state_dtype != HALF else 0.05, atol=0.02
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_neither_steps_nor_rates_compile_anew():
    from umup.numerics.kernels import jit
    from umup.numerics.kernels.adamw import _adamw_kernel

    optimizer = AdamW(groups_of(device="cuda"), **HYPER, state_dtype=HALF)
    train(optimizer, 2)
    cache = jit(_adamw_kernel).device_caches[torch.cuda.current_device()][0]
    compiled = len(cache)
    train(optimizer, 40, 2)
    assert len(cache) == compiled


def test_groups_may_store_their_moments_differently():
    half, full = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    groups = [{"params": [half], "state_dtype": HALF}, {"params": [full]}]
    optimizer = AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    for p in (half, full):
        p.grad = torch.ones(8)
    optimizer.step()
    restored = AdamW(deepcopy(groups), lr=0.1, betas=(0.9, 0.95))
    restored.load_state_dict(optimizer.state_dict())
    for o in (optimizer, restored):
        stored = [o.state[p]["exp_avg"].dtype for group in o.param_groups for p in group["params"]]
        assert stored == [HALF, torch.float32]
    bounds = [step_bound(optimizer, group).absolute for group in optimizer.param_groups]
    assert bounds[0] > bounds[1]  # bfloat16 moments round
