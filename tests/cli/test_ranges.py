"""`umup ranges`: from a run to a table, advice and a figure."""

import json
import sys

import pytest

from umup.cli.main import main
from umup.config.load import dump_yaml, load_config, parse_config, read_yaml

FP8 = ["--precision.recipe", "fp8", "--precision.backend", "emulate", "--precision.sample_every", "2"]


@pytest.fixture
def run(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(config), "--out", str(out), "--model.num_layers", "2", "--train.steps", "5", *FP8]) == 0
    capsys.readouterr()
    return out


def spoil(run, product, operand, **entries):
    """Change entries of the last look at an operand."""
    path = run / "ranges.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(r for r in reversed(rows) if (r["product"], r["operand"]) == (product, operand)).update(entries)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_and_a_figure(run, capsys):
    assert main(["ranges", str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("4 looks, before steps 0 to 4;")
    cells = {tuple(line.split()[:3]) for line in lines[3 : lines.index("", 3)]}
    kinds = [f"layers.*.{name}" for name in ("attn.q+k+v", "attn.out", "mlp.gate+up", "mlp.down")]
    assert {(kind, o, "E5M2" if o == "g" else "E4M3") for kind in kinds for o in "xgw"} == cells
    assert "nothing to spare" in out
    assert lines[-1] == f"figure: {run / 'ranges.png'}"
    assert (run / "ranges.png").read_bytes().startswith(b"\x89PNG")


def test_the_advice_can_be_pasted(run, capsys):
    config = load_config(run / "config.yaml").model_dump()
    config["precision"] |= {"overrides": {"*.attn.out": "fp8_e4m3"}}
    (run / "config.yaml").write_text(dump_yaml(parse_config(config)))
    spoil(run, "layers.1.attn.q+k+v", "g", event="bf16")
    spoil(run, "layers.0.mlp.down", "x", clip=0.25)
    spoil(run, "layers.1.mlp.down", "x", clip=0.5)
    assert main(["ranges", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  layers.1.attn.q+k+v: no constant served its output gradient at step 4" in lines
    assert "  layers.0.mlp.down: 0.25 of its input clipped at the last look" in lines
    (pasted,) = (line for line in lines if line.startswith("precision: "))
    overrides = read_yaml(pasted)["precision"]["overrides"]
    names = ["*.attn.out", "layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v", "layers.*.mlp.down"]
    assert set(overrides) == set(names)
    body = load_config(run / "config.yaml").model_dump()
    parse_config({**body, "precision": {**body["precision"], "overrides": overrides}})


def test_one_json_document(run, capsys):
    spoil(run, "layers.0.mlp.down", "x", clip=0.25)
    assert main(["ranges", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overrides"] == {"layers.0.mlp.down": "bf16"}
    assert found["faults"] == {"layers.0.mlp.down": "0.25 of its input clipped at the last look"}
    assert len(found["tensors"]) == 2 * 4 * 3
    assert (run / "ranges.png").exists()


def refused(capsys, run):
    assert main(["ranges", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_run_without_fp8_is_refused(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(config), "--out", str(out)]) == 0
    capsys.readouterr()
    line = refused(capsys, out)
    assert str(out) in line
    assert "precision.recipe: fp8" in line
    assert "precision.scales: monitor or adapt" in line


def test_a_damaged_line_is_named(run, capsys):
    path = run / "ranges.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], lines[6][:-5], *lines[7:], ""]))
    assert f"{path}, line 7: " in refused(capsys, run)


def test_a_run_whose_config_is_gone_is_refused(run, capsys):
    (run / "config.yaml").unlink()
    assert "config.yaml" in refused(capsys, run)


def test_the_table_is_printed_without_matplotlib(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["ranges", str(run)]) == 2
    out, err = capsys.readouterr()
    assert "nothing to spare" in out
    assert "pip install 'umup[plots]'" in err


def test_a_simulated_run_is_drawn_and_spares_to_its_stream(run, capsys):
    config = load_config(run / "config.yaml").model_dump()
    config["precision"] |= {"recipe": "simulate:E3M2", "scales": "monitor"}
    (run / "config.yaml").write_text(dump_yaml(parse_config(config)))
    path = run / "ranges.jsonl"
    path.write_text(path.read_text().replace("E5M2", "E3M2").replace("E4M3", "E3M2"))
    spoil(run, "layers.0.mlp.down", "g", clip=0.25)
    assert main(["ranges", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overrides"] == {"layers.0.mlp.down": "fp32"}
