"""FP8 exports: the layout of compressed-tensors, scales that are a run's own, and logits that stay near."""

import json

import pytest
import torch
import torch.nn.functional as F

from umup.checkpoint import RunState, TensorFiles, save_checkpoint
from umup.config.load import dump_yaml, parse_config
from umup.errors import CheckpointError, ConfigError
from umup.interop.compare import our_logits, prompts
from umup.interop.export import Request, export
from umup.interop.source import open_source
from umup.models.build import build
from umup.models.specs import plan_for, shape_of
from umup.train.precision import ScaleKeeper

E4M3_MAX = 448.0


def run(path, recipe="fp8", scales="adapt", exponents=None, **model):
    """A run directory that has a checkpoint, with the given exponents of inputs."""
    sizes = {"hidden_size": 64, "num_layers": 2, "head_dim": 16, "intermediate_size": 96, "max_seq_len": 32}
    config = parse_config(
        {
            "model": {**sizes, **model},
            "precision": {"recipe": recipe, "backend": "emulate", "scales": scales},
        }
    )
    built = build(config)
    keeper = ScaleKeeper(built, "static", 100)
    for p in keeper.products:
        for name in p.names:
            moved, spared = (exponents or {}).get(name, (None, False))
            if moved is not None:
                p.matmul.set_exponents(torch.tensor([moved, 0, 0]))
            p.matmul.spared = spared
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(config))
    (path / "plan.json").write_text(plan_for(config).to_json())
    (path / "data.json").write_text('{"tokenizer": {"name": "bytes"}}')
    weights = {name: p.detach() for name, p in built.named_parameters()}
    save_checkpoint(path, RunState(3, {}, weights, {}, {"cpu": torch.get_rng_state()}, keeper.state()), keep=1)
    return path


def exported(source, out, **request):
    said = []
    report = export(open_source(source), out, Request("hf-llama", fp8=True, **request), said.append)
    body = json.loads((out / "config.json").read_text())
    return report, body, TensorFiles([out / "model.safetensors"]), said


def test_the_layout_is_that_of_compressed_tensors(tmp_path):
    report, body, stored, _ = exported(run(tmp_path / "run"), tmp_path / "out")
    quantized = body["quantization_config"]
    assert (quantized["quant_method"], quantized["format"]) == ("compressed-tensors", "float-quantized")
    assert quantized["ignore"] == ["lm_head"]
    (group,) = quantized["config_groups"].values()
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert group["weights"] == group["input_activations"] == wanted
    for i in range(2):
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{i}.{module}"
            assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
            for scale in ("weight_scale", "input_scale"):
                value = stored[f"{name}.{scale}"]
                assert value.shape == (1,)
                assert value.bfloat16().float() == value == 2.0 ** round(float(value.log2()))
    assert stored["lm_head.weight"].dtype == stored["model.norm.weight"].dtype == torch.bfloat16
    assert report.dtype == "fp8"
    assert report.comparison.passed


def test_products_that_vllm_joins_have_one_scale(tmp_path):
    _, _, stored, _ = exported(run(tmp_path / "run"), tmp_path / "out")
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for scale in ("weight_scale", "input_scale"):
            assert len({float(stored[f"model.layers.1.{m}.{scale}"]) for m in group}) == 1
    assert max(float(stored[f"model.layers.1.{m}.weight"].float().abs().max()) for m in group) > E4M3_MAX / 2


def test_scales_of_inputs_are_the_run_s_own_and_spared_products_stay(tmp_path):
    exponents = {f"layers.{i}.mlp.down": (-5 + i, False) for i in range(2)} | {"layers.1.attn.out": (None, True)}
    _, body, stored, said = exported(run(tmp_path / "run", exponents=exponents), tmp_path / "out")
    assert "input scales: those of the run's last checkpoint" in said
    assert [float(stored[f"model.layers.{i}.mlp.down_proj.input_scale"]) for i in range(2)] == [2.0**5, 2.0**4]
    assert float(stored["model.layers.0.self_attn.q_proj.input_scale"]) == 1.0
    assert set(body["quantization_config"]["ignore"]) == {"model.layers.1.self_attn.o_proj", "lm_head"}
    assert "model.layers.1.self_attn.o_proj.input_scale" not in stored
    assert stored["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_other_weights_get_measured_scales(tmp_path):
    for recipe, scales in (("bf16", "adapt"), ("fp8", "dynamic")):
        folder = run(tmp_path / recipe, recipe, scales)
        _, _, stored, said = exported(folder, tmp_path / f"{recipe}-out")
        assert "input scales: measured on 8 random prompts" in said
        assert 2.0**-6 <= float(stored["model.layers.0.mlp.down_proj.input_scale"]) <= 2.0**6


def test_a_recipe_s_spared_products_stay(tmp_path):
    _, body, _, _ = exported(run(tmp_path / "run", "fp8_partial"), tmp_path / "out")
    parts = ("self_attn.o_proj", "mlp.down_proj")
    spared = {f"model.layers.{i}.{part}" for part in parts for i in range(2)}
    assert set(body["quantization_config"]["ignore"]) == spared | {"lm_head"}


def dequantised_llama(stored, body, tokens):
    """A Llama of plain torch on the file: inputs and weights of its products decoded from FP8 by the scales."""

    def product(x, name):
        scale, weight = (stored[f"{name}.{part}"].float() for part in ("input_scale", "weight"))
        x8 = (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
        return x8 @ (weight * stored[f"{name}.weight_scale"]).T

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], stored[f"{name}.weight"].float(), body["rms_norm_eps"])

    n, d = body["num_attention_heads"], body["hidden_size"] // body["num_attention_heads"]
    angles = torch.arange(tokens.shape[1])[:, None] * body["rope_theta"] ** (-torch.arange(0, d, 2) / d)

    def rotated(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    x = stored["model.embed_tokens.weight"].float()[tokens]
    for i in range(body["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (product(h, f"{at}.self_attn.{p}_proj").unflatten(-1, (n, d)).transpose(1, 2) for p in "qkv")
        h = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + product(h.transpose(1, 2).flatten(-2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        x = x + product(
            F.silu(product(h, f"{at}.mlp.gate_proj")) * product(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj"
        )
    return norm(x, "model.norm") @ stored["lm_head.weight"].float().T


def test_decoded_by_plain_torch_the_logits_are_those_that_the_export_compared(tmp_path):
    """Against the run's own FP8 model, too: both are FP8's rounding away from float32."""
    folder = run(tmp_path / "run")
    report, body, stored, _ = exported(folder, tmp_path / "out", dtype="fp32")
    source = open_source(folder)
    shape = shape_of(source.config.model)
    tokens = prompts(shape)
    expected = our_logits(shape, source.plan, source.weights(), tokens)
    found = dequantised_llama(stored, body, tokens)
    error = float((found - expected).norm() / expected.norm())
    assert 0.01 < error < 0.15
    assert error == pytest.approx(report.comparison.error, rel=0.05)
    trained = build(source.config)
    trained.load_state_dict(dict(source.weights()))
    with torch.no_grad():
        own = trained(tokens).float() * trained.loss_multiplier
    assert float((found - own).norm() / own.norm()) < 0.15


def test_an_fp8_directory_is_read_with_decoded_weights(tmp_path):
    folder = run(tmp_path / "run")
    exported(folder, tmp_path / "out", dtype="fp32")
    back, source = open_source(tmp_path / "out"), open_source(folder)
    shape = shape_of(source.config.model)
    logits = [our_logits(shape_of(s.config.model), s.plan, s.weights(), prompts(shape)) for s in (source, back)]
    assert 0.01 < float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1
    assert export(back, tmp_path / "again", Request("hf-llama")).comparison.passed


def test_imported_weights_can_be_encoded(tmp_path):
    export(open_source(run(tmp_path / "run", "bf16")), tmp_path / "llama", Request("hf-llama"))
    report, _, _, said = exported(tmp_path / "llama", tmp_path / "out")
    assert "input scales: measured on 8 random prompts" in said
    assert report.comparison.passed


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        "none of this",
    ],
)
def test_other_quantizations_are_refused(other, tmp_path):
    exported(run(tmp_path / "run"), tmp_path / "out")
    body = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**body, "quantization_config": other}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_source(tmp_path / "out")


def test_sides_that_fp8_kernels_do_not_take_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiples of 16"):
        exported(run(tmp_path / "run", "bf16", intermediate_size=100), tmp_path / "out")


def test_transformers_reads_it_with_compressed_tensors(tmp_path):
    """Of which no extra is: installed somewhere else, this test says whether the layout still holds."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    report, *_ = exported(run(tmp_path / "run"), tmp_path / "out", dtype="fp32")
    assert report.comparison.against.startswith("transformers")
    assert 0.01 < report.comparison.error < 0.15
