"""A trained model on disk, whoever wrote it: what it is, the plan it runs under, its weights one at a time.

`open_source` looks at a directory and asks the first reader of READERS that knows it. A new format is a module with a
reader and a row here.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from umup.checkpoint import load_latest, load_model
from umup.config.load import load_config
from umup.config.sections import RunConfig
from umup.data.tokenizer import Tokenizer, load_tokenizer
from umup.errors import CheckpointError
from umup.rules.plan import Plan

RUN = "umup"
"""The format of our own run directories."""


@dataclass(frozen=True)
class Source:
    """`weights` yields (our parameter name, tensor), reading as it goes; `notes` are lines a person should read.

    The config says what the format knows of a run; sections that it does not know have their defaults. `tokenizer`: a
    tokenizer.json, or None for what `config.data.tokenizer` says. `step`: of a run that has not finished.
    """

    format: str
    path: Path
    config: RunConfig
    plan: Plan
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: Path | None
    notes: tuple[str, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class Reader:
    """A format: whether a directory holds it, and how it is opened (raising CheckpointError and ConfigError)."""

    format: str
    knows: Callable[[Path], bool]
    open: Callable[[Path], Source]


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "plan.json").is_file()


def _open_run(path: Path) -> Source:
    """A run of `umup train`: its final weights, or its newest checkpoint if it has not finished."""
    config = load_config(path / "config.yaml")
    plan = Plan.from_json((path / "plan.json").read_text(encoding="utf-8"))
    tokenizer = path / "tokenizer.json"
    notes: tuple[str, ...] = ()
    step = None
    if (path / "model.safetensors").exists():
        tensors = load_model(path / "model.safetensors")
    else:
        state, _ = load_latest(path)
        if state is None:
            raise CheckpointError(f"run {path} has no weights yet; train it first")
        tensors, step = state.model, state.step
        notes = (f"not finished: the weights are those of step {step}",)
    known = tokenizer if tokenizer.exists() else None
    return Source(RUN, path, config, plan, lambda: iter(tensors.items()), known, notes, step)


def watched(source: Source, notice: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    """The source's weights; `notice` is told of those that hold NaN or infinity."""
    for name, tensor in source.weights():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no sums of FP8
        # The sum tells at no memory whether there is anything to count.
        if not values.sum(dtype=torch.float32).isfinite() and (bad := int((~values.isfinite()).sum())):
            notice(f"{source.path}: {name} holds {bad} values that are NaN or infinite")
        yield name, tensor


def tokenizer_of(source: Source) -> Tokenizer:
    """What a source's ids mean. Raises CheckpointError where nothing says it, or where it has more ids than the model,
    and DataError for a file that is no tokenizer."""
    if source.tokenizer is None and source.format == RUN:
        _check_known(source.path)
    found = load_tokenizer(str(source.tokenizer or source.config.data.tokenizer))
    if found.vocab_size > (size := source.config.model.vocab_size):
        raise CheckpointError(
            f"{source.path}: tokenizer {found.name} has {found.vocab_size} ids and the model's vocab_size is {size}; "
            "write the path of weights and tokenizer that belong together"
        )
    return found


def _check_known(run: Path) -> None:
    """A run of token files of unknown origin has no tokenizer."""
    try:
        known = json.loads((run / "data.json").read_text())["tokenizer"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{run / 'data.json'} is missing or damaged; train the run again") from None
    if not known:
        raise CheckpointError(f"run {run} was trained on ids of an unknown tokenizer; copy its tokenizer.json there")


# Readers of other programs' files are loaded with their first use: they need this module.


def _is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file()


def _open_huggingface(path: Path) -> Source:
    from umup.interop.huggingface import open_huggingface

    return open_huggingface(path)


def _is_llmc(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == (20240326).to_bytes(4, "little")


def _open_llmc(path: Path) -> Source:
    from umup.interop.gpt2_files import open_llmc

    return open_llmc(path)


def _is_nanogpt(path: Path) -> bool:
    return (path.is_file() and path.suffix == ".pt") or (path / "ckpt.pt").is_file()


def _open_nanogpt(path: Path) -> Source:
    from umup.interop.gpt2_files import open_nanogpt

    return open_nanogpt(path)


READERS: tuple[Reader, ...] = (
    Reader(RUN, _is_run, _open_run),
    Reader("Hugging Face", _is_huggingface, _open_huggingface),
    Reader("llm.c", _is_llmc, _open_llmc),
    Reader("nanoGPT", _is_nanogpt, _open_nanogpt),
)


def open_source(path: str | Path) -> Source:
    """Raises CheckpointError for a path that no reader knows, and what the reader raises."""
    directory = Path(path)
    for reader in READERS:
        if reader.knows(directory):
            return reader.open(directory)
    known = ", ".join(reader.format for reader in READERS if reader.format != RUN)
    raise CheckpointError(
        f"{directory} is no run directory, and no checkpoint of {known}; write the --out of a training, or such a path"
    )
