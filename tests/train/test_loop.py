"""The loop and its step: what it minimises, how decay, accumulation and clipping act, and how it stops."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from umup.checkpoint import load_latest
from umup.cli.main import main
from umup.errors import CheckpointError, ConfigError, DivergedError
from umup.models.build import build
from umup.models.specs import plan_for
from umup.optim.groups import param_groups
from umup.optim.schedule import apply_factor
from umup.train import loop
from umup.train.loop import run_training
from umup.train.step import evaluate, train_step

# These decays are large so that their effect is seen.

BASE = {"hidden_size": 16}


def scheme(name):
    return {"scheme": name, **({"base": BASE} if name == "mup" else {})}


def losses(config, out=None):
    seen = []
    run_training(config, out, observe=seen.append)
    return [m.train_loss for m in seen]


def prepared(config):
    """A model in training and its optimizer, as the loop makes them."""
    plan = plan_for(config)
    model = build(config, plan)
    model.train()
    o = config.optimizer
    groups = param_groups(plan, model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, eps=o.eps)
    return plan, model, torch.optim.AdamW(groups, betas=o.betas)


def batch(rows, length=16, seed=0):
    ids = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "lr"), [("sp", 0.005), ("mup", 0.005), ("umup", 0.5)])
def test_every_scheme_learns_in_every_family(tiny, name, lr, family):
    config = tiny(model={"family": family}, parametrization=scheme(name), optimizer={"lr": lr}, train={"steps": 60})
    seen = losses(config)
    assert seen[0] == pytest.approx(math.log(256), rel=0.15)
    assert sum(seen[-5:]) / 5 < 3.5


def by_hand(plan, model, config, factor, coupled):
    """One Adam step from zero state on the gradients at hand, in float64."""
    o = config.optimizer
    stepped = {}
    for name, parameter in model.named_parameters():
        w, g, p = parameter.detach().double(), parameter.grad.double(), plan.params[name]
        rate = o.lr * p["lr"] * factor
        decay = o.weight_decay * p["weight_decay"] * (rate if coupled else factor)
        # At the first step the bias corrections undo (1 - beta): m = g, v = g^2.
        stepped[name] = w * (1 - decay) - rate * g / (g.abs() + 1e-8 * p["eps"])  # torch's epsilon
    return stepped


@pytest.mark.parametrize("coupled", [False, True], ids=["independent", "coupled"])
@pytest.mark.parametrize("name", ["sp", "mup", "umup"])
def test_a_step_is_adam_with_the_decay_that_was_asked_for(tiny, name, coupled):
    config = tiny(
        model={"family": "gpt2"},
        parametrization=scheme(name),
        optimizer={"lr": 0.25, "weight_decay": 0.125, "independent_weight_decay": not coupled},
    )
    plan, model, optimizer = prepared(config)
    apply_factor(optimizer, 0.5)
    model.loss(*batch(4)).backward()
    expected = by_hand(plan, model, config, 0.5, coupled)
    train_step(model.loss, optimizer, [batch(4)], grad_clip=0.0)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["sp", "mup", "umup"])
def test_independent_decay_shrinks_matrices_by_wd_times_the_factor_whatever_their_rate(tiny, name):
    config = tiny(parametrization=scheme(name), optimizer={"lr": 0.03, "weight_decay": 0.5})
    _, model, optimizer = prepared(config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    apply_factor(optimizer, 0.25)
    optimizer.step()
    for key, parameter in model.named_parameters():
        kept = 1.0 if "norm" in key else 1 - 0.5 * 0.25
        torch.testing.assert_close(parameter.detach(), before[key] * kept, rtol=1e-6, atol=0.0, msg=key)


@pytest.mark.parametrize("name", ["sp", "mup"])
def test_coupled_decay_is_torchs_adamw(tiny, name):
    """With factors of 1 (muP at its base) the run is the plain optimizer's, weight for weight."""
    base = {"base": {"hidden_size": 32}} if name == "mup" else {}
    config = tiny(
        model={"norm_gain": False},
        parametrization={"scheme": name, **base},
        optimizer={"lr": 0.01, "weight_decay": 0.5, "independent_weight_decay": False},
    )
    _, model, optimizer = prepared(config)
    twin = build(config)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    for seed in range(3):
        train_step(model.loss, optimizer, [batch(4, seed=seed)], 0.0)
        plain.zero_grad()
        twin.loss(*batch(4, seed=seed)).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sp", "mup", "umup"])
def test_accumulating_two_microbatches_equals_one_of_twice_the_size(tiny, name):
    sections = {"parametrization": scheme(name), "optimizer": {"lr": 0.02}}
    _, once, once_optimizer = prepared(tiny(**sections, train={"batch_size": 8}))
    _, twice, twice_optimizer = prepared(tiny(**sections, train={"batch_size": 4, "grad_accum": 2}))
    for seed in range(5):
        inputs, targets = batch(8, seed=seed)
        halves = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
        a = train_step(once.loss, once_optimizer, [(inputs, targets)], 1.0)
        b = train_step(twice.loss, twice_optimizer, halves, 1.0)
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
        assert a.loss == pytest.approx(b.loss, abs=1e-5 if seed else 1e-6)


def test_clipping_bounds_the_norm_and_reports_it_unclipped(tiny):
    config = tiny(optimizer={"lr": 0.01})
    norms = {}
    for clip in (0.0, 0.5, 1e9):
        _, model, optimizer = prepared(config)
        result = train_step(model.loss, optimizer, [batch(4)], clip)
        left = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        norms[clip] = (result.grad_norm, left)
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-6)
    assert norms[0.0] == norms[1e9]
    assert norms[0.5][0] == norms[0.0][0] > 0.5
    assert norms[0.5][1] == pytest.approx(0.5, rel=1e-4)


def test_evaluation_does_not_disturb_training(tiny):
    sections = {"model": {"dropout": 0.2}, "optimizer": {"lr": 0.5}}
    assert losses(tiny(**sections, train={"eval_every": 1})) == losses(tiny(**sections, train={"eval_every": 1000}))


def test_evaluation_has_no_dropout_and_leaves_the_model_training(tiny):
    _, model, _ = prepared(tiny(model={"dropout": 0.5}))
    first, second = (evaluate(model, model.loss, [batch(4)]) for _ in range(2))
    assert first == second != model.loss(*batch(4)).item()
    assert model.training


def test_equal_seeds_are_bit_identical_and_others_are_not(tiny):
    sections = {"model": {"dropout": 0.1}, "optimizer": {"lr": 0.5}}
    first, again, other = (losses(tiny(**sections, train={"seed": seed})) for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


def test_bf16_trains_like_fp32_and_keeps_float32_weights(tiny, tmp_path):
    sections = {"optimizer": {"lr": 0.2}, "train": {"steps": 40}}
    exact = losses(tiny(**sections))
    rounded = losses(tiny(**sections, precision={"recipe": "bf16"}), tmp_path / "run")
    assert rounded != exact
    assert rounded[:10] == pytest.approx(exact[:10], abs=0.02)
    assert sum(rounded[-5:]) / 5 == pytest.approx(sum(exact[-5:]) / 5, abs=0.2)
    state, _ = load_latest(tmp_path / "run")
    assert {t.dtype for t in [*state.model.values(), *state.optimizer.values()]} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny):
    sections = {"optimizer": {"lr": 0.1}}
    eager = losses(tiny(**sections, train={"steps": 5, "eval_every": 2}))
    compiled = losses(tiny(**sections, train={"steps": 5, "eval_every": 2, "compile": True}))
    assert compiled == pytest.approx(eager, abs=1e-3)


def test_a_run_directory_holds_what_was_trained(tiny, tmp_path):
    config = tiny(train={"steps": 7, "eval_every": 3, "checkpoint_every": 2, "keep_checkpoints": 2})
    result = run_training(config, tmp_path / "run")
    names = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*")}
    top = {"config.yaml", "plan.json", "data.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    assert {name for name in names if "/" not in name} == top
    assert {"checkpoints/step-00000006", "checkpoints/step-00000007"} < names
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6, 7]
    assert (result.steps, result.val_loss, result.train_loss) == (7, rows[-1]["val/loss"], rows[-1]["train/loss"])


def test_an_interrupt_is_served_after_the_step(tiny, tmp_path):
    seen = []

    def interrupt_at_the_fifth(metrics):
        seen.append(metrics.step)
        if metrics.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny(), tmp_path / "run", observe=interrupt_at_the_fifth)
    assert seen == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert signal.getsignal(signal.SIGTERM) is before


# Decay by more than 2 turns into growth: every weight is multiplied by -999 at every step until it overflows.
EXPLODING = {"optimizer": {"lr": 0.1, "weight_decay": 1000.0}, "train": {"steps": 40, "checkpoint_every": 2}}


def test_a_diverged_run_says_where_and_keeps_its_last_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        run_training(tiny(**EXPLODING), run)
    message = str(caught.value)
    done = len((run / "metrics.jsonl").read_text().splitlines())
    newest = max(p.name for p in (run / "checkpoints").iterdir())
    assert done >= 1
    assert message.startswith(f"step {done + 1}: ")
    assert f"checkpoint of step {int(newest.removeprefix('step-'))} is kept" in message
    assert "largest weights: " in message
    assert "largest gradients: " in message
    named = message.split("largest weights: ")[1].split(";")[0]
    assert all(part.rsplit(" ", 1)[0] in plan_for(tiny()).params for part in named.split(", "))
    assert "optimizer.lr" in message
    assert not (run / "model.safetensors").exists()


def test_a_diverged_run_exits_with_3_in_one_line(tiny, written, tmp_path, capsys):
    assert main(["train", str(written(tiny(**EXPLODING))), "--out", str(tmp_path / "run")]) == 3
    err = capsys.readouterr().err
    assert err.startswith("umup: step ")
    assert err.count("\n") == 1


def test_a_huge_rate_diverges_at_the_second_step(tiny):
    with pytest.raises(DivergedError, match=r"^step 2: loss became .*; no checkpoint yet"):
        run_training(tiny(optimizer={"lr": 1e30}))


def test_a_validation_loss_that_is_no_number_is_divergence(tiny, tmp_path):
    """The last step's update is seen by no training loss."""
    with pytest.raises(DivergedError, match=r"^step 1: loss became"):
        run_training(tiny(optimizer={"lr": 1e30}, train={"steps": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_diverging_step_leaves_the_weights_alone(tiny):
    _, model, optimizer = prepared(tiny())
    before = [p.detach().clone() for p in model.parameters()]
    result = train_step(lambda *b: model.loss(*b) * math.nan, optimizer, [batch(4)], 1.0)
    assert math.isnan(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"train\.device: 'cuda' is not available here; write cpu or auto"):
        run_training(tiny(train={"device": "cuda"}))


def test_a_checkpoint_that_gives_no_finite_loss_never_replaces_a_good_one(tiny, tmp_path, monkeypatch):
    config = tiny(train={"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": 100})
    honest = loop.evaluate
    calls = []

    def spoiled(*args):
        calls.append(1)
        return honest(*args) if len(calls) < 4 else float("nan")

    monkeypatch.setattr(loop, "evaluate", spoiled)
    with pytest.raises(DivergedError, match="checkpoint of step 3 is kept"):
        run_training(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_finished_run_without_metrics_says_so(tiny, tmp_path):
    config = tiny(train={"steps": 2})
    run_training(config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is gone"):
        run_training(config, tmp_path / "run")


def test_a_run_keeps_the_rules_it_began_with(tiny, tmp_path):
    config = tiny(train={"steps": 2})
    run_training(config, tmp_path / "run")
    plan = tmp_path / "run" / "plan.json"
    plan.write_text(plan_for(config).shift({"head.weight": 2.0}).to_json())
    with pytest.raises(CheckpointError, match=r"rules have changed.*head\.weight"):
        run_training(config, tmp_path / "run")


def test_training_again_replaces_a_broken_final_model(tiny, tmp_path):
    config, run = tiny(train={"steps": 2}), tmp_path / "run"
    run_training(config, run)
    good = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(good[:50])
    shutil.rmtree(run / "checkpoints")
    run_training(config, run)
    assert (run / "model.safetensors").read_bytes() == good


def test_a_replaced_token_file_is_another_corpus(tiny, tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(4000).astype("<u2").__mod__(200).tofile(path)
    config = tiny(data={"source": str(path)}, train={"steps": 1})
    run_training(config, tmp_path / "run")
    np.zeros(4000, "<u2").tofile(path)
    with pytest.raises(CheckpointError, match="corpus has changed"):
        run_training(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap"])
def test_optimizers_that_no_run_trains_with_are_named(tiny, name):
    with pytest.raises(ConfigError, match=rf"^optimizer\.name: a run trains with adamw.*'{name}' has rules"):
        run_training(tiny(optimizer={"name": name}))
