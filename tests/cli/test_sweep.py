"""`umup sweep`: the study, its files, joining, bad input, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from umup.cli.main import main

RATES = ["--space.optimizer.lr", "[0.5, 1, 2]"]


@pytest.fixture
def sweep(config, tmp_path):
    """`umup sweep` with these arguments on a config that trains in a moment."""
    return lambda *arguments: main(["sweep", str(config), *map(str, arguments)])


def test_a_sweep_leaves_its_choice_and_report(sweep, tmp_path, capsys):
    out = tmp_path / "study"
    assert sweep("--out", out, *RATES, "--json") == 0
    said = capsys.readouterr()
    best = json.loads(said.out)
    assert best.pop("out") == str(out)
    assert best == json.loads((out / "best.json").read_text())
    assert best["trials"] == 3
    assert best["values"]["optimizer.lr"] in (0.5, 1, 2)
    assert "## Ranking" in (out / "report.md").read_text()
    assert "![loss against every hyperparameter](sweep.png)" in (out / "report.md").read_text()
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sweep.csv").read_text().splitlines()) == 4
    assert said.err.count("trial ") == 3

    assert sweep("--out", out, *RATES) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("best: optimizer.lr ")

    assert sweep("--join", out) == 0
    assert capsys.readouterr().err == ""


def test_axes_from_a_file_and_from_the_command_line(sweep, tmp_path, capsys):
    file = tmp_path / "space.yaml"
    file.write_text("optimizer.lr: 0.5..8\nparametrization.hparams.alpha_res: [1, 2]\n")
    out = tmp_path / "study"
    assert sweep("--out", out, "--strategy", "random", "--trials", 2, "--space", file, "--space.optimizer.lr=1..2") == 0
    axes = {axis["key"]: axis["values"] for axis in json.loads((out / "study.json").read_text())["space"]}
    assert axes == {"optimizer.lr": [1, 2], "parametrization.hparams.alpha_res": [1, 2]}


def test_a_torn_journal_is_mended_and_said(sweep, tmp_path, capsys):
    out = tmp_path / "study"
    assert sweep("--out", out, *RATES) == 0
    journal = out / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-7])
    capsys.readouterr()
    assert sweep("--out", out, *RATES) == 0
    err = capsys.readouterr().err
    assert "its last line was cut short and is dropped" in err
    assert "its worker died; the trial is tried again" in err
    assert json.loads((out / "best.json").read_text())["trials"] == 3


def test_without_matplotlib_there_is_a_report_and_no_figure(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "study"
    assert sweep("--out", out, *RATES) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "umup: no figure: drawing a figure needs matplotlib; write: pip install 'umup[plots]'"
    )
    assert said.out.endswith("report.md, best.json, sweep.csv\n")
    assert "sweep.png" not in (out / "report.md").read_text()


BAD = {
    "empty space": (["--space", "EMPTY"], ["--space: it is empty"]),
    "no space file": (["--space", "none.yaml"], ["--space none.yaml: cannot be read"]),
    "one point": (
        ["--space.optimizer.lr", "[1]"],
        ["--space.optimizer.lr: [1] is nothing to search; write --optimizer.lr 1 or"],
    ),
    "no range": (["--space.optimizer.lr"], ["has no range; write --space.optimizer.lr 2^-3..2^3"]),
    "head size": (["--space.model.hidden_size", "[32, 40]"], ["--space.model.hidden_size 40", "model.head_dim"]),
    "unknown hyperparameter": (
        ["--space.parametrization.hparams.alpha_rse", "1..2"],
        ["'umup' has no hyperparameter 'alpha_rse'; did you mean 'alpha_res'?"],
    ),
    "unknown strategy": (["--strategy", "randon"], ["--strategy: 'randon' is not one of independent"]),
    "huge grid": (["--strategy", "grid"], ["117649 points on 6 axes"]),
    "no workers": (["--workers", "0"], ["--workers must be 1 or more"]),
    "no stack": (["--stack", "0"], ["--stack must be 1 or more, not 0"]),
    "a stack of sgd": (
        ["--stack", "4", "--optimizer.name", "sgd"],
        ["--stack: optimizer.name is 'sgd'; a stack trains with adamw or adam, or leave --stack out"],
    ),
    "a stack of commands": (["--stack", "4", "--command", "x"], ["--stack has no effect on --command"]),
    "no trials": (["--trials", "0"], ["--trials must be 1 or more"]),
    "trials of lines": (["--trials", "9"], ["--trials has no effect on --strategy independent"]),
    "keep of nothing": (["--keep", "9"], ["--keep is of a shortlist; write --shortlist"]),
    "join with axes": (["--join", "x", *RATES, "--seeds", "2"], ["--join takes the study's own --seeds, --space.KEY"]),
    "no study to join": (["--join", "nowhere"], ["study nowhere: it has no study.json"]),
    "no shortlist config": (["--shortlist", "none.yaml"], ["none.yaml: no such file"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input(sweep, arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("")
    assert sweep(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("umup: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "runs").exists()


def test_another_configs_study_is_refused(sweep, tmp_path, capsys):
    out = tmp_path / "study"
    assert sweep("--out", out, *RATES) == 0
    capsys.readouterr()
    assert sweep("--out", out, *RATES, "--train.batch_size", 4) == 2
    assert "config.train.batch_size was 2 and is now 4" in capsys.readouterr().err
    assert sweep("--join", out, "--train.batch_size", 4) == 2
    assert "was made by another config" in capsys.readouterr().err


def test_another_corpus_is_refused(sweep, tmp_path, corpus, capsys):
    out = tmp_path / "study"
    assert sweep("--out", out, *RATES) == 0
    (corpus / "0.py").write_text("x = 1\n" * 500)
    capsys.readouterr()
    assert sweep("--join", out) == 2
    assert "the corpus here is not the one it began with" in capsys.readouterr().err


def test_all_diverged_is_exit_3(sweep, tmp_path, capsys):
    assert sweep("--out", tmp_path / "study", "--space.optimizer.lr", "[1e18, 1e20]") == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("umup: all 2 trials diverged, at optimizer.lr 1e+18 to 1e+20; write --space.optimizer.lr ")


@pytest.mark.parametrize("command", ["sweep", "transfer-check"])
def test_without_optuna_it_says_what_to_install(command, config, tmp_path):
    code = "import sys; sys.modules['optuna'] = None; from umup.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, command, str(config), "--out", str(tmp_path / "study")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "umup: a study of many trials needs optuna; write: pip install 'umup[sweep]'\n"
    assert not (tmp_path / "study").exists()


def states(out):
    from umup.study.ledger import Ledger

    return [str(a.state) for a in Ledger(out).attempts()]


def test_a_killed_child_is_replaced_and_ctrl_c_is_130(config, tmp_path):
    """One command with two workers: one is killed, then the command alone is interrupted, as `kill -INT` does."""
    body = yaml.safe_load(config.read_text())
    body["train"]["steps"] = 600
    config.write_text(yaml.safe_dump(body))
    out, log = tmp_path / "study", tmp_path / "log"
    command = [sys.executable, "-m", "umup.cli.main", "sweep", str(config), "--out", str(out), *RATES, "--workers", "2"]

    def until(seen):
        while not seen():
            assert running.poll() is None, log.read_text()
            time.sleep(0.02)

    with log.open("w") as err:
        running = subprocess.Popen(command, stderr=err)
    until(lambda: len(list(out.glob("trials/*/metrics.jsonl"))) == 2)
    killed = next((out / "workers").iterdir())
    os.kill(int(killed.name.rsplit("-", 2)[1]), signal.SIGKILL)
    until(lambda: "its worker died; the trial is tried again" in log.read_text())
    assert "failed" in states(out)
    until(lambda: "running" in states(out))
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert log.read_text().splitlines()[-1] == "umup: interrupted; the same command goes on where it was"
    assert "Traceback" not in log.read_text()
    assert list((out / "workers").iterdir()) == [killed]
    assert not (out / "best.json").exists()
    assert "running" not in states(out)
    assert "released" in states(out)
