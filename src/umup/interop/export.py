"""`umup export`: a trained model, whoever wrote it, as another program's directory, and proof that it is the same.

    report = export(open_source("runs/7b"), Path("out"), Request("hf-llama"))
    report.comparison.passed

What a format cannot express is refused, naming the feature, before anything is written; what is written stays, whatever
the comparison of logits says.

Not covered: optimizer states, and formats that neither transformers nor this library loads.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from umup.checkpoint import TensorFiles, TensorLayout, make_directory, write_tensors
from umup.config.load import dump_yaml
from umup.data.tokenizer import Tokenizer
from umup.errors import CheckpointError, ConfigError, did_you_mean
from umup.interop.compare import (
    TOLERANCES,
    Comparison,
    compare,
    our_logits,
    prompts,
    through_fp8,
    transformers_logits,
    watch_squares,
)
from umup.interop.compressed import INPUT
from umup.interop.fp8_inputs import input_exponents
from umup.interop.hf_config import CONFIG, expressible, native
from umup.interop.hf_formats import FORMATS
from umup.interop.hf_tensors import TABLES
from umup.interop.hf_write import (
    TOKEN_IDS,
    Folded,
    Fp8,
    fp8_weights,
    target_of,
    write_config,
    write_tokenizer,
    write_weights,
)
from umup.interop.keymap import layout
from umup.interop.model_card import model_card
from umup.interop.source import RUN, Source, open_source, tokenizer_of, watched
from umup.models.build import DTYPES
from umup.models.specs import shape_of

NATIVE, PREFIX = "hf", "hf-"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """`target`: umup, hf (the family's own class) or hf-NAME. `dtype`: fp32, bf16, fp16; None: as the source has it."""

    target: str
    dtype: str | None = None
    fp8: bool = False
    shard_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class Report:
    """What was written, and how it compares. `format`: umup, or the name of transformers' class."""

    out: Path
    format: str
    dtype: str
    files: tuple[str, ...]
    bytes: int
    comparison: Comparison


def targets() -> list[str]:
    """Everything that `Request.target` may be."""
    return [RUN, NATIVE, *(PREFIX + name for name in FORMATS)]


def export(source: Source, out: Path, request: Request, say: Say = lambda line: None) -> Report:
    """Write `source` below `out`, a new or empty directory.

    Raises ConfigError for what the target cannot express, and CheckpointError for sources that cannot be read whole.
    """
    if request.target not in targets():
        raise ConfigError(f"--to: unknown format {request.target!r}; {did_you_mean(request.target, targets())}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --out")
    for line in source.notes:
        say(line)
    if request.target == RUN:
        return _to_umup(source, out, request, say)
    name = _named(source, request.target)
    if request.fp8 and not FORMATS[name].fp8:
        known = " or ".join(PREFIX + n for n, form in FORMATS.items() if form.fp8)
        raise ConfigError(f"--fp8: {PREFIX}{name} has no FP8 layout; write --to {known}")
    return _to_huggingface(source, name, out, request, say)


def _named(source: Source, target: str) -> str:
    """The row of FORMATS that the target means for this source."""
    if target != NATIVE:
        return target.removeprefix(PREFIX)
    family = source.config.model.family
    if (name := native(family)) is None:
        raise ConfigError(f"--to hf: transformers has no class that is the family {family!r}; write --to hf-llama")
    return name


def _to_umup(source: Source, out: Path, request: Request, say: Say) -> Report:
    """A run directory without a history."""
    if request.fp8:
        raise ConfigError("--fp8: a run keeps its master weights; write --to hf-llama, or --dtype bf16")
    if source.format != RUN:
        numbers = ", ".join(f"{name} {value:g}" for name, value in source.plan.hparams.items())
        say(f"imported weights run under the plan of scheme {source.plan.scheme} ({numbers})")
    tokenizer = _tokenizer(source, say)
    parts = _checked(source, say)
    dtype = request.dtype or _dtype_of(parts)
    parts = [part._replace(dtype=DTYPES[dtype]) for part in parts]
    shape = shape_of(source.config.model)
    make_directory(out)
    (out / "config.yaml").write_text(dump_yaml(source.config), encoding="utf-8")
    (out / "plan.json").write_text(source.plan.to_json(), encoding="utf-8")
    if source.tokenizer is not None:
        (out / "tokenizer.json").write_bytes(source.tokenizer.read_bytes())
    known = None if tokenizer is None else {"name": tokenizer.name, "digest": tokenizer.digest}
    (out / "data.json").write_text(json.dumps({"tokenizer": known, "imported_from": source.format}))
    write_tensors(out / "model.safetensors", parts, (tensor.to(DTYPES[dtype]) for _, tensor in source.weights()))
    tokens = prompts(shape)
    expected, who = _source_logits(source, tokens, say)
    back = open_source(out)
    found = our_logits(shape, back.plan, back.weights(), tokens)
    return _report(out, RUN, dtype, ["model.safetensors"], compare(expected, found, f"{who} on the source", dtype))


def _source_logits(source: Source, tokens: Tensor, say: Say) -> tuple[Tensor, str]:
    """What the source computes, and by whom: an imported one is run by transformers, if it can be had."""
    try:
        theirs = transformers_logits(source.path, tokens) if source.format.startswith(PREFIX) else None
    except CheckpointError as error:
        say(str(error))
        theirs = None
    if theirs is not None:
        return theirs
    return our_logits(shape_of(source.config.model), source.plan, source.weights(), tokens), "umup"


def _to_huggingface(source: Source, name: str, out: Path, request: Request, say: Say) -> Report:
    expressible(name, shape_of(source.config.model))  # before gigabytes are read
    tokenizer = _tokenizer(source, say)
    given = _dtype_of(_checked(source, say))
    dtype = request.dtype or ("bf16" if request.fp8 else given)
    precision = "fp8" if request.fp8 else dtype
    target = target_of(source, name, TOLERANCES[precision])
    weights = dict(source.weights())  # lent by memory maps rather than loaded
    tokens, squares = prompts(target.source), dict[str, list[float]]()
    watch = partial(watch_squares, norms=target.fold.epsilons, squares=squares)
    expected = our_logits(target.source, source.plan, weights.items(), tokens, watch)
    target = target.corrected(squares)
    folded = Folded(target, weights)
    fp8 = fp8_weights(target, folded, input_exponents(source, weights, say)) if request.fp8 else None
    make_directory(out)
    if tokenizer is not None:
        write_tokenizer(out, source, tokenizer.separator)
    write_config(out, target, DTYPES[dtype], _token_ids(source, tokenizer), fp8)
    files = write_weights(out, target, folded, DTYPES[dtype], fp8, request.shard_bytes)
    comparison = compare(expected, *_written_logits(out, fp8, tokens), precision)
    architecture = FORMATS[name].architecture
    kept = "kept in config.json where the class has a field for them, the rest " if FORMATS[name].multipliers else ""
    how = f"The plan's multipliers are {kept}folded into the weights."
    (out / "README.md").write_text(model_card(source, out.name, architecture, how, comparison.text()), encoding="utf-8")
    return _report(out, architecture, precision, files, comparison)


def _written_logits(out: Path, fp8: Fp8 | None, tokens: Tensor) -> tuple[Tensor, str]:
    """What the written directory computes, by transformers if it can be had, and by whom."""
    theirs = transformers_logits(out, tokens, needs="compressed_tensors" if fp8 else None)
    if theirs is not None:
        return theirs
    back = open_source(out)
    shape = shape_of(back.config.model)
    prepare = partial(through_fp8, scales=_input_scales(out, back, fp8) if fp8 else {})
    return our_logits(shape, back.plan, back.weights(), tokens, prepare), "umup's own reading of it"


def _input_scales(out: Path, back: Source, fp8: Fp8) -> dict[str, float]:
    stored, shape = TensorFiles(sorted(out.glob("*.safetensors"))), shape_of(back.config.model)
    rows = [r for r, _ in layout(TABLES[back.format.removeprefix(PREFIX)](shape), shape)]
    homes = {r.ours[0].removesuffix(".weight"): r.theirs.removesuffix(".weight") for r in rows}
    return {product: float(stored[homes[product] + INPUT]) for product in fp8.inputs}


def _checked(source: Source, say: Say) -> list[TensorLayout]:
    """What the source's weights are, in their order.

    Reading all once finds what is missing, damaged or not a number before anything is written.
    """
    return [TensorLayout(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in watched(source, say)]


def _dtype_of(parts: list[TensorLayout]) -> str:
    """The finest dtype among the weights."""
    given = {part.dtype for part in parts}
    return next((name for name, dtype in DTYPES.items() if dtype in given), "fp32")


def _tokenizer(source: Source, say: Say) -> Tokenizer | None:
    """The source's tokenizer, or None where it has none, which `say` is told."""
    if source.tokenizer is None and source.config.data.tokenizer != "bytes":
        say(f"no tokenizer: {source.path} has no tokenizer.json")
        return None
    return tokenizer_of(source)


def _token_ids(source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Special tokens as the source's config.json has them, else the end of a document."""
    if source.format.startswith(PREFIX):
        body = json.loads((source.path / CONFIG).read_text(encoding="utf-8"))
        return {key: body.get(key) for key in TOKEN_IDS}
    return {"eos_token_id": None if tokenizer is None else tokenizer.separator}


def _report(out: Path, form: str, dtype: str, files: list[str], comparison: Comparison) -> Report:
    size = sum((out / file).stat().st_size for file in files)
    return Report(out, form, dtype, tuple(files), size, comparison)
