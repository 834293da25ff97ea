"""`umup convert SRC --to FORMAT`: configs across ecosystems.

The model zoo's tutorial has options of one dash and several letters (`-d_base 256`), which clash with dotted overrides;
so this command has a parser of its own and takes no overrides.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umup.cli.arguments import Parser
from umup.config.load import read_yaml
from umup.errors import ConfigError

if TYPE_CHECKING:
    from umup.interop.formats import Request, Source, Writer

DESCRIPTION = """\
Convert a config: Cerebras model-zoo YAML (SP and muP, both layouts), nanoGPT, nanoGPT-mup, llm.c or umup's own. Which
it is, is seen by its content. What the target cannot express is an error that names the field; notes go to stderr.
"""
MOST_BYTES = 2**22
TEXT_SUFFIXES = (".py", ".sh", ".txt")


@dataclass(frozen=True)
class Number:
    """A number tuned on the base model: its name in the request, its spellings, its default and what it is."""

    name: str
    spellings: tuple[str, ...]
    default: float
    what: str


NUMBERS = (
    Number("width", ("-d_base", "--base_layer_width", "--base-layer-width", "--base-width"), 256, "base layer width"),
    Number("lr", ("-lr_base", "--base_lr", "--base-lr"), 6e-3, "base lr"),
    Number("std", ("-std_base", "--base_init_std", "--base-init-std"), 0.08, "base initialization std"),
    Number("embedding", ("-m_base", "--m_embed", "--m-embed"), 10.0, "embeddings scale"),
    Number("logits", ("--output-logits-alpha", "--output_logits_alpha"), 1.0, "output logits alpha"),
)
# What the tutorial's tool announces.
ANNOUNCED = ("width", "lr", "std", "embedding")


def run(arguments: list[str]) -> int:
    """Read, convert, write, say what was noted."""
    from umup.interop.formats import WRITERS, find_writer

    parser = _parser(WRITERS)
    known = parser.parse_strictly(arguments)
    path = _source_path(parser, known)
    writer = find_writer(known.to)
    request, numbers = _request(known), {n.name: getattr(known, n.name) for n in NUMBERS}
    _check_options(known, writer, numbers)
    source = _read(path)
    notes = _announcements(known, source, request)
    try:
        output = writer.write(source, request)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    out = _out(known, path)
    if out is not None:
        _write(out, path, output.text)
    notes += [*output.notes, *([f"written to {out}"] if out is not None else [])]
    if known.json:
        found = {"from": source.format, "to": known.to, "out": None if out is None else str(out), "notes": notes}
        print(json.dumps({**found, "text": output.text}, indent=1))
        return 0
    for note in notes:
        print(note, file=sys.stderr)
    if out is None:
        print(output.text, end="")
    return 0


def _parser(writers: "Mapping[str, Writer]") -> Parser:
    targets = "\n".join(f"  {name.ljust(14)}{writer.what}" for name, writer in writers.items())
    parser = Parser("convert", DESCRIPTION, epilog=f"formats of --to:\n{targets}")
    add = parser.add_argument
    add("source", metavar="SRC", nargs="?", type=Path, help="the config to convert")
    add("-i", "--input_yaml", "--input-yaml", dest="input", metavar="SRC", type=Path, help="another spelling of SRC")
    add("--to", metavar="FORMAT", required=True, help="see below")
    add(
        *("-o", "--output_yaml", "--output-yaml", "--out"),
        dest="out",
        metavar="OUT",
        type=Path,
        help="the file to write [cerebras-mup: SRC's name with the tag _mup; else stdout]",
    )
    for n in NUMBERS:
        add(*n.spellings, dest=n.name, metavar="X", help=f"{n.what} [{n.default:g}]")
    add("--layout", metavar="NAME", help="current: write the trainer layout (from release 2.3) [the input's]")
    add("--scheme", metavar="NAME", help="with --to umup, megatron, torchtitan: re-parametrize")
    add("--faithful", action="store_true", help="do what the original programs do, known faults included")
    add("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    return parser


def _source_path(parser: Parser, known: argparse.Namespace) -> Path:
    paths = [path for path in (known.source, known.input) if path is not None]
    if len(paths) != 1:
        parser.error("expected one SRC, the config to convert")
    return Path(paths[0])


def _request(known: argparse.Namespace) -> "Request":
    from umup.interop.formats import Request, with_tuned

    if known.layout not in (None, "current"):
        raise ConfigError(f"--layout: unknown layout {known.layout!r}; write current, or leave it out for the input's")
    request = Request(current=known.layout is not None, faithful=known.faithful, scheme=known.scheme)
    given = {n.name: _number(n, getattr(known, n.name)) for n in NUMBERS if getattr(known, n.name) is not None}
    return with_tuned(request, **given)


def _number(number: Number, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    whole = number.name == "width"
    if not isfinite(value) or value <= 0 or (whole and not value.is_integer()):
        kind = "a positive whole number" if whole else "a positive number"
        raise ConfigError(f"{number.spellings[0]}: {number.what} must be {kind}, not {text!r}")
    return int(value) if whole else value


def _check_options(known: argparse.Namespace, writer: "Writer", numbers: Mapping[str, Any]) -> None:
    """Every option must have an effect."""
    given = {name: value is not None for name, value in numbers.items()}
    given |= {"layout": known.layout is not None, "scheme": known.scheme is not None, "faithful": known.faithful}
    spelled = {n.name: n.spellings[0] for n in NUMBERS}
    for name, there in given.items():
        if there and name not in writer.options:
            raise ConfigError(f"{spelled.get(name, f'--{name}')} has no effect on --to {known.to}; leave it out")
    if given["width"] and "scheme" in writer.options and not given["scheme"]:
        raise ConfigError(f"-d_base goes with --scheme on --to {known.to}; write --scheme mup, too")


def _read(path: Path) -> "Source":
    from umup.interop.formats import read_source

    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes are no config")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    try:
        body: Any = text if path.suffix in TEXT_SUFFIXES else read_yaml(text)
        return read_source(text if isinstance(body, str) else body)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _announcements(known: argparse.Namespace, source: "Source", request: "Request") -> list[str]:
    """Which of the tutorial's values are defaults, as its tool says before it converts."""
    if known.to != "cerebras-mup" or (source.format == "cerebras" and source.content.format != "standard"):
        return []
    found = []
    for n in NUMBERS:
        value = vars(request.tuned)[n.name]
        if n.name in request.given:
            found.append(f"{n.what} is {value:g}; it should be what a sweep at the base width found best")
        elif n.name in ANNOUNCED:
            found.append(f"{n.what} not provided; using the Cerebras-GPT default {value:g}")
    return found


def _out(known: argparse.Namespace, path: Path) -> Path | None:
    if known.out is not None:
        return Path(known.out)
    if known.to != "cerebras-mup":
        return None
    return path.with_name(f"{path.stem}_{'muP' if known.faithful else 'mup'}.yaml")


def _write(out: Path, source: Path, text: str) -> None:
    if out.exists() and out.samefile(source):
        raise ConfigError(f"-o {out}: is the source itself; write another name")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"-o {out}: cannot be written ({error.strerror})") from None
