"""Axes: from the scheme's table, from what a user writes, and what is refused."""

import pytest

from umup.config.load import parse_config
from umup.errors import ConfigError
from umup.study.space import Axis, apply_values, base_values, check_space, name_of, parse_space, table_space

MODEL = {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "norm_gain": False}


def config(scheme="umup", lr=1.0, **parametrization):
    body = {"model": MODEL, "optimizer": {"lr": lr}, "parametrization": {"scheme": scheme, **parametrization}}
    return parse_config(body)


def test_the_table_gives_the_rate_and_every_hyperparameter():
    lr, *others = table_space(config(lr=0.5))
    assert lr == Axis("optimizer.lr", tuple(0.5 * 2.0**k for k in range(-3, 4)), grows=True)
    assert [axis.key.rpartition(".")[2] for axis in others] == [
        "alpha_ffn_act",
        "alpha_attn_softmax",
        "alpha_res",
        "alpha_res_attn_ratio",
        "alpha_loss_softmax",
    ]
    assert all(axis.values == (0.125, 0.25, 0.5, 1, 2, 4, 8) for axis in others)


def test_the_table_is_searched_in_octaves_of_the_configs_own_value():
    space = table_space(config("sp", hparams={"sigma_init": 0.03}))
    assert space[1].values == tuple(0.03 * 2.0**k for k in range(-3, 3))


def test_every_point_of_every_schemes_table_is_a_config():
    for scheme in ("sp", "umup", "spectral"):
        check_space(config(scheme), table_space(config(scheme)))


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("2^-2..2^1", (0.25, 0.5, 1, 2)),
        ("0.5..4", (0.5, 1, 2, 4)),
        ("1e-3..1.5e-3", (1e-3, 1.5e-3)),
        ("[3, 1, 2.5]", (1, 2.5, 3)),
        ([4, 2], (2, 4)),
    ],
)
def test_a_user_writes_ranges_and_lists(spec, values):
    (axis,) = parse_space({"optimizer.lr": spec})
    assert axis.values == pytest.approx(values)
    assert axis.listed is (spec in ("[3, 1, 2.5]", [4, 2]))
    assert not axis.grows


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, ["--space", "empty", "2^-3..2^3"]),
        (
            {"optimizer.lr": "[1]"},
            ["--space.optimizer.lr: [1] is nothing to search; write --optimizer.lr 1 or a range"],
        ),
        ({"optimizer.lr": "1..1"}, ["--space.optimizer.lr: 1..1 is nothing to search; write --optimizer.lr 1 or"]),
        ({"optimizer.lr": "[]"}, ["--space.optimizer.lr: [] is nothing to search; write a range"]),
        ({"optimizer.lr": 0.5}, ["--space.optimizer.lr: 0.5 is nothing to search"]),
        ({"optimizer.lr": "4..1"}, ["--space.optimizer.lr", "low..high", "4..1"]),
        ({"optimizer.lr": "0..1"}, ["--space.optimizer.lr", "positive"]),
        ({"optimizer.lr": "low..high"}, ["--space.optimizer.lr", "'low' is no number"]),
        ({"optimizer.lr": "[yes, no]"}, ["--space.optimizer.lr", "'yes' is no number"]),
        ({"optimizer.lr": "2^x..1"}, ["--space.optimizer.lr", "'2^x' is no number"]),
        ({"optimizer.lr": "1...inf"}, ["--space.optimizer.lr", "is no number"]),
    ],
)
def test_axes_that_are_none(entries, words):
    with pytest.raises(ConfigError) as error:
        parse_space(entries)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("key", "spec", "words"),
    [
        ("optimizer.lrr", "1..2", ["optimizer.lrr", "did you mean 'lr'"]),
        ("parametrization.hparams.alpha_rse", "1..2", ["alpha_rse", "did you mean 'alpha_res'"]),
        ("model.hidden_size", "[32, 40]", ["--space.model.hidden_size 40", "write model.head_dim"]),
        ("optimizer.lr", "[-1, 1]", ["--space.optimizer.lr -1", "greater than 0"]),
    ],
)
def test_axes_that_do_not_fit_the_config(key, spec, words):
    with pytest.raises(ConfigError) as error:
        check_space(config(), parse_space({key: spec}))
    assert all(word in str(error.value) for word in words), error.value


def test_base_values_are_the_configs_own_then_the_tables():
    given = config(lr=2.0, hparams={"alpha_res": 0.5})
    assert base_values(given, table_space(given)) == {
        "optimizer.lr": 2.0,
        "parametrization.hparams.alpha_ffn_act": 1,
        "parametrization.hparams.alpha_attn_softmax": 1,
        "parametrization.hparams.alpha_res": 0.5,
        "parametrization.hparams.alpha_res_attn_ratio": 1,
        "parametrization.hparams.alpha_loss_softmax": 1,
    }
    assert base_values(given, parse_space({"optimizer.eps": "[1e-9, 1e-8, 1e-7]"})) == {"optimizer.eps": 1e-8}


def test_values_are_laid_over_a_config_exactly():
    values = {"optimizer.lr": 0.1 + 0.2, "parametrization.hparams.alpha_res": 1e-5, "model.num_layers": 3}
    made = apply_values(config(), values)
    assert (made.optimizer.lr, made.model.num_layers) == (0.1 + 0.2, 3)
    assert made.parametrization.hparams == {"alpha_res": 1e-5}
    assert made.optimizer.betas == config().optimizer.betas


def test_names_do_not_depend_on_order_or_type():
    assert name_of({"a": 1, "b": 2.0}) == name_of({"b": 2, "a": 1.0}) != name_of({"a": 1, "b": 2.0000000000000004})
