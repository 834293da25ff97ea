"""Does muP keep the models people have flat in width? One row per architecture of transformers, made on a CPU.

    python benchmarks/hf_coordinates.py --write docs/models.md

Each model is built from its config with random weights at three widths (heads are added, their size stays), planned by
`umup.plan` with the narrowest as base, and trained for some AdamW steps on one batch. The root mean square (RMS) of
every module's output should not depend on the width: what is reported is the slope of log RMS against log width, of
the mean over steps and seeds. The same is done with the model's own init and one rate for all parameters.

The rate is large enough that updates, not the init, make the outputs. The batch is small on purpose: what an update
does by chance rather than by alignment falls as sqrt(tokens/width), and would hide the limit at these widths.

Not covered: modules that return neither a tensor nor a tuple of them, logits of attention, depth, growing heads, other
optimizers.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import log2
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import umup

HEAD, VOCAB, LENGTH, BATCH = 16, 64, 8, 2
IMAGE, PATCH, CLASSES = 16, 4, 10
WIDTHS = (128, 256, 512)
STEPS, RATE = 4, 0.002
SEEDS, OWN_SEEDS = 8, 1
FLAT, STEEP = 0.1, 0.25

READOUT = "readout"
SHARED_VALUES = "one value head"
OWN_BIAS = "init of a bias"
REASONS = {
    READOUT: "logits start from a random part that shrinks with width, and the first steps add little to it.",
    SHARED_VALUES: (
        "multi-query attention takes a growing width to values of a fixed size. `umup.plan` calls that matrix hidden, "
        "as is usual; but in the limit it acts like a readout, whose few rows are what earlier layers move along, so "
        "that values grow with width, up to its square root. Let the number of value heads grow with width. Where "
        "values have a projection of their own, `overrides={'*.v_proj.weight': 'readout'}` bounds them: they shrink at "
        "first."
    ),
    OWN_BIAS: "T5 draws its relative attention bias with std d_model^-0.5; biases keep the init that they come with.",
}

OWN_FACTOR = (
    "- *own factor*: Gemma's forward multiplies embeddings by sqrt(hidden_size), T5's what its tied head reads by "
    "d_model^-0.5; the plan divides that out of init and rate, or of the head's multiplier."
)

# Module -> the mean over steps of log2 of the RMS, or its slope.
Trace = dict[str, float]
Sizes = Callable[[int], Mapping[str, int]]


@dataclass(frozen=True)
class Case:
    """A model's classes, its sizes at any width and at one, and what is known of it.

    `excused` maps patterns of modules to one of REASONS. `overrides` and `inits` (at a width) are umup.plan's and its
    apply's.
    """

    model: type[nn.Module]
    config: Callable[..., Any]
    fixed: Mapping[str, Any]
    sizes: Sizes
    excused: Mapping[str, str]
    notes: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    inits: Callable[[int], Mapping[str, float]] = lambda width: {}

    def build(self, width: int) -> nn.Module:
        """The model at a width, freshly drawn, without dropout."""
        return self.model(self.config(**self.fixed, **self.sizes(width))).eval()


def gated(width: int) -> dict[str, int]:
    """Llama's names; all heads have keys and values."""
    return {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // HEAD}


def grouped(width: int) -> dict[str, int]:
    """Llama's names; keys and values for every second head."""
    return {**gated(width), "num_key_value_heads": width // HEAD // 2}


def plain(width: int) -> dict[str, int]:
    """BERT's names."""
    return {**gated(width), "intermediate_size": 4 * width}


def gpt2(width: int) -> dict[str, int]:
    """GPT-2's names."""
    return {"n_embd": width, "n_head": width // HEAD}


def opt(width: int) -> dict[str, int]:
    """OPT's names."""
    heads = {"num_attention_heads": width // HEAD}
    return {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, **heads}


def bloom(width: int) -> dict[str, int]:
    """Bloom's names."""
    return {"hidden_size": width, "n_head": width // HEAD}


def falcon(width: int) -> dict[str, int]:
    """Falcon's names."""
    return {"hidden_size": width, "num_attention_heads": width // HEAD}


def new_falcon(width: int) -> dict[str, int]:
    """Falcon-40B's."""
    return {**falcon(width), "num_kv_heads": width // HEAD // 2}


def mpt(width: int) -> dict[str, int]:
    """MPT's names."""
    return {"d_model": width, "n_heads": width // HEAD}


def t5(width: int) -> dict[str, int]:
    """T5's names."""
    return {"d_model": width, "d_ff": 4 * width, "num_heads": width // HEAD}


IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {**IDS, "num_hidden_layers": 2, "max_position_embeddings": LENGTH + 2}
FIXED_HEADS = {**LLAMA, "head_dim": HEAD}
GPT2 = {**IDS, "n_layer": 2, "n_positions": LENGTH}
T5 = {**IDS, "num_layers": 2, "d_kv": HEAD, "decoder_start_token_id": 0}
VIT = {"num_hidden_layers": 2, "image_size": IMAGE, "patch_size": PATCH, "num_labels": CLASSES}
HEADLESS = {"lm_head": READOUT}
CASES = {
    "GPT-2": Case(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2, gpt2, HEADLESS, "tied; fused c_attn"),
    "GPT-J": Case(hf.GPTJForCausalLM, hf.GPTJConfig, {**GPT2, "rotary_dim": 8}, gpt2, HEADLESS, "parallel branches"),
    "GPT-NeoX": Case(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, LLAMA, plain, HEADLESS, "fused qkv by head"),
    "Llama": Case(hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA, grouped, HEADLESS, "grouped queries"),
    "Mistral": Case(hf.MistralForCausalLM, hf.MistralConfig, FIXED_HEADS, grouped, HEADLESS, "grouped queries"),
    "Qwen2": Case(
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {**LLAMA, "tie_word_embeddings": True},
        grouped,
        HEADLESS,
        "tied; qkv biases",
    ),
    "Qwen3": Case(hf.Qwen3ForCausalLM, hf.Qwen3Config, FIXED_HEADS, grouped, HEADLESS, "normed queries and keys"),
    "Gemma": Case(
        hf.GemmaForCausalLM,
        hf.GemmaConfig,
        FIXED_HEADS,
        grouped,
        HEADLESS,
        "tied; own factor on embeddings",
    ),
    "Gemma 2B": Case(
        hf.GemmaForCausalLM,
        hf.GemmaConfig,
        {**FIXED_HEADS, "num_key_value_heads": 1},
        gated,
        {**HEADLESS, "*.self_attn*": SHARED_VALUES},
        "as Gemma; multi-query",
    ),
    "Gemma 2B, values overridden": Case(
        hf.GemmaForCausalLM,
        hf.GemmaConfig,
        {**FIXED_HEADS, "num_key_value_heads": 1},
        gated,
        {**HEADLESS, "*.self_attn*": SHARED_VALUES},
        "`*.v_proj.weight` is a readout",
        overrides={"*.v_proj.weight": "readout"},
    ),
    "Gemma 2": Case(
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        {**FIXED_HEADS, "query_pre_attn_scalar": HEAD},
        grouped,
        HEADLESS,
        "as Gemma; norms after branches too",
    ),
    "Falcon": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**IDS, "num_hidden_layers": 2},
        falcon,
        {**HEADLESS, "*.self_attention*": SHARED_VALUES},
        "tied; fused multi-query",
    ),
    "Falcon-40B": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**IDS, "num_hidden_layers": 2, "new_decoder_architecture": True},
        new_falcon,
        HEADLESS,
        "tied; fused grouped queries",
    ),
    "Bloom": Case(hf.BloomForCausalLM, hf.BloomConfig, {**IDS, "n_layer": 2}, bloom, HEADLESS, "tied; ALiBi; fused"),
    "GPTBigCode": Case(
        hf.GPTBigCodeForCausalLM,
        hf.GPTBigCodeConfig,
        GPT2,
        gpt2,
        {**HEADLESS, "*.attn*": SHARED_VALUES},
        "tied; fused multi-query",
    ),
    "MPT": Case(
        hf.MptForCausalLM,
        hf.MptConfig,
        {**IDS, "n_layers": 2, "max_seq_len": LENGTH},
        mpt,
        HEADLESS,
        "tied; ALiBi; fused Wqkv",
    ),
    "OPT": Case(hf.OPTForCausalLM, hf.OPTConfig, LLAMA, opt, HEADLESS, "tied"),
    "BERT": Case(
        hf.BertForMaskedLM,
        hf.BertConfig,
        LLAMA,
        plain,
        {"cls": READOUT, "cls.predictions": READOUT, "*.decoder": READOUT},
        "tied; post-norm",
    ),
    "RoBERTa": Case(
        hf.RobertaForMaskedLM,
        hf.RobertaConfig,
        {**LLAMA, "pad_token_id": 1},
        plain,
        {"lm_head": READOUT, "lm_head.decoder": READOUT},
        "tied; post-norm",
    ),
    "T5": Case(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5,
        t5,
        {**HEADLESS, "*.relative_attention_bias": OWN_BIAS},
        "tied; own factor on the head; queries drawn smaller by sqrt(d_kv)",
        inits=lambda width: {"*.relative_attention_bias.weight": width**-0.5},
    ),
    "ViT": Case(hf.ViTForImageClassification, hf.ViTConfig, VIT, plain, {"classifier": READOUT}, "patches are inputs"),
}


@dataclass(frozen=True)
class Row:
    """One model: its number of parameters, and the (module, slope) furthest from flat: under muP, under muP for each
    reason of excuse, and as the model comes.
    """

    parameters: int
    mup: tuple[str, float]
    excused: Mapping[str, tuple[str, float]]
    own: tuple[str, float]

    @property
    def verdict(self) -> str:
        """`flat` if every module that is not excused is, and some module is steep without muP."""
        if abs(self.mup[1]) > FLAT or abs(self.own[1]) < STEEP:
            return "not flat"
        kept = [why for why, (_, slope) in self.excused.items() if why != READOUT and abs(slope) > FLAT]
        return ", but for ".join(["flat", *kept])


def batch(name: str, seed: int) -> dict[str, Tensor]:
    """One batch, the same at all widths: tokens to continue, to translate or to unmask, or images to classify."""
    generator = torch.Generator().manual_seed(seed)
    if name == "ViT":
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator), "labels": labels}
    tokens, others = torch.randint(3, VOCAB, (2, BATCH, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": others if name in ("BERT", "RoBERTa", "T5") else tokens}


def trace(name: str, width: int, seed: int, mup: bool) -> Trace:
    """log2 of the RMS of every module's output, the mean over steps. A module that runs twice counts once."""
    torch.manual_seed(seed)
    model = CASES[name].build(width)
    params = planned(CASES[name], model, width) if mup else model.parameters()
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)
    latest: Trace = {}

    def record(module: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point():
            latest[module] = log2(first.detach().square().mean().sqrt().item())

    for module, m in model.named_modules():
        m.register_forward_hook(lambda _, args, output, module=module: record(module, output))
    data = batch(name, seed)
    traces = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
        with torch.no_grad():
            model(**data)
        traces.append(dict(latest))
    return {module: mean(t[module] for t in traces) for module in latest}


def planned(case: Case, model: nn.Module, width: int) -> list[dict[str, Any]]:
    """Apply muP's plan to a model; its parameter groups."""
    with warnings.catch_warnings(action="ignore"):  # the base itself needs no plan
        plan = umup.plan(model, lambda: case.build(WIDTHS[0]), scheme="mup", overrides=case.overrides)
    plan.apply(model, case.inits(width))
    groups: list[dict[str, Any]] = plan.param_groups(model, lr=RATE)
    return groups


def slopes(name: str, mup: bool, seeds: int) -> Trace:
    """The slope of log RMS against log width, of the mean over seeds and steps, per module."""
    measured: dict[str, list[float]] = defaultdict(list)
    for width in WIDTHS:
        traces = [trace(name, width, seed, mup) for seed in range(seeds)]
        for module in traces[0]:
            measured[module].append(mean(t[module] for t in traces))
    return {module: linear_regression([log2(w) for w in WIDTHS], ys).slope for module, ys in measured.items()}


def excuse(case: Case, module: str) -> str | None:
    """Why a module need not be flat: a key of REASONS."""
    return next((why for pattern, why in case.excused.items() if fnmatchcase(module, pattern)), None)


def measure(name: str, seeds: int = SEEDS) -> Row:
    """The row of one model."""
    case, mup, own = CASES[name], slopes(name, True, seeds), slopes(name, False, OWN_SEEDS)
    by_reason: dict[str | None, list[str]] = defaultdict(list)
    for module in mup:
        by_reason[excuse(case, module)].append(module)
    excused = {why: worst(mup, modules) for why, modules in by_reason.items() if why is not None}
    parameters = len(list(case.build(WIDTHS[0]).named_parameters()))
    return Row(parameters, worst(mup, by_reason[None]), excused, worst(own, own))


def worst(found: Trace, modules: Iterable[str]) -> tuple[str, float]:
    """The module furthest from flat, and its slope; of equal ones, such as a branch and its dropout, the outermost."""
    return max(((module, round(found[module], 2)) for module in modules), key=lambda e: (abs(e[1]), -len(e[0])))


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| model | verdict | largest slope under muP | excused | as it comes | parameters | notes |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        excused = "; ".join(f"{why}: {cell(entry)}" for why, entry in row.excused.items())
        cells = [name, row.verdict, cell(row.mup), excused, cell(row.own), str(row.parameters), CASES[name].notes]
        yield f"| {' | '.join(cells)} |"


def cell(entry: tuple[str, float]) -> str:
    """A slope and its module."""
    return f"{entry[1]:+.2f} `{entry[0]}`"


HEAD_OF_PAGE = """# The models people have

`umup.plan` finds the role of every parameter of these models without being told; under its muP plan the size of what
their modules put out does not depend on the width, which it does as the models come.

Made by `python benchmarks/hf_coordinates.py --write docs/models.md` on a CPU: random models of two layers, of widths
{widths} with heads of size {head} and muP's base at the narrowest; {steps} steps of AdamW at a rate of {rate} on one
batch. A slope is that of the logarithm of a module's RMS against that of the width, of the mean over the steps and
{seeds} seeds (as it comes: {own_seeds}). *Flat*: every module that is not excused is within {flat}, and as the model
comes, with one rate, some module is beyond {steep}. All modules count; those named are the worst. Norms are flat by
construction. transformers {transformers}, torch {torch}.
"""


def page(rows: Mapping[str, Row]) -> str:
    """docs/models.md."""
    head = HEAD_OF_PAGE.format(
        widths=", ".join(map(str, WIDTHS)),
        head=HEAD,
        steps=STEPS,
        rate=RATE,
        seeds=SEEDS,
        own_seeds=OWN_SEEDS,
        flat=FLAT,
        steep=STEEP,
        transformers=hf.__version__,
        torch=torch.__version__.partition("+")[0],
    )
    reasons = [f"- *{name}*: {reason}" for name, reason in REASONS.items()]
    return "\n".join([head, *table(rows), "", "Excused, and noted:", "", *reasons, OWN_FACTOR, ""])


def main() -> None:
    """Measure all models, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the file to write; default: print")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # what transformers says of small configs
    torch.set_num_threads(1)
    text = page({name: measure(name) for name in CASES})
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
