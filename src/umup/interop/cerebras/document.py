"""A model-zoo file, read: which layout, which class, which format of muP, and every key with its default.

Layouts: `flat`, up to release 2.2 (`model:`, `optimizer:` with its learning rates, `runconfig:`), and `trainer`, from
2.3 (`trainer: init: ...`). Formats: `standard`; `legacy`, whose file holds final numbers (`output_logits_scale`,
`embeddings_scale`, `scale_qk_dot_by_d` and `adjust_learning_rate: decoder_kernel`); `current`, which holds base widths
and base numbers (`mup_base_hidden_size`, `mup_base_filter_size`) and lets the model compute.

Refused: keys and classes that the zoo does not have, half a format, two formats at once, encoders (BERT, T5).
Numbers in quotes, and `1e-05` as YAML 1.1 reads it, are numbers where a number is known to stand; yes and no are bools.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from umup.errors import ConfigError, did_you_mean
from umup.interop.cerebras.keys import (
    ALIASES,
    ENCODERS,
    FLAT_SECTIONS,
    GROUPS,
    INIT_SECTIONS,
    KEYS,
    LEGACY_GROUP,
    MODELS,
    OPTIMIZER_KEYS,
    OPTIMIZERS,
    PARALLEL_KEYS,
    SCHEDULERS,
    TRAINER_SECTIONS,
    Code,
)

Layout = Literal["flat", "trainer"]
Format = Literal["standard", "legacy", "current"]
Body = dict[str, Any]
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Leg:
    """One schedule of a sequence: the class without its LR, where it stands, its parameters as written."""

    kind: str
    where: str
    params: Mapping[str, Any]

    def rate(self, key: str) -> float:
        """A rate as a number. Raises ConfigError where it is missing or none."""
        if self.params.get(key) is None:
            raise ConfigError(f"{self.where}.{key} is missing; a {self.kind} schedule needs it")
        return number(f"{self.where}.{key}", self.params[key])


@dataclass(frozen=True)
class Document:
    """A file's body with what was found in it; `model` has every key, in the zoo's spelling, with its default."""

    layout: Layout
    body: Body
    code: Code
    family: str
    format: Format
    given: Mapping[str, Any]
    model: Mapping[str, Any]
    optimizer_name: str
    optimizer: Mapping[str, Any]
    adjust: Mapping[str, float]
    legs: tuple[Leg, ...]

    @property
    def init(self) -> Mapping[str, Any]:
        """`trainer.init`; empty in the flat layout."""
        found: Mapping[str, Any] = self.body["trainer"]["init"] if self.layout == "trainer" else {}
        return found

    def copy(self) -> Body:
        """The body to write into; what was one object (a data loader named twice) stays one."""
        return deepcopy(self.body)


def is_document(body: Any) -> bool:
    """Whether a parsed YAML body is a model-zoo file, by what only such files have."""
    if not isinstance(body, Mapping):
        return False
    model = body.get("model")
    keys = {"num_hidden_layers", "num_heads", "filter_size", "max_position_embeddings", "position_embedding_type"}
    flat = {"train_input", "eval_input", "runconfig"} & set(body) or (isinstance(model, Mapping) and keys & set(model))
    return "trainer" in body or bool(flat)


def read_document(body: Any) -> Document:
    """Read a parsed YAML body. Raises ConfigError, naming the key, for what this module's docstring refuses."""
    layout, model, optimizer = _sections(body)
    name, params = _optimizer(layout, optimizer)
    given = _canonical(model)
    code, family = _class(given, model, layout)
    full = {key.name: given.get(key.name, key.default_in(code)) for key in KEYS.values()}
    full = {key: KEYS[key].default_in(code) if value is None else value for key, value in full.items()}
    for key in ("hidden_size", "num_hidden_layers"):
        if full[key] is None:
            raise ConfigError(f"model.{key} is missing; every decoder's config has it")
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "filter_size",
        "vocab_size",
        "max_position_embeddings",
    ):
        if full[key] <= 0:
            raise ConfigError(f"model.{key}: expected a positive number, found {full[key]}")
    if full["hidden_size"] % full["num_heads"]:
        raise ConfigError(
            f"model.num_heads {full['num_heads']} does not divide model.hidden_size {full['hidden_size']}"
        )
    adjust = _adjustments(params)
    raw = body["trainer"]["init"].get("schedulers") if layout == "trainer" else None
    legs = tuple(_legs("schedulers", raw) if raw is not None else _legs("optimizer.learning_rate", _scalar(params)))
    return Document(layout, body, code, family, _format(layout, full, adjust), given, full, name, params, adjust, legs)


def number(where: str, value: Any) -> float:
    """A finite number, also as text. Raises ConfigError."""
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not isfinite(found):
        raise ConfigError(f"{where}: expected a number, found {value!r}")
    return found


def _sections(body: Any) -> tuple[Layout, Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(body, Mapping):
        raise ConfigError(f"expected sections such as 'model:' or 'trainer:', found {type(body).__name__}")
    if "trainer" not in body:
        _known("", body, FLAT_SECTIONS)
        return "flat", _mapping("model", body.get("model")), _mapping("optimizer", body.get("optimizer"))
    _known("", body, ("trainer",))
    if isinstance(body["trainer"], list):
        raise ConfigError("trainer: a list of trainers; write the one to convert as 'trainer: {init: ..., fit: ...}'")
    trainer = _mapping("trainer", body["trainer"])
    _known("trainer.", trainer, TRAINER_SECTIONS)
    init = _mapping("trainer.init", trainer.get("init"))
    _known("trainer.init.", init, INIT_SECTIONS)
    return "trainer", _mapping("model", init.get("model")), _mapping("optimizer", init.get("optimizer"))


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        raise ConfigError(f"{where} is missing: expected a section with keys")
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a section with keys, found {type(value).__name__}")
    return value


def _known(where: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise ConfigError(f"unknown key '{where}{key}'; {did_you_mean(key, known)}")


def _optimizer(layout: Layout, section: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Its class, lower case, and its parameters."""
    if layout == "trainer":
        if len(section) != 1:
            raise ConfigError(f"optimizer: expected one class such as 'AdamW:', found {', '.join(map(str, section))}")
        ((name, params),) = section.items()
        params = {} if params is None else _mapping(f"optimizer.{name}", params)
    else:
        name, params = section.get("optimizer_type", "AdamW"), section
    if str(name).lower() not in OPTIMIZERS:
        raise ConfigError(f"optimizer: unknown class {name!r}; {did_you_mean(name, OPTIMIZERS)}")
    _known("optimizer.", params, OPTIMIZER_KEYS)
    return str(name).lower(), params


def _canonical(model: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys by their first name, values of the kind that the zoo expects."""
    found: dict[str, Any] = {}
    for key, value in model.items():
        name = ALIASES.get(key, key)
        if name.startswith("mup_base_d_"):
            raise ConfigError(
                f"model.{key}: of T5, which umup convert does not read; decoders have mup_base_hidden_size"
            )
        if name not in KEYS:
            raise ConfigError(f"unknown key 'model.{key}'; {did_you_mean(key, [*KEYS, *ALIASES])}")
        if name in found:
            raise ConfigError(f"model.{key} and model.{name} are one key; remove one")
        found[name] = value if value is None else _coerced(f"model.{key}", KEYS[name].kind, value)
    return found


def _coerced(where: str, kind: type | None, value: Any) -> Any:
    if kind in (int, float):
        found = number(where, value)
        if kind is int and not found.is_integer():
            raise ConfigError(f"{where}: expected a whole number, found {value!r}")
        return kind(found)
    if kind is bool and not isinstance(value, bool):
        if str(value).lower() not in WORDS:
            raise ConfigError(f"{where}: expected true or false, found {value!r}")
        return WORDS[str(value).lower()]
    if kind in (str, dict) and not isinstance(value, kind):
        raise ConfigError(f"{where}: expected {'text' if kind is str else 'a section'}, found {value!r}")
    return value.lower() if kind is str else value


def _class(given: Mapping[str, Any], model: Mapping[str, Any], layout: Layout) -> tuple[Code, str]:
    """The zoo's class and the family's name, which the flat layout leaves to the keys."""
    name = given.get("name")
    if name in ENCODERS:
        raise ConfigError(f"model.name {name!r}: encoders are not converted; known: {', '.join(MODELS)}")
    if name is not None and name not in MODELS:
        raise ConfigError(f"model.name: unknown class {name!r}; {did_you_mean(name, MODELS)}")
    if name is not None:
        return MODELS[name], name
    if layout == "trainer":
        raise ConfigError(f"model.name is missing; write one of {', '.join(MODELS)}")
    shared = given.get("attention_module") == "multiquery_attention"
    if any(key in model for key in PARALLEL_KEYS):
        return "parallel", "falcon" if shared else "gptj"
    positions = given.get("position_embedding_type") or "learned"
    named = {"rotary": "llama", "alibi": "bloom" if given.get("embedding_layer_norm") else "mpt"}
    return "sequential", named.get(positions, "starcoder" if shared else "gpt2")


def _adjustments(params: Mapping[str, Any]) -> dict[str, float]:
    given = params.get("adjust_learning_rate")
    if given is None:
        return {}
    section = _mapping("optimizer.adjust_learning_rate", given)
    _known("optimizer.adjust_learning_rate.", section, (*GROUPS, LEGACY_GROUP))
    return {group: _positive(f"optimizer.adjust_learning_rate.{group}", value) for group, value in section.items()}


def _positive(where: str, value: Any) -> float:
    found = number(where, value)
    if found <= 0:
        raise ConfigError(f"{where}: expected a positive number, found {value!r}")
    return found


def _format(layout: Layout, model: Mapping[str, Any], adjust: Mapping[str, float]) -> Format:
    bases = {key: model[key] for key in ("mup_base_hidden_size", "mup_base_filter_size")}
    logits, kernel = model["output_logits_scale"], LEGACY_GROUP in adjust
    if any(value is not None for value in bases.values()):
        for key, value in bases.items():
            if value is None:
                raise ConfigError(f"model.{key} is missing: both base sizes or neither (write the base's own)")
            _positive(f"model.{key}", value)
        if logits is not None or kernel:
            key = (
                "model.output_logits_scale" if logits is not None else f"optimizer.adjust_learning_rate.{LEGACY_GROUP}"
            )
            raise ConfigError(f"{key} is of the legacy muP format and mup_base_hidden_size of the current; remove one")
        return "current"
    parts = {
        "model.output_logits_scale": bool(logits),
        f"optimizer.adjust_learning_rate.{LEGACY_GROUP}": kernel,
        "model.scale_qk_dot_by_d": bool(model["scale_qk_dot_by_d"]),
    }
    # The current class takes scale_qk_dot_by_d outside of muP as well.
    if not any(parts.values()) or (layout == "trainer" and not logits and not kernel):
        return "standard"
    missing = [key for key, there in parts.items() if not there]
    if missing:
        present = ", ".join(key for key, there in parts.items() if there)
        raise ConfigError(f"an incomplete muP config: {present} without {', '.join(missing)}; write all or none")
    return "legacy"


def _scalar(params: Mapping[str, Any]) -> Any:
    return params.get("learning_rate")


def _legs(where: str, raw: Any) -> Iterator[Leg]:
    """The schedules in either layout's spelling, wrappers undone. Raises ConfigError for unknown ones."""
    if raw is None:
        return
    if isinstance(raw, list):
        for i, entry in enumerate(raw):
            yield from _legs(f"{where}[{i}]", entry)
        return
    if not isinstance(raw, Mapping):
        yield Leg("Constant", where, {"learning_rate": number(where, raw)})
        return
    if "scheduler" in raw and not isinstance(raw["scheduler"], Mapping):
        yield _leg(where, raw["scheduler"], raw)
    elif len(raw) == 1:
        ((name, params),) = raw.items()
        yield from _wrapped(f"{where}.{name}", str(name), _mapping(f"{where}.{name}", params))
    else:
        raise ConfigError(f"{where}: expected 'scheduler: Linear' or one class such as 'LinearLR:'")


def _wrapped(where: str, name: str, params: Mapping[str, Any]) -> Iterator[Leg]:
    lower = name.lower()
    if lower in ("sequentiallr", "chainedscheduler"):
        yield from _legs(f"{where}.schedulers", params.get("schedulers"))
    elif lower == "scaleperparamlr":
        yield from _legs(f"{where}.scheduler", params.get("scheduler"))
    elif not lower.endswith("wd"):  # a schedule of weight decay, which has no rate
        yield _leg(where, name, params)


def _leg(where: str, name: Any, params: Mapping[str, Any]) -> Leg:
    known = {kind.lower(): kind for kind in SCHEDULERS}
    kind = known.get(str(name).lower().removesuffix("lr"))
    if kind is None:
        raise ConfigError(f"{where}: unknown scheduler {name!r}; {did_you_mean(name, SCHEDULERS)}")
    leg = Leg(kind, where, params)
    for key in SCHEDULERS[kind]:
        if key != "learning_rates":
            leg.rate(key)
    return leg
