"""The Python and YAML of the README and the docs run as they stand."""

import re
import shlex
from pathlib import Path

from umup.cli.main import main
from umup.config.load import parse_config, read_yaml
from umup.interop.hf_formats import FORMATS
from umup.models.specs import plan_for

ROOT = Path(__file__).parents[1]


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert "layers.*.attn.q.weight" in capsys.readouterr().out


def test_fp8_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python", "docs/fp8.md")
    scope = {}
    exec(compile(code, "docs/fp8.md", "exec"), scope)
    assert scope["keeper"].products
    for text in blocks("yaml", "docs/fp8.md"):
        assert parse_config(read_yaml(text)).precision.recipe == "fp8"


def test_any_module_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scope = {}
    for code in blocks("python", "docs/any-module.md"):
        exec(compile(code, "docs/any-module.md", "exec"), scope)
    assert "head.weight" in capsys.readouterr().out
    assert scope["keeper"].products


def test_export_page_runs(monkeypatch, capsys):
    """What it prints is what the page says."""
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python", "docs/export.md")
    exec(compile(code, "docs/export.md", "exec"), {})
    assert blocks("text", "docs/export.md")[0] == capsys.readouterr().out


def test_the_export_page_lists_every_format():
    page = (ROOT / "docs" / "export.md").read_text()
    for name, form in FORMATS.items():
        assert f"`{form.architecture}` (`hf-{name}`)" in page


def test_the_pages_of_the_checks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for page in ("docs/coord-check.md", "docs/transfer.md"):
        for code in blocks("python", page):
            exec(compile(code, page, "exec"), {"__name__": page})  # what takes minutes is under __main__
    assert "PASS: mup over widths 64, 128, 256" in capsys.readouterr().out


def test_readme_config_is_valid():
    for text in blocks("yaml"):
        assert plan_for(parse_config(read_yaml(text))).scheme == "umup"


def test_the_convert_page_runs(monkeypatch, tmp_path, capsys):
    """Blocks that begin with a file's name are that file; the commands run in their order."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/convert.md").read_text()
    ran = 0
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        if language == "sh":
            for line in text.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
                ran += 1
        else:
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
    assert ran >= 10
    assert read_yaml(Path("mup.yaml").read_text())["model"]["output_logits_scale"] == 0.1
    assert parse_config(read_yaml(Path("config-mup.yaml").read_text())).parametrization.scheme == "mup"
