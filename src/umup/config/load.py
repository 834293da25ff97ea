"""YAML files and dotted overrides -> RunConfig, with errors that say where and what to write.

YAML is read by 1.2's rules, here and nowhere else: `1e-3` is a number, `off` and `yes` are words, and a key that
stands twice is an error.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from umup.config.sections import RunConfig
from umup.errors import ConfigError, did_you_mean


class _Yaml12(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes words that either YAML 1.1 or 1.2 would take for something else."""


# Of one document, aliases followed.
MOST_NODES = 100_000


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


_Yaml12.add_constructor("tag:yaml.org,2002:int", _integer)
_Yaml12.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    for _class in (_Yaml12, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), [*_first, ""])


def read_yaml(text: str) -> Any:
    """Parse YAML text by 1.2's rules; ConfigError where it is not YAML, or where its aliases make a flood of it."""
    try:
        loader = _Yaml12(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _nodes(root, {}) > MOST_NODES:
            raise ConfigError(f"not a config: its aliases stand for more than {MOST_NODES} values")
        return loader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not YAML: it is nested too deeply, or an alias stands within itself") from None


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that the node stands for, those of its aliases each time; RecursionError where one holds itself."""
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_nodes(child, known) for child in children)
    return known[id(node)]


def dump_yaml(config: BaseModel) -> str:
    """A resolved config as YAML, every field written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def dump_body(body: Any) -> str:
    """Any plain data as YAML that readers of 1.1 and 1.2 take alike; keys keep their order."""
    return yaml.dump(body, Dumper=_Dumper, sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read a YAML file, lay `(section.key, value)` overrides over it and validate. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read as text ({error})") from None
    try:
        return parse_config(read_yaml(text), overrides)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None


def parse_config(body: Any, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """A parsed YAML body plus overrides -> RunConfig. Raises ConfigError."""
    if body is None:
        body = {}
    if not isinstance(body, Mapping):
        raise ConfigError(f"expected sections such as 'model:', found {type(body).__name__}")
    tree = {k: dict(v) if isinstance(v, Mapping) else v for k, v in body.items()}
    for dotted, value in overrides:
        _set(tree, dotted, value)
    try:
        return RunConfig.model_validate(_arrays_to_tuples(tree))
    except ValidationError as error:
        unknown_keys_first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError(_one_line(unknown_keys_first[0])) from None


def _set(tree: dict[str, Any], dotted: str, value: str) -> None:
    *sections, key = dotted.split(".")
    node = tree
    for section in sections:
        inner = node.setdefault(section, {})
        node[section] = node = dict(inner) if isinstance(inner, Mapping) else {}
    if not sections:
        raise ConfigError(f"override --{dotted}: write --section.key, e.g. --optimizer.lr 0.5")
    try:
        node[key] = read_yaml(value)
    except ConfigError:
        node[key] = value


def _arrays_to_tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """Strict validation takes a tuple only as a tuple, which YAML has not."""
    optimizer = tree.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("betas"), list):
        tree = {**tree, "optimizer": {**optimizer, "betas": tuple(optimizer["betas"])}}
    return tree


def _one_line(error: ErrorDetails) -> str:
    where = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        # pydantic appends the union member it tried ("data.source.str"); the user wrote only the keys.
        where = [part for part in where if part not in ("str", "list[str]")]
    dotted = ".".join(where)
    if error["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {did_you_mean(where[-1], _fields_at(where[:-1]))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{dotted} is missing"
    message = error["msg"].removeprefix("Input should be ")
    return f"{dotted}: expected {message}, found {error['input']!r}"


def _fields_at(where: Sequence[str]) -> list[str]:
    owner: type[BaseModel] = RunConfig
    for part in where:
        annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), owner)
    return list(owner.model_fields)
