"""The flat layout (up to release 2.2) moved into the trainer layout (from 2.3), key by key.

What is moved is a table, the zoo's own; a key of `runconfig` that is not in it is an error. The other way does not
exist, there or here: configs are written in the layout of their input, or in this one.
"""

from collections.abc import Mapping
from typing import Any

from umup.errors import ConfigError, did_you_mean
from umup.interop.cerebras.document import Body, Document
from umup.interop.cerebras.keys import SCHEDULERS

# Flat section and key -> path under trainer.init.
MOVES: Mapping[tuple[str, str], tuple[str, ...]] = {
    **{("runconfig", key): (key,) for key in ("seed", "model_dir")},
    **{
        ("runconfig", key): ("backend", key)
        for key in (
            *("enable_distributed", "main_process_id", "dist_backend", "init_method", "sync_batchnorm"),
            *("compile_dir", "compile_only", "validate_only", "retrace_every_iteration", "python_paths", "mount_dirs"),
            *("num_csx", "max_wgt_servers", "max_act_per_csx", "num_workers_per_csx", "job_labels", "job_priority"),
        )
    },
    **{
        ("runconfig", key): ("loop", key)
        for key in ("num_steps", "max_steps", "num_epochs", "steps_per_epoch", "eval_frequency", "eval_steps")
    },
    ("runconfig", "checkpoint_steps"): ("checkpoint", "steps"),
    **{
        ("runconfig", key): ("checkpoint", key)
        for key in ("disable_strict_checkpoint_loading", "autoload_last_checkpoint", "save_initial_checkpoint")
    },
    ("runconfig", "log_steps"): ("logging", "log_steps"),
    ("runconfig", "logging"): ("logging", "log_level"),
    ("runconfig", "precision_opt_level"): ("precision", "precision_opt_level"),
    ("model", "mixed_precision"): ("precision", "enabled"),
    ("model", "fp16_type"): ("precision", "fp16_type"),
    **{
        ("optimizer", key): ("precision", key)
        for key in (
            *("loss_scaling_factor", "initial_loss_scale", "steps_per_increase", "min_loss_scale", "max_loss_scale"),
            *("max_gradient_norm", "max_gradient_value"),
        )
    },
    ("optimizer", "log_summaries"): ("precision", "log_loss_scale"),
    ("optimizer", "grad_accum_steps"): ("loop", "grad_accum_steps"),
}
# Callbacks: flat section and key -> class, its argument.
CALLBACKS: Mapping[tuple[str, str], tuple[str, str]] = {
    **{
        ("runconfig", key): ("GlobalFlags", f"csx.debug.{key}")
        for key in (
            *("compile_crd_memory_gi", "execute_crd_memory_gi", "wrk_memory_gi", "act_memory_gi", "cmd_memory_gi"),
            *("wgt_memory_gi", "chf_memory_gi", "drop_data", "lazy_initialization", "log_initialization"),
        )
    },
    ("train_input", "micro_batch_size"): ("ScopedTrainFlags", "csx.performance.micro_batch_size"),
    ("eval_input", "micro_batch_size"): ("ScopedValidateFlags", "csx.performance.micro_batch_size"),
    ("runconfig", "max_checkpoints"): ("KeepNCheckpoints", "n"),
    ("runconfig", "load_checkpoint_states"): ("LoadCheckpointStates", "load_checkpoint_states"),
}
FLAG_CALLBACKS = {
    ("runconfig", "check_loss_values"): "CheckLoss",
    ("runconfig", "log_input_summaries"): "LogInputSummaries",
    ("optimizer", "log_summaries"): "ComputeNorm",
}
CALLBACK_ORDER = (
    *("GlobalFlags", "ScopedTrainFlags", "ScopedValidateFlags", "LogInputSummaries", "CheckLoss", "ComputeNorm"),
    *("LoadCheckpointStates", "KeepNCheckpoints"),
)
CHECKPOINT_PATH = ("runconfig", "checkpoint_path")
IGNORED = {("runconfig", "mode")}


def to_trainer(document: Document, body: Body) -> Body:
    """A flat body in the trainer layout. Raises ConfigError for what has no place there."""
    init: dict[str, Any] = {}
    callbacks: list[dict[str, Any]] = []
    taken: set[tuple[str, str]] = set()
    for section in ("runconfig", "model", "optimizer", "train_input", "eval_input"):
        for key, value in (body.get(section) or {}).items():
            place = (section, key)
            if place in MOVES and value is not None:
                _put(init, MOVES[place], value)
            if place in FLAG_CALLBACKS and value:
                callbacks.append({FLAG_CALLBACKS[place]: {}})
            if place in CALLBACKS and value is not None:
                _callback(callbacks, *CALLBACKS[place], value)
            if place in {*MOVES, *FLAG_CALLBACKS, *CALLBACKS}:
                taken.add(place)
    _check_runconfig(body.get("runconfig") or {}, taken)
    model = _rest(body, "model", taken)
    optimizer = _rest(body, "optimizer", taken)
    schedulers = _schedulers(optimizer)
    init["model"] = {**model, "name": model.get("name") or document.family}
    init["optimizer"] = {optimizer.pop("optimizer_type", "AdamW"): optimizer}
    init |= {"schedulers": schedulers} if schedulers else {}
    init |= {"sparsity": body["sparsity"]} if body.get("sparsity") else {}
    callbacks.sort(key=lambda callback: CALLBACK_ORDER.index(next(iter(callback))))
    init |= {"callbacks": callbacks} if callbacks else {}
    init |= {"loggers": [{"WandbLogger": body["wandb"]}]} if body.get("wandb") else {}
    return {"trainer": {"init": init, **_loaders(body, taken)}}


def _loaders(body: Body, taken: set[tuple[str, str]]) -> Body:
    path = (body.get("runconfig") or {}).get("checkpoint_path")
    found: Body = {}
    if body.get("train_input"):
        found["fit"] = {"train_dataloader": _rest(body, "train_input", taken)}
    if body.get("eval_input"):
        loader = _rest(body, "eval_input", taken)
        found.setdefault("fit", {})["val_dataloader"] = loader
        found["validate"] = {"val_dataloader": loader}
        found["validate_all"] = {"val_dataloaders": loader}
        if "train_dataloader" not in found["fit"]:
            del found["fit"]
    for section, key in (("fit", "ckpt_path"), ("validate", "ckpt_path"), ("validate_all", "ckpt_paths")):
        if path is not None and section in found:
            found[section][key] = path
    return found


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *sections, key = path
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def _callback(callbacks: list[dict[str, Any]], name: str, argument: str, value: Any) -> None:
    for callback in callbacks:
        if name in callback:
            callback[name][argument] = value
            return
    callbacks.append({name: {argument: value}})


def _rest(body: Body, section: str, taken: set[tuple[str, str]]) -> dict[str, Any]:
    return {key: value for key, value in (body.get(section) or {}).items() if (section, key) not in taken}


def _check_runconfig(runconfig: Mapping[str, Any], taken: set[tuple[str, str]]) -> None:
    for key in runconfig:
        place = ("runconfig", key)
        if place not in taken and place not in IGNORED and place != CHECKPOINT_PATH:
            known = [name for section, name in (*MOVES, *CALLBACKS, *FLAG_CALLBACKS) if section == "runconfig"]
            raise ConfigError(f"runconfig.{key} has no place in the trainer layout; {did_you_mean(key, known)}")


def _schedulers(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The flat learning rates as scheduler classes; a constant one stays in the optimizer, too."""
    given = optimizer.get("learning_rate")
    if given is None:
        return []
    if not isinstance(given, list | Mapping):
        return [{"ConstantLR": {"learning_rate": given}}]
    del optimizer["learning_rate"]
    entries = given if isinstance(given, list) else [given]
    chained = any(str(entry.get("main_scheduler", "")).lower().startswith("chained") for entry in entries)
    classes = [_scheduler(entry) for entry in entries]
    if len(classes) == 1 and not chained:
        return classes
    return [{"ChainedScheduler" if chained else "SequentialLR": {"schedulers": classes}}]


def _scheduler(entry: Mapping[str, Any]) -> dict[str, Any]:
    known = {kind.lower(): kind for kind in SCHEDULERS}
    kind = known[str(entry["scheduler"]).lower().removesuffix("lr")]
    params = {key: value for key, value in entry.items() if key not in ("scheduler", "main_scheduler")}
    name = kind if kind == "CosineAnnealingWarmRestarts" else f"{kind}LR"
    return {name: params}
