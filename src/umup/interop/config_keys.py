"""Two-way maps between somebody's config keys and ours: one row per key, used to read and to write.

    KEYS = (Key("n_embd", "model.hidden_size"), Key("dropout", "model.dropout"))
    KEYS' theirs -> ours: read(KEYS, theirs); ours -> theirs: write(KEYS, ours)

What a row cannot say (a key that depends on two of ours) is code beside the table.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def same(value: Any) -> Any:
    """The value itself."""
    return value


@dataclass(frozen=True)
class Key:
    """Their key, our dotted key, and how a value goes over."""

    theirs: str
    ours: str
    read: Callable[[Any], Any] = same
    write: Callable[[Any], Any] = same


def read(keys: Iterable[Key], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our dotted keys for those of theirs that are there; what goes over as None is left out."""
    found = {key.ours: key.read(theirs[key.theirs]) for key in keys if theirs.get(key.theirs) is not None}
    return {ours: value for ours, value in found.items() if value is not None}


def write(keys: Iterable[Key], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Their keys for our dotted ones that are there, likewise."""
    found = {key.theirs: key.write(ours[key.ours]) for key in keys if ours.get(key.ours) is not None}
    return {theirs: value for theirs, value in found.items() if value is not None}


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.hidden_size": 1}` as `{"model": {"hidden_size": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree
