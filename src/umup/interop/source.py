"""A trained model on disk, whoever wrote it: what it is, the plan it runs under, its weights one at a time.

`open_source` looks at a directory and asks the first reader of READERS that knows it. A new format is a module with a
reader and a row here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from umup.checkpoint import load_latest, load_model
from umup.config.load import load_config
from umup.config.sections import RunConfig
from umup.errors import CheckpointError
from umup.rules.plan import Plan


@dataclass(frozen=True)
class Source:
    """`weights` yields (our parameter name, tensor), reading as it goes; `notes` are lines a person should read.

    The config says what the format knows of a run; sections that it does not know have their defaults. `tokenizer`: a
    tokenizer.json, or None for bytes.
    """

    format: str
    path: Path
    config: RunConfig
    plan: Plan
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: Path | None
    notes: tuple[str, ...] = ()


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
    if (path / "model.safetensors").exists():
        tensors = load_model(path / "model.safetensors")
    else:
        state, _ = load_latest(path)
        if state is None:
            raise CheckpointError(f"run {path} has no weights yet; train it first")
        tensors, notes = state.model, (f"not finished: the weights are those of step {state.step}",)
    return Source(
        "umup", path, config, plan, lambda: iter(tensors.items()), tokenizer if tokenizer.exists() else None, notes
    )


READERS: tuple[Reader, ...] = (Reader("umup", _is_run, _open_run),)


def open_source(path: str | Path) -> Source:
    """Raises CheckpointError for a path that no reader knows, and what the reader raises."""
    directory = Path(path)
    for reader in READERS:
        if reader.knows(directory):
            return reader.open(directory)
    known = ", ".join(reader.format for reader in READERS)
    raise CheckpointError(f"{directory}: not a checkpoint of any format that umup reads ({known})")
