"""nanoGPT-mup's and llm.c's configs: the plans have the numbers of those repositories' code.

The rules are written down here as read in model.py of EleutherAI/nanoGPT-mup (branch master: `_init_weights`, the loop
over `c_attn`, `c_fc`, `c_proj`, `forward`, `configure_optimizers`; branch completep at 3904404, where they differ) and
in train_gpt2.cu of llm.c's pull request 650 (a9b272c: `gpt2_build_from_random`, `gpt2_forward`, `gpt2_update`).
"""

from math import sqrt

import pytest

from umup.errors import ConfigError
from umup.interop.formats import read_source
from umup.interop.nanogpt import llmc_run, nanogpt_run, parse_assignments, parse_command
from umup.models.specs import plan_for

CONFIG = """\
# finetuned from nobody
import time
out_dir = 'out-mup'
wandb_run_name = 'mup-' + str(time.time())
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 128
n_layer = 6
n_head = 8
n_embd = 512
bias = False
init_std = 0.05
learning_rate = 6e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 6e-4
warmup_iters = 100
mup_enabled = True
mup_width_multiplier = 4.0
mup_input_alpha = 10.0
mup_output_alpha = 2.0
"""
DEPTH = "depth_alpha_enabled = True\ndepth_multiplier = 3.0\ndepth_alpha_exp = {}\n"
M, LAYERS, HEAD = 4.0, 6, 64


def run_of(text):
    return nanogpt_run(parse_assignments(text))[0]


def numbers(plan, layer=0):
    """What the tests compare, by the repository's names."""
    names = {
        "wte": "embed",
        "c_attn": f"layers.{layer}.attn.q",
        "attn.c_proj": f"layers.{layer}.attn.out",
        "c_fc": f"layers.{layer}.mlp.up",
        "mlp.c_proj": f"layers.{layer}.mlp.down",
        "ln_1": f"layers.{layer}.attn.norm",
        "ln_f": "norm",
    }
    return {
        theirs: {q: plan.params[f"{ours}.weight"][q] for q in ("init_std", "lr", "weight_decay", "eps")}
        for theirs, ours in names.items()
    }


def assert_numbers(plan, expected):
    for name, values in numbers(plan).items():
        std, lr, decay, eps = expected[name]
        assert values == pytest.approx({"init_std": std, "lr": lr, "weight_decay": decay, "eps": eps}, rel=1e-12), name


HIDDEN = ("c_attn", "c_fc", "attn.c_proj", "mlp.c_proj")


def test_the_rules_of_master():
    plan = plan_for(run_of(CONFIG))
    std = 0.05 / sqrt(M)
    out = 0.05 / sqrt(2 * LAYERS * M)
    assert_numbers(
        plan,
        {
            "wte": (0.05, 1, 1, 1),
            **{name: (out if "proj" in name else std, 1 / M, 1, 1) for name in HIDDEN},
            **dict.fromkeys(("ln_1", "ln_f"), (0, 1, 0, 1)),
        },
    )
    assert plan.params["embed.weight"]["multiplier"] == plan.params["positions.weight"]["multiplier"] == 10.0
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(2.0 / M)
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(1 / HEAD)


def test_the_rules_of_the_completep_branch_without_depth():
    """The depth keys tell the branch: c_proj without 1/sqrt(2L), epsilon by 1/m."""
    plan = plan_for(run_of(CONFIG + "depth_alpha_enabled = False\n"))
    std = 0.05 / sqrt(M)
    assert_numbers(
        plan,
        {
            "wte": (0.05, 1, 1, 1 / M),
            **dict.fromkeys(HIDDEN, (std, 1 / M, 1, 1 / M)),
            **dict.fromkeys(("ln_1", "ln_f"), (0, 1, 0, 1 / M)),
        },
    )


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_rules_of_the_completep_branch_with_depth(alpha):
    config = run_of(CONFIG + DEPTH.format(alpha))
    assert config.parametrization.scheme == "completep"
    plan, d = plan_for(config), 3.0
    std, rate, eps = 0.05 / sqrt(M), d ** (alpha - 1), d**-alpha
    assert_numbers(
        plan,
        {
            "wte": (0.05, 1, 1, 1 / M),
            **dict.fromkeys(HIDDEN, (std, rate / M, M, eps / M)),
            "ln_1": (0, rate, 0, eps / M),
            "ln_f": (0, 1, 0, 1 / M),
        },
    )
    assert plan.ops["layers.2.attn.residual"]["branch"] == pytest.approx(d**-alpha)
    assert plan.ops["layers.2.attn.sdpa"]["logits"] == pytest.approx(1 / HEAD)


def test_the_switches_of_the_step_by_step_coordinate_check():
    plan = plan_for(run_of(CONFIG + "mup_disable_attention_scaling = True\nmup_disable_hidden_lr_scaling = True\n"))
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(HEAD**-0.5)
    assert [p["lr"] for p in plan.stored.values()] == pytest.approx([1.0] * len(plan.stored))
    assert plan.params["layers.0.attn.q.weight"]["init_std"] == pytest.approx(0.05 / sqrt(M))


def test_without_muP_it_is_gpt2():
    plan = plan_for(run_of(CONFIG.replace("mup_enabled = True", "mup_enabled = False")))
    assert plan.scheme == "sp"
    assert plan.params["layers.0.mlp.down.weight"]["init_std"] == pytest.approx(0.05 / sqrt(2 * LAYERS))
    assert plan.params["embed.weight"]["multiplier"] == 1.0


def test_a_width_multiplier_of_any_kind():
    plan = plan_for(run_of(CONFIG.replace("mup_width_multiplier = 4.0", "mup_width_multiplier = 3.7")))
    assert plan.params["layers.0.mlp.down.weight"]["lr"] == pytest.approx(1 / 3.7, rel=1e-12)
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(2 / 3.7, rel=1e-12)


def test_the_rest_of_the_config():
    config = run_of(CONFIG)
    m = config.model
    assert (m.family, m.hidden_size, m.num_layers, m.head_dim, m.intermediate_size) == ("gpt3", 512, 6, 64, 2048)
    assert (m.vocab_size, m.max_seq_len, m.attention_bias, m.mlp_bias, m.norm_bias) == (50304, 128, False, False, False)
    o, s, t = config.optimizer, config.schedule, config.train
    assert (o.lr, o.betas, o.weight_decay, o.independent_weight_decay, o.eps) == (6e-3, (0.9, 0.95), 0.1, False, 1e-8)
    assert (s.name, s.warmup_steps, s.final_factor) == ("cosine", 100, pytest.approx(0.1))
    assert (t.steps, t.batch_size, t.grad_accum, t.grad_clip) == (1000, 12, 40, 1.0)
    assert config.data.source == "data/openwebtext/train.bin"
    # train.py's own defaults, for what a config leaves out.
    assert run_of("n_embd = 768").train.steps == 600000
    _, notes = nanogpt_run(parse_assignments("max_iters = 5000\n"))
    assert any("lr_decay_iters 600000" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_embed = 768", "unknown name 'n_embed'; did you mean 'n_embd'?"),
        ("n_embd = 768\nfor i in range(3): pass", "line 2: expected NAME = VALUE"),
        ("n_embd = __import__('os').system('true')", "line 1: n_embd is"),
        ("n_embd = 2 ** 40", "line 1: n_embd is '2 .. 40'; write its value out"),
        ("n_embd, n_head = 1, 2", "line 1: expected NAME = VALUE"),
        ("n_embd = (", "not a file of assignments"),
        ("n_embd = 'wide'", "n_embd: expected a number, found 'wide'"),
        ("n_head = 7", "n_head 7 does not divide n_embd 768"),
        ("dataset = 3", "dataset: expected text"),
        ("dtype = 'float8'", "dtype: unknown 'float8'"),
        ("init_from = 'gpt2-xl'", "init_from 'gpt2-xl'"),
        ("mup_enabled = True\nmup_width_multiplier = 0", "mup_width_multiplier: expected a positive number, found 0"),
        ("depth_alpha_enabled = True", "depth_alpha_enabled without mup_enabled"),
        ("mup_enabled = True\ndepth_alpha_enabled = True\ndepth_alpha_exp = 0.7", "unknown choice '0.7'"),
    ],
)
def test_bad_configs_are_named_and_never_run(text, message):
    with pytest.raises(Exception, match=message) as caught:
        plan_for(run_of(text))
    assert caught.type.__module__ == "umup.errors"
    assert "\n" not in str(caught.value)


# --- llm.c ----------------------------------------------------------------------------------------------------------

COMMAND = r"""
make train_gpt2cu NO_MULTI_GPU=1
./train_gpt2cu \
    -i "dev/data/fineweb10B/fineweb_train_*.bin" \
    -j "dev/data/fineweb10B/fineweb_val_*.bin" \
    -e d12 -b 16 -t 512 -d 524288 -l 0.006 -u 700 -q 0.1 -c 0.1 -x 18865 -y 0 -z 1 \
    -me 1 -mm 3.0 -ma 8.0
"""


def test_the_rules_of_llm_c():
    source = read_source(COMMAND)
    assert source.format == "llm.c"
    config, notes = source.run()
    plan, m = plan_for(config), 3.0
    std, out = 0.02 / sqrt(m), 0.02 / sqrt(2 * 12 * m)
    assert_numbers(
        plan,
        {
            "wte": (0.02, 1, 1, 1),
            # Half of muP's compensation in its optimizer: decay times m, rate by m.
            **{name: (out if "proj" in name else std, 1 / m, m, 1) for name in HIDDEN},
            **dict.fromkeys(("ln_1", "ln_f"), (0, 1, 0, 1)),
        },
    )
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(1 / m)
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(8.0 / 64)
    assert any("at 0" in note for note in notes)
    t, s = config.train, config.schedule
    assert (t.batch_size, t.grad_accum, t.steps) == (16, 64, 18865)
    assert (s.name, s.warmup_steps, s.final_factor) == ("cosine", 700, 0.1)
    assert config.data.source == "dev/data/fineweb10B/fineweb_train_*.bin"


def test_names_of_llm_c_serve_as_well():
    text = """use_mup = 1
mup_width_mult = 2.0
mup_base_attn_mult = 4.0
channels = 256
num_heads = 4
num_layers = 3
max_steps = 9
"""
    source = read_source(text)
    assert source.format == "llm.c names"
    plan = plan_for(source.run()[0])
    assert plan.params["layers.0.attn.q.weight"]["lr"] == 0.5
    assert plan.ops["layers.0.attn.sdpa"]["logits"] == pytest.approx(4 / 64)


def test_llm_c_without_muP():
    plan = plan_for(llmc_run({"load_filename": "d12", "max_steps": 5})[0])
    assert plan.scheme == "sp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./train_gpt2cu -e d12 -mz 1", "unknown flag '-mz'"),
        ("./train_gpt2cu -e d12 -me $me", "a shell variable; write its value"),
        ("./train_gpt2cu -e d13 -x 1", "expected a size of llm.c"),
        ("./train_gpt2cu -e d12 -x 1 -me 1 -mm 0", "mup_width_mult: expected a positive number"),
        ("./train_gpt2cu -e d12 -x 1 -d 1000", "total_batch_size 1000 is no multiple"),
        ("./train_gpt2cu -e 'd12", "cannot be read"),
    ],
)
def test_bad_commands_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        llmc_run(parse_command(text))


def test_text_that_is_neither():
    with pytest.raises(ConfigError, match="the format is not recognised"):
        read_source("x = 1")
