"""Config formats by name: how each is recognised by its content, read as a umup run, and written.

A new format is a row of READERS or WRITERS. Model-zoo files are converted among themselves without a detour, so that
what is no matter of muP stays as it was; everything else goes by way of a RunConfig.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from umup.config.load import dump_body, parse_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError, InputError, did_you_mean
from umup.interop.cerebras.convert import Converted, Tuned, mup_to_current, sp_to_mup, to_sp
from umup.interop.cerebras.document import is_document, read_document
from umup.interop.cerebras.from_umup import from_umup, refuse_schemes
from umup.interop.cerebras.to_umup import to_umup
from umup.interop.megatron import flags
from umup.interop.nanogpt import (
    DEPTH_DEFAULTS,
    LLMC_DEFAULTS,
    NANO_DEFAULTS,
    llmc_run,
    nanogpt_run,
    parse_assignments,
    parse_command,
)
from umup.interop.torchtitan import multipliers_toml
from umup.models.specs import base_shape_of, plan_for, shape_of
from umup.rules.schemes import hparams_of
from umup.rules.schemes import scheme as find_scheme

Run = tuple[RunConfig, list[str]]


@dataclass(frozen=True)
class Request:
    """What was asked for besides the format; `given` names the options that were written out."""

    tuned: Tuned = field(default_factory=Tuned)
    given: frozenset[str] = frozenset()
    current: bool = False
    faithful: bool = False
    scheme: str | None = None


@dataclass(frozen=True)
class Source:
    """A config as read: the name of its format, and its parsed content."""

    format: str
    content: Any

    def run(self, faithful: bool = False) -> Run:
        """As a umup run, with notes. Raises ConfigError."""
        return next(r for r in READERS if r.name == self.format).run(self.content, faithful)


@dataclass(frozen=True)
class Output:
    """Text to write, and what is to be said."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A format that is read. `parse` gives its content, or None where a text or a parsed YAML body is another's."""

    name: str
    what: str
    parse: Callable[[Any], Any]
    run: Callable[[Any, bool], Run]


@dataclass(frozen=True)
class Writer:
    """A format that is written; `options` of the command that have an effect on it, by their name in Request."""

    what: str
    write: Callable[[Source, Request], Output]
    options: tuple[str, ...] = ()


def read_source(body: Any) -> Source:
    """Recognise a parsed YAML or JSON body, or text that is neither. Raises ConfigError where it is no known format."""
    for reader in READERS:
        content = reader.parse(body)
        if content is not None:
            return Source(reader.name, content)
    known = "; ".join(f"{reader.name} ({reader.what})" for reader in READERS)
    raise ConfigError(f"the format is not recognised; known: {known}")


def find_writer(name: str) -> Writer:
    """The named format's. Raises ConfigError naming the nearest."""
    if name not in WRITERS:
        raise ConfigError(f"--to: unknown format {name!r}; {did_you_mean(name, WRITERS)}")
    return WRITERS[name]


# --- readers ----------------------------------------------------------------------------------------------------


def _umup_body(body: Any) -> Any:
    sections = set(RunConfig.model_fields)
    return body if isinstance(body, Mapping) and body and set(body) & sections else None


def _umup_run(body: Any, faithful: bool) -> Run:
    return parse_config(body), []


def _assignments(names: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Text of assignments of which some are of these names."""

    def parse(body: Any) -> Any:
        if not isinstance(body, str):
            return None
        found = parse_assignments(body)
        return found if names.keys() & found.keys() else None

    return parse


def _command(body: Any) -> Any:
    return parse_command(body) if isinstance(body, str) and "train_gpt2cu" in body else None


READERS: tuple[Reader, ...] = (
    Reader(
        "cerebras",
        "model-zoo YAML with trainer.init, or model and runconfig",
        lambda body: read_document(body) if is_document(body) else None,
        to_umup,
    ),
    Reader("umup", "YAML with sections model, parametrization, ...", _umup_body, _umup_run),
    Reader("llm.c", "a train_gpt2cu command", _command, lambda c, _: llmc_run(c)),
    Reader(
        "llm.c names",
        "assignments such as use_mup = 1",
        _assignments({name: 0 for name in LLMC_DEFAULTS if name not in NANO_DEFAULTS}),
        lambda c, _: llmc_run(c),
    ),
    Reader(
        "nanogpt",
        "Python assignments such as n_embd = 768",
        _assignments({**NANO_DEFAULTS, **DEPTH_DEFAULTS}),
        lambda c, _: nanogpt_run(c),
    ),
)


# --- writers ----------------------------------------------------------------------------------------------------


def _zoo(converted: Converted) -> Output:
    return Output(dump_body(converted.body), converted.notes)


def _to_cerebras_mup(source: Source, request: Request) -> Output:
    if source.format == "cerebras":
        document = source.content
        if document.format == "legacy" and request.current and not request.given:
            return _zoo(mup_to_current(document, request.faithful))
        return _zoo(sp_to_mup(document, request.tuned, request.current, request.faithful))
    config, notes = source.run()
    written = from_umup(config)
    if config.parametrization.base is None:
        converted = sp_to_mup(read_document(written.body), request.tuned, True, request.faithful)
        written = Converted(converted.body, (*written.notes, *converted.notes))
    elif request.given:
        raise ConfigError("the config is muP already: its base and multipliers are written; leave the options out")
    return _zoo(Converted(written.body, (*notes, *written.notes)))


def _to_cerebras_sp(source: Source, request: Request) -> Output:
    if source.format == "cerebras":
        lr = request.tuned.lr if "lr" in request.given else None
        std = request.tuned.std if "std" in request.given else 0.02
        return _zoo(to_sp(source.content, lr, std, request.current))
    config, notes = source.run()
    if config.parametrization.base is not None:
        raise ConfigError("the config is muP; write --to umup --scheme sp first, and tune its rate")
    written = from_umup(config)
    return _zoo(Converted(written.body, (*notes, *written.notes)))


def _to_cerebras_umup(source: Source, request: Request) -> Output:
    config, _ = source.run()
    refuse_schemes(rescheme(config, "umup", None))
    raise ConfigError("u-muP has no keys in the model zoo")


def _to_umup(source: Source, request: Request) -> Output:
    config, notes = _run(source, request)
    plan_for(config)
    return Output(dump_body(config.model_dump(mode="json", exclude_unset=True)), tuple(notes))


def _to_megatron(source: Source, request: Request) -> Output:
    config, notes = _run(source, request)
    base = config.parametrization.base
    head_dim = None if base is None else base_shape_of(shape_of(config.model), base).head_dim
    return Output(flags(plan_for(config), base_head_dim=head_dim), tuple(notes))


def _to_torchtitan(source: Source, request: Request) -> Output:
    config, notes = _run(source, request)
    return Output(multipliers_toml(plan_for(config).fold(), config.optimizer.lr), tuple(notes))


def _run(source: Source, request: Request) -> Run:
    """As a run, under another scheme if asked for."""
    config, notes = source.run(request.faithful)
    if request.scheme is None:
        return config, notes
    width = request.tuned.width if "width" in request.given else None
    found = rescheme(config, request.scheme, width)
    before = config.parametrization.scheme
    if request.scheme != before:
        where = f"tuned at width {width}" if width else "of the new scheme"
        notes = [
            *notes,
            f"optimizer.lr {config.optimizer.lr:g} was {before}'s and now counts as {where}: umup sweep tunes it",
        ]
    return found, notes


def rescheme(config: RunConfig, name: str, base_width: int | None) -> RunConfig:
    """The same run under another scheme: hyperparameters and options that it shares, its own base and norms.

    Raises ConfigError and PlanError for schemes that do not exist or need a base, and sizes that do not divide.
    """
    scheme, p = find_scheme(name), config.parametrization
    if scheme.needs_base and base_width is None and p.base is None:
        raise ConfigError(f"--scheme {name} is relative to a base width; write --base-width {config.model.hidden_size}")
    if not scheme.needs_base and base_width is not None:
        raise ConfigError(f"--scheme {name} takes no base width; leave --base-width out")
    body = config.model_dump(exclude_unset=True)
    options = {o.name: p.options[o.name] for o in scheme.options if p.options.get(o.name) in o.choices}
    known = {h.name for h in hparams_of(name, options)}
    section: dict[str, Any] = {
        "scheme": name,
        "hparams": {h: value for h, value in p.hparams.items() if h in known},
        "options": options,
    }
    if scheme.needs_base:
        base = (
            {"hidden_size": base_width}
            if base_width is not None
            else p.base.model_dump(exclude_none=True)
            if p.base
            else {}
        )
        section["base"] = {**base, **({"num_layers": config.model.num_layers} if scheme.needs_base_depth else {})}
    body["parametrization"] = {key: value for key, value in section.items() if value not in ({}, None)}
    try:
        found = parse_config(body)
        plan_for(found)
    except InputError as error:
        raise ConfigError(f"--scheme {name}: {error}") from None
    return found


TUNED = ("width", "lr", "std", "embedding", "logits")
WRITERS: Mapping[str, Writer] = {
    "cerebras-mup": Writer("model-zoo YAML, muP", _to_cerebras_mup, (*TUNED, "layout", "faithful")),
    "cerebras-sp": Writer("model-zoo YAML, standard parametrization", _to_cerebras_sp, ("lr", "std", "layout")),
    "cerebras-umup": Writer("refused, with the reason: the model zoo cannot say it", _to_cerebras_umup),
    "umup": Writer("a config of umup's", _to_umup, ("scheme", "width", "faithful")),
    "megatron": Writer("Megatron-LM's flags", _to_megatron, ("scheme", "width", "faithful")),
    "torchtitan": Writer("torchtitan's parameter groups", _to_torchtitan, ("scheme", "width", "faithful")),
}


def with_tuned(request: Request, **values: float) -> Request:
    """The request with some tuned values written out."""
    return replace(request, tuned=replace(request.tuned, **values), given=request.given | values.keys())  # type: ignore[arg-type]
