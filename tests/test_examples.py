"""The examples run alone and do what they say; so do the pages on migration and fine-tuning."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from umup.errors import PlanError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
STEPS = 3


def run(name, *argv):
    return runpy.run_path(str(EXAMPLES / name))["main"]([*argv, "--steps", str(STEPS)])


@pytest.fixture(params=[128, 256])
def nanogpt(request):
    return request.param, *run("nanogpt.py", "--width", str(request.param), "--batch-size", "4", "--lr", "0.004")


def test_nanogpt_trains_at_two_widths(nanogpt):
    width, losses, optimizer = nanogpt
    assert losses[-1] < losses[0] < 6.0
    rates = {name: g["initial_lr"] for g in optimizer.param_groups for name in g["names"]}
    assert rates["wte.weight"] == 0.004
    for name in ("c_attn", "c_proj"):
        assert rates[f"h.0.attn.{name}.weight"] == pytest.approx(0.004 * 64 / width)


def test_nanogpt_schedule_multiplies_every_group(nanogpt):
    # The last call of the scheduler set the factor of the step after the last.
    assert {round(g["lr"] / g["initial_lr"], 9) for g in nanogpt[2].param_groups} == {(STEPS + 1) / 10}


def test_nanogpt_has_three_added_lines_and_runs_without_them(capsys):
    lines = (EXAMPLES / "nanogpt.py").read_text().splitlines()
    added = [line for line in lines if line.endswith("# umup")]
    assert len(added) == 3
    assert 120 <= len(lines) <= 175
    rest = [line for line in lines if line not in added and line != "import umup"]
    assert not any("umup." in line for line in rest)
    scope = {"__name__": "plain"}
    exec(compile("\n".join(rest), "nanogpt.py", "exec"), scope)
    losses, optimizer = scope["main"](["--width", "128", "--steps", str(STEPS), "--batch-size", "4"])
    assert losses[-1] < losses[0]
    assert len(optimizer.param_groups) == 1


def test_huggingface_trainer_follows_plan_and_schedule():
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        trainer = run("huggingface_trainer.py", "--width", "128")
    logged = [record["learning_rate"] for record in trainer.state.log_history if "learning_rate" in record]
    assert logged == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert trainer.state.global_step == STEPS
    groups = trainer.optimizer.param_groups
    for group in groups:
        for name in group["names"]:
            assert group["initial_lr"] == pytest.approx(1e-2 * trainer.plan.folded.params[name]["lr"])
        assert group["lr"] == 0.0
    rates = {name: g["initial_lr"] for g in groups for name in g["names"]}
    assert rates["model.layers.1.mlp.down_proj.weight"] == pytest.approx(1e-2 / 2)
    assert rates["model.embed_tokens.weight"] == pytest.approx(1e-2)


def test_huggingface_guard_refuses_a_schedule_that_writes_rates():
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = run("huggingface_trainer.py")
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    with pytest.raises(PlanError, match="writes absolute"):
        trainer.optimizer.step()


def test_lightning_module_follows_plan_and_schedule():
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning's own
        trainer = run("lightning_module.py", "--width", "128")
    assert trainer.global_step == STEPS
    (optimizer,) = trainer.optimizers
    rates = {name: (g["initial_lr"], g["lr"]) for g in optimizer.param_groups for name in g["names"]}
    assert rates["0.weight"] == pytest.approx((1e-2, 1e-3))
    assert rates["2.weight"] == pytest.approx((1e-2 / 2, 1e-3 / 2))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("nanogpt.py", "torch"),
        pytest.param("huggingface_trainer.py", "transformers", marks=pytest.mark.slow),
        pytest.param("lightning_module.py", "lightning", marks=pytest.mark.slow),
    ],
)
def test_example_runs_alone(name, needs):
    pytest.importorskip(needs)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), "--width", "128", "--steps", str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


def run_page(page):
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        exec(compile(code, page, "exec"), scope)
    return scope


def test_migration_page_runs(monkeypatch, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mup

    def mlp(width):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    monkeypatch.chdir(tmp_path)
    mup.make_base_shapes(mlp(64), mlp(128), savefile="base.bsh")
    run_page("migration.md")
    printed = capsys.readouterr().out
    assert "scheme mup, optimizer adam," in printed
    assert r'pattern=r"^(up\.weight|down\.weight)$"' in printed
    assert "--scaling-base-hidden-size 64" in printed


def test_finetuning_page_runs(capsys):
    scope = run_page("finetuning.md")
    printed = capsys.readouterr().out
    assert "2.weight has a std of" in printed
    assert "router (Router) is a mixture-of-experts layer" in printed
    assert not any(name.startswith("0.") for name in scope["rates"])


def test_every_example_is_named_by_a_test():
    assert [p.name for p in sorted(EXAMPLES.glob("*.py"))] == [
        "huggingface_trainer.py",
        "lightning_module.py",
        "nanogpt.py",
    ]
