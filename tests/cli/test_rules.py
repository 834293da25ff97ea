"""`umup rules`: what it lists, how wide, and its refusals."""

import json

import pytest

from umup.cli.main import main
from umup.rules.catalog import HORIZON
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.schemes import SCHEMES

NAMES = [*SCHEMES, *OPTIMIZERS]


def printed(capsys, *arguments):
    assert main(["rules", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def section(text, head):
    """The rows below the header that begins with `head`, to the next empty line."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    return lines[start + 1 : lines.index("", start) if "" in lines[start:] else None]


def row(lines, *cells):
    return next(line for line in lines if line.split()[: len(cells)] == list(cells))


def test_no_scheme_is_called_like_an_optimizer():
    assert not set(SCHEMES) & set(OPTIMIZERS)


def test_the_catalog_lists_every_table(capsys):
    text = printed(capsys)
    assert [line.split()[0] for line in section(text, "scheme ") if line[0] != " "] == list(SCHEMES)
    listed = {line.split()[0] for line in section(text, "optimizer ") if line[0] != " "}
    assert listed >= set(OPTIMIZERS)
    for axis, rules in HORIZON.items():
        for name in rules:
            assert row(section(text, "horizon "), axis, name)
    for scheme in SCHEMES.values():
        for option in scheme.options:
            for choice in option.choices:
                default = ["(default)"] if choice == option.default else []
                assert row(section(text, "option "), option.name, scheme.name, choice, *default)


def test_a_hyperparameter_that_schemes_share_stands_once(capsys):
    lines = section(printed(capsys), "hyperparameter ")
    assert [line.split()[0] for line in lines].count("sigma_init") == 1
    assert row(lines, "sigma_init", "sp,", "mup,", "depth_mup,", "completep", "0.02", "0.002", "to", "0.2")
    assert row(lines, "tau", "unit", "0.2")
    assert row(lines, "tau", "mus", "0.4")


def test_a_scheme_shows_its_flags(capsys):
    lines = section(printed(capsys), "scheme ")
    assert row(lines, "completep", "width,", "depth", "-", "-", "pre/post")
    assert row(lines, "mup", "width", "-", "-", "pre/post")
    assert row(lines, "unit", "-", "yes", "yes", "pre/post")
    assert row(lines, "mus", "-", "yes", "-", "res_post")


def test_a_scheme_shows_formulas_by_role_and_site(capsys):
    text = printed(capsys, "umup")
    lines = text.splitlines()
    forward = lines[lines.index("") :]
    assert row(forward, "input,", "hidden,")
    assert row(forward, "readout", "1", "1/fan_in", "1/sqrt(fan_out)")
    rates = section(text, "under adamw")
    assert row(rates, "embedding,", "position", "1/sqrt(fan_out)", "1", "1", "1", "2407.17465")
    assert row(rates, "input*,", "hidden*,", "hidden_out", "1/(sqrt(depth)*sqrt(fan_in))")
    assert "tied_readout" not in " ".join(rates)
    assert row(section(text, "site "), "loss", "logits", "alpha_loss_softmax")
    assert "fan_in: features" in text
    assert "base_" not in text


def test_exact_gradients_are_said_once(capsys):
    assert "gradients are exact" in printed(capsys, "mup")
    assert "gradients are exact" not in printed(capsys, "umup")


def test_the_optimizer_of_a_scheme_is_chosen(capsys):
    assert row(section(printed(capsys, "mup", "--optimizer", "sgd"), "under sgd"), "readout", "fan_in/base_fan_in", "-")
    assert row(section(printed(capsys, "mup"), "under adamw"), "readout", "1", "base_fan_in/fan_in")


def test_an_optimizer_shows_its_row_who_trains_what_and_every_scheme(capsys):
    text = printed(capsys, "muon")
    assert text.splitlines()[1].startswith("muon ")
    assert "\nmuon trains hidden, hidden_out\n" in text
    assert all(f"\nunder {name} [" in text for name in SCHEMES)
    assert " trains " not in printed(capsys, "sgd").replace("that trains", "")


@pytest.mark.parametrize("name", NAMES)
def test_lines_stay_within_120(name, capsys):
    for arguments in [[name], *([name, "--optimizer", o] for o in OPTIMIZERS if name in SCHEMES)]:
        assert max(map(len, printed(capsys, *arguments).splitlines())) <= 120, arguments


def test_the_catalog_stays_within_120(capsys):
    assert max(map(len, printed(capsys).splitlines())) <= 120


def test_json_is_one_document(capsys):
    assert json.loads(printed(capsys, "--json")).keys() == {"schemes", "optimizers", "horizon"}
    scheme = json.loads(printed(capsys, "mup", "--optimizer", "muon", "--json"))
    assert (scheme["scheme"]["name"], scheme["optimizer"]["name"]) == ("mup", "muon")
    (hidden,) = (r for r in scheme["parameters"] if r["role"] == "hidden" and not r["in_branch"])
    assert hidden["trained_by"] == "muon"
    assert hidden["formulas"]["init_std"]["formula"] == "sqrt(base_fan_in)*sigma_init/sqrt(fan_in)"
    assert json.loads(printed(capsys, "lion", "--json"))["schemes"].keys() == SCHEMES.keys()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["umop"], ["'umop'", "did you mean 'umup'?"]),
        (["mun"], ["'mun'", "did you mean 'muon'?"]),
        (["xyz"], ["known: sp,", "soap"]),
        (["umop", "--optimizer", "sgd"], ["'umop'"]),
        (["umup", "--optimizer", "sgdd"], ["--optimizer", "'sgdd'", "did you mean 'sgd'?"]),
        (["--optimizer", "sgd"], ["goes with a scheme", "write umup rules umup --optimizer sgd"]),
        (["muon", "--optimizer", "sgd"], ["goes with a scheme"]),
        (["umup", "mup"], ["unknown argument 'mup'"]),
    ],
)
def test_refusals_are_one_line(arguments, named, capsys):
    assert main(["rules", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(text in err for text in named), err
