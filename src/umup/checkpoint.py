"""Run state <-> directory: atomic, versioned, safetensors and JSON only.

    checkpoints/step-00000100/
        model.safetensors       parameters by name
        training.safetensors    optimizer/<entry>/<name>, rng/<device>, precision/<linear>
        state.json              step, data position
        manifest.json           version, and size and sha256 of the three others

A checkpoint is written under a hidden name, flushed to disk and renamed: a kill leaves the old ones whole. On reading,
every byte is checked against the manifest; what fails is refused by name and the one before it is used.

Not covered: sharded state (torch.distributed.checkpoint).
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umup.errors import CheckpointError, RunError

VERSION = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class RunState:
    """Everything a run needs to go on: `step` optimizer steps are done, `data` is the position of the next batch.

    `precision` holds the scales of FP8 products; runs without any have none.
    """

    step: int
    data: dict[str, int]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    precision: dict[str, Tensor]


def save_checkpoint(run: Path, state: RunState, keep: int) -> Path:
    """Write `state` below `run/checkpoints` and drop all but the newest `keep`. Returns the new folder."""
    home = run / "checkpoints"
    final, draft = home / f"step-{state.step:08d}", home / f".step-{state.step:08d}"
    # A folder of a later step is one that was refused: left alone, it would push out the good ones.
    for old in (final, draft, *(f for f in _folders(run) if f.name > final.name)):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(parents=True)
    _save(state.model, draft / MODEL)
    parts = {"optimizer": state.optimizer, "rng": state.rng, "precision": state.precision}
    training = {f"{part}/{n}": t for part, tensors in parts.items() for n, t in tensors.items()}
    _save(training, draft / TRAINING)
    (draft / STATE).write_text(json.dumps({"step": state.step, "data": state.data}))
    files = {name: _fingerprint(draft / name) for name in (MODEL, TRAINING, STATE)}
    (draft / MANIFEST).write_text(json.dumps({"umup_checkpoint": VERSION, "files": files}, indent=1))
    for path in [*draft.iterdir(), draft]:
        _flush(path)
    draft.rename(final)
    _flush(home)
    for old in _folders(run)[keep:]:
        shutil.rmtree(old)
    return final


def load_latest(run: Path) -> tuple[RunState | None, list[str]]:
    """The newest usable state, and one line per checkpoint that was refused.

    (None, []) when there is no checkpoint. Raises CheckpointError when there are some and none is usable.
    """
    refused: list[str] = []
    for folder in _folders(run):
        try:
            return load_checkpoint(folder), refused
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"{'; '.join(refused)}; delete {run / 'checkpoints'} to start over")
    return None, []


def load_checkpoint(folder: Path) -> RunState:
    """Read one checkpoint folder. Raises CheckpointError if anything is missing, truncated or altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["umup_checkpoint"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is missing or damaged") from None
    if version != VERSION:
        raise CheckpointError(f"checkpoint {folder}: version {version}, this umup reads {VERSION}")
    for name, expected in files.items():
        if not (folder / name).is_file() or _fingerprint(folder / name) != expected:
            raise CheckpointError(f"checkpoint {folder}: {name} is truncated or altered")
    state = json.loads((folder / STATE).read_text())
    training = load_file(folder / TRAINING)
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "rng": {}, "precision": {}}
    for key, tensor in training.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return RunState(state["step"], state["data"], load_file(folder / MODEL), **parts)


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy named tensors into the model, one at a time. Raises CheckpointError naming what does not fit."""
    left = dict(model.named_parameters())
    faults = []
    for name, tensor in tensors:
        parameter = left.pop(name, None)
        if parameter is None:
            faults.append(f"{name} is not in the model")
        elif parameter.shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}")
        else:
            parameter.data.copy_(tensor)
    faults += [f"{name} is missing" for name in left]
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}")


def save_model(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write weights to one safetensors file, atomically."""
    draft = path.with_name(f".{path.name}")
    _save(tensors, draft)
    _flush(draft)
    draft.rename(path)


def load_model(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights. Raises CheckpointError if it is not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by name. Each is read when it is asked for, so what is not held costs nothing.

    Raises CheckpointError for files that are missing, truncated or no safetensors.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._home: dict[str, Path] = {}
        for file in files:
            with _opened(file) as tensors:
                self._home |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._home[name]) as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None


class TensorLayout(NamedTuple):
    """What a file says of a tensor before its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


# As safetensors calls them.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_tensors(path: Path, layout: Sequence[TensorLayout], tensors: Iterable[Tensor]) -> None:
    """A safetensors file of tensors that come one at a time, in the layout's order: memory holds one of them.

    The format: the header's length as 8 bytes, the header as JSON, padded so that tensors start at a multiple of 8, and
    the tensors' bytes. Atomic.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in layout:
        start, end = end, end + part.bytes
        header[part.name] = {"dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draft = path.with_name(f".{path.name}")
    with draft.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part, tensor in zip(layout, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == part[1:], part
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _flush(draft)
    draft.rename(path)


def load_pickled(path: Path) -> Any:
    """What torch.save wrote, memory-mapped where its format (since torch 1.6) allows.

    Raises CheckpointError for files that hold more than tensors and plain values, before anything in them runs, and for
    damaged ones.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign protocol, which is refused where it matters
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        named = f"it names {code[1]}" if code else "it is no pickle of torch.save"
        raise CheckpointError(
            f"{path}: refused before anything in it runs: it holds more than tensors and plain values ({named}); "
            "save the weights as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError):
        raise CheckpointError(f"{path}: truncated, or not a file of torch.save; fetch it again") from None


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    draft.rename(path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, as safetensors says it
        raise RunError(f"{path}: cannot write ({error}); what was saved before is kept") from None


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory for results. Raises CheckpointError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write there ({error.strerror}); choose another --out") from None
