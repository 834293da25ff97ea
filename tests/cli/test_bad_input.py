"""Bad input: exit code 2, one line that names the thing and says what to write, nothing lost."""

import json
import os

import pytest
import torch

from umup.cli.main import main


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*arguments, code=2):
        assert main([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("umup: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run


def contents(folder):
    """Every file below a folder with its bytes and time of change."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


OVERRIDES = {
    "unknown key": (["--model.hiden_size", "64"], ["model.hiden_size", "did you mean 'hidden_size'"]),
    "unknown section": (["--optimiser.lr", "1"], ["optimiser", "did you mean 'optimizer'"]),
    "wrong type": (["--model.hidden_size", "wide"], ["model.hidden_size", "expected a valid integer", "'wide'"]),
    "a boolean for a number": (["--train.steps", "true"], ["train.steps", "expected a valid integer", "True"]),
    "negative rate": (["--optimizer.lr", "-1"], ["optimizer.lr", "greater than 0", "-1"]),
    "NaN rate": (["--optimizer.lr", ".nan"], ["optimizer.lr", "finite number", "nan"]),
    "zero rate": (["--optimizer.lr=0"], ["optimizer.lr", "greater than 0"]),
    "negative steps": (["--train.steps=-5"], ["train.steps", "greater than 0", "-5"]),
    "seed beyond 64 bits": (["--train.seed", str(2**64)], ["train.seed", "expected less than"]),
    "width and heads": (["--model.hidden_size", "40"], ["model.hidden_size 40", "write model.head_dim: 20"]),
    "muP without a base": (["--parametrization.scheme", "mup"], ["parametrization.base", "write base: {hidden_size:"]),
    "a base for u-muP": (["--parametrization.base.hidden_size", "16"], ["parametrization.base", "remove it"]),
    "unknown scheme": (["--parametrization.scheme", "umop"], ["parametrization.scheme", "did you mean 'umup'"]),
    "unknown multiplier": (
        ["--parametrization.hparams.alpha_rse", "2"],
        ["parametrization.hparams", "did you mean 'alpha_res'"],
    ),
    "unknown family": (["--model.family", "lama"], ["model.family", "did you mean 'llama'"]),
    "unknown optimizer": (["--optimizer.name", "adanw"], ["optimizer.name", "did you mean 'adamw'"]),
    "unknown schedule": (["--schedule.name", "cosin"], ["schedule.name", "'cosine'", "'cosin'"]),
    "override without value": (["--optimizer.lr"], ["--optimizer.lr has no value", "write --optimizer.lr VALUE"]),
    "override without section": (["--lr", "1"], ["unknown argument '--lr'"]),
    "unknown option": (["--ouT", "x"], ["unknown argument '--ouT'", "did you mean '--out'"]),
    "missing corpus": (["--data.source", "nowhere"], ["data.source", "'nowhere'", "python-stdlib"]),
    "glob without files": (["--data.source", "/nowhere/*.txt"], ["data.source", "'/nowhere/*.txt'", "write"]),
    "missing tokenizer": (["--data.tokenizer", "none.json"], ["data.tokenizer", "'none.json'", "write bytes"]),
    "tokenizer and vocabulary": (["--model.vocab_size", "100"], ["256", "write model.vocab_size: 256"]),
    "corpus shorter than a batch": (["--train.batch_size", "10000"], ["tokens", "smaller train.batch_size"]),
    "absent device": (["--train.device", "tpu"], ["train.device", "'tpu'", "write cpu or auto"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_wrong_config_is_refused_before_anything_is_written(case, config, refused, tmp_path):
    arguments, named = OVERRIDES[case]
    line = refused("train", config, "--out", tmp_path / "run", *arguments)
    assert all(text in line for text in named), line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(config, refused):
    assert "train.device: 'cuda' is not available here; write cpu or auto" in refused(
        "train", config, "--train.device", "cuda"
    )


@pytest.mark.parametrize("command", ["train", "data", "explain"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ["no such file"]),
        ("modle: {}", ["unknown key 'modle'", "did you mean 'model'"]),
        ("model: {hidden_size: x}", ["model.hidden_size", "integer", "'x'"]),
        ("model: {hidden_size: 64\n", ["not YAML"]),
        ("just words", ["expected sections such as 'model:'"]),
        ("model: {}\nmodel: {}", ["'model' stands twice"]),
    ],
)
def test_a_wrong_file_is_refused_by_every_command_that_reads_it(command, text, named, refused, tmp_path):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    line = refused(command, path)
    assert all(part in line for part in [str(path), *named]), line


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ["data.source", "empty corpus"]),
        ({"a.txt": b"", "b.txt": b""}, ["empty corpus", "2 empty files"]),
        ({"a.png": b"\x89PNG\xff\xfe", "b.dat": b"a\0b"}, ["empty corpus", "2 binary", "write files of UTF-8 text"]),
        ({"a.txt": b"short"}, ["one batch needs", "write"]),
    ],
    ids=["empty folder", "empty files", "binary only", "too short"],
)
def test_a_corpus_that_holds_no_batch_of_text_is_refused(command, files, named, config, refused, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    line = refused(command, config, "--data.source", folder)
    assert all(part in line for part in named), line


def test_a_run_directory_that_cannot_be_made_is_refused(config, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refused("train", config, "--out", out)
        assert f"{out}: cannot write there" in line
        assert "choose another --out" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission_is_refused(config, refused, tmp_path, mode):
    closed = tmp_path / "closed"
    closed.mkdir(mode=mode)
    assert "cannot write there" in refused("train", config, "--out", closed / "run")


def test_a_cache_that_cannot_be_made_is_refused(config, refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("data", config, "--data.cache_dir", tmp_path / "file")
    assert "data.cache_dir" in line


def test_a_run_directory_of_another_config_is_left_alone(config, refused, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(config), "--out", str(run)]) == 0
    capsys.readouterr()
    before = contents(run)
    line = refused("train", config, "--out", run, "--optimizer.lr", "0.5", "--model.num_layers", "2")
    assert "optimizer.lr was 1.0 and is now 0.5" in line
    assert "model.num_layers was 1 and is now 2" in line
    assert "choose another --out" in line
    assert contents(run) == before


def test_a_run_directory_of_another_corpus_is_left_alone(config, corpus, refused, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(config), "--out", str(run)]) == 0
    capsys.readouterr()
    before = contents(run)
    (corpus / "0.py").write_text("print('other')\n" * 99)
    line = refused("train", config, "--out", run)
    assert "the corpus has changed" in line
    assert contents(run) == before


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(config, refused, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(config), "--out", str(run)]) == 0
    capsys.readouterr()
    weights = run / "checkpoints" / "step-00000002" / "model.safetensors"
    os.truncate(weights, 100)
    (run / "model.safetensors").unlink()
    for command in (["train", config, "--out", run], ["generate", run, "--prompt", "x"]):
        line = refused(*command)
        assert "model.safetensors is truncated or altered" in line
        assert "step-00000002" in line
    assert weights.stat().st_size == 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("some words to learn from, again and again. " * 40)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16},
                "data": {
                    "source": str(folder / "text.txt"),
                    "cache_dir": str(folder / "cache"),
                    "val_fraction": 0.2,
                },
                "train": {"steps": 1, "batch_size": 2, "eval_batches": 1},
            }
        )
    )
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


GENERATE = {
    "prompt longer than the context": (["--prompt", "x" * 17], ["17 tokens", "context 16", "shorten it"]),
    "empty prompt": (["--prompt", ""], ["the prompt is empty"]),
    "no prompt": ([], ["--prompt", "required"]),
    "negative max-tokens": (["--prompt", "x", "--max-tokens", "-3"], ["--max-tokens", "1 or more", "-3"]),
    "max-tokens no number": (["--prompt", "x", "--max-tokens", "many"], ["--max-tokens", "'many'"]),
    "negative temperature": (["--prompt", "x", "--temperature", "-0.5"], ["--temperature", "0 or more", "-0.5"]),
    "temperature NaN": (["--prompt", "x", "--temperature", "nan"], ["--temperature", "nan"]),
    "temperature no number": (["--prompt", "x", "--temperature", "hot"], ["--temperature", "'hot'"]),
    "negative top-k": (["--prompt", "x", "--top-k", "-1"], ["--top-k", "0 or more"]),
    "top-p above 1": (["--prompt", "x", "--top-p", "1.5"], ["--top-p", "at most 1", "1.5"]),
    "seed beyond 64 bits": (["--prompt", "x", "--seed", str(2**64)], ["--seed", "below 2^63"]),
    "unknown option": (["--prompt", "x", "--temprature", "1"], ["'--temprature'", "did you mean '--temperature'"]),
}


@pytest.mark.parametrize("case", GENERATE)
def test_a_wrong_request_for_text_is_refused_before_a_word_is_printed(case, trained, refused):
    arguments, named = GENERATE[case]
    line = refused("generate", trained, *arguments)
    assert all(text in line for text in named), line


def test_generate_from_what_is_no_run_is_refused(refused, tmp_path):
    line = refused("generate", tmp_path / "nothing", "--prompt", "x")
    assert str(tmp_path / "nothing") in line
    assert "write the --out of a training" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["frobnicate"], ["unknown command 'frobnicate'", "known: demo, train"]),
        (["--verbose"], ["unknown command '--verbose'"]),
        (["train"], ["CONFIG", "--help"]),
        (["demo", "--workers", "0"], ["--workers must be 1 or more, not 0"]),
        (["demo", "--fats"], ["'--fats'", "did you mean '--fast'"]),
        (["demo", "--out", "/dev/null/demo"], ["/dev/null/demo: cannot write there"]),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, named, refused):
    line = refused(*arguments)
    assert all(text in line for text in named), line


PRECISION = {
    "unknown recipe": (["--precision.recipe", "fp8_partail"], ["precision.recipe", "did you mean 'fp8_partial'"]),
    "static FP8 without unit scaling": (
        ["--precision.recipe", "fp8", "--parametrization.scheme", "sp"],
        ["'sp'", "write precision.scales: dynamic, parametrization.scheme: umup"],
    ),
    "FP16 without unit scaling": (
        ["--precision.recipe", "fp16", "--parametrization.scheme", "sp"],
        ["needs loss scaling", "write precision.recipe: bf16"],
    ),
    "odd sides": (
        ["--precision.recipe", "fp8", "--model.intermediate_size", "40"],
        ["layers.0.mlp.gate maps 32 features to 40", "change 40 to 48", "{'layers.*.mlp.gate': bf16}"],
    ),
    "unmatched override": (
        ["--precision.recipe", "fp8", "--precision.overrides", "{layers.0.attn.query: bf16}"],
        ["precision.overrides 'layers.0.attn.query'", "did you mean"],
    ),
    "dotted override": (["--precision.overrides.head", "{a: b}"], ["write the pattern whole"]),
}


@pytest.mark.parametrize("against", [[], ["--against", "umup"]], ids=["alone", "against"])
@pytest.mark.parametrize("case", PRECISION)
def test_explain_refuses_formats_that_could_not_run(case, against, config, refused):
    arguments, named = PRECISION[case]
    line = refused("explain", config, *arguments, *against)
    assert all(text in line for text in named), line


def test_explain_against_an_unknown_scheme_or_one_without_its_base_is_refused(config, refused):
    assert "did you mean 'umup'" in refused("explain", config, "--against", "umupp")
    assert "needs a base shape" in refused("explain", config, "--against", "mup")
