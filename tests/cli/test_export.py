"""`umup export` from the command line: what it prints and writes, and bad input in one line with exit code 2."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from umup.checkpoint import TensorFiles, TensorLayout, write_tensors
from umup.cli.main import main
from umup.interop import hf_write
from umup.interop.compare import our_logits, prompts
from umup.interop.source import open_source
from umup.models.specs import shape_of

pytest.importorskip("transformers")


@pytest.fixture
def run(config, tmp_path, capsys):
    """The directory of a tiny finished run."""
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


@pytest.fixture
def llama(run, tmp_path, capsys):
    """The same as a Hugging Face directory."""
    assert main(["export", str(run), "--to", "hf-llama", "-o", str(tmp_path / "llama")]) == 0
    capsys.readouterr()
    return tmp_path / "llama"


def test_a_run_becomes_a_llama_that_says_how_it_compares(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "hf-llama", "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    wrote, compared = out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'out'}: LlamaForCausalLM, fp32, 1 file, ")
    assert compared.startswith("logits on 4 random prompts of 16 tokens, against transformers ")
    assert compared.endswith("; within 1e-05")
    assert err == ""
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_json_goes_to_stdout_alone(run, tmp_path, capsys):
    arguments = ["--to", "hf-granite", "--out", str(tmp_path / "out"), "--dtype", "bf16", "--shard-size", "20KB"]
    assert main(["export", str(run), *arguments, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["format"], body["dtype"], body["comparison"]["passed"]) == ("GraniteForCausalLM", "bf16", True)
    assert len(body["files"]) > 2


def test_fp8_says_where_its_scales_are_from(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "hf-llama", "-o", str(tmp_path / "out"), "--fp8"]) == 0
    out, err = capsys.readouterr()
    assert "LlamaForCausalLM, fp8" in out
    assert err == "input scales: measured on 8 random prompts\n"


def test_a_failed_comparison_exits_with_1_and_deletes_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf_write, "kept", hf_write.plain)  # Granite's numbers left out of its config
    monkeypatch.setattr(hf_write, "plain", lambda shape: hf_write.kept(shape) | {"attention": 1.0})
    assert main(["export", str(run), "--to", "hf-llama", "-o", str(tmp_path / "out")]) == 1
    assert "NOT within 1e-05" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_there_and_back_again(run, llama, tmp_path, capsys):
    assert main(["export", str(llama), "--to", "umup", "-o", str(tmp_path / "back")]) == 0
    assert "against transformers" in capsys.readouterr().out
    sources = [open_source(path) for path in (run, tmp_path / "back")]
    logits = [our_logits(s := shape_of(x.config.model), x.plan, x.weights(), prompts(s)) for x in sources]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert sources[1].plan.scheme == "sp"


@pytest.mark.parametrize("which", ["llama", "back"])
def test_text_comes_from_imported_weights(which, run, llama, tmp_path, capsys):
    main(["export", str(llama), "--to", "umup", "-o", str(tmp_path / "back")])
    capsys.readouterr()
    texts = []
    for path in (run, tmp_path / which):
        arguments = ["--prompt", "def f", "--max-tokens", "8", "--temperature", "0", "--json"]
        assert main(["generate", str(path), *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


@pytest.fixture
def refused(capsys, tmp_path):
    """Export what must be refused; returns the one line, after lines of notes."""

    def call(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        *notes, line = err.splitlines()
        assert line.startswith("umup: ")
        assert not any(note.startswith("umup: ") for note in notes)
        return line

    return call


def rewritten(folder, change):
    """The directory's tensors after a change, in one file."""
    tensors = dict(TensorFiles([folder / "model.safetensors"]))
    change(tensors)
    layout = [TensorLayout(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    write_tensors(folder / "model.safetensors", layout, [t.clone() for t in tensors.values()])


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config_changed(**keys):
    def change(folder):
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**body, **keys}))

    return change


def without_a_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/umup-test-was-here",)


def with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")


def other_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")


def larger_tokenizer(folder):
    body = json.loads((folder / "tokenizer.json").read_text())
    body["added_tokens"] = [
        {
            "id": 256,
            "content": "<|x|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    (folder / "tokenizer.json").write_text(json.dumps(body))


SPOILT = {
    "missing tensor": (
        lambda f: rewritten(f, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        ["model.layers.0.mlp.up_proj.weight is missing"],
    ),
    "extra tensor": (
        lambda f: rewritten(f, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(1)})),
        ["q_norm.weight is in no place of this network"],
    ),
    "extra layers": (config_changed(num_hidden_layers=2), ["model.layers.1.", "is missing", "and 6 more"]),
    "wrong shape": (
        lambda f: rewritten(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        ["model.norm.weight has shape (7,), this network wants (32,)"],
    ),
    "truncated": (truncated, ["model.safetensors: not a readable safetensors file"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
    "missing shard": (without_a_shard, ["model-00002-of-00002.safetensors", "not there"]),
    "broken index": (no_index, ["not an index of shards"]),
    "code in a pickle": (with_code, ["refused before anything in it runs", "system"]),
    "another pickle": (other_pickle, ["not a mapping of names to tensors"]),
    "unknown type": (config_changed(model_type="lama"), ["unknown model_type 'lama'", "did you mean 'llama'"]),
    "a feature": (config_changed(sliding_window=64), ["sliding_window: 64", "does not have"]),
    "another vocabulary": (larger_tokenizer, ["has 257 ids and the model's vocab_size is 256"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["is not a Hugging Face tokenizer.json"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_directory_is_refused_in_one_line_and_nothing_is_written(case, llama, tmp_path, refused):
    spoil, named = SPOILT[case]
    spoil(llama)
    line = refused(llama, "--to", "umup", "-o", tmp_path / "out")
    assert all(text in line for text in named), line
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/umup-test-was-here").exists()


def test_wrong_arguments_are_refused_in_one_line(run, tmp_path, refused):
    out = tmp_path / "out"
    assert "did you mean 'hf-llama'" in refused(run, "--to", "hf-lama", "-o", out)
    assert "--shard-size '5 apples' is no size" in refused(run, "--to", "hf", "-o", out, "--shard-size", "5 apples")
    assert "invalid choice: 'int4'" in refused(run, "--to", "hf", "-o", out, "--dtype", "int4")
    assert "required: --to" in refused(run, "-o", out)
    assert "is no run directory, and no checkpoint of Hugging Face, llm.c, nanoGPT; write the" in refused(
        tmp_path, "--to", "hf", "-o", out
    )
    assert "cannot express model.norm: rms" in refused(run, "--to", "hf-gpt2", "-o", out)
    assert not out.exists()
    shutil.copytree(run, out)
    assert "exists and is not empty; choose another --out" in refused(run, "--to", "hf", "-o", out)
    assert (out / "plan.json").exists()


def test_an_unfinished_run_and_nan_are_told(run, tmp_path, capsys):
    (run / "model.safetensors").unlink()
    assert main(["export", str(run), "--to", "hf", "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "not finished: the weights are those of step 2\n"
    rewritten(tmp_path / "out", lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert main(["export", str(tmp_path / "out"), "--to", "umup", "-o", str(tmp_path / "nan")]) == 1
    out, err = capsys.readouterr()
    assert "norm.weight holds 32 values that are NaN or infinite" in err
    assert "NOT within" in out
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x", "--max-tokens", "1"]) == 3
    err = capsys.readouterr().err
    assert "norm.weight holds 32 values that are NaN or infinite" in err
    assert "umup: the model's logits are NaN" in err
