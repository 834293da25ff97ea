"""What is exported computes what was trained, by transformers' own classes; what a format cannot say is named."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from umup.checkpoint import TensorFiles
from umup.config.load import parse_config
from umup.data.tokenizer import ByteTokenizer
from umup.errors import CheckpointError, ConfigError
from umup.interop import compare as compare_module
from umup.interop import hf_write
from umup.interop.compare import our_logits, prompts, watch_squares
from umup.interop.export import Request, export, targets
from umup.interop.fold import fold, kept
from umup.interop.hf_config import native, plain
from umup.interop.hf_write import Folded, target_of
from umup.interop.source import Source, open_source
from umup.models.families import FAMILIES
from umup.models.specs import decoder_specs, plan_for, shape_of
from umup.rules.roles import Role
from umup.rules.schemes import SCHEMES

transformers = pytest.importorskip("transformers")

# Every multiplier off 1.
HPARAMS = {
    "umup": {
        "alpha_ffn_act": 1.7,
        "alpha_attn_softmax": 2.0,
        "alpha_res": 1.5,
        "alpha_res_attn_ratio": 0.6,
        "alpha_loss_softmax": 1.3,
    },
    "mup": {"alpha_emb": 3.0, "alpha_attn": 1.5, "alpha_out": 2.0},
    "completep": {"alpha_emb": 3.0, "alpha_attn": 1.5, "alpha_out": 2.0},
}
VOCAB, LENGTH = 256, 40
DECODERS = [family for family in FAMILIES if native(family)]


def trained(path, family="llama", scheme="umup", hparams=None, precision=None, **model):
    """A source whose weights, gains and biases are all random, of the plan's sizes or more."""
    table = SCHEMES[scheme]
    sizes = {"hidden_size": 64, "num_layers": 3, "head_dim": 16, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    base = {"hidden_size": 32, "head_dim": 8, "num_layers": 2, "num_kv_heads": model.get("num_kv_heads")}
    config = parse_config(
        {
            "model": {"family": family, **sizes, "norm_placement": table.norm_placements[0], **model},
            "parametrization": {
                "scheme": scheme,
                "hparams": HPARAMS.get(scheme, {}) if hparams is None else hparams,
                "base": base if table.needs_base else None,
            },
            "precision": precision or {},
        }
    )
    plan = plan_for(config)
    torch.manual_seed(0)
    weights = {}
    for spec in decoder_specs(shape_of(config.model)):
        if spec.tied_to is None:
            p = plan.params[spec.name]
            vector = spec.role in (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
            weights[spec.name] = torch.randn(spec.shape) * (0.3 if vector else p["init_std"]) + p["init_mean"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "data.json").write_text('{"tokenizer": {"name": "bytes"}}')
    return Source("umup", path, config, plan, lambda: iter(weights.items()), None)


def body_of(path):
    return json.loads((path / "config.json").read_text())


OTHER_SCHEMES = [("llama", "sp"), ("gptj", "unit"), ("bloom", "completep"), ("falcon", "ntp"), ("gpt2", "spectral")]


@pytest.mark.parametrize(("family", "scheme"), [*product(DECODERS, ["mup", "umup"]), *OTHER_SCHEMES])
def test_every_family_becomes_its_own_class_under_every_scheme(family, scheme, tmp_path):
    report = export(trained(tmp_path / "run", family, scheme), tmp_path / "out", Request("hf"))
    assert report.comparison.against.startswith("transformers")
    assert report.comparison.error < 5e-6
    assert report.comparison.passed


LLAMAS = {
    "gainless": {"norm_gain": False},
    "grouped": {"num_kv_heads": 2},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_embeddings": True},
    "interleaved": {"rotary_interleaved": True, "num_kv_heads": 2, "attention_bias": True},
    "geglu": {"activation": "gated_gelu"},
    "geglu tanh": {"activation": "gated_gelu_tanh"},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize(("form", "target"), list(product(LLAMAS, ["hf-llama", "hf-granite"])))
def test_every_form_of_llama_becomes_llama_and_granite(form, target, tmp_path):
    report = export(trained(tmp_path / "run", "llama", **LLAMAS[form]), tmp_path / "out", Request(target))
    assert report.comparison.error < 5e-6
    assert report.format == {"hf-llama": "LlamaForCausalLM", "hf-granite": "GraniteForCausalLM"}[target]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gptj"])
def test_what_dropout_leaves_of_itself_is_folded_too(family, tmp_path):
    report = export(trained(tmp_path / "run", family, dropout=0.2), tmp_path / "out", Request("hf"))
    assert report.comparison.error < 5e-6


def test_a_norm_after_the_embedding_gets_its_own_epsilon_by_the_table_s_scale(tmp_path):
    """The table is all that it sees, so that this norm is exact: epsilon 1.5 times as large, squares too."""
    source = trained(tmp_path / "run", "bloom", hparams={})
    shape = shape_of(source.config.model)
    assert fold(source.plan, shape, plain(shape)).factors["embed.weight"] == pytest.approx(1.5**0.5)


def test_a_tied_head_is_kept_by_granite_and_untied_by_llama_where_its_uses_differ(tmp_path):
    source = trained(tmp_path / "run", tie_embeddings=True)
    for target, tied in (("hf-llama", False), ("hf-granite", True)):
        export(source, tmp_path / target, Request(target))
        assert body_of(tmp_path / target)["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in TensorFiles((tmp_path / target).glob("*.safetensors"))) is not tied
    export(trained(tmp_path / "sp", scheme="sp", tie_embeddings=True), tmp_path / "plain", Request("hf-llama"))
    assert body_of(tmp_path / "plain")["tie_word_embeddings"] is True


def test_granite_holds_the_plan_s_numbers(tmp_path):
    source = trained(tmp_path / "run", scheme="mup")
    export(source, tmp_path / "out", Request("hf-granite"))
    body, plan = body_of(tmp_path / "out"), source.plan
    assert body["embedding_multiplier"] == 3.0
    assert body["attention_multiplier"] == pytest.approx(1.5 * 8**0.5 / 16)
    assert body["residual_multiplier"] == 1.0
    assert body["logits_scaling"] == pytest.approx(1 / (2.0 * 32 / 64))
    back = open_source(tmp_path / "out")
    assert back.plan.ops["layers.1.attn.sdpa"]["logits"] == plan.ops["layers.1.attn.sdpa"]["logits"]
    assert back.plan.params["embed.weight"]["multiplier"] == 3.0


def test_granite_s_one_residual_multiplier_serves_umup_s_default_weights(tmp_path):
    """Rescaled by the skips, all branches of u-muP weigh 1/sqrt(L) unless attention's share is another."""
    equal = trained(tmp_path / "a", hparams={})
    assert kept(equal.plan, shape_of(equal.config.model))["residual"] == pytest.approx(3**-0.5)
    other = trained(tmp_path / "b", hparams={"alpha_res_attn_ratio": 0.5})
    assert kept(other.plan, shape_of(other.config.model))["residual"] == 1.0


def test_gains_that_are_not_there_become_ones_and_biases_zeros(tmp_path):
    export(trained(tmp_path / "a", scheme="mup", norm_gain=False), tmp_path / "llama", Request("hf"))
    assert (TensorFiles([tmp_path / "llama" / "model.safetensors"])["model.layers.1.input_layernorm.weight"] == 1).all()
    source = trained(tmp_path / "b", "gpt2", attention_bias=False, mlp_bias=False, norm_bias=False)
    assert export(source, tmp_path / "gpt2", Request("hf")).comparison.passed
    stored = TensorFiles([tmp_path / "gpt2" / "model.safetensors"])
    assert not any(stored[name].any() for name in stored if name.endswith(".bias"))


@pytest.fixture
def umup(tmp_path):
    return trained(tmp_path / "run", hparams={}, norm_gain=False)


def test_one_epsilon_serves_all_norms_in_the_middle_of_what_they_want(umup):
    shape = shape_of(umup.config.model)
    found = fold(umup.plan, shape, plain(shape))
    assert found.norm_eps == pytest.approx(1.5e-5)
    assert found.epsilons["layers.0.attn.norm"] == pytest.approx(1.5e-5)
    assert found.epsilons["norm"] == pytest.approx(0.5e-5)
    assert found.epsilon_error == pytest.approx(0.25e-5)
    exact = fold(plan_for(trained(umup.path, scheme="mup").config), shape, plain(shape))
    assert (exact.norm_eps, exact.epsilon_error) == (1e-5, 0.0)


def test_gains_take_back_what_epsilon_costs_all_tokens(umup, tmp_path, monkeypatch):
    corrected = export(umup, tmp_path / "corrected", Request("hf-llama")).comparison.error
    monkeypatch.setattr(hf_write.Target, "corrected", lambda target, squares: target)
    plain_error = export(umup, tmp_path / "plain", Request("hf-llama")).comparison.error
    assert corrected < plain_error / 2
    assert plain_error < 1e-5


def test_an_epsilon_that_no_one_number_serves_is_refused_unless_weights_are_coarser(tmp_path):
    source = trained(tmp_path / "run", norm_eps=1e-3, hparams={})
    with pytest.raises(ConfigError, match=r"norm_eps 0.001 .* one epsilon for all norms.*write a coarser --dtype"):
        export(source, tmp_path / "out", Request("hf-llama"))
    assert not (tmp_path / "out").exists()
    assert export(source, tmp_path / "out", Request("hf-llama", dtype="bf16")).comparison.passed


REFUSED = {
    "norm": ("hf-llama", {"family": "gpt2"}, "model.norm: layer"),
    "positions": ("hf-llama", {"positions": "learned"}, "model.positions: learned"),
    "placement": ("hf-llama", {"norm_placement": "post"}, "model.norm_placement: post"),
    "parallel": ("hf-llama", {"parallel": "two_norms"}, "model.parallel: two_norms"),
    "embedding norm": ("hf-granite", {"embedding_norm": True}, "model.embedding_norm: True"),
    "partial rotary": ("hf-llama", {"rotary_dim": 8}, "model.rotary_dim: 8"),
    "ungated": ("hf-llama", {"activation": "relu"}, "model.activation: relu"),
    "head bias": ("hf-llama", {"head_bias": True}, "model.head_bias: True"),
    "grouped heads": ("hf-gpt2", {"family": "gpt2", "num_kv_heads": 2}, "model.num_kv_heads: 2"),
    "gated": ("hf-gpt2", {"family": "gpt2", "activation": "gated_silu"}, "model.activation: gated_silu"),
    "inner width": ("hf-bloom", {"family": "bloom", "intermediate_size": 128}, "model.intermediate_size: 128"),
    "activation": ("hf-mpt", {"family": "mpt", "activation": "gelu_tanh"}, "model.activation: gelu_tanh"),
    "theta": ("hf-gptj", {"family": "gptj", "rope_theta": 5e5}, "model.rope_theta: 500000.0"),
    "bias": ("hf-mpt", {"family": "mpt", "mlp_bias": True}, "model.mlp_bias: True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_express_is_named_and_nothing_is_written(case, tmp_path):
    target, model, named = REFUSED[case]
    with pytest.raises(ConfigError, match=f"--to {target}: .* cannot express {named}"):
        export(trained(tmp_path / "run", scheme="sp", **model), tmp_path / "out", Request(target))
    assert not (tmp_path / "out").exists()


def test_output_norms_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.norm_placement: res_post"):
        export(trained(tmp_path / "run", scheme="mus"), tmp_path / "out", Request("hf"))


@pytest.mark.parametrize(("dtype", "worst"), [("bf16", 5e-2), ("fp16", 5e-3)])
def test_coarser_weights_are_compared_by_a_coarser_measure(dtype, worst, tmp_path):
    report = export(trained(tmp_path / "run"), tmp_path / "out", Request("hf", dtype=dtype))
    assert 1e-4 < report.comparison.error < worst
    assert report.comparison.passed
    stored = TensorFiles([tmp_path / "out" / "model.safetensors"])
    assert {t.dtype for t in stored.values()} == {getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])}


def test_large_weights_are_sharded(tmp_path):
    source = trained(tmp_path / "run")
    whole = export(source, tmp_path / "whole", Request("hf"))
    parts = export(source, tmp_path / "parts", Request("hf", shard_bytes=150_000))
    assert (whole.files, len(parts.files)) == (("model.safetensors",), 6)
    assert parts.files[0] == "model-00001-of-00006.safetensors"
    assert parts.comparison.error == whole.comparison.error
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    one = TensorFiles([tmp_path / "whole" / "model.safetensors"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert index["weight_map"].keys() == set(one)
    sizes = [(tmp_path / "parts" / f).stat().st_size for f in parts.files]
    assert max(sizes) < 150_000 + 2_000


def test_a_wrong_factor_fails_the_comparison_and_deletes_nothing(tmp_path, monkeypatch):
    def wrong(*arguments):
        found = fold(*arguments)
        return replace(found, factors={**found.factors, "layers.1.attn.q.weight": 1.0})

    monkeypatch.setattr(hf_write, "fold", wrong)
    report = export(trained(tmp_path / "run"), tmp_path / "out", Request("hf"))
    assert not report.comparison.passed
    assert "NOT within 1e-05" in report.comparison.text()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "NOT within" in (tmp_path / "out" / "README.md").read_text()


def test_without_transformers_the_written_files_are_read_by_umup(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "find_spec", lambda name: None)
    report = export(trained(tmp_path / "run"), tmp_path / "out", Request("hf"))
    assert report.comparison.against == "umup's own reading of it"
    assert report.comparison.passed


def test_the_byte_tokenizer_is_written_with_the_same_ids(tmp_path):
    export(trained(tmp_path / "run"), tmp_path / "out", Request("hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return 'Ā é \u20ac \U0001f600'  # <|endoftext|>\t\x7f"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == body_of(tmp_path / "out")["eos_token_id"] == 0


def test_a_directory_s_own_tokenizer_and_special_tokens_go_with_it(tmp_path):
    export(trained(tmp_path / "run"), tmp_path / "first", Request("hf"))
    (tmp_path / "first" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "mine": 1}'
    )
    body = {**body_of(tmp_path / "first"), "bos_token_id": 7, "eos_token_id": [0, 9]}
    (tmp_path / "first" / "config.json").write_text(json.dumps(body))
    export(open_source(tmp_path / "first"), tmp_path / "second", Request("hf-llama"))
    second = tmp_path / "second"
    assert json.loads((second / "tokenizer_config.json").read_text())["mine"] == 1
    assert (second / "tokenizer.json").read_bytes() == (tmp_path / "first" / "tokenizer.json").read_bytes()
    assert (body_of(second)["bos_token_id"], body_of(second)["eos_token_id"]) == (7, [0, 9])


def test_the_card_says_what_it_is_and_how_it_compares(tmp_path):
    report = export(trained(tmp_path / "run"), tmp_path / "out", Request("hf"))
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("LlamaForCausalLM", "`umup`", "alpha_res 1.5", "depth_count L", report.comparison.text()):
        assert text in card


def test_nan_weights_are_told_and_written(tmp_path):
    source, said = trained(tmp_path / "run"), []
    dict(source.weights())["layers.1.mlp.up.weight"][0, :3] = float("nan")
    report = export(source, tmp_path / "out", Request("hf"), said.append)
    assert any("layers.1.mlp.up.weight holds 3 values that are NaN" in line for line in said)
    assert not report.comparison.passed


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path):
    source = trained(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(source, tmp_path / "out", Request("hf"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_targets_and_their_errors(tmp_path):
    assert targets()[:4] == ["umup", "hf", "hf-llama", "hf-granite"]
    source = trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="--to: unknown format 'hf-lama'; did you mean 'hf-llama'"):
        export(source, tmp_path / "out", Request("hf-lama"))
    with pytest.raises(ConfigError, match="--fp8: hf-gpt2 has no FP8 layout; write --to hf-llama or hf-granite"):
        export(source, tmp_path / "out", Request("hf-gpt2", fp8=True))
    with pytest.raises(ConfigError, match="a run keeps its master weights"):
        export(source, tmp_path / "out", Request("umup", fp8=True))


def test_weights_are_folded_one_at_a_time(umup):
    """Nothing but the source's own tensors is held: each folded one is made when it is asked for."""
    target = target_of(umup, "llama", 1e-5)
    weights = dict(umup.weights())
    folded = Folded(target, weights)
    assert folded["layers.0.attn.k.weight"] is not folded["layers.0.attn.k.weight"]
    assert len(folded) == len(list(decoder_specs(target.shape)))


def test_squares_are_those_of_the_stream(umup):
    """u-muP's stream has an RMS near 1 at the start, at every norm."""
    shape, squares = shape_of(umup.config.model), {}
    norms = fold(umup.plan, shape, plain(shape)).epsilons

    def prepare(model):
        watch_squares(model, norms, squares)

    our_logits(shape, umup.plan, umup.weights(), prompts(shape), prepare)
    assert squares.keys() == norms.keys()
    for seen in squares.values():
        assert 0.3 < sum(seen) / len(seen) < 3
