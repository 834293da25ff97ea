"""`umup convert`: its options under every spelling, formats by content, what it prints, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from umup.cli.convert import NUMBERS
from umup.cli.main import main
from umup.config.load import load_config, read_yaml
from umup.models.specs import plan_for

ROOT = Path(__file__).parents[2]
SP = """\
# A small GPT-3 of ours.
train_input: {data_processor: GptHDF5MapDataProcessor, data_dir: ./train/, batch_size: 16}
model:
  vocab_size: 512
  hidden_size: 128
  num_hidden_layers: 8
  num_heads: 4
  filter_size: 512
  max_position_embeddings: 64
  dropout_rate: 0.0
  attention_dropout_rate: 0.0
  initializer: {name: truncated_normal, mean: 0.0, std: 0.02, a: -0.04, b: 0.04}
  output_layer_initializer: {name: truncated_normal, mean: 0.0, std: 0.005, a: -0.01, b: 0.01}
optimizer:
  optimizer_type: AdamW
  betas: [0.9, 0.95]
  eps: 1.0e-8
  weight_decay: 0.1
  learning_rate:
  - {scheduler: Linear, initial_learning_rate: 0.0, end_learning_rate: 0.0006, total_iters: 10}
  - {scheduler: CosineDecay, initial_learning_rate: 0.0006, end_learning_rate: 6e-05, total_iters: 90}
runconfig: {max_steps: 100, seed: 1}
"""
LLAMA = ROOT / "recipes" / "llama-tiny-sp.yaml"


@pytest.fixture
def sp(tmp_path):
    path = tmp_path / "sp.yaml"
    path.write_text(SP)
    return path


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def converted(*arguments, out):
    assert convert(*arguments, "-o", out) == 0
    return read_yaml(out.read_text())


def refused(capsys, *arguments):
    """The one line that a refusal prints."""
    assert convert(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_the_tutorials_command(sp, capsys):
    assert convert("-i", sp, "--to", "cerebras-mup") == 0
    out = sp.with_name("sp_mup.yaml")
    body = read_yaml(out.read_text())
    assert body["model"]["initializer"]["std"] == pytest.approx(0.08 / (128 / 256) ** 0.5)
    assert body["model"]["embeddings_scale"] == 10.0
    assert body["optimizer"]["learning_rate"][0]["end_learning_rate"] == 0.006
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    # The original prints placeholders for three of them.
    assert lines[:4] == [
        "base layer width not provided; using the Cerebras-GPT default 256",
        "base lr not provided; using the Cerebras-GPT default 0.006",
        "base initialization std not provided; using the Cerebras-GPT default 0.08",
        "embeddings scale not provided; using the Cerebras-GPT default 10",
    ]
    assert lines[-1] == f"written to {out}"


def test_faithfully_the_name_is_the_originals(sp):
    assert convert(sp, "--to", "cerebras-mup", "--faithful") == 0
    assert sp.with_name("sp_muP.yaml").exists()


SPELLINGS = [(n.name, spelling) for n in NUMBERS for spelling in n.spellings]


def test_the_spellings_of_the_tutorial_are_there():
    assert {s for _, s in SPELLINGS} >= {
        *("-d_base", "--base_layer_width", "--base-layer-width", "-lr_base", "--base_lr", "--base-lr"),
        *("-std_base", "--base_init_std", "--base-init-std", "-m_base", "--m_embed", "--m-embed"),
    }


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
@pytest.mark.parametrize("equals", [False, True], ids=["space", "equals"])
def test_every_spelling(sp, tmp_path, capsys, name, spelling, equals):
    value = {"width": "64", "lr": "3e-3", "std": "0.05", "embedding": "12.5", "logits": "2.0"}[name]
    option = [f"{spelling}={value}"] if equals else [spelling, value]
    body = converted(sp, "--to", "cerebras-mup", *option, out=tmp_path / "o.yaml")
    model, optimizer = body["model"], body["optimizer"]
    found = {
        "width": optimizer["adjust_learning_rate"]["decoder_kernel"],
        "lr": optimizer["learning_rate"][1]["initial_learning_rate"],
        "std": model["embedding_initializer"]["std"],
        "embedding": model["embeddings_scale"],
        "logits": model["output_logits_scale"],
    }
    expected = {"width": 0.5, "lr": 3e-3, "std": 0.05, "embedding": 12.5, "logits": 4.0}
    assert found[name] == pytest.approx(expected[name])
    said = capsys.readouterr().err
    assert f"is {float(value):g}; it should be what a sweep at the base width found best" in said


def test_the_current_layout(sp, tmp_path, capsys):
    body = converted(sp, "--to", "cerebras-mup", "--layout", "current", "-d_base", 64, out=tmp_path / "o.yaml")
    assert body["trainer"]["init"]["model"]["mup_base_hidden_size"] == 64
    assert "ffn_output_layer_initializer is written out" in capsys.readouterr().err


def test_to_umup_and_on(sp, tmp_path, capsys):
    """SP, to muP, to umup's own, to another scheme; each step is read by its content."""
    mup, ours, other = (tmp_path / name for name in ("mup.yaml", "ours.yaml", "other.yaml"))
    assert convert(sp, "--to", "cerebras-mup", "-d_base", 64, "-o", mup) == 0
    assert convert(mup, "--to", "umup", "-o", ours) == 0
    config = load_config(ours)
    assert config.parametrization.scheme == "mup"
    assert plan_for(config).params["layers.0.attn.q.weight"]["lr"] == 0.5
    assert convert(ours, "--to", "umup", "--scheme", "umup", "-o", other) == 0
    assert plan_for(load_config(other)).scheme == "umup"
    capsys.readouterr()
    assert convert(ours, "--to", "cerebras-mup", "-o", tmp_path / "back.yaml") == 0
    back = read_yaml((tmp_path / "back.yaml").read_text())["trainer"]["init"]["model"]
    assert back["embeddings_scale"] == pytest.approx(10.0)


def test_back_to_sp(sp, tmp_path):
    mup = tmp_path / "mup.yaml"
    assert convert(sp, "--to", "cerebras-mup", "-o", mup) == 0
    body = converted(mup, "--to", "cerebras-sp", "--base-lr", "6e-4", out=tmp_path / "sp2.yaml")
    rates = body["optimizer"].pop("learning_rate")
    before = read_yaml(SP)["optimizer"]
    for leg, old in zip(rates, before.pop("learning_rate"), strict=True):
        assert leg == pytest.approx(old)
    assert body["optimizer"] == before
    assert "embeddings_scale" not in body["model"]


def test_our_own_under_another_scheme(capsys):
    assert convert(LLAMA, "--to", "umup", "--scheme", "mup", "--base-width", 64) == 0
    shown = capsys.readouterr()
    body = read_yaml(shown.out)
    assert body["parametrization"] == {"scheme": "mup", "base": {"hidden_size": 64}}
    assert body["optimizer"] == read_yaml(LLAMA.read_text())["optimizer"]
    assert "optimizer.lr 0.004 was sp's and now counts as tuned at width 64" in shown.err


def test_a_scheme_with_a_base_of_depth(capsys):
    assert convert(LLAMA, "--to", "umup", "--scheme", "completep", "--base-width", 64) == 0
    base = read_yaml(capsys.readouterr().out)["parametrization"]["base"]
    assert base == {"hidden_size": 64, "num_layers": 4}


def test_flags_and_groups(capsys):
    options = ("--scheme", "mup", "--base-width", 64)
    assert convert(LLAMA, "--to", "megatron", *options) == 0
    assert "--scaling-recipe mup\n--scaling-base-hidden-size 64\n" in capsys.readouterr().out
    assert convert(LLAMA, "--to", "torchtitan", *options) == 0
    assert "lr_multiplier = 0.5" in capsys.readouterr().out


def test_nanogpt_and_llm_c_are_recognised(tmp_path, capsys):
    nano, command = tmp_path / "train.py", tmp_path / "run.sh"
    nano.write_text("n_embd = 256\nn_head = 4\nn_layer = 2\nmup_enabled = True\nmup_width_multiplier = 2.0\n")
    command.write_text("./train_gpt2cu -e d12 -x 10 -me 1 -mm 3.0 -c 0.1\n")
    assert convert(nano, "--to", "umup") == 0
    assert read_yaml(capsys.readouterr().out)["parametrization"]["base"]["hidden_size"] == 128
    assert convert(command, "--to", "umup") == 0
    assert read_yaml(capsys.readouterr().out)["parametrization"]["base"]["hidden_size"] == 256
    assert convert(command, "--to", "cerebras-mup", "-o", tmp_path / "o.yaml") == 2
    assert "decay: with_rate" in capsys.readouterr().err


def test_json_has_all(sp, capsys, tmp_path):
    assert convert(sp, "--to", "cerebras-mup", "-o", tmp_path / "o.yaml", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["from"], found["to"], found["out"]) == ("cerebras", "cerebras-mup", str(tmp_path / "o.yaml"))
    assert "base lr not provided; using the Cerebras-GPT default 0.006" in found["notes"]
    assert read_yaml(found["text"]) == read_yaml((tmp_path / "o.yaml").read_text())
    assert shown.err == ""


def test_u_muP_is_refused_with_the_reason(sp, capsys):
    said = refused(capsys, sp, "--to", "cerebras-umup")
    assert "model-zoo configs have no key for it" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "cerebras"), "--to: unknown format 'cerebras'; did you mean 'cerebras-"),
        ((), "the following arguments are required: --to"),
        (
            ("--to", "cerebras-mup", "-d_base", "0"),
            "-d_base: base layer width must be a positive whole number, not '0'",
        ),
        (("--to", "cerebras-mup", "-d_base", "-256"), "must be a positive whole number, not '-256'"),
        (("--to", "cerebras-mup", "-d_base", "64.5"), "must be a positive whole number, not '64.5'"),
        (("--to", "cerebras-mup", "--base-lr", "fast"), "-lr_base: base lr must be a positive number, not 'fast'"),
        (("--to", "cerebras-mup", "-std_base", "nan"), "-std_base: base initialization std must be a positive number"),
        (("--to", "cerebras-mup", "-d_bse", "64"), "unknown argument '-d_bse'; did you mean '-d_base'?"),
        (("--to", "cerebras-mup", "--layout", "new"), "--layout: unknown layout 'new'; write current"),
        (("--to", "cerebras-mup", "--scheme", "mup"), "--scheme has no effect on --to cerebras-mup"),
        (("--to", "umup", "--base-lr", "1"), "-lr_base has no effect on --to umup"),
        (("--to", "umup", "-d_base", "64"), "-d_base goes with --scheme"),
        (("--to", "umup", "--scheme", "mup"), "--scheme mup is relative to a base width; write --base-width 128"),
        (("--to", "umup", "--scheme", "sp", "-d_base", "64"), "--scheme sp takes no base width"),
        (("--to", "umup", "--scheme", "mupp"), "unknown scheme 'mupp'"),
        (("--to", "cerebras-sp"), "in standard parametrization already"),
        (("other.yaml", "--to", "umup"), "unknown argument 'other.yaml'"),
        (("-i", "other.yaml", "--to", "umup"), "expected one SRC"),
    ],
)
def test_bad_options_are_one_line(sp, capsys, arguments, message):
    assert message in refused(capsys, sp, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SP.replace("hidden_size: 128", "hidden_sise: 128"),
            "unknown key 'model.hidden_sise'; did you mean 'hidden_size'?",
        ),
        (SP.replace("  num_heads", "  hidden_size: 256\n  num_heads"), "the key 'hidden_size' stands twice"),
        (SP.replace("model:", "model: ["), "not YAML"),
        ("a: 1", "the format is not recognised; known: cerebras"),
        ("", "the format is not recognised"),
        ("\x00", "not YAML"),
        ("a: &a [*a]", "an alias stands within itself"),
    ],
)
def test_bad_files_are_one_line(sp, capsys, text, message):
    sp.write_text(text)
    assert message in refused(capsys, sp, "--to", "cerebras-mup")
    assert list(sp.parent.iterdir()) == [sp]


def test_files_that_are_not_there_or_no_text(tmp_path, capsys):
    assert "no such file" in refused(capsys, tmp_path / "x.yaml", "--to", "umup")
    assert "cannot be read" in refused(capsys, tmp_path, "--to", "umup")
    binary, large = tmp_path / "b.yaml", tmp_path / "l.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large.write_bytes(b"#" * (2**22 + 1))
    assert "cannot be read as text" in refused(capsys, binary, "--to", "umup")
    assert "are no config" in refused(capsys, large, "--to", "umup")


def test_the_source_is_never_overwritten(sp, capsys):
    assert "is the source itself" in refused(capsys, sp, "--to", "cerebras-mup", "-o", sp)
    assert sp.read_text() == SP
    assert "cannot be written" in refused(capsys, sp, "--to", "cerebras-mup", "-o", sp.parent / "no" / "o.yaml")


def test_it_loads_no_torch(sp):
    code = (
        "import sys\nfrom umup.cli.main import main\n"
        f"code = main(['convert', {str(sp)!r}, '--to', 'umup'])\n"
        "sys.exit(77 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
