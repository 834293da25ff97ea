"""What commands share: a parser whose complaints are one line, and dotted config overrides."""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from umup.config.load import load_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse, with errors as ConfigErrors and no abbreviations."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"umup {command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 by way of main."""
        raise ConfigError(f"{self.prog}: {message}; write {self.prog} --help for all options")

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; an unknown option names the nearest."""
        known, rest = self.parse_known_args(arguments)
        if rest:
            options = [o for action in self._actions for o in action.option_strings]
            raise ConfigError(f"{self.prog}: unknown argument {rest[0]!r}; {did_you_mean(rest[0], options)}")
        return known


def config_parser(command: str, description: str) -> Parser:
    """A parser for `umup COMMAND CONFIG.yaml [--section.key value ...]`; --help lists every config field."""
    parser = Parser(command, description, epilog=_config_help())
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a YAML file")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    return parser


def parse_with_config(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Split off the dotted overrides, parse the rest strictly, load the config."""
    plain, overrides = _split_overrides(arguments)
    known = parser.parse_strictly(plain)
    return known, load_config(known.config, overrides)


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    plain, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and "." in name:
            if not equals:
                try:
                    value = next(rest)
                except StopIteration:
                    raise ConfigError(f"override {name} has no value; write {name} VALUE") from None
            overrides.append((name.removeprefix("--"), value))
        else:
            plain.append(argument)
    return plain, overrides


def _config_help() -> str:
    lines = ["config fields; override any with --section.key VALUE (VALUE is read as YAML):"]
    for section, field in RunConfig.model_fields.items():
        kind: Any = field.annotation
        lines += ["", f"  {section}: {' '.join((kind.__doc__ or '').split())}"]
        lines += [f"    {name:28s}{text}" for name, text in _fields(kind)]
    return "\n".join(lines)


def _fields(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is None else f" [{default}]"
        text = textwrap.fill(f"{field.description}{shown}", width=86, subsequent_indent=" " * 32)
        yield name, text
