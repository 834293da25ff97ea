"""Help, version, explain and the JSON of the commands; what starts without torch."""

import json
import subprocess
import sys

import pytest

import umup
from umup.cli.main import COMMANDS, main
from umup.config.sections import RunConfig
from umup.rules.plan import Plan


def printed(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    text = printed(capsys, "--help")
    assert all(f"  {name}" in text and what in text for name, what in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert help_of(command, capsys).startswith(f"usage: umup {command} ")


@pytest.mark.parametrize("command", ["train", "data", "explain"])
def test_help_lists_every_config_field_with_its_description(command, capsys):
    lines = help_of(command, capsys).splitlines()
    at = 0
    for section, field in RunConfig.model_fields.items():
        at = next(i for i in range(at, len(lines)) if lines[i].startswith(f"  {section}: "))
        for name, inner in field.annotation.model_fields.items():
            at = next(i for i in range(at, len(lines)) if lines[i].split()[:1] == [name])
            assert inner.description.split()[0] in lines[at]


def test_version(capsys):
    assert printed(capsys, "--version").strip() == umup.__version__


SCHEMES = {
    "sp": ["--parametrization.scheme", "sp"],
    "mup": ["--parametrization.scheme", "mup", "--parametrization.base.hidden_size", "16"],
    "umup": ["--parametrization.scheme", "umup"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_explain_prints_every_kind_of_parameter_with_rule_and_source(scheme, config, capsys):
    text = printed(capsys, "explain", config, *SCHEMES[scheme])
    assert text.startswith(f"scheme {scheme}, optimizer adamw")
    for name in ("embed.weight", "layers.*.attn.q.weight", "layers.*.mlp.down.weight", "head.weight", "loss"):
        rows = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert rows, name
        assert all(len(row.split("  ")) >= 4 for row in rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_explain_json_is_the_plan(scheme, config, capsys):
    plan = Plan.from_json(printed(capsys, "explain", config, "--json", *SCHEMES[scheme]))
    assert plan.scheme == scheme
    assert "head.weight" in plan.params


def test_explain_shows_which_product_runs_in_which_format(config, capsys):
    lines = printed(capsys, "explain", config, "--precision.recipe", "fp8_partial").splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("product "))
    rows = {line.split()[0]: line for line in lines[header + 1 : lines.index("", header)]}
    assert rows["layers.*.mlp.up"].split()[1:5] == ["hidden", "E4M3", "E5M2", "bf16"]
    assert rows["layers.*.mlp.down"].split()[1:6] == ["hidden_out", "bf16", "bf16", "bf16", "spared:"]
    assert rows["head"].split()[1:5] == ["readout", "bf16", "bf16", "bf16"]


def test_explain_json_adds_the_precision_to_the_plan(config, capsys):
    overrides = ["--precision.recipe", "fp8", "--precision.overrides", "{'*.down': bf16}"]
    text = printed(capsys, "explain", config, "--json", *overrides)
    assert Plan.from_json(text) == Plan.from_json(printed(capsys, "explain", config, "--json"))
    precision = json.loads(text)["precision"]
    assert (precision["recipe"], precision["overrides"]) == ("fp8", {"*.down": "bf16"})
    assert precision["products"]["layers.0.attn.q"]["gradient"] == "E5M2"
    assert precision["products"]["layers.0.mlp.down"]["forward"] is None


def test_explain_against_shows_what_differs_in_two_columns(config, capsys):
    lines = printed(capsys, "explain", config, "--against", "sp").splitlines()
    assert lines[0].split() == ["name", "quantity", "umup", "sp"]
    init = next(line for line in lines if line.startswith("embed.weight") and "init_std" in line)
    assert init.split()[2:] == ["1", "0.02"]
    document = json.loads(printed(capsys, "explain", config, "--against", "sp", "--json"))
    assert document["schemes"] == ["umup", "sp"]
    assert ["embed.weight", "init_std", 1.0, 0.02] in document["differences"]


def test_explain_against_itself_shows_no_difference(config, capsys):
    assert len(printed(capsys, "explain", config, "--against", "umup").splitlines()) == 1


def test_train_and_data_print_one_json_document(config, tmp_path, capsys):
    record = json.loads(printed(capsys, "data", config, "--json"))
    assert record["train"]["tokens"] > record["val"]["tokens"] > 0
    result = json.loads(printed(capsys, "train", config, "--json", "--out", tmp_path / "run"))
    assert result.keys() == {"steps", "train_loss", "val_loss", "tokens_per_second", "out"}
    assert (result["steps"], result["out"]) == (2, str(tmp_path / "run"))


def test_a_run_without_out_is_named_by_its_config(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "train", config).endswith("in runs/config\n")
    assert (tmp_path / "runs" / "config" / "model.safetensors").exists()


def loads_torch(*arguments):
    code = (
        "import sys\nfrom umup.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stopped:\n    code = stopped.code\n"
        "assert code == 0, code\nsys.exit(77 if 'torch' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 77), done.stderr
    return done.returncode == 77


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["generate", "--help"], ["rules"], ["explain", "CONFIG"], ["data", "CONFIG"]],
    ids=" ".join,
)
def test_what_needs_no_tensor_starts_without_torch(arguments, config):
    assert not loads_torch(*(config if a == "CONFIG" else a for a in arguments))


def test_the_torch_probe_can_fail(config, tmp_path):
    assert loads_torch("train", config, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
    ids=["gpu", "cpu", "python", "disk"],
)
def test_what_the_machine_lacks_is_a_failed_run_in_one_line(error, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr("umup.cli.main._run", fail)
    assert main(["train"]) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) > len("umup: \n")


def test_a_fault_of_the_program_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(*args):
        raise RuntimeError("unsupported memory format option")

    monkeypatch.setattr("umup.cli.main._run", fail)
    with pytest.raises(RuntimeError):
        main(["train"])


def test_a_reader_that_leaves_early_is_no_error(monkeypatch, capsys):
    def fail(*args):
        raise BrokenPipeError

    monkeypatch.setattr("umup.cli.main._run", fail)
    monkeypatch.setattr("sys.stdout", sys.stdout)
    assert main(["explain"]) == 0
    assert capsys.readouterr().err == ""
