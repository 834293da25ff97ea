"""Base-shape files (`.bsh`) of microsoft/mup as the base of a plan.

    base = base_model(model, "base.bsh")                          # weighs nothing: parameters are on the meta device
    plan = umup.plan(model, base=base, scheme="mup", optimizer="adamw")

A file maps each parameter's name to its base shape, in which `null` is a side that does not grow:

    layers.0.weight:
        - 128
        - null

The base is the model with its parameters cut to these shapes. Where a model has the base's very width nothing grows,
and every number is 1 there, as in mup.

Not covered:
- another depth: mup knows none, and its files name every layer;
- the head size, which the files do not hold: attention that scales its logits by 1/head_dim, as mup's users write it,
  stays as it is;
- MuReadout and MuSharedReadout, which umup.plan refuses. Write `nn.Linear`.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umup.config.load import read_yaml
from umup.errors import ConfigError, PlanError, did_you_mean

BaseShape = tuple[int | None, ...]

# Sizes that modules keep beside their weights: class -> (attribute, a parameter whose first side is a multiple of it).
SIZES: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.MultiheadAttention: ("embed_dim", "out_proj.weight"),
    nn.RNNBase: ("hidden_size", "weight_hh_l0"),
    nn.RNNCellBase: ("hidden_size", "weight_hh"),
}


def read_base_shapes(path: str | Path) -> dict[str, BaseShape]:
    """Parameter name -> base shape, None for sides that do not grow; DataParallel's `module.` is taken off.

    Raises ConfigError, in one line, for files that cannot be read or are no base shapes.
    """
    path = Path(path)
    try:
        body = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"base shapes {path}: cannot be read ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"base shapes {path}: {error}") from None
    if not isinstance(body, dict) or not body:
        raise ConfigError(f"base shapes {path}: expected lines such as 'layer.weight: [128, null]', found no names")
    shapes = {str(name): _shape(path, name, sides) for name, sides in body.items()}
    wrapped = all(name.startswith("module.") for name in shapes)
    return {name.removeprefix("module."): s for name, s in shapes.items()} if wrapped else shapes


def base_model(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of `model` on the meta device whose parameters have the file's shapes; `umup.plan` takes it as its base.

    The model is the plain one (not wrapped, not compiled). Raises ConfigError for a broken file, and PlanError for
    names that only one of the two has and for shapes with another number of sides.
    """
    shapes = read_base_shapes(path)
    parameters = dict(model.named_parameters())
    _check_names(path, shapes, parameters)
    # deepcopy takes what `memo` holds in place of a copy, so that no weight is copied and tied ones stay tied.
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    for name, p in parameters.items():
        memo[id(p)] = nn.Parameter(_cut(path, name, p, shapes[name]), requires_grad=p.requires_grad)
    base = copy.deepcopy(model, memo)
    for name, module in base.named_modules():
        _resize(module, model.get_submodule(name))
    return base


def _shape(path: Path, name: object, sides: object) -> BaseShape:
    known = isinstance(sides, list) and all(side is None or (type(side) is int and side > 0) for side in sides)
    if not isinstance(sides, list) or not known:
        raise ConfigError(f"base shapes {path}: {name}: expected a list of sizes and nulls, found {sides!r}")
    return tuple(sides)


def _check_names(path: str | Path, shapes: Mapping[str, BaseShape], parameters: Mapping[str, nn.Parameter]) -> None:
    missing = [name for name in parameters if name not in shapes]
    if missing:
        raise PlanError(
            f"base shapes {path}: the model's parameter {missing[0]!r} is not in the file; "
            f"{did_you_mean(missing[0], shapes)}"
        )
    extra = [name for name in shapes if name not in parameters]
    if extra:
        raise PlanError(
            f"base shapes {path}: {extra[0]!r} is no parameter of the model; {did_you_mean(extra[0], parameters)}"
        )


def _cut(path: str | Path, name: str, p: nn.Parameter, shape: BaseShape) -> torch.Tensor:
    if len(shape) != p.ndim:
        raise PlanError(
            f"base shapes {path}: {name} has {len(shape)} sides there and {p.ndim} here ({tuple(p.shape)}); "
            "make the file from this model"
        )
    sides = [size if side is None else side for side, size in zip(shape, p.shape, strict=True)]
    return torch.empty(sides, dtype=p.dtype, device="meta")


def _resize(module: nn.Module, own: nn.Module) -> None:
    """Bring the size that a copied module keeps beside its weights to the base's."""
    for kind, (attribute, parameter) in SIZES.items():
        if isinstance(module, kind):
            mine, theirs = own.get_parameter(parameter), module.get_parameter(parameter)
            setattr(module, attribute, vars(own)[attribute] * theirs.shape[0] // mine.shape[0])
