"""A Hugging Face directory as a Source: config.json, safetensors (or pytorch_model.bin), tokenizer.json.

An imported network runs under `sp` at its default sigma_init: its forward pass has no multipliers, and the plan's
initial values matter only to who trains anew. Granite's multipliers are kept as numbers of that plan.

Tensors are read one at a time, in the order of our network, from whichever shard holds them: memory holds one. Old
pickled files are read without running code, or refused.

Not covered: remote code, adapters, quantized weights other than those that we write (`compressed.py`).
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from umup.checkpoint import TensorFiles, load_pickled
from umup.errors import CheckpointError
from umup.interop.compressed import dequantised
from umup.interop.fold import with_multipliers
from umup.interop.hf_config import CONFIG, read_directory
from umup.interop.hf_tensors import IGNORED, TABLES
from umup.interop.keymap import to_ours
from umup.interop.source import Source
from umup.models.specs import Shape, plan_for, shape_of

HEAD = "lm_head.weight"


def open_huggingface(path: Path) -> Source:
    """The directory as a Source. Raises ConfigError for networks that are not ours, and CheckpointError."""
    found = read_directory(path)
    shape, name = shape_of(found.config.model), found.name
    theirs = with_prefix(name, shape, dequantised(path / CONFIG, found.body, stored_tensors(path)))
    if shape.traits.tie_embeddings and HEAD in theirs:
        _check_tied(path, name, shape, theirs)
    tokenizer = path / "tokenizer.json"
    return Source(
        f"hf-{name}",
        path,
        found.config,
        with_multipliers(plan_for(found.config), found.multipliers),
        partial(read_weights, name, shape, theirs),
        tokenizer if tokenizer.is_file() else None,
        found.notes,
    )


def read_weights(name: str, shape: Shape, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a format by our names, one at a time."""
    tied = shape.traits.tie_embeddings
    return to_ours(TABLES[name](shape), theirs, shape, lambda n: bool(IGNORED.search(n)) or (tied and n == HEAD))


def stored_tensors(path: Path) -> Mapping[str, Tensor]:
    """What the directory's files hold. Raises CheckpointError where there are none, or where one is cut off."""
    for kind, read in (("model.safetensors", TensorFiles), ("pytorch_model.bin", _pickled)):
        index, single = path / f"{kind}.index.json", path / kind
        if index.is_file():
            return read(_shards(index))
        if single.is_file():
            return read([single])
    raise CheckpointError(f"{path} has a {CONFIG} but no weights (model.safetensors, its index, or pytorch_model.bin)")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not an index of shards; fetch it again") from None
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index} names {', '.join(missing[:3])}, which are not there; fetch the missing shards")
    return shards


def _pickled(files: list[Path]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        body = load_pickled(file)
        if not isinstance(body, dict) or not all(isinstance(t, Tensor) for t in body.values()):
            raise CheckpointError(f"{file}: not a mapping of names to tensors; save the weights as safetensors")
        found |= body
    return found


def with_prefix(name: str, shape: Shape, theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under their full names, where the file was saved from the model without its head."""
    prefix = TABLES[name](shape)[0].theirs.partition(".")[0] + "."
    if any(n.startswith(prefix) for n in theirs):
        return theirs
    return Renamed(theirs, {n if n.startswith("lm_head.") else prefix + n: n for n in theirs})


class Renamed(Mapping[str, Tensor]):
    """A mapping's tensors under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_tied(path: Path, name: str, shape: Shape, theirs: Mapping[str, Tensor]) -> None:
    """A file may hold a tied head, as a copy. One that differs means that the config is wrong about it."""
    embedding = TABLES[name](shape)[0].theirs
    if embedding in theirs and not torch.equal(theirs[embedding], theirs[HEAD]):
        raise CheckpointError(
            f"{path}: {CONFIG} ties the head to the embedding and the file has another {HEAD}; "
            "write tie_word_embeddings: false"
        )
