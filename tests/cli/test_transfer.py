"""`umup transfer` and `umup transfer-check`, end to end at their smallest, and what they refuse."""

import json

import pytest

from umup.cli.main import main
from umup.config.load import dump_yaml, load_config, parse_config
from umup.models.specs import plan_for
from umup.study.ledger import Ledger


def write(path, body):
    path.write_text(dump_yaml(parse_config(body)))
    return path


@pytest.fixture
def proxy(body, tmp_path):
    tuned = {
        **body,
        "model": {**body["model"], "norm_gain": False},
        "optimizer": {"lr": 1.0},
        "train": {"steps": 8, "batch_size": 2, "eval_batches": 2, "eval_every": 8, "device": "cpu"},
    }
    return write(tmp_path / "proxy.yaml", tuned)


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        assert main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run


def test_check_then_transfer_a_run_then_train_what_it_wrote(proxy, body, tmp_path, capsys):
    check, run, out = (tmp_path / name for name in ("check", "run", "out"))
    arguments = [
        "transfer-check",
        proxy,
        "--sizes",
        "64",
        "--grid",
        "2^-1..2^1",
        "--step",
        "1",
        "--seeds",
        "1",
        "--workers",
        "1",
    ]
    arguments += ["--out", check, "--json"]
    code = main([str(a) for a in arguments])
    found = json.loads(capsys.readouterr().out)
    assert code == {"pass": 0, "fail": 1, "undecided": 4}[found["verdict"]]
    assert set(found["sizes"]) == {"32", "64"}
    made = {"study.json", "journal.log", "trials", "workers", "transfer.csv", "transfer.png", "check.json"}
    assert {p.name for p in check.iterdir()} == made
    assert main([str(a) for a in arguments]) == code
    assert capsys.readouterr().err == ""  # everything is in the journal

    assert main(["train", str(proxy), "--out", str(run)]) == 0
    target = tmp_path / "target.yaml"
    target.write_text("model: {hidden_size: 64, num_layers: 2, head_dim: 16, max_seq_len: 16, norm_gain: false}\n")
    data = [f"--data.{key}={value}" for key, value in body["data"].items()]
    sizes = ["--train.steps", "16", "--train.batch_size", "4", "--train.device", "cpu", *data]
    capsys.readouterr()
    assert (
        main(
            ["transfer", str(run), "--target", str(target), "--out", str(out), "--check", str(check), "--json", *sizes]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["checks"][0]["verdict"] == found["verdict"]
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "plan.json",
        "transfer.json",
        "report.md",
        "transfer-width.png",
    }
    assert json.loads((out / "transfer.json").read_text()) == plan
    report = (out / "report.md").read_text()
    assert "![loss over width](transfer-width.png)" in report
    assert found["summary"][0] in report
    made = load_config(out / "config.yaml")
    assert (made.model.hidden_size, made.train.steps) == (64, 16)
    assert made.optimizer.lr == pytest.approx(2**0.5 * 4**-0.32)
    assert main(["train", str(out / "config.yaml"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["transfer", str(run), "--target", str(target), "--out", str(out), *sizes]) == 2
    assert "a run has begun there" in capsys.readouterr().err


SMALL = ["--sizes", "64", "--grid", "2^-1..2^1", "--step", "1", "--workers", "1"]


def test_a_check_may_ask_for_more_and_repeats_nothing(proxy, refused, tmp_path, capsys, monkeypatch):
    out = tmp_path / "check"

    def trials(*arguments):
        assert main(["transfer-check", str(proxy), "--out", str(out), *SMALL, *arguments]) in (0, 1, 4)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("trial ")]

    first = trials("--seeds", "1")
    assert f"trial {len(first) - 1}: umup width " in first[-1]
    more = trials("--seeds", "2", "--penalty", "0.1")
    assert more
    assert all(", seed 1: loss" in line for line in more)
    assert trials("--seeds", "2", "--optimizer.lr", "0.5") == []  # the grid's values replace it
    for change in (["--optimizer.weight_decay", "0.1"], ["--hparam", "alpha_res"], ["--length-rule", "none"]):
        line = refused("transfer-check", proxy, "--out", out, *SMALL, *change)
        assert f"study {out} was made otherwise" in line
        assert "choose another --out" in line
    assert "was made otherwise" in refused("sweep", proxy, "--out", out)
    monkeypatch.setattr("umup.study.todo.plan_for", lambda c: plan_for(c).shift({"head.weight": 2.0}))
    assert "was made otherwise" in refused("transfer-check", proxy, "--out", out, *SMALL)


def test_a_stacked_check_is_the_check(proxy, tmp_path, capsys):
    found = []
    for stack in ("1", "8"):
        out = tmp_path / stack
        main(["transfer-check", str(proxy), "--out", str(out), *SMALL, "--seeds", "2", "--stack", stack])
        found.append(json.loads((out / "check.json").read_text()))
        programs = {a.program for a in Ledger(out).attempts()}
    apart, stacked = found
    assert len(programs) < len(list((tmp_path / "8" / "trials").iterdir())) / 2
    assert stacked["verdict"] == apart["verdict"]
    for size, row in apart["sizes"].items():
        assert stacked["sizes"][size]["best"] == row["best"]
        assert stacked["sizes"][size]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert stacked["sizes"][size]["optimum"] == pytest.approx(row["optimum"], abs=0.05)


CHECK = {
    "one point": (["--grid", "2^1..2^1"], "from low to high"),
    "no range": (["--grid", "0.5-2"], "expected a range of powers of two"),
    "two points": (["--grid", "2^0..2^0.5"], "a grid of 2 points"),
    "widths and heads": (["--sizes", "40"], "not a multiple of model.head_dim 16"),
    "words for sizes": (["--sizes", "a,b"], "expected numbers with commas"),
    "an unknown hyperparameter": (["--hparam", "alpha_rse"], "did you mean 'alpha_res'"),
    "an unknown axis": (["--axis", "widht"], "--axis"),
    "an unknown rule": (["--batch-rule", "sqr"], "did you mean 'sqrt'"),
    "no stack": (["--stack", "0"], "--stack must be 1 or more"),
    "no seeds": (["--seeds", "0"], "--seeds must be 1 or more"),
    "no tolerance": (["--drift", "0"], "--drift must be positive"),
}


@pytest.mark.parametrize("case", CHECK)
def test_bad_checks(refused, proxy, tmp_path, case):
    arguments, words = CHECK[case]
    assert words in refused("transfer-check", proxy, "--out", tmp_path / "never", *arguments)
    assert not (tmp_path / "never").exists()


def test_the_report_shows_the_sweeps_figure_where_there_is_one(proxy, tmp_path, capsys):
    config = load_config(proxy).model_dump(mode="json")
    (tmp_path / "best.json").write_text(
        json.dumps({"values": {}, "loss": 1.0, "config": config, "trials": 1, "tokens": 1})
    )
    for shows in (False, True):
        out = tmp_path / f"out-{shows}"
        assert main(["transfer", str(tmp_path), "--target", str(proxy), "--out", str(out)]) == 0
        assert ("![what the sweep found](sweep.png)" in (out / "report.md").read_text()) is shows
        assert (out / "sweep.png").exists() is shows
        (tmp_path / "sweep.png").write_bytes(b"a figure")
    assert (out / "sweep.png").read_bytes() == b"a figure"


def test_bad_transfers(refused, proxy, tmp_path):
    assert "no best.json" in refused("transfer", tmp_path, "--target", proxy)
    assert "--target" in refused("transfer", tmp_path)
    best = {"values": {}, "loss": 1.0, "config": load_config(proxy).model_dump(mode="json"), "trials": 1, "tokens": 1}
    (tmp_path / "best.json").write_text(json.dumps(best))
    bad = ["transfer", tmp_path, "--target", proxy]
    assert "no check.json" in refused(*bad, "--check", tmp_path)
    assert "not the output of umup bench" in refused(*bad, "--bench", tmp_path / "none.json")
    assert "smaller than the proxy" in refused(*bad, "--model.hidden_size", "16")
    assert "unknown rule" in refused(*bad, "--length-rule", "pover")
