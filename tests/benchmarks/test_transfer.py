"""The transfer benchmark runs the deciding cells first, encloses every optimum, resumes, and finds a known drift."""

import importlib.util
import sys
from collections import Counter
from math import inf, log2
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    spec = importlib.util.spec_from_file_location("transfer_benchmark", ROOT / "benchmarks" / "transfer.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "transfer_benchmark", module)
    spec.loader.exec_module(module)
    return module


def session(bench):
    size = bench.Size(0, 0, 0, 0, 16, 2, 2, 12)
    return bench.Session(("sp", "mup"), (16, 32, 64), (1, 2), (0, 1), 16, 8, size, 12, ("x",), torch.device("cpu"))


def losses_of(trial):
    """SP drifts by an octave per doubling of the width, muP not; rates far above the best diverge."""
    best = -8.0 if trial.cell.scheme == "mup" else -9.0 - log2(trial.cell.width / 16)
    x = trial.log2_lr - best
    return inf if x > 1.6 else 2 + 0.2 * x**2 + 0.01 * trial.seed


def test_cells_come_by_what_they_decide_and_the_known_drift_is_found(bench):
    s, done, order = session(bench), {}, []
    while (trial := s.next(done.get)) is not None:
        assert trial not in done
        done[trial] = losses_of(trial)
        order.append(trial.cell)
    cells = list(dict.fromkeys(order))
    assert [(c.scheme, c.width, c.depth) for c in cells[:6]] == [
        *(("sp", 16, 1), ("mup", 16, 1)),
        *(("sp", 64, 1), ("mup", 64, 1)),
        *(("sp", 16, 2), ("mup", 16, 2)),
    ]
    assert len(cells) == 12
    assert max(Counter(order).values()) < 24
    found = {(c.scheme, c.axis): c for c in bench.checks(s, done.get)}
    drifted, kept = found["sp, depth 1", "width"], found["mup, depth 1", "width"]
    assert drifted.drift_per_doubling.value == pytest.approx(-1, abs=0.01)
    assert (drifted.verdict, kept.verdict, found["mup", "depth"].verdict) == ("fail", "pass", "pass")
    assert all(len(line.losses[drifted.rate]) == 2 for line in drifted.lines.values())


def test_it_runs_resumes_and_reports(bench, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(900)))
    sizes = "--widths 16 32 --depths 1 --proxy-width 16 --head-dim 8 --steps 12 --batch-size 2 --seq-len 16"
    arguments = ["--results", str(tmp_path / "r.jsonl"), "--schemes", "umup", *sizes.split(), "--eval-batches", "1"]
    arguments += ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--seeds", "0"]
    bench.main(arguments)
    whole = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(whole[:3]))
    bench.main(arguments)
    capsys.readouterr()
    ended = (tmp_path / "r.jsonl").read_text()
    assert ended.splitlines(keepends=True)[:3] == whole[:3]
    assert len(ended.splitlines()) == len(whole)
    bench.main([*arguments, "--report", "--out", str(tmp_path / "out")])
    assert (tmp_path / "r.jsonl").read_text() == ended
    assert "umup, depth 1, lr over width: tuned at 16" in capsys.readouterr().out
    assert (tmp_path / "out" / "transfer-width.png").exists()
