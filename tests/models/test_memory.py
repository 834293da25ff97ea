"""The memory report against what one real step allocates."""

import subprocess
import sys

import pytest
import torch

from umup.config.load import parse_config
from umup.errors import ConfigError
from umup.models.build import build
from umup.models.memory import GIB, memory_table, memory_text
from umup.models.specs import plan_for
from umup.nn.fp8 import StaticMatmul
from umup.optim.adamw import make_optimizer
from umup.optim.groups import param_groups

DTYPES = ["fp32", "bf16"]


def config_of(family="llama", precision=None, **optimizer):
    return parse_config(
        {
            "model": {
                "family": family,
                "hidden_size": 64,
                "num_layers": 2,
                "head_dim": 32,
                "intermediate_size": 160,
                "vocab_size": 512,
                "max_seq_len": 32,
            },
            "optimizer": optimizer,
            "precision": precision or {"recipe": "bf16"},
        }
    )


def allocated(config):
    """Bytes by component after one step."""
    plan, model = plan_for(config), build(config)
    groups = param_groups(plan, model.named_parameters(), lr=0.1, weight_decay=0.0, eps=1e-8)
    optimizer = make_optimizer(config.optimizer, groups)
    tokens = torch.randint(512, (2, 2, 32))
    model.loss(*tokens).backward()
    optimizer.step()
    found = {"parameters": list(model.parameters()), "gradients": [p.grad for p in model.parameters()]}
    for entry in ("exp_avg", "exp_avg_sq"):
        found[entry] = [optimizer.state[p][entry] for p in model.parameters()]
    encoded = [m for m in model.modules() if isinstance(m, StaticMatmul)]
    found["weights of products"] = [t for m in encoded for t in (m.row, m.column)]
    sizes = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in found.items()}
    return {name: size for name, size in sizes.items() if size}


def reported(config):
    sizes = {}
    for row in memory_table(config):
        sizes[row.component] = sizes.get(row.component, 0) + row.bytes
    return sizes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("master_dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_the_report_is_what_a_step_allocates(family, master_dtype, state_dtype):
    config = config_of(family, master_dtype=master_dtype, state_dtype=state_dtype)
    assert reported(config) == allocated(config)


@pytest.mark.parametrize("recipe", ["fp8", "fp8_partial", "fp8_head", "simulate:E4M3", "simulate:E3M2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_encoded_weights_are_counted_as_they_are_held(family, recipe):
    config = config_of(family, {"recipe": recipe, "backend": "emulate"})
    assert reported(config) == allocated(config)


def test_overrides_count_and_formats_stand_apart():
    config = config_of(
        precision={"recipe": "fp8", "overrides": {"*.mlp.*": "bf16", "head": "fp8", "*.q": "simulate:E5M2"}}
    )
    copies = {r.dtype: r.elements for r in memory_table(config) if r.component == "weights of products"}
    square = 64 * 64
    assert copies == {"E4M3": 2 * (2 * 3 * square + 512 * 64), "fp32": 2 * 2 * square}  # what is simulated


def test_bytes_per_parameter_are_the_known_layouts():
    """16 in float32, 12 with bfloat16 moments, 8 with both; a tied embedding counts once."""
    for fields, total in [
        ({}, 16),
        ({"state_dtype": "bf16"}, 12),
        ({"state_dtype": "bf16", "master_dtype": "bf16"}, 8),
    ]:
        for family in ("llama", "gpt2"):
            rows = memory_table(config_of(family, **fields))
            assert sum(r.bytes_per_parameter for r in rows) == total
    # Nearly every weight of a deep model is a hidden product's.
    rows = memory_table(
        parse_config({"model": {"hidden_size": 4096, "num_layers": 32}, "precision": {"recipe": "fp8"}})
    )
    assert 17.9 < sum(r.bytes_per_parameter for r in rows) < 18.0


def test_the_text_shows_every_row_and_the_total():
    config = config_of(precision={"recipe": "fp8_head"}, state_dtype="bf16")
    text = memory_text(config)
    rows = memory_table(config)
    for row in rows:
        assert any(line.startswith(row.component) and row.dtype in line for line in text.splitlines())
    name, per_parameter, gib = text.splitlines()[-1].split()
    assert name == "total"
    assert float(per_parameter) == pytest.approx(sum(r.bytes_per_parameter for r in rows), abs=0.005)
    assert float(gib) == pytest.approx(sum(r.bytes for r in rows) / GIB, rel=1e-3)


def test_an_optimizer_without_a_table_is_told_those_that_have_one():
    with pytest.raises(ConfigError, match="the memory of 'lion' is not known here; known: adamw, adam, nadam"):
        memory_table(config_of(name="lion"))


def test_it_needs_no_torch():
    code = "import umup.models.memory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
