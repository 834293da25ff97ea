"""llm.c's and nanoGPT's GPT-2 files: the same logits as transformers' GPT-2 with those weights, and refusals."""

import os

import numpy as np
import pytest
import torch

from umup.errors import CheckpointError, DataError
from umup.inference.completion import load_run
from umup.interop.compare import our_logits
from umup.interop.export import Request, export
from umup.interop.source import open_source
from umup.models.specs import shape_of

transformers = pytest.importorskip("transformers")

VOCAB, PADDED, WIDTH, LAYERS, HEADS, LENGTH = 50, 64, 24, 2, 3, 16
LINEARS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
IN_ORDER = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)


def gpt2(activation, biases=True):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LENGTH,
        activation_function=activation,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            if not biases and name.endswith(".bias"):
                p.zero_()
    return model


def linear_state(model):
    """Its tensors with matrices as (out, in), as both programs have them."""
    return {n: t.t().contiguous() if n.endswith(LINEARS) else t for n, t in model.state_dict().items()}


def llmc_file(path, model, version=3, dtype=torch.float32):
    """As llm.c's write_model does it."""
    state = linear_state(model)
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, LENGTH, VOCAB, LAYERS, HEADS, WIDTH, PADDED]
    padding = torch.full((PADDED - VOCAB, WIDTH), 9.0)
    tensors = [torch.cat((state["transformer.wte.weight"], padding)), state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.h.{i}.{name}"] for name in IN_ORDER for i in range(LAYERS)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    raw = b"".join(t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    path.write_bytes(header.tobytes() + raw)
    return path


def nanogpt_file(path, model, prefix="", bias=True, **args):
    """As nanoGPT's train.py saves it."""
    state = {prefix + n: t for n, t in linear_state(model).items() if bias or not n.endswith(".bias")}
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": VOCAB}
    body = {"model": state, "model_args": {**sizes, "bias": bias, "dropout": 0.0, **args}, "iter_num": 5}
    torch.save(
        {**body, "optimizer": {"state": {}}, "best_val_loss": torch.tensor(2.5), "config": {"dataset": "x"}}, path
    )
    return path


def error(path, model):
    source = open_source(path)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    found = our_logits(shape_of(source.config.model), source.plan, source.weights(), tokens)
    return source, float((found - expected).norm() / expected.norm())


def test_llmc_in_float32_and_bfloat16(tmp_path):
    model = gpt2("gelu_new")
    source, apart = error(llmc_file(tmp_path / "a.bin", model), model)
    assert (source.format, source.config.model.family, source.plan.scheme) == ("llm.c", "gpt2", "sp")
    assert apart < 1e-6
    assert 1e-4 < error(llmc_file(tmp_path / "b.bin", model, 5, torch.bfloat16), model)[1] < 2e-2


@pytest.mark.parametrize(("prefix", "bias"), [("", True), ("_orig_mod.", True), ("", False)])
def test_nanogpt(prefix, bias, tmp_path):
    model = gpt2("gelu", bias)
    path = nanogpt_file(tmp_path / "ckpt.pt", model, prefix, bias)
    source, apart = error(path, model)
    assert (source.format, source.config.model.family) == ("nanoGPT", "gpt3")
    assert shape_of(source.config.model).traits.norm_bias is bias
    assert apart < 1e-6
    assert error(tmp_path, model)[1] == apart  # the directory, too


def test_they_become_hugging_face_s_gpt2(tmp_path):
    path = llmc_file(tmp_path / "gpt2_124M.bin", gpt2("gelu_new"))
    report = export(open_source(path), tmp_path / "out", Request("hf-gpt2"))
    assert report.comparison.passed
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    path = nanogpt_file(tmp_path / "ckpt.pt", gpt2("gelu", biases=False), bias=False)
    assert export(open_source(path), tmp_path / "nano", Request("hf")).format == "GPT2LMHeadModel"


def test_text_needs_a_tokenizer_beside_the_file(tmp_path):
    path = llmc_file(tmp_path / "a.bin", gpt2("gelu_new"))
    said = []
    with pytest.raises(DataError, match=r"write bytes, or the path of a Hugging Face tokenizer\.json"):
        load_run(path, said.append)
    assert said == [f"no tokenizer: copy GPT-2's tokenizer.json to {tmp_path / 'tokenizer.json'}"]


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def damaged(tmp_path):
    """Name -> (path, words of the refusal)."""
    model = gpt2("gelu_new")
    good = llmc_file(tmp_path / "good.bin", model).read_bytes()
    header = np.frombuffer(good[:1024], "<i4").copy()

    def changed(name, at, value):
        header_now = header.copy()
        header_now[at] = value
        (tmp_path / name).write_bytes(header_now.tobytes() + good[1024:])
        return tmp_path / name

    def cut(name, size):
        (tmp_path / name).write_bytes(good[:size])
        return tmp_path / name

    marker = tmp_path / "ran"
    torch.save({"model_args": {}, "model": Evil(f"touch {marker}")}, tmp_path / "evil.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(nanogpt_file(tmp_path / "x.pt", model).read_bytes()[:500])
    wrong = linear_state(model)
    wrong["transformer.wpe.weight"] = torch.zeros(LENGTH + 1, WIDTH)
    args = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": VOCAB}
    torch.save({"model": wrong, "model_args": args}, tmp_path / "shape.pt")
    torch.save({"model": wrong, "model_args": {"n_layer": 2}}, tmp_path / "args.pt")
    return {
        "version": (changed("version.bin", 1, 1), "version 1; umup reads 3, 5"),
        "heads": (changed("heads.bin", 5, 5), "sizes"),
        "negative": (changed("negative.bin", 4, -2), "sizes"),
        "cut off": (cut("cut.bin", len(good) - 4), "it is cut off"),
        "header only": (cut("header.bin", 100), "version 0"),
        "code": (tmp_path / "evil.pt", "refused before anything in it runs.*system"),
        "another pickle": (tmp_path / "other.pt", "not a checkpoint of nanoGPT"),
        "cut pickle": (tmp_path / "cut.pt", "truncated"),
        "shape": (tmp_path / "shape.pt", r"transformer.wpe.weight has shape \(17, 24\), this network wants \(16, 24\)"),
        "arguments": (tmp_path / "args.pt", "model_args has no 'vocab_size'"),
        "fork": (nanogpt_file(tmp_path / "fork.pt", model, n_kv_head=1), "model_args has n_kv_head"),
        "mup": (nanogpt_file(tmp_path / "mup.pt", model, mup_enabled=True), "mup_enabled: True"),
    }


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    for path, words in damaged(tmp_path).values():
        with pytest.raises(CheckpointError, match=words) as caught:
            list(open_source(path).weights())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_idle_numbers_of_nanogpt_mup_are_no_matter(tmp_path):
    model = gpt2("gelu")
    idle = {"mup_enabled": False, "mup_width_multiplier": 4.0, "init_std": 0.02, "depth_alpha_enabled": False}
    assert error(nanogpt_file(tmp_path / "ckpt.pt", model, **idle), model)[1] < 1e-6
