"""`umup coord-check`: exit codes, text, JSON, files."""

import csv
import json

import pytest

from umup.cli.main import main
from umup.config.load import dump_yaml, parse_config

FAST = ["--widths", "64,128,256", "--seeds", "3", "--steps", "3"]
SP = ["--parametrization.scheme", "sp", "--optimizer.lr", "0.01", "--model.norm_gain", "true"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    model = {
        "hidden_size": 32,
        "num_layers": 2,
        "head_dim": 16,
        "max_seq_len": 16,
        "vocab_size": 64,
        "norm_gain": False,
    }
    path.write_text(dump_yaml(parse_config({"model": model, "optimizer": {"lr": 0.5}})))
    return str(path)


def test_pass_and_files(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["coord-check", config, *FAST, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASS: umup over widths 64, 128, 256 (3 seeds, 3 steps, ")
    assert "suspect" not in "".join(lines)
    assert "it passes within 0.35" in lines[-1]
    assert (out / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text())["verdict"] == "PASS"
    with (out / "coordinates.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {r["axis"] for r in table} == {"width", "raised", "head size", "layers"}
    assert {r["width"] for r in table if r["axis"] == "width"} == {"64", "128", "256"}


def test_fail_is_exit_code_1_and_one_json_document(config, capsys):
    assert main(["coord-check", config, *FAST, *SP, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "FAIL"
    assert found["suspects"][0]["mistake"].startswith("sp is not width-independent")
    assert {s["status"] for s in found["slopes"]} >= {"pass", "fail"}
    assert found["limits"] == {"coordinates": 0.35, "numbers": 0.2, "raised": 0.5}


def test_over_depth(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["coord-check", config, "--depths", "2,4,8", "--steps", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("PASS: umup over depths 2, 4, 8 (3 seeds, 3 steps, ")
    with (out / "coordinates.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(r["axis"], r["depth"]) for r in table} == {("depth", n) for n in "248"}
    assert (out / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    mup = ["--parametrization.scheme", "mup", "--parametrization.base.hidden_size", "32", "--optimizer.lr", "0.004"]
    assert main(["coord-check", config, "--axis", "depth", "--steps", "3", *mup, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["axis"], found["sizes"]) == ("depth", [2, 4, 8])
    assert found["suspects"][0]["mistake"].startswith("mup is not depth-independent")


def test_undecided_is_exit_code_4(config, capsys, monkeypatch):
    from umup.study import coord_verdict

    monkeypatch.setattr(coord_verdict, "SEEDLESS_ERROR", 1.0)
    assert main(["coord-check", config, "--widths", "32,64", "--seeds", "1", "--steps", "2"]) == 4
    assert capsys.readouterr().out.startswith("UNDECIDED: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--widths", "32"], "write at least 2 widths"),
        (["--widths", "32,x"], "write --widths 64,128,256"),
        (["--widths", "32,40"], "is not a multiple of model.head_dim"),
        (["--optimizer.name", "muon"], "optimizer.name"),
        (["--depths", "2,x"], "write --depths 2,4,8"),
        (["--depths", "2"], "write at least 2 depths"),
        (["--depths", "0,2"], "write at least 2 depths"),
        (["--depths", "2,4", "--widths", "32,64"], "--widths has no effect on a check over depth"),
        (["--axis", "width", "--depths", "2,4"], "--depths has no effect on a check over width"),
    ],
)
def test_bad_input_is_one_line(config, capsys, arguments, told):
    assert main(["coord-check", config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err
