"""A run's records of ranges -> what happened to each operand, and which products to spare.

`ranges.jsonl` holds a row per look, product and operand (train/precision.py). A product is worth sparing if no constant
served it, if its scale would not come to rest, or if it clips to the end: each with its reason, and all of it as the
`precision.overrides` that one can paste. Weights clip never and their scales follow by themselves; they are shown only.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umup.config.load import load_config
from umup.errors import CheckpointError
from umup.numerics.ranges import CLIP_LIMIT
from umup.rules.precision import LAYER, find_recipe
from umup.train.precision import OPERAND_NAMES, read_looks

MANY_MOVES = 4
"""A drift over a whole run takes two or three; a scale that moves more often has nowhere to rest."""


@dataclass(frozen=True)
class Look:
    """A row of ranges.jsonl: what was seen before step `step`, and shares clipped and flushed at 2^exponent."""

    step: int
    product: str
    operand: str
    format: str
    exponent: int
    rms: float
    max: float
    nonfinite: int
    clip: float
    flush: float
    event: str | None


@dataclass(frozen=True)
class History:
    """All looks at one operand of one product, in the order of their steps; there is at least one.

    `spared_at` is the step from which the product ran in the stream's dtype, if it came to that.
    """

    looks: tuple[Look, ...]
    spared_at: int | None = None

    @property
    def first(self) -> Look:
        """The earliest look."""
        return self.looks[0]

    @property
    def last(self) -> Look:
        """The latest look."""
        return self.looks[-1]

    @property
    def used(self) -> tuple[Look, ...]:
        """The looks whose scale a product was then made with."""
        return tuple(look for look in self.looks if self.spared_at is None or look.step <= self.spared_at)

    @property
    def kind(self) -> str:
        """The product with a star for its layer."""
        return LAYER.sub("*", self.first.product)

    @property
    def moves(self) -> tuple[tuple[Look, Look], ...]:
        """(before, after): neighbouring looks with different scales; the move itself followed the first."""
        return tuple((a, b) for a, b in zip(self.looks, self.looks[1:], strict=False) if a.exponent != b.exponent)

    @property
    def unserved(self) -> tuple[Look, ...]:
        """Looks at which no constant served."""
        return tuple(look for look in self.looks if look.event == "bf16")

    @property
    def fault(self) -> str | None:
        """Why to spare the product on this operand's account."""
        if self.first.operand == "w":
            return None
        name = OPERAND_NAMES[self.first.operand]
        if self.unserved:
            return f"no constant served its {name} at step {self.unserved[0].step}"
        if len(self.moves) > MANY_MOVES:
            return f"the scale of its {name} moved {len(self.moves)} times"
        if self.last.clip > CLIP_LIMIT:
            return f"{self.last.clip:.2g} of its {name} clipped at the last look"
        return None


@dataclass(frozen=True)
class RangeReport:
    """Histories in the model's order, the run's own overrides and the stream's dtype."""

    histories: tuple[History, ...]
    overrides: Mapping[str, str]
    stream: str

    @property
    def faults(self) -> dict[str, str]:
        """Product -> why to spare it."""
        found: dict[str, list[str]] = {}
        for history in self.histories:
            if history.fault is not None:
                found.setdefault(history.first.product, []).append(history.fault)
        return {product: "; ".join(reasons) for product, reasons in found.items()}

    @property
    def spare(self) -> dict[str, str]:
        """`precision.overrides`: the run's own, then one per product to spare, with a star where all layers need it."""
        products = dict.fromkeys(h.first.product for h in self.histories)
        patterns: dict[str, None] = {}
        for product in self.faults:
            kind = LAYER.sub("*", product)
            everywhere = all(p in self.faults for p in products if LAYER.sub("*", p) == kind)
            patterns |= dict.fromkeys(linears(kind if everywhere else product))
        kept = {pattern: name for pattern, name in self.overrides.items() if pattern not in patterns}
        return {**kept, **dict.fromkeys(patterns, self.stream)} if patterns else {}

    def json(self) -> dict[str, Any]:
        """One document: a row per operand of each product, faults and overrides."""
        return {"tensors": [_summary(h) for h in self.histories], "faults": self.faults, "overrides": self.spare}


def linears(product: str) -> list[str]:
    """The linears of a product's name: "layers.0.attn.q+k+v" -> layers.0.attn.q, .k and .v."""
    home, dot, names = product.rpartition(".")
    return [f"{home}{dot}{name}" for name in names.split("+")]


def read_report(run: Path) -> RangeReport:
    """Raises CheckpointError where a run has no record of ranges, or a damaged one."""
    path = run / "ranges.jsonl"
    rows = read_looks(path) if path.exists() else []
    if not rows:
        raise CheckpointError(
            f"{run}: no ranges were recorded; train with precision.recipe: fp8 (or another with FP8 products) and "
            "precision.scales: monitor or adapt"
        )
    config = load_config(run / "config.yaml")
    stream = find_recipe(config.precision.recipe).stream
    looks = [Look(**row) for row in rows]
    return RangeReport(histories_of(looks, config.precision.scales == "adapt"), config.precision.overrides, stream)


def histories_of(looks: Iterable[Look], adapt: bool) -> tuple[History, ...]:
    """Looks grouped by product and operand, in the order of their first appearance.

    `adapt` says that the run's scales were followed: then a product that no constant serves is spared.
    """
    found: dict[tuple[str, str, str], list[Look]] = {}
    spared: dict[str, int] = {}
    for look in looks:
        found.setdefault((look.product, look.operand, look.format), []).append(look)
        if adapt and look.event == "bf16":
            spared.setdefault(look.product, look.step)
    return tuple(History(tuple(group), spared.get(group[0].product)) for group in found.values())


def collapse(histories: Sequence[History]) -> list[tuple[str, list[History]]]:
    """Layers that are alike as one entry: same operand, format, verdict, and (but for weights) scale and moves."""
    tensors: dict[tuple[str, str, str], dict[tuple[Any, ...], list[History]]] = {}
    for h in histories:
        last = h.used[-1]
        scale = None if last.operand == "w" else (last.exponent, len(h.moves))
        alike = (scale, h.spared_at is None, bool(h.unserved), h.fault is None)
        tensors.setdefault((h.kind, last.operand, last.format), {}).setdefault(alike, []).append(h)
    return [
        (_name(group, sum(map(len, groups.values()))), group)
        for groups in tensors.values()
        for group in groups.values()
    ]


def _name(group: Sequence[History], whole: int) -> str:
    """ "layers.*.mlp.down" for all layers, "layers.{0,2-5}.mlp.down" for some."""
    if len(group) == 1:
        return group[0].first.product
    if len(group) == whole:
        return group[0].kind
    layers = [int(number[0]) for h in group if (number := LAYER.search(h.first.product))]
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return re.sub(r"\*", f"{{{spans}}}", group[0].kind)


def _summary(h: History) -> dict[str, Any]:
    return {
        "product": h.first.product,
        "operand": h.first.operand,
        "format": h.first.format,
        "rms_first": h.first.rms,
        "rms_last": h.last.rms,
        "max": max(look.max for look in h.looks),
        "nonfinite": max(look.nonfinite for look in h.looks),
        "clip": max(look.clip for look in h.used),
        "flush": max(look.flush for look in h.used),
        "exponent": h.used[-1].exponent,
        "moves": [{"step": a.step, "from": a.exponent, "to": b.exponent} for a, b in h.moves],
        "spared_at": h.spared_at,
        "fault": h.fault,
    }
