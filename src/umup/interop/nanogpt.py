"""nanoGPT, nanoGPT-mup and llm.c configs as umup runs with the numbers that those repositories compute.

nanoGPT's configs are Python files of assignments over train.py's defaults. They are parsed, never run: values are
literals and arithmetic on them. llm.c has command lines (`./train_gpt2cu -e d12 -me 1 -mm 3.0 -ma 8.0 ...`, a shell
script with one in it), or assignments by its names (`use_mup = 1`). Read in EleutherAI/nanoGPT-mup (branch master and
branch completep at 3904404) and in pull request 650 of karpathy/llm.c at a9b272c, m being the width multiplier:

                          nanoGPT-mup, master   branch completep          llm.c
    embeddings            init_std, lr 1        the same                  0.02 (tokens: 0), lr 1
    c_attn, c_fc          init_std/sqrt(m)      the same                  0.02/sqrt(m) (queries: 0)
    c_proj                init_std/sqrt(2L m)   init_std/sqrt(m)          0.02/sqrt(2L m)
    rates of the hidden   1/m                   1/m, times a depth factor 1/m
    decay of the hidden   unchanged             unchanged; with depth, *m *m
    epsilon               one                   1/m, times a depth factor one
    q.k                   1/head_dim            1/head_dim                mup_base_attn_mult/head_dim
    embedding x, logits x mup_input_alpha, mup_output_alpha/m             1, 1/m

The depth keys (`depth_alpha_enabled`, ...) are the branch's alone and tell it from master. Not covered: llm.c's zeros,
which have no place in a plan of one std per role (a note says so); sparse muP, experts, other forks.
"""

import ast
import operator
import re
import shlex
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

from umup.config.load import parse_config, read_yaml
from umup.config.sections import RunConfig
from umup.errors import ConfigError, did_you_mean
from umup.interop.config_keys import Key, nested, read
from umup.interop.mup_numbers import Sizes, Wanted, base_of, parametrization

Assignments = Mapping[str, Any]

# train.py's defaults for what is read here.
NANO_DEFAULTS: Assignments = {
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "dropout": 0.0},
    **{"bias": False, "init_std": 0.02, "batch_size": 12, "gradient_accumulation_steps": 40, "seed": 1337},
    **{"learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0},
    **{"decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "eval_interval": 2000},
    **{"dataset": "openwebtext", "dtype": "bfloat16", "init_from": "scratch"},
    **{"mup_enabled": False, "mup_disable_attention_scaling": False, "mup_disable_hidden_lr_scaling": False},
    **{"mup_width_multiplier": 1.0, "mup_input_alpha": 1.0, "mup_output_alpha": 1.0},
}
# The completep branch's own.
DEPTH_DEFAULTS: Assignments = {"depth_alpha_enabled": False, "depth_multiplier": 1.0, "depth_alpha_exp": 1.0}
NANO_IGNORED = (
    *("out_dir", "log_interval", "eval_iters", "eval_only", "skip_val_loss", "always_save_checkpoint", "compile"),
    *("never_save_checkpoint", "wandb_log", "wandb_project", "wandb_run_name", "csv_log", "backend", "device"),
    "mup_enable_coord_check_logging",
)
NANO_KEYS = (
    Key("n_embd", "model.hidden_size"),
    Key("n_layer", "model.num_layers"),
    Key("block_size", "model.max_seq_len"),
    Key("vocab_size", "model.vocab_size"),
    Key("dropout", "model.dropout"),
    Key("batch_size", "train.batch_size"),
    Key("gradient_accumulation_steps", "train.grad_accum"),
    Key("max_iters", "train.steps"),
    Key("eval_interval", "train.eval_every"),
    Key("eval_interval", "train.checkpoint_every"),
    Key("grad_clip", "train.grad_clip"),
    Key("seed", "train.seed"),
    Key("learning_rate", "optimizer.lr"),
    Key("weight_decay", "optimizer.weight_decay"),
    Key("warmup_iters", "schedule.warmup_steps"),
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

# llm.c's flags -> the names of its variables.
LLMC_FLAGS = {
    **{"me": "use_mup", "mm": "mup_width_mult", "ma": "mup_base_attn_mult", "e": "load_filename", "b": "B", "t": "T"},
    **{"d": "total_batch_size", "l": "learning_rate", "u": "warmup_iterations", "q": "final_learning_rate_frac"},
    **{"c": "weight_decay", "x": "max_steps", "k": "lr_scheduler_type", "i": "train_data_pattern"},
    **{"j": "val_data_pattern", "v": "val_loss_every", "n": "checkpoint_every"},
}
LLMC_IGNORED_FLAGS = (
    *("o", "m", "s", "g", "h", "a", "f", "w", "z", "r", "y", "nk", "nm", "sl", "sg", "ge", "pn", "pr", "pg", "pm"),
    *("pi", "pf", "ps", "pp", "mc", "mw"),
)
LLMC_DEFAULTS: Assignments = {
    **{"use_mup": 0, "mup_width_mult": 1.0, "mup_base_attn_mult": 1.0, "load_filename": "d12", "B": 4, "T": 1024},
    **{"total_batch_size": -1, "learning_rate": 3e-4, "warmup_iterations": 0, "final_learning_rate_frac": 1.0},
    **{
        "weight_decay": 0.0,
        "max_steps": -1,
        "lr_scheduler_type": "cosine",
        "val_loss_every": 20,
        "checkpoint_every": 0,
    },
    **{"train_data_pattern": None, "val_data_pattern": None, "channels": None, "num_heads": None, "num_layers": None},
    **{"vocab_size": 50257},
}
# gpt2_build_from_random: depth -> channels, heads.
LLMC_SIZES = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25)}
LLMC_KEYS = (
    Key("vocab_size", "model.vocab_size"),
    Key("T", "model.max_seq_len"),
    Key("B", "train.batch_size"),
    Key("learning_rate", "optimizer.lr"),
    Key("weight_decay", "optimizer.weight_decay"),
    Key("warmup_iterations", "schedule.warmup_steps"),
    Key("final_learning_rate_frac", "schedule.final_factor"),
    Key("lr_scheduler_type", "schedule.name"),
    Key("train_data_pattern", "data.source"),
    Key("val_data_pattern", "data.val_source"),
    Key("val_loss_every", "train.eval_every"),
    Key("checkpoint_every", "train.checkpoint_every", lambda steps: steps or None),
)

OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def parse_assignments(text: str) -> dict[str, Any]:
    """Names and values of a Python file of plain assignments; imports are passed over, nothing is run.

    A value that is no literal (`str(time.time())`) is left out if nothing here reads its name. Raises ConfigError.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"not a file of assignments: {error}") from None
    found: dict[str, Any] = {}
    for statement in tree.body:
        comment = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if comment or isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        simple = isinstance(statement, ast.Assign) and len(statement.targets) == 1
        if not simple or not isinstance(statement.targets[0], ast.Name):  # type: ignore[attr-defined]
            raise ConfigError(f"line {statement.lineno}: expected NAME = VALUE, found {ast.unparse(statement)[:60]!r}")
        name, value = statement.targets[0].id, statement.value  # type: ignore[attr-defined]
        try:
            found[name] = _value(value)
        except ValueError:
            if name not in NANO_IGNORED:
                raise ConfigError(
                    f"line {statement.lineno}: {name} is {ast.unparse(value)[:60]!r}; write its value out"
                ) from None
    return found


def parse_command(text: str) -> dict[str, Any]:
    """llm.c's variables from a command line of train_gpt2cu, on its own or in a shell script. Raises ConfigError."""
    joined = re.sub(r"\\\s*\n", " ", text)
    line = next((line for line in joined.splitlines() if re.search(r"train_gpt2cu\s+-", line)), "")
    try:
        words = shlex.split(line.partition("train_gpt2cu")[2], comments=True)
    except ValueError as error:
        raise ConfigError(f"the command of train_gpt2cu cannot be read: {error}") from None
    found: dict[str, Any] = {}
    for flag, value in zip(words[::2], words[1::2], strict=False):
        name = flag.removeprefix("-")
        if name in LLMC_IGNORED_FLAGS:
            continue
        if not flag.startswith("-") or name not in LLMC_FLAGS:
            raise ConfigError(f"train_gpt2cu: unknown flag {flag!r}; {did_you_mean(name, LLMC_FLAGS)}")
        if "$" in value:
            raise ConfigError(f"train_gpt2cu {flag} {value}: a shell variable; write its value")
        found[LLMC_FLAGS[name]] = read_yaml(value)
    return found


def nanogpt_run(given: Assignments) -> tuple[RunConfig, list[str]]:
    """A nanoGPT or nanoGPT-mup config as a run, and notes. Raises ConfigError."""
    branch = bool(DEPTH_DEFAULTS.keys() & given.keys())
    known = {**NANO_DEFAULTS, **DEPTH_DEFAULTS, "adam_eps": 1e-12 if branch else 1e-8}
    _check(given, known, NANO_IGNORED)
    c = {**known, **given}
    if c["init_from"] != "scratch":
        raise ConfigError(
            f"init_from {c['init_from']!r}: weights are not part of a config; write init_from = 'scratch'"
        )
    if c["dtype"] not in DTYPES:
        raise ConfigError(f"dtype: unknown {c['dtype']!r}; {did_you_mean(c['dtype'], DTYPES)}")
    heads, width = c["n_head"], c["n_embd"]
    if heads <= 0 or width % heads:
        raise ConfigError(f"n_head {heads} does not divide n_embd {width}")
    sizes = Sizes(width, 4 * width, c["n_layer"], heads, heads)
    notes = []
    if c["decay_lr"] and c["lr_decay_iters"] != c["max_iters"]:
        notes.append(
            f"lr_decay_iters {c['lr_decay_iters']}: umup's decay ends with the run, at max_iters {c['max_iters']}"
        )
    body = nested(read(NANO_KEYS, c))
    body["model"] |= {"family": "gpt3", "head_dim": sizes.head_dim, "intermediate_size": sizes.intermediate}
    if not c["bias"]:
        body["model"] |= dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), False)
    body["optimizer"] |= {"betas": [c["beta1"], c["beta2"]], "eps": c["adam_eps"], "independent_weight_decay": False}
    shape = (
        {"name": "cosine", "final_factor": c["min_lr"] / c["learning_rate"]} if c["decay_lr"] else {"name": "constant"}
    )
    body["schedule"] = {**body["schedule"], **shape} if c["decay_lr"] else shape
    body["parametrization"] = _nano_section(c, sizes, branch)
    body["data"] = {
        key: f"data/{c['dataset']}/{part}.bin" for key, part in (("source", "train"), ("val_source", "val"))
    }
    body["precision"] = {"recipe": DTYPES[c["dtype"]]}
    return parse_config(body), notes


def _nano_section(c: Assignments, sizes: Sizes, branch: bool) -> dict[str, Any]:
    if not c["mup_enabled"]:
        if c.get("depth_alpha_enabled"):
            raise ConfigError("depth_alpha_enabled without mup_enabled: no scheme here is SP with shrunken branches")
        return {"scheme": "sp", **({"hparams": {"sigma_init": c["init_std"]}} if c["init_std"] != 0.02 else {})}
    m = _multiplier("mup_width_multiplier", c["mup_width_multiplier"])
    scaled_rates = not c["mup_disable_hidden_lr_scaling"]
    std = c["init_std"] / sqrt(m)
    out = std if branch else std / sqrt(2 * sizes.num_layers)
    rate = 1 / m if scaled_rates else 1.0
    base = base_of(sizes, sizes.hidden / m, sizes.intermediate / m)
    # Without scaled rates that branch has one group, whose epsilon is the given one.
    options = {"decay": "with_rate", **({} if branch and scaled_rates else {"eps": "constant"})}
    scheme = "mup"
    if c["depth_alpha_enabled"]:
        scheme, options = "completep", {"depth_alpha": f"{c['depth_alpha_exp']:g}"}
        if not scaled_rates:
            raise ConfigError("mup_disable_hidden_lr_scaling with depth_alpha_enabled: completep scales these rates")
        base["num_layers"] = round(sizes.num_layers / _multiplier("depth_multiplier", c["depth_multiplier"]))
    roles = ("embedding", "attention", "attention_out", "ffn_in", "ffn_out")
    head_dim = sizes.head_dim
    wanted = Wanted(
        std=dict(zip(roles, (c["init_std"], std, out, std, out), strict=True)),
        lr={**dict.fromkeys(roles, rate), "embedding": 1.0},
        embedding=c["mup_input_alpha"],
        logits=c["mup_output_alpha"] / m,
        attention=1 / sqrt(head_dim) if c["mup_disable_attention_scaling"] else 1 / head_dim,
        options=options,
    )
    return parametrization(sizes, wanted, base, scheme)


def llmc_run(given: Assignments) -> tuple[RunConfig, list[str]]:
    """A config of llm.c as a run, and notes. Raises ConfigError."""
    _check(given, LLMC_DEFAULTS, ())
    c = {**LLMC_DEFAULTS, **given}
    sizes = _llmc_sizes(c)
    body = nested(read(LLMC_KEYS, c))
    fields = {"hidden_size": sizes.hidden, "num_layers": sizes.num_layers, "head_dim": sizes.head_dim}
    body["model"] |= {"family": "gpt2", **fields, "intermediate_size": sizes.intermediate}
    body["optimizer"] |= {"betas": [0.9, 0.95], "eps": 1e-8, "independent_weight_decay": False}
    body["train"]["grad_clip"] = 1.0
    micro = c["B"] * c["T"]
    if c["total_batch_size"] != -1:
        if c["total_batch_size"] % micro:
            raise ConfigError(f"total_batch_size {c['total_batch_size']} is no multiple of B*T = {micro}")
        body["train"]["grad_accum"] = c["total_batch_size"] // micro
    notes = []
    if c["max_steps"] == -1:
        notes.append("max_steps is not given (llm.c: one epoch); write train.steps")
    else:
        body["train"]["steps"] = c["max_steps"]
    body["parametrization"] = {"scheme": "sp"}
    if c["use_mup"]:
        notes.append("llm.c starts the token embedding and the queries at 0; here they start as their role does")
        body["parametrization"] = _llmc_section(c, sizes)
    return parse_config(body), notes


def _llmc_section(c: Assignments, sizes: Sizes) -> dict[str, Any]:
    m = _multiplier("mup_width_mult", c["mup_width_mult"])
    std = 0.02 / sqrt(m)
    out = std / sqrt(2 * sizes.num_layers)
    roles = ("embedding", "attention", "attention_out", "ffn_in", "ffn_out")
    wanted = Wanted(
        std=dict(zip(roles, (0.02, std, out, std, out), strict=True)),
        lr={**dict.fromkeys(roles, 1 / m), "embedding": 1.0},
        embedding=1.0,
        logits=1 / m,
        attention=c["mup_base_attn_mult"] / sizes.head_dim,
        options={"eps": "constant"},
    )
    return parametrization(sizes, wanted, base_of(sizes, sizes.hidden / m, sizes.intermediate / m))


def _llmc_sizes(c: Assignments) -> Sizes:
    given = (c["num_layers"], c["channels"], c["num_heads"])
    if None not in given:
        layers, channels, heads = given
    else:
        depth = re.fullmatch(r"d(\d+)", str(c["load_filename"]))
        layers = int(depth[1]) if depth else 0
        if layers not in LLMC_SIZES:
            known = ", ".join(f"d{layers}" for layers in LLMC_SIZES)
            raise ConfigError(f"-e {c['load_filename']}: expected a size of llm.c to start from: {known}")
        channels, heads = LLMC_SIZES[layers]
    if heads <= 0 or channels % heads:
        raise ConfigError(f"num_heads {heads} does not divide channels {channels}")
    return Sizes(channels, 4 * channels, layers, heads, heads)


def _multiplier(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name}: expected a positive number, found {value!r}")
    return float(value)


def _check(given: Assignments, known: Assignments, ignored: tuple[str, ...]) -> None:
    """Names and kinds; a number may be given for a number of the other kind, and 0 and 1 for a bool."""
    for name, value in given.items():
        if name in ignored:
            continue
        if name not in known:
            raise ConfigError(f"unknown name {name!r}; {did_you_mean(name, [*known, *ignored])}")
        default = known[name]
        if isinstance(default, int | float) and not isinstance(value, int | float):
            raise ConfigError(f"{name}: expected a number, found {value!r}")
        if isinstance(default, str) and not isinstance(value, str):
            raise ConfigError(f"{name}: expected text, found {value!r}")


def _value(node: ast.expr) -> Any:
    """A literal, or arithmetic on numbers. Raises ValueError."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            raise ValueError
        try:
            return OPERATORS[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError):
            raise ValueError from None
    return ast.literal_eval(node)
