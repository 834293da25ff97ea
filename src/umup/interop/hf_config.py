"""config.json <-> ModelConfig, by the tables of `hf_formats.py`. No torch.

    read_directory(path)        config.json -> our config, and what our config has no place for
    write(format, shape)        our shape -> what config.json says of it
    expressible(name, shape)    our shape -> the same network as the format has it, or a ConfigError naming the feature

A format can express a shape iff what is written reads back as that shape, but for differences that zeros, ones and
permutations make up for; nothing else decides what can be exported.

Keys that no table knows are told in a note, not refused: real files are full of them, and every export compares logits.

Not covered: scaled rotary frequencies, sliding windows, experts, soft caps, normed queries and keys, and what else the
tables name: files that ask for them are refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from umup.config.load import parse_config
from umup.config.sections import ModelConfig, RunConfig
from umup.errors import ConfigError, did_you_mean
from umup.interop.hf_formats import FORMATS, HARMLESS, ONLY, Format, Keys
from umup.models.families import FAMILIES
from umup.models.specs import Shape, shape_of

CONFIG = "config.json"


@dataclass(frozen=True)
class Reading:
    """`name`: the row of FORMATS. `multipliers` are the format's, by our names; most have none."""

    name: str
    format: Format
    config: RunConfig
    multipliers: Mapping[str, float]
    body: Mapping[str, Any]
    notes: tuple[str, ...]


def read_config(path: str | Path) -> RunConfig:
    """The config of a Hugging Face directory or config.json, under `sp` at its default sigma_init.

    Raises ConfigError for files that are none, for what the decoder has not, and for multipliers that no config says
    (Granite's), which only a plan can hold.
    """
    found = read_directory(Path(path))
    for name, key in found.format.multipliers.items():
        if found.multipliers[name] != plain(shape_of(found.config.model))[name]:
            raise ConfigError(f"{path}: {key} has no place in a config; umup export --to umup keeps it in the plan")
    return found.config


def read_directory(path: Path) -> Reading:
    """All of it. `path` is the directory or the file. Raises ConfigError."""
    file = path / CONFIG if path.is_dir() else path
    keys = Keys(file, _body(file))
    model_type = keys.get(("model_type",))
    name = next((n for n, f in FORMATS.items() if f.model_type == model_type), None)
    if name is None:
        known = [f.model_type for f in FORMATS.values()]
        raise ConfigError(f"{file}: unknown model_type {model_type!r}; {did_you_mean(model_type, known)}")
    form = FORMATS[name]
    _refuse_features(keys, form)
    fields: dict[str, Any] = {}
    for part in form.parts:
        fields |= part.read(keys)
    multipliers = {ours: keys.number(theirs, 1.0) for ours, theirs in form.multipliers.items()}
    rest = {n for n, value in keys.values.items() if value is not None} - keys.asked
    unknown = sorted(n for n in rest if n.rpartition(".")[2] not in HARMLESS | ONLY.keys())
    if unknown:
        keys.notes.append(f"{CONFIG} has keys that umup does not know and leaves out of account: {', '.join(unknown)}")
    config = _config(file, form, fields)
    return Reading(name, form, config, multipliers, keys.values, tuple(keys.notes))


def _body(file: Path) -> Mapping[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{file}: expected an object with a model_type, found {type(body).__name__}")
    return body


def _refuse_features(keys: Keys, form: Format) -> None:
    own = set(form.multipliers.values())
    for key, fine in {**ONLY, **form.only}.items():
        value = keys.get((key,)) if key not in own else None
        if value is not None and value not in fine:
            wanted = " or ".join(json.dumps(v) for v in fine) or "null"
            raise keys.refuse(key, f"is a feature that umup's decoder does not have (only {wanted})")
    kinds = keys.get(("layer_types",), [])
    if any(kind != "full_attention" for kind in kinds):
        raise keys.refuse("layer_types", "is a feature that umup's decoder does not have (only full_attention)")


def _config(file: Path, form: Format, fields: Mapping[str, Any]) -> RunConfig:
    tokenizer = str(file.parent / "tokenizer.json")
    model = model_section(form.families, fields)
    try:
        config = parse_config({"model": model, "parametrization": {"scheme": "sp"}, "data": {"tokenizer": tokenizer}})
        shape_of(config.model)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config


def model_section(families: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config's model section: of the families the one that leaves the least to say, and what it leaves."""

    def section(name: str) -> dict[str, Any]:
        default = vars(FAMILIES[name].traits)
        return {"family": name, **{k: v for k, v in fields.items() if k not in default or v != default[k]}}

    return min(map(section, families), key=len)


# --- writing a table ---------------------------------------------------------------------------------------------

# Differences that constants make up for: zeros for biases, ones for gains.
WIDER = {"norm_gain", "norm_bias", "attention_bias", "mlp_bias", "head_bias"}
# Which features rotary pairs is a permutation of rows; dropout and the frequencies of absent positions do nothing.
INDIFFERENT = {"rotary_interleaved", "dropout"}


def write(form: Format, shape: Shape, multipliers: Mapping[str, float]) -> dict[str, Any]:
    """What config.json says of the network; `multipliers` by our names, of which those of the format are written."""
    mine = {**vars(shape), **vars(shape.traits)}
    body: dict[str, Any] = {"architectures": [form.architecture], "model_type": form.model_type}
    for part in form.parts:
        body |= part.write(mine)
    return body | {theirs: multipliers[ours] for ours, theirs in form.multipliers.items()}


def expressible(name: str, shape: Shape) -> Shape:
    """The shape as the format has it. Raises ConfigError naming the first feature that it has not."""
    form = FORMATS[name]
    theirs = _read_back(form, shape)
    mine, found = ({**vars(s.traits), **vars(s)} for s in (shape, theirs))
    skipped = INDIFFERENT | {"family", "traits"}
    if shape.traits.positions != "rotary":
        skipped = skipped | {"rope_theta"}
    for key, value in mine.items():
        if key in skipped or value == found[key] or (key in WIDER and found[key]):
            continue
        raise ConfigError(
            f"--to hf-{name}: {form.architecture} cannot express model.{key}: {value} (it has {found[key]})"
        )
    return replace(theirs, dropout=shape.dropout)


def _read_back(form: Format, shape: Shape) -> Shape:
    keys = Keys(Path(CONFIG), write(form, shape, plain(shape)))
    fields: dict[str, Any] = {"family": form.families[0]}
    for part in form.parts:
        fields |= part.read(keys)
    return shape_of(ModelConfig(**fields))


def plain(shape: Shape) -> dict[str, float]:
    """The multipliers of a network that has none."""
    return {"embedding": 1.0, "attention": 1 / sqrt(shape.head_dim), "residual": 1.0, "logits": 1.0}


def native(family: str) -> str | None:
    """The format that a family of ours is, if any: the first that names it."""
    return next((name for name, form in FORMATS.items() if family in form.families), None)
