"""The models people have stay flat in width under a muP plan, are not flat as they come, and docs/models.md says so."""

import importlib.util
import sys
from math import sqrt
from pathlib import Path

import pytest
import torch

import umup
from umup.adapt.discover import discover

pytest.importorskip("transformers")
import transformers

ROOT = Path(__file__).parents[2]
# Fused and grouped projections, tied heads, post-norm, ALiBi: under a minute on one core.
FAST = ("GPT-2", "GPT-NeoX", "Llama", "Falcon-40B", "Bloom", "BERT")


def load():
    spec = importlib.util.spec_from_file_location("hf_coordinates", ROOT / "benchmarks" / "hf_coordinates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hf_coordinates"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


coordinates = load()


def documented():
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[1:]}


def test_the_docs_list_these_models():
    assert list(documented()) == list(coordinates.CASES)


@pytest.mark.parametrize("name", FAST)
def test_coordinates_are_flat_under_mup_and_not_without(name):
    row = coordinates.measure(name, seeds=4)
    assert abs(row.mup[1]) <= coordinates.FLAT, row.mup
    assert abs(row.own[1]) >= coordinates.STEEP, row.own
    assert row.verdict == documented()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in coordinates.CASES if name not in FAST])
def test_the_documented_verdict(name):
    row = coordinates.measure(name)
    assert row.verdict == documented()[name], row
    assert row.verdict.startswith("flat")


def test_rows_tell_flat_from_steep():
    flat, excused, steep = ("a", 0.05), {coordinates.READOUT: ("head", -0.5)}, ("b", 1.0)
    row = coordinates.Row(1, flat, excused, steep)
    assert row.verdict == "flat"
    assert coordinates.Row(1, ("a", -0.2), excused, steep).verdict == "not flat"
    assert coordinates.Row(1, flat, excused, ("b", 0.1)).verdict == "not flat"
    assert coordinates.Row(1, flat, {"grows": ("v", 0.3)}, steep).verdict == "flat, but for grows"
    assert coordinates.worst({"x.y": 0.2, "x": 0.2, "z": -0.1}, ["x.y", "x", "z"]) == ("x", 0.2)


def gemma(width):
    return coordinates.CASES["Gemma"].build(width)


def test_own_factors_are_found():
    with torch.device("meta"):
        assert discover(gemma(256), gemma(64)).own_factors == {"model.embed_tokens.weight": (16.0, 8.0)}
        t5 = [coordinates.CASES["T5"].build(width) for width in (256, 64)]
        assert discover(*t5).own_factors == {"lm_head.weight": (1 / 16, 1 / 8)}
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "vocab_size": 8}
        bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, scale_embedding=True))
        assert set(discover(bart).own_factors.values()) == {(8.0, 8.0)}
        assert discover(coordinates.CASES["Llama"].build(64)).own_factors == {}


def test_own_factors_are_divided_out():
    """Of init and rate; the tied head, which reads the same weights without the factor, gets it back."""
    torch.manual_seed(0)
    model = gemma(256)
    plan = umup.plan(model, lambda: gemma(64))
    assert plan.apply(model).factors["model.embed_tokens.weight"] == pytest.approx(1 / 2)
    assert plan.folded.params["model.embed_tokens.weight"]["lr"] == pytest.approx(1 / 2)
    assert plan.folded.params["lm_head.weight"]["multiplier"] == pytest.approx(2 / 4)
    t5 = coordinates.CASES["T5"]
    with torch.device("meta"):
        plan = umup.plan(t5.build(256), t5.build(64))
    assert plan.folded.params["lm_head.weight"]["multiplier"] == pytest.approx(sqrt(64 / 256))
