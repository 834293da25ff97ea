"""The README's Python and YAML run as they stand."""

import re
from pathlib import Path

from umup.config.load import parse_config, read_yaml
from umup.models.specs import plan_for

ROOT = Path(__file__).parents[1]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert "layers.*.attn.q.weight" in capsys.readouterr().out


def test_readme_config_is_valid():
    for text in blocks("yaml"):
        assert plan_for(parse_config(read_yaml(text))).scheme == "umup"
