"""`umup explain` under every scheme and optimizer, and what `--against` refuses."""

import json
import re

import pytest

from umup.cli.main import main
from umup.config.load import dump_yaml, parse_config, read_yaml
from umup.rules.optimizers import OPTIMIZERS
from umup.rules.plan import Plan
from umup.rules.schemes import SCHEMES


def overrides(scheme):
    row = SCHEMES[scheme]
    base = {"hidden_size": 16, **({"num_layers": 1} if row.needs_base_depth else {})}
    found = ["--parametrization.scheme", scheme, "--model.norm_placement", row.norm_placements[0]]
    return [*found, "--parametrization.base", str(base)] if row.needs_base else found


def run(capsys, *arguments, code=0):
    assert main(["explain", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert (err if code == 0 else out) == ""
    return out if code == 0 else err


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_optimizer_is_explained(scheme, optimizer, family, config, capsys):
    arguments = [config, *overrides(scheme), "--optimizer.name", optimizer, "--model.family", family]
    text = run(capsys, *arguments)
    assert text.startswith(f"scheme {scheme}, optimizer {optimizer}")
    hybrid = OPTIMIZERS[optimizer].rest is not None
    assert ("trained by" in text) == hybrid
    document = json.loads(run(capsys, *arguments, "--json"))
    plan = Plan.from_json(json.dumps(document))
    assert (plan.scheme, plan.optimizer) == (scheme, optimizer)
    assert document["trained_by"].keys() == plan.stored.keys()
    hidden, embedding = (document["trained_by"][n] for n in ("layers.0.attn.q.weight", "embed.weight"))
    assert (hidden, embedding) == (optimizer, OPTIMIZERS[optimizer].rest or optimizer)


def test_a_hybrid_shows_who_trains_each_parameter(config, capsys):
    lines = run(capsys, config, "--optimizer.name", "muon", "--model.family", "gpt2").splitlines()
    rows = {name: cells for name, *cells in (line.split()[:3] for line in lines[3 : lines.index("", 3)])}
    assert rows["layers.*.attn.q.weight"] == ["hidden", "muon"]
    assert rows["layers.*.attn.q.bias"] == ["bias", "adamw"]
    assert rows["head.weight"] == ["tied_readout", "-"]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if "pre" in row.norm_placements])
def test_a_relative_config_compares_with_every_scheme_of_its_network(scheme, optimizer, config, capsys):
    arguments = [config, *overrides("completep"), "--model.num_layers", 2, "--optimizer.name", optimizer]
    arguments += ["--against", scheme]
    assert json.loads(run(capsys, *arguments, "--json"))["schemes"] == ["completep", scheme]
    assert bool(run(capsys, *arguments).splitlines()[1:]) == (scheme != "completep")


@pytest.mark.parametrize("scheme", ["mup", "depth_mup", "completep"])
def test_a_scheme_that_lacks_a_base_says_what_to_write_and_that_works(scheme, body, config, capsys):
    line = run(capsys, config, "--against", scheme, code=2)
    assert line.count("\n") == 1
    advice = re.search(r"write (parametrization: .*) in the config, and (--against umup)$", line.strip())
    assert advice, line
    other = config.with_name("other.yaml")
    other.write_text(dump_yaml(parse_config({**body, **read_yaml(advice[1])})))
    header = run(capsys, other, *advice[2].split()).splitlines()[0]
    assert header.split() == ["name", "quantity", scheme, "umup"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--against", "mus"], ["'mus'", "model.norm_placement: res_post"]),
        (["--against", "mupp"], ["--against: unknown scheme 'mupp'", "did you mean 'mup'?"]),
        (["--optimizer.name", "mun"], ["optimizer.name", "'mun'", "did you mean 'muon'?"]),
    ],
)
def test_refusals_are_one_line(arguments, named, config, capsys):
    line = run(capsys, config, *arguments, code=2)
    assert line.count("\n") == 1
    assert all(text in line for text in named), line
