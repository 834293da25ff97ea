"""Every recipe runs: two steps of it, and its plan explained."""

from pathlib import Path

import pytest

from umup.config.load import load_config
from umup.models.specs import plan_for
from umup.train.loop import run_training

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_two_steps(path, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    overrides = [
        ("train.steps", "2"),
        ("train.batch_size", "2"),
        ("train.eval_batches", "1"),
        ("schedule.warmup_steps", "0"),
        ("data.source", str(tmp_path / "text.txt")),
        ("data.cache_dir", str(tmp_path / "cache")),
    ]
    config = load_config(path, overrides)
    assert plan_for(config).explain()
    result = run_training(config, tmp_path / "run")
    assert result.steps == 2
    assert 4.0 < result.train_loss < 6.5


def test_there_are_recipes():
    assert len(RECIPES) >= 3
