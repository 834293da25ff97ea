"""SP to muP, muP to SP, legacy to current: model-zoo configs written as model-zoo configs.

A file is kept as it stands but for what muP is about. The tutorial's rule (2304.03208, table 14; the zoo's script),
with m = hidden_size/base width, s, lr, e tuned on the base, and L layers:

    embedding_initializer s, initializer s/sqrt(m), output_layer_initializer s/sqrt(2 L m), each cut at two stds
    embeddings_scale e, output_logits_scale 1/m, scale_qk_dot_by_d, adjust_learning_rate: {decoder_kernel: 1/m}
    every rate of the schedule times lr/(its peak)

in the legacy format, which the flat layout has, and the same by base values in the current one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from umup.errors import ConfigError
from umup.interop.cerebras.document import Body, Document, read_document
from umup.interop.cerebras.keys import ADAMS, ALIASES, LEGACY_GROUP
from umup.interop.cerebras.layout import to_trainer
from umup.interop.cerebras.numbers import RESIDUAL, Init, Numbers, faults, numbers, ratios
from umup.interop.cerebras.schedule import check_joints, moved_rates, original_rates, peak

MUP_KEYS = (
    *("mup_base_hidden_size", "mup_base_filter_size", "output_logits_scale", "output_logits_alpha", "embeddings_scale"),
    *("scale_qk_dot_by_d", "scale_output_logits_by_d", "attention_logits_alpha"),
)
LATER_INITIALIZERS = ("ffn_initializer", "ffn_output_layer_initializer")


@dataclass(frozen=True)
class Tuned:
    """What was tuned on the base model: width, peak rate, initial std, embedding and output multiplier.

    The defaults are Cerebras-GPT's (2304.03208).
    """

    width: int = 256
    lr: float = 6e-3
    std: float = 0.08
    embedding: float = 10.0
    logits: float = 1.0


@dataclass(frozen=True)
class Converted:
    """A body to write, and what is to be said of it."""

    body: Body
    notes: tuple[str, ...] = ()


def sp_to_mup(document: Document, tuned: Tuned, current: bool, faithful: bool = False) -> Converted:
    """An SP config as muP; `current`: in the current layout and format, else in the input's.

    faithful: as the zoo's script does it, which takes a muP config for SP, and knows only its own schedules.
    Raises ConfigError for what is muP already and for what muP's rules do not cover.
    """
    check_is_sp(document, faithful)
    if document.optimizer_name not in ADAMS:
        raise ConfigError(f"optimizer {document.optimizer_name}: muP's rates are Adam's here; write AdamW")
    to_current = current or document.layout == "trainer"
    if document.code == "parallel" and not to_current:
        raise ConfigError(
            f"{document.family}: its class has no keys for muP in the flat layout (2.3 has); write --layout current"
        )
    body, notes = document.copy(), []
    if faithful and document.layout == "flat":
        _write_rates(document, body, lambda raw: original_rates(document, raw, tuned.lr), tuned.lr)
    else:
        check_joints(document)
        _move_peak(document, body, tuned.lr)
        notes += _schedule_notes(document, tuned.lr)
    m = document.model["hidden_size"] / tuned.width
    depth = 2 * document.model["num_hidden_layers"]
    stds = {"embedding": 1.0, "attention": m**-0.5, "ffn_in": m**-0.5, **dict.fromkeys(RESIDUAL, (depth * m) ** -0.5)}
    wanted = Numbers(
        init={role: Init(tuned.std * factor, 2.0) for role, factor in stds.items()},
        lr={},
        embedding=tuned.embedding,
        logits=tuned.logits / m,
        attention=document.model["attention_logits_alpha"],
        base=(float(tuned.width), document.model["filter_size"] / m),
    )
    if not document.model["share_embedding_weights"]:
        std = document.model["initializer_range"]
        notes.append(
            f"the untied head starts at initializer_range {std:g}, whatever was tuned: the zoo has no key for it"
        )
    if to_current:
        _optimizer(body).pop("adjust_learning_rate", None)
        return _as_current(document, body, wanted, faithful, notes)
    model = body["model"]
    for key in LATER_INITIALIZERS:
        model.pop(key, None)
    write_inits(model, wanted.init, Init.times, {}, faithful=True)
    model["output_logits_scale"] = wanted.logits
    model["embeddings_scale"] = wanted.embedding
    model["scale_qk_dot_by_d"] = True
    body["optimizer"]["adjust_learning_rate"] = {LEGACY_GROUP: 1 / m}
    return Converted(body, tuple(notes))


def mup_to_current(document: Document, faithful: bool = False) -> Converted:
    """A legacy muP config in the current layout and format. Raises ConfigError where nothing is to be done."""
    if document.format != "legacy":
        raise ConfigError(f"the config is muP of the {document.format} format already; there is nothing to convert")
    body = document.copy()
    del _optimizer(body)["adjust_learning_rate"]
    return _as_current(document, body, numbers(document), faithful, [])


def to_sp(document: Document, lr: float | None, std: float, current: bool) -> Converted:
    """The config in standard parametrization: GPT-2's init (0.02, outputs /sqrt(2L)), one rate, no multipliers.

    A muP rate is the base's, so that SP's must be given. Raises ConfigError.
    """
    if document.format == "standard":
        if current and document.layout == "flat":
            return Converted(to_trainer(document, document.copy()))
        raise ConfigError("the config is in standard parametrization already; there is nothing to convert")
    if lr is None:
        raise ConfigError("the rates of a muP config are the base's; write the peak rate of the SP run, --base-lr RATE")
    body = document.copy()
    _move_peak(document, body, lr)
    if current and document.layout == "flat":
        body["optimizer"].pop("adjust_learning_rate", None)
        body = to_trainer(document, body)
    trainer = "trainer" in body
    model = body["trainer"]["init"]["model"] if trainer else body["model"]
    _optimizer(body).pop("adjust_learning_rate", None)
    for key in (*MUP_KEYS, *LATER_INITIALIZERS):
        model.pop(key, None)
    depth = (2 * document.model["num_hidden_layers"]) ** -0.5
    inits = {role: Init(std * (depth if role in RESIDUAL else 1.0), 2.0) for role in numbers(document).init}
    write_inits(model, inits, Init.times, {}, faithful=True)
    return Converted(body, (f"the initial std {std:g} and the rate {lr:g} are yours: no rule carries muP's to SP",))


def check_is_sp(document: Document, faithful: bool) -> None:
    """Raises ConfigError for a config that is muP already, whose values would be lost."""
    if document.format == "standard" or (faithful and document.format == "legacy"):
        return
    base = numbers(document).base
    width = f"{base[0]:g}" if base else "?"
    raise ConfigError(
        f"the config is muP already ({document.format} format, base width {width}): its values would be overwritten; "
        "write --to cerebras-sp first, or --layout current alone to convert the format"
    )


def _optimizer(body: Body) -> dict[str, Any]:
    """Its parameters, in either layout."""
    owner: dict[str, dict[str, Any]] = body["trainer"]["init"]["optimizer"] if "trainer" in body else body
    name = next(iter(owner)) if "trainer" in body else "optimizer"
    owner[name] = owner[name] or {}
    return owner[name]


def _as_current(document: Document, body: Body, wanted: Numbers, faithful: bool, notes: list[str]) -> Converted:
    """The numbers by base values, in the trainer layout."""
    if document.layout == "flat":
        body = to_trainer(document, body)
    model = body["trainer"]["init"]["model"]
    assert wanted.base is not None
    depth = (2 * document.model["num_hidden_layers"]) ** -0.5
    grown = {role: ratio**-0.5 for role, ratio in ratios(document, wanted.base).items()}
    factors = {role: factor * (depth if role in RESIDUAL else 1.0) for role, factor in grown.items()}
    model.pop("output_logits_scale", None)
    model.pop("ffn_output_layer_initializer", None)
    model.pop("ffn_initializer", None)
    write_inits(model, wanted.init, base_value, factors, faithful)
    model["mup_base_hidden_size"], model["mup_base_filter_size"] = wanted.base
    model["output_logits_alpha"] = float(f"{wanted.logits * document.model['hidden_size'] / wanted.base[0]:.15g}")
    model["embeddings_scale"] = wanted.embedding
    model["scale_qk_dot_by_d"] = True
    if not faithful:
        model.setdefault("share_embedding_weights", document.model["share_embedding_weights"])
    written = read_document(body)
    if faithful:
        notes += [f"--faithful: {line}" for line in faults(written)]
    elif document.code == "sequential":
        notes.append(
            "ffn_output_layer_initializer is written out: without it release 2.10 starts them at initializer_range"
        )
    else:
        notes += faults(written)
    return Converted(body, tuple(notes))


def write_inits(
    model: dict[str, Any], inits: Mapping[str, Init], scaled: Any, factors: Mapping[str, float], faithful: bool
) -> None:
    """The initializers that the zoo has keys for; those of the FFN only where they are needed or nothing is implied."""
    named = {role: scaled(init, factors.get(role, 1.0)) for role, init in inits.items() if role != "head"}
    _put(model, "embedding_initializer", named["embedding"])
    _put(model, "initializer", named["attention"])
    _put(model, "output_layer_initializer", named["attention_out"])
    if not _same(named["ffn_in"], named["attention"]):
        _put(model, "ffn_initializer", named["ffn_in"])
    if not faithful or not _same(named["ffn_out"], named["attention_out"]):
        _put(model, "ffn_output_layer_initializer", named["ffn_out"])


def base_value(init: Init, factor: float) -> Init:
    """The base's initializer, whose std the factor makes this one's; fifteen digits, so that 0.08 is 0.08."""
    return replace(init, std=float(f"{init.std / factor:.15g}"))


def _same(a: Init, b: Init) -> bool:
    return a.cut == b.cut and abs(a.std - b.std) <= 1e-12 * a.std


def _put(model: dict[str, Any], key: str, init: Init) -> None:
    spelled = next((alias for alias, name in ALIASES.items() if name == key and alias in model), key)
    if init.cut is None:
        model[spelled] = {"mean": 0.0, "name": "normal", "std": init.std}
    else:
        bound = init.cut * init.std
        model[spelled] = {"mean": 0.0, "name": "truncated_normal", "std": init.std, "a": -bound, "b": bound}


def _move_peak(document: Document, body: Body, lr: float) -> None:
    old = peak(document)
    _write_rates(document, body, lambda raw: moved_rates("learning_rate", _as_rate(raw), old or lr, lr), lr)


def _as_rate(raw: Any) -> Any:
    """A scalar as a schedule, so that its number is found by its key."""
    return raw if isinstance(raw, list | Mapping) else {"learning_rate": raw}


def _write_rates(document: Document, body: Body, moved: Any, lr: float) -> None:
    """Replace the schedule where the config has it; a config without one gets a constant rate."""
    if document.layout == "flat":
        optimizer = body["optimizer"]
        raw = optimizer.get("learning_rate")
        if raw is None or not isinstance(raw, list | Mapping):
            # Also where --faithful: the script refuses a scalar, and writes one where there is none.
            optimizer["learning_rate"] = lr if raw is None else _scalar(moved(raw))
        else:
            optimizer["learning_rate"] = moved(raw)
        return
    init = body["trainer"]["init"]
    ((name, params),) = init["optimizer"].items()
    if init.get("schedulers") is not None:
        init["schedulers"] = moved(init["schedulers"])
    else:
        init["schedulers"] = [{"ConstantLR": {"learning_rate": lr}}]
    if isinstance(params, dict) and params.get("learning_rate") is not None:
        init["optimizer"][name] = {**params, "learning_rate": lr}


def _scalar(moved: Any) -> Any:
    return moved["learning_rate"]


def _schedule_notes(document: Document, lr: float) -> list[str]:
    """What the zoo's script would have done otherwise, where it would have gone on."""
    if document.layout != "flat" or not document.legs:
        return []
    rising = [leg for leg in document.legs if leg.kind == "Linear" and leg.rate("initial_learning_rate") != 0]
    found = []
    for leg in rising:
        first, last = leg.rate("initial_learning_rate"), leg.rate("end_learning_rate")
        if last > first:
            found.append(
                f"{leg.where}: the warm-up from {first:g} keeps its shape; the original takes it for a decay that "
                f"ends at {lr * (last / first):g} (--faithful does that)"
            )
    return found
