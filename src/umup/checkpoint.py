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
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
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


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy named tensors into the model. Raises CheckpointError naming every parameter that does not fit."""
    parameters = dict(model.named_parameters())
    faults = [f"{n} is missing" for n in parameters if n not in tensors]
    faults += [f"{n} is not in the model" for n in tensors if n not in parameters]
    faults += [
        f"{n} has shape {tuple(t.shape)}, the model wants {tuple(parameters[n].shape)}"
        for n, t in tensors.items()
        if n in parameters and parameters[n].shape != t.shape
    ]
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}")
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


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
