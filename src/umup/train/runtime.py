"""What surrounds the loop: the device, random state, interrupts, the run directory.

Not covered: several devices.
"""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umup.checkpoint import make_directory, write_atomic
from umup.config.load import dump_yaml, load_config
from umup.config.sections import PrecisionConfig, RunConfig
from umup.data.tokenizer import tokenizer_file
from umup.errors import CheckpointError, ConfigError
from umup.rules.plan import Plan

# Fields that may differ when a run goes on: they change no weight.
HARMLESS = {
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.cache_dir",
}


def device_of(config: RunConfig) -> torch.device:
    """The device that `train.device` names. Raises ConfigError if it is not there."""
    name = config.train.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"train.device: {name!r} is not available here; write cpu or auto") from None
    return device


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random states, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    return state if device.type != "cuda" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Set what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Interrupt:
    """Set once Ctrl-C or SIGTERM has arrived."""

    requested = False


@contextmanager
def deferred_interrupts() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is never cut in half. A second one acts at once."""
    flag = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {s: signal.getsignal(s) for s in signals}

    def note(number: int, frame: Any) -> None:
        flag.requested = True
        for s, handler in previous.items():
            signal.signal(s, handler)

    for s in signals:
        signal.signal(s, note)
    try:
        yield flag
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def open_run(
    out: Path, config: RunConfig, plan: Plan, data_record: str, notice: Callable[[str], None] = lambda line: None
) -> None:
    """Make or re-enter a run directory: config.yaml, plan.json, data.json, tokenizer.json.

    A run may go on in other number formats: `notice` is told which. Raises CheckpointError if the directory cannot be
    written or belongs to another config or corpus, saying what differs.
    """
    make_directory(out)
    known = out / "config.yaml"
    if known.exists():
        before = load_config(known)
        _refuse_differences(out, before, config)
        if (out / "data.json").exists() and _recorded(out) != _contents(json.loads(data_record)):
            raise CheckpointError(f"run {out}: the corpus has changed since it began; choose another --out")
        if (out / "plan.json").exists():
            _refuse_other_rules(out, plan)
        for line in _precision_changes(before.precision, config.precision):
            notice(line)
    write_atomic(known, dump_yaml(config))
    write_atomic(out / "plan.json", plan.to_json())
    write_atomic(out / "data.json", data_record)
    if config.data.tokenizer != "bytes":
        shutil.copyfile(tokenizer_file(config.data.tokenizer), out / "tokenizer.json")


def _refuse_other_rules(out: Path, plan: Plan) -> None:
    """A newer umup may resolve the same config to other numbers; a run keeps those it began with."""
    changed = Plan.from_json((out / "plan.json").read_text()).diff(plan)
    if changed:
        name, quantity, before, after = changed[0]
        raise CheckpointError(
            f"run {out}: the rules have changed since it began ({name} {quantity} was {before} and is now {after}); "
            "choose another --out, or finish it with the umup that began it"
        )


def _recorded(out: Path) -> dict[str, Any]:
    try:
        return _contents(json.loads((out / "data.json").read_text()))
    except (ValueError, AttributeError):
        raise CheckpointError(f"{out / 'data.json'}: not a record of data; choose another --out") from None


def _contents(data_record: dict[str, Any]) -> dict[str, Any]:
    """A data record without the places of its token files."""
    return {k: v for k, v in _flat(data_record).items() if k not in ("train.path", "val.path")}


def _refuse_differences(out: Path, old: RunConfig, new: RunConfig) -> None:
    before, after = (_flat(c.model_dump(mode="json", exclude={"precision"})) for c in (old, new))
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k) and k not in HARMLESS]
    if changed:
        listed = ", ".join(f"{k} was {before.get(k)} and is now {after.get(k)}" for k in changed)
        raise CheckpointError(f"run {out} was made by another config: {listed}; choose another --out")


def _precision_changes(old: PrecisionConfig, new: PrecisionConfig) -> list[str]:
    # As text, because the order of overrides counts and dicts are equal in any.
    before, after = ({k: str(v) for k, v in p.model_dump(mode="json").items()} for p in (old, new))
    return [f"precision.{k} was {before[k]} and is now {after[k]}" for k in before if before[k] != after[k]]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        leaves.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return leaves
