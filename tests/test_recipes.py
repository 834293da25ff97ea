"""Every recipe runs: two steps of it, small enough for a CPU, and its plan explained as it stands."""

from pathlib import Path

import pytest

from umup.config.load import load_config, read_yaml
from umup.models.specs import plan_for, products_for
from umup.study.space import check_space, parse_space
from umup.study.sweep import twenty_tokens
from umup.train.loop import run_training

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_two_steps(path, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    overrides = [
        ("train.steps", "2"),
        ("train.batch_size", "2"),
        ("train.eval_batches", "1"),
        ("train.compile", "false"),
        ("model.num_layers", "2"),
        ("model.max_seq_len", "128"),
        ("precision.backend", "emulate"),
        ("schedule.warmup_steps", "0"),
        ("data.source", str(tmp_path / "text.txt")),
        ("data.cache_dir", str(tmp_path / "cache")),
    ]
    whole = load_config(path)
    assert plan_for(whole).explain()
    assert products_for(whole, plan_for(whole))
    config = load_config(path, overrides)
    result = run_training(config, tmp_path / "run")
    assert result.steps == 2
    assert 1.5 < result.train_loss < 6.5  # ln 256 = 5.5 at first; a rate tuned for more text learns this one fast


def test_there_are_recipes():
    assert len(RECIPES) >= 3


def test_the_tutorials_search_is_valid():
    """recipes/spaces: axes that the proxy they are made for takes."""
    proxy = load_config(RECIPES[0].parent / "cerebras-40m-mup.yaml")
    space = parse_space(read_yaml((RECIPES[0].parent / "spaces" / "cerebras.yaml").read_text()))
    check_space(proxy, space)
    assert len(space) == 4
    middle = load_config(RECIPES[0].parent / "cerebras-256m-mup.yaml")
    assert twenty_tokens(middle).train.steps == pytest.approx(middle.train.steps, rel=0.01)
    assert middle.parametrization.base == proxy.parametrization.base
