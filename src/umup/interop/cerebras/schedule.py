"""Learning rates of a model-zoo config: moved to another peak, and matched with umup's schedules.

A rate is moved by multiplying every rate of the schedule by new peak over old peak, whatever the schedule is. The zoo's
script (2.10) instead takes an entry that starts at 0 for the warm-up and every other for the decay, so that a
warm-up from 1e-7 comes out 6000 times the rate; `original_rates` does that on demand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

from umup.errors import ConfigError
from umup.interop.cerebras.document import Document, Leg, number
from umup.interop.cerebras.keys import RATES

CLOSE = 1e-6


@dataclass(frozen=True)
class Shape:
    """A schedule as umup has it: name, peak rate, warm-up, all steps, last over peak; wsd: share of steps decaying."""

    name: str
    peak: float
    warmup: int
    steps: int | None
    final: float
    decay_fraction: float | None = None
    notes: tuple[str, ...] = ()


def peak(document: Document) -> float | None:
    """The highest rate of the schedule, None where there is no schedule. Raises ConfigError."""
    if not document.legs:
        return None
    found = max(rate for leg in document.legs for rate in _rates(leg.where, leg.params))
    if found <= 0:
        raise ConfigError(f"{document.legs[0].where}: its highest learning rate is {found:g}; write a positive one")
    return found


def check_joints(document: Document) -> None:
    """A warm-up must end where the next schedule starts. Raises ConfigError."""
    for leg, following in zip(document.legs, document.legs[1:], strict=False):
        start = _start(following)
        if not _rises(leg) or start is None:
            continue
        last = leg.rate("end_learning_rate")
        if not isclose(last, start, rel_tol=CLOSE):
            raise ConfigError(
                f"{leg.where}: the warm-up ends at {last:g} and {following.where} starts at {start:g}; write one rate"
            )


def moved_rates(where: str, raw: Any, old_peak: float, new_peak: float) -> Any:
    """A copy of a schedule as written, every rate times new over old."""

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(key, v) for v in value]
        return new_peak * (number(f"{where}.{key}", value) / old_peak)

    if isinstance(raw, list):
        return [moved_rates(f"{where}[{i}]", v, old_peak, new_peak) for i, v in enumerate(raw)]
    if isinstance(raw, Mapping):
        return {
            key: moved(key, v)
            if key in RATES and v is not None
            else moved_rates(f"{where}.{key}", v, old_peak, new_peak)
            for key, v in raw.items()
        }
    return raw


def original_rates(document: Document, raw: Any, lr: float) -> Any:
    """What the zoo's script makes of a list of schedules. Raises ConfigError where it does not go on."""
    if not isinstance(raw, list):
        raise ConfigError(
            "optimizer.learning_rate: the original takes a list of Linear and CosineDecay alone; leave --faithful out"
        )
    entries = []
    for leg, entry in zip(document.legs, raw, strict=True):
        if leg.kind not in ("Linear", "CosineDecay"):
            raise ConfigError(f"{leg.where}: the original refuses {leg.kind}; leave --faithful out")
        first, last = leg.rate("initial_learning_rate"), leg.rate("end_learning_rate")
        if first == 0:
            entries.append({**entry, "end_learning_rate": lr})
        else:
            entries.append({**entry, "initial_learning_rate": lr, "end_learning_rate": lr * (last / first)})
    return entries


def shape(document: Document, max_steps: int | None) -> Shape:
    """The config's schedule as one of umup's. Raises ConfigError, naming the schedules, where none is like it."""
    check_joints(document)
    top = peak(document)
    if top is None:
        raise ConfigError("the config has no learning rate; write optimizer.learning_rate, or schedulers")
    legs, notes = list(document.legs), []
    warmup = 0
    if len(legs) > 1 and legs[0].kind == "Linear" and _rises(legs[0]):
        first, warmup = legs[0].rate("initial_learning_rate"), _length(legs[0])
        if first > top / max(warmup, 1) * (1 + CLOSE):
            notes.append(f"{legs[0].where}: umup warms up from 1/warmup_steps of the rate, not from {first:g}")
        legs = legs[1:]
    if len(legs) > 1 and legs[-1].kind == "Constant" and legs[0].kind != "Constant":
        notes.append(f"{legs[-1].where}: the constant rate after the decay is left out, and so are its steps")
        legs, max_steps = legs[:-1], None
    kinds = tuple(leg.kind for leg in legs)
    if kinds == ("Constant",):
        return Shape("constant", top, warmup, max_steps, 1.0, notes=tuple(notes))
    last = legs[-1]
    if kinds == ("Constant", "Linear") and not _rises(last):
        steps = warmup + _length(legs[0]) + _length(last)
        fraction = _length(last) / steps
        return Shape("wsd", top, warmup, steps, _share(last, top), fraction, tuple(notes))
    if kinds not in (("Linear",), ("CosineDecay",)) or _rises(last):
        names = ", ".join(leg.kind for leg in document.legs)
        raise ConfigError(
            f"{document.legs[0].where}: umup has no schedule like {names}; it has constant, linear, cosine, wsd"
        )
    steps = warmup + _length(last)
    if max_steps is not None and max_steps != steps:
        notes.append(f"loop.max_steps is {max_steps} and the schedule's {steps}; train.steps is the schedule's")
    name = {"Linear": "linear", "CosineDecay": "cosine"}[last.kind]
    return Shape(name, top, warmup, steps, _share(last, top), notes=tuple(notes))


def legs_of(name: str, lr: float, warmup: int, steps: int, final: float, fraction: float) -> list[dict[str, Any]]:
    """umup's schedule in the trainer layout's words."""
    rest = steps - warmup
    decaying = max(1, round(fraction * steps))
    warm = [_linear(0.0, lr, warmup)] if warmup else []
    shapes: Mapping[str, Sequence[dict[str, Any]]] = {
        "constant": [{"ConstantLR": {"learning_rate": lr}}],
        "linear": [_linear(lr, lr * final, rest)],
        "cosine": [{"CosineDecayLR": _linear(lr, lr * final, rest)["LinearLR"]}],
        "wsd": [
            {"ConstantLR": {"learning_rate": lr, "total_iters": max(1, rest - decaying)}},
            _linear(lr, lr * final, decaying),
        ],
    }
    return [{"SequentialLR": {"schedulers": [*warm, *shapes[name]]}}]


def _linear(first: float, last: float, steps: int) -> dict[str, Any]:
    return {"LinearLR": {"initial_learning_rate": first, "end_learning_rate": last, "total_iters": steps}}


def _rates(where: str, params: Mapping[str, Any]) -> list[float]:
    found: list[float] = []
    for key, value in params.items():
        if key in RATES and value is not None:
            found += [number(f"{where}.{key}", v) for v in (value if isinstance(value, list) else [value])]
    return found or [0.0]


def _share(leg: Leg, top: float) -> float:
    """The end over the peak, to fifteen digits: 0.1, not 0.09999999999999999."""
    return float(f"{leg.rate('end_learning_rate') / top:.15g}")


def _start(leg: Leg) -> float | None:
    for key in ("initial_learning_rate", "learning_rate"):
        if leg.params.get(key) is not None:
            return leg.rate(key)
    return None


def _rises(leg: Leg) -> bool:
    ends = ("initial_learning_rate", "end_learning_rate")
    return all(key in leg.params for key in ends) and leg.rate(ends[1]) > leg.rate(ends[0])


def _length(leg: Leg) -> int:
    for key in ("total_iters", "steps", "decay_steps"):
        if leg.params.get(key) is not None:
            return int(number(f"{leg.where}.{key}", leg.params[key]))
    raise ConfigError(f"{leg.where}.total_iters is missing; umup needs the length of every schedule")
