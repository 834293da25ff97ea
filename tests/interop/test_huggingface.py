"""transformers' models and ours from the same files: the same logits, the same greedy tokens."""

import shutil
import weakref
from dataclasses import replace
from itertools import islice

import pytest
import torch

from umup.checkpoint import load_weights
from umup.errors import CheckpointError
from umup.inference.generate import Sampling, generate
from umup.interop.export import Request, export
from umup.interop.hf_formats import FORMATS
from umup.interop.huggingface import stored_tensors
from umup.interop.source import open_source, watched
from umup.models.build import decoder
from umup.models.specs import shape_of

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MptConfig,
)

VOCAB, LENGTH, WIDTH = 97, 48, 48
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": LENGTH,
    "rope_theta": 500.0,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 5.0,
}
FALCON = {k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"ffn_hidden_size": 80}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 6, "n_positions": LENGTH}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
MPT = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH}

CASES = {
    "llama": LlamaConfig(**LLAMA),
    "llama grouped": LlamaConfig(**LLAMA, num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama biased and tied": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama geglu": LlamaConfig(**LLAMA, hidden_act="gelu_pytorch_tanh"),
    "granite": GraniteConfig(**LLAMA, **GRANITE, num_key_value_heads=2),
    "granite tied": GraniteConfig(**LLAMA, **GRANITE, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, n_inner=80, tie_word_embeddings=False),
    "gpt3": GPT2Config(**GPT2, activation_function="gelu"),
    "gptj": GPTJConfig(**{**GPT2, "n_head": 3}, rotary_dim=4),
    "gptj tied": GPTJConfig(**{**GPT2, "n_head": 3}, rotary_dim=16, tie_word_embeddings=True),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=4, seq_length=LENGTH),
    "bloom six heads": BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=6, seq_length=LENGTH),
    "falcon 7b": FalconConfig(**FALCON),
    "falcon many heads": FalconConfig(**FALCON, bias=True, multi_query=False, tie_word_embeddings=False),
    "falcon 40b": FalconConfig(**FALCON, **NEW),
    "falcon 11b": FalconConfig(**FALCON, **NEW, num_ln_in_parallel_attn=1),
    "falcon sequential": FalconConfig(**FALCON, parallel_attn=False),
    "starcoder": GPTBigCodeConfig(**GPT2),
    "starcoder many heads": GPTBigCodeConfig(**GPT2, multi_query=False, activation_function="gelu"),
    "mpt": MptConfig(**MPT),
    "mpt six heads": MptConfig(**{**MPT, "n_heads": 6}, tie_word_embeddings=False),
}


def twin(case):
    """The model, for inference, every parameter moved off its initial value, gains and biases too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CASES[case]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def saved(case, path, **options):
    """The model and the directory that it was saved to."""
    transformers.utils.logging.disable_progress_bar()
    model = twin(case)
    model.save_pretrained(path, **options)
    return model


def tokens(length, batch=2):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def distance(a, b):
    """Relative L2."""
    return float((a - b).norm() / a.norm())


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def ours(source):
    """The imported model, for inference."""
    model = decoder(shape_of(source.config.model), source.plan).eval()
    load_weights(model, source.weights(), "twin")
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    theirs = saved(case, tmp_path)
    source = open_source(tmp_path)
    mine = ours(source)
    assert source.plan.scheme == "sp"
    assert not any("does not know" in note for note in source.notes), source.notes
    for length in (1, 7, LENGTH):
        with torch.no_grad():
            expected, found = theirs(tokens(length)).logits, mine(tokens(length)) * mine.loss_multiplier
        assert found.shape == expected.shape
        assert distance(expected, found) < 2e-6
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    prompt = tokens(5, batch=1)
    with torch.no_grad():
        chain = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for use_cache in (True, False):
        found = generate(mine, prompt[0].tolist(), LENGTH, Sampling(temperature=0.0), use_cache=use_cache)
        assert [token for token, _ in islice(found, 12)] == chain[0, 5:].tolist()


def test_every_format_is_among_the_cases():
    assert {config.model_type for config in CASES.values()} == {form.model_type for form in FORMATS.values()}


@pytest.mark.parametrize("case", ["llama grouped", "granite tied", "gpt2", "bloom", "falcon 40b", "starcoder", "mpt"])
def test_an_import_exported_again_holds_the_same_bits(case, tmp_path):
    saved(case, tmp_path / "theirs")
    source = open_source(tmp_path / "theirs")
    report = export(source, tmp_path / "again", Request(source.format))
    assert report.comparison.passed
    assert report.comparison.against.startswith("transformers")
    before, after = (dict(stored_tensors(tmp_path / name)) for name in ("theirs", "again"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert open_source(tmp_path / "again").config.model == source.config.model


@pytest.mark.parametrize("case", ["granite tied", "falcon 7b"])
def test_an_imported_run_directory_computes_the_same(case, tmp_path):
    saved(case, tmp_path / "theirs")
    said = []
    report = export(open_source(tmp_path / "theirs"), tmp_path / "run", Request("umup"), said.append)
    assert said[-2:] == [
        "imported weights run under the plan of scheme sp (sigma_init 0.02)",
        f"no tokenizer: {tmp_path / 'theirs'} has no tokenizer.json",
    ]
    assert report.comparison.passed
    assert "transformers" in report.comparison.against
    assert open_source(tmp_path / "run").format == "umup"


def test_shards_pickles_and_bare_names_are_read_alike(tmp_path):
    model = saved("llama", tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = dict(open_source(tmp_path / "single").weights())
    bare = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    for name, content in (("pickled", model.state_dict()), ("bare", bare)):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "single" / "config.json", tmp_path / name)
        torch.save(content, tmp_path / name / "pytorch_model.bin")
    for name in ("sharded", "pickled", "bare"):
        found = dict(open_source(tmp_path / name).weights())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_buffers_of_old_files_and_a_tied_copy_are_left_out(tmp_path):
    model = saved("gpt2", tmp_path)
    old = {
        **model.state_dict(),
        "transformer.h.0.attn.bias": torch.ones(1),
        "transformer.h.1.attn.masked_bias": torch.ones(1),
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert "head.weight" not in dict(open_source(tmp_path).weights())
    torch.save({**old, "lm_head.weight": old["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="write tie_word_embeddings: false"):
        open_source(tmp_path)


def test_weights_in_bf16_keep_their_bits(tmp_path):
    twin("llama").bfloat16().save_pretrained(tmp_path / "theirs")
    report = export(open_source(tmp_path / "theirs"), tmp_path / "again", Request("hf"))
    assert (report.dtype, report.comparison.passed) == ("bf16", True)
    assert report.comparison.error < 1e-5  # nothing was rounded
    back = dict(stored_tensors(tmp_path / "again"))
    assert all(torch.equal(back[name], t) for name, t in stored_tensors(tmp_path / "theirs").items())


def test_an_import_is_read_one_tensor_at_a_time(tmp_path):
    """What is alive while the weights go by is one tensor of ours, and the memory map that it is a view of."""
    saved("llama", tmp_path, max_shard_size="40KB")
    alive = []
    for _, tensor in open_source(tmp_path).weights():
        alive.append(weakref.ref(tensor))
        del tensor
        assert sum(ref() is not None for ref in alive) <= 1
    assert len(alive) == 21


def test_weights_that_are_not_finite_are_told_in_every_dtype(tmp_path):
    source = open_source((saved("llama", tmp_path), tmp_path)[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        spoilt = {name: t.to(dtype) for name, t in source.weights()}
        spoilt["norm.weight"] = torch.full((WIDTH,), float("nan")).to(dtype)
        said = []
        assert len(list(watched(replace(source, weights=lambda s=spoilt: iter(s.items())), said.append))) == len(spoilt)
        assert said == [f"{tmp_path}: norm.weight holds {WIDTH} values that are NaN or infinite"]
