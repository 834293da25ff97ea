"""The benchmark's arithmetic, its twin of the decoder, and its processes on a CPU."""

import json

import pytest
import torch
from torch._functorch import config as functorch

from umup.cli.main import main
from umup.config.load import dump_yaml, parse_config
from umup.errors import ConfigError
from umup.models.specs import plan_for, products_for, shape_of
from umup.study import rooflines
from umup.study.bench import BenchPlan, Worker, bench_text, groups, resident, run_bench
from umup.study.bench_variants import (
    VARIANTS,
    StockDecoder,
    bench_shape,
    config_of,
    named_shape,
    text_batches,
    trainee,
)
from umup.study.bench_worker import compiled, kernel_class
from umup.study.rooflines import Rates, floor_ms, moved_bytes, sites

TINY = named_shape("tiny")
SHAPE = shape_of(TINY.model)
TOKENS = 128


def plan(*variants, **others):
    return BenchPlan(TINY, variants, **{"rounds": 2, "steps": 2, "loss_steps": 16, **others})


def rates(bf16, fp8):
    names = [site.name for site in sites(SHAPE)]
    return Rates(dict.fromkeys(names, (bf16,) * 3), dict.fromkeys(names, (fp8,) * 3), attention=5.0, copy=1e6)


def floor_of(variant, measured):
    config = config_of(VARIANTS[variant], TINY, "cpu")
    return floor_ms(SHAPE, TOKENS, products_for(config, plan_for(config)), measured)


def test_sites_hold_the_decoders_parameters():
    elements = sum(site.count * site.fan_in * site.fan_out for site in sites(SHAPE))
    products = products_for(config_of(VARIANTS["fp8"], TINY, "cpu"), plan_for(TINY)).values()
    assert elements == sum(p.fan_in * p.fan_out for p in products)


def test_the_floor_counts_every_product_in_its_format():
    # Two layers of four joined products, each three times, and one head; two attentions of 5 ms; the bytes.
    rest = 2 * 5.0 + moved_bytes(SHAPE, TOKENS) / 1e6
    measured = rates(10.0, 1.0)
    assert floor_of("bf16_umup", measured) == pytest.approx(3 * (8 * 10.0 + 10.0) + rest)
    assert floor_of("fp8", measured) == pytest.approx(3 * (8 * 1.0 + 10.0) + rest)
    assert floor_of("fp8_head", measured) == pytest.approx(3 * (8 * 1.0 + 1.0) + rest)
    assert floor_of("fp8_partial", measured) == pytest.approx(3 * (4 * 1.0 + 4 * 10.0 + 10.0) + rest)


def test_moved_bytes_of_the_7b_shape_are_those_of_the_formula():
    s = shape_of(named_shape("7b").model)
    assert moved_bytes(s, 1) == 4 * (32 * 4096 + 16 * 4096 + 16 * 11008) + 6 * 32768


def test_groups_each_hold_the_reference_and_every_variant_once():
    names = tuple(VARIANTS)
    made = list(groups(plan(*names), 4))
    assert all(group[0] == "bf16_sp" and len(group) <= 4 for group in made)
    assert sorted(v for group in made for v in group[1:]) == sorted(set(names) - {"bf16_sp"})
    assert list(groups(plan("fp8", "bf16_umup"), 2)) == [("fp8", "bf16_umup")]
    assert list(groups(plan("bf16_sp"), 4)) == [("bf16_sp",)]


def test_resident_is_what_is_asked_for():
    assert resident(plan("bf16_sp", "fp8", resident=3), SHAPE, cuda=False) == 3
    assert resident(plan("bf16_sp", "fp8"), SHAPE, cuda=False) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("triton_poi_fused__scaled_mm__scaled_dot_product_cudnn_attention_3", "other"),
        ("_transpose_kernel", "other"),
        ("_cast_kernel", "other"),
    ],
)
def test_kernels_are_classed_by_name(name, expected):
    assert kernel_class(name) == expected


def test_the_stock_twin_computes_our_sp_decoder():
    ours = trainee(VARIANTS["bf16_sp"], config_of(VARIANTS["bf16_sp"], TINY, "cpu"), "cpu").model.float()
    ours.dtype = torch.float32
    twin = StockDecoder(SHAPE)
    twin.rotate("cpu")
    weights = {
        "embed.weight": ours.embed.weight,
        "head.weight": ours.head.weight,
        **{
            f"layers.{i}.{name}.weight": torch.cat([p.weight for p in parts])
            for i, layer in enumerate(ours.layers)
            for name, parts in (
                ("qkv", (layer.attn.q, layer.attn.k, layer.attn.v)),
                ("out", (layer.attn.out,)),
                ("gate_up", (layer.mlp.gate, layer.mlp.up)),
                ("down", (layer.mlp.down,)),
            )
        },
    }
    twin.load_state_dict(weights)
    batch = text_batches(TINY, 1, "cpu")[0]
    losses = ours.loss(*batch), twin.loss(*batch)
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(twin.layers[1].down.weight.grad, ours.layers[1].mlp.down.weight.grad)


def test_the_twin_starts_at_the_scale_of_ours():
    ours = trainee(VARIANTS["bf16_sp"], config_of(VARIANTS["bf16_sp"], TINY, "cpu"), "cpu").model
    twin = StockDecoder(SHAPE)
    pairs = [
        (twin.embed.weight, ours.embed.weight),
        (twin.head.weight, ours.head.weight),
        (twin.layers[0].out.weight, ours.layers[0].attn.out.weight),
        (twin.layers[0].gate_up.weight, ours.layers[0].mlp.gate.weight),
    ]
    for a, b in pairs:
        assert float(a.detach().std()) == pytest.approx(float(b.detach().float().std()), rel=0.1)


def test_text_is_pairs_of_bytes_shifted_by_one():
    batches = text_batches(TINY, 3, "cpu")
    assert len(batches) == 3
    tokens, targets = batches[1]
    assert tokens.shape == targets.shape == (2, 64)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert int(tokens.max()) < 512
    assert not torch.equal(batches[0][0], tokens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
@functorch.patch(force_non_lazy_backward_lowering=False)  # put back afterwards
def test_compile_waits_once_before_anything_runs():
    runs, seen = torch.zeros(()), []

    def loss(x):
        runs.add_(1)
        return (x * x).sum()

    fast = compiled(loss, lambda: seen.append(runs.item()))
    for n in (4, 8):  # the second shape compiles again
        x = torch.ones(n, requires_grad=True)
        fast(x).backward()
        assert x.grad.tolist() == [2.0] * n
    assert seen == [0.0]
    assert runs.item() == 2.0


def test_shapes_that_the_twin_has_not_are_refused():
    assert bench_shape(parse_config({})).model.norm_gain is False
    with pytest.raises(ConfigError, match="only decoders like llama"):
        bench_shape(parse_config({"model": {"family": "gpt2"}}))


def test_a_worker_that_dies_is_a_row_with_its_last_words():
    with Worker("no_such_variant", plan("bf16_sp"), "cpu", 1) as worker:
        assert worker.answer() == {}
        assert "no_such_variant" in worker.failure
        assert worker.answer("time 1") == {}


@pytest.mark.slow
def test_a_run_on_a_cpu_has_speeds_and_losses_beside_each_other():
    bench = run_bench(plan("bf16_sp", "fp8"))
    sp, fp8 = bench.rows
    assert [sp.variant, fp8.variant] == ["bf16_sp", "fp8"]
    assert sp.ratio == 1.0
    assert fp8.ratio == pytest.approx(sp.forward_backward_ms / fp8.forward_backward_ms)
    assert sp.look_ms is None
    assert fp8.look_percent == pytest.approx(100 * fp8.look_ms / (100 * fp8.step_ms))
    assert f"fp8: a look at the scales takes {fp8.look_ms:.1f} ms" in bench_text(bench)
    for row in bench.rows:
        assert row.failure is None
        assert row.step_ms > row.forward_backward_ms > 0
        assert row.tokens_per_second == pytest.approx(1000 * TOKENS / row.step_ms)
        assert len(row.losses) == 16
        assert row.losses[-1] < row.losses[0]
        assert row.floor_ms is row.peak_gib is row.kernels_per_layer is None


@pytest.mark.slow
def test_the_command_prints_one_json_document(capsys):
    command = ["bench", "--shape", "tiny", "--variants", "fp8", "--rounds", "1", "--steps", "1", "--loss-steps", "2"]
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["variant"] == "fp8"
    assert row["ratio"] is None


def test_advice_without_an_fp8_gpu_is_an_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(parse_config({})))
    assert main(["bench", "--advise", str(path)]) == 0
    assert capsys.readouterr().out == "this machine has no GPU with FP8 products, so FP8 does not pay here\n"


@pytest.mark.parametrize(("fp8", "verdict"), [(1.0, "FP8 pays"), (9.9, "FP8 does not pay")])
def test_advice_follows_from_the_rates(fp8, verdict, monkeypatch):
    monkeypatch.setattr(rooflines, "measure_rates", lambda shape, batch: rates(10.0, fp8))
    advice = rooflines.advise(named_shape("tiny"))
    # Hidden products: x costs 3 bytes and g 5 per feature and token, weights 4 + 2 per element and step.
    d, f = 64, 176
    sides = [(d, 3 * d), (d, d), (d, 2 * f), (f, d)]
    extra = 2 * sum(TOKENS * (3 * i + 5 * o) + 6 * i * o for i, o in sides) / 1e6
    assert advice.bf16_ms == pytest.approx(floor_of("bf16_umup", rates(10.0, fp8)))
    assert advice.fp8_ms == pytest.approx(floor_of("fp8", rates(10.0, fp8)) + extra)
    assert advice.ratio == pytest.approx(advice.bf16_ms / advice.fp8_ms)
    assert advice.verdict.startswith(f"{verdict}: predicted {advice.ratio:.2f}x")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
        (["--resident", "1"], "--resident must be 2 or more"),
        (["--variants", "fp9"], "unknown variant 'fp9'; did you mean 'fp8'"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, complaint, capsys):
    assert main(["bench", "--shape", "tiny", *arguments]) == 2
    assert complaint in capsys.readouterr().err
