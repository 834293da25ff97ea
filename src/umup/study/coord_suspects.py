"""Symptoms -> the mistake that explains them, named.

Every wrong number and slope is a symptom: which quantity, of which role, in which direction. Parameters with the same
symptoms are one case, and the first row of the table that fits names it. Numbers come before coordinates: a wrong rate
explains the outputs it blows up, not the other way round; and of coordinates the first layer that is wrong by itself
(its output at step 0, then its effective update) comes before those that only pass it on.

Not covered: two mistakes in one parameter that no row lists together; they are named by the stronger one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from umup.rules.precision import LAYER
from umup.study.coord_verdict import COORDINATES, NUMBERS, Mismatch, Slope

HIDDEN = ("hidden", "hidden_out")
LOOKUP = ("embedding", "position")
READOUT = ("readout",)
TIED = ("tied_readout",)
VECTOR = ("bias", "norm_gain", "norm_bias")
OUTSIDE = (*LOOKUP, *READOUT)
ANY: tuple[str, ...] = ()
DEPTHS = ("layers", "depth")
QUANTITIES = {"weight": "init", "update": "lr", "weight_decay": "decay", "logit_factor": "scale"}


@dataclass(frozen=True)
class Rule:
    """A mistake: the roles that show it, and symptoms (quantity, with + or - or either) that must all be there.

    `some`: only where other parameters of the role are in order. `where`: part of the names. `axes`: where it shows.
    """

    mistake: str
    roles: tuple[str, ...]
    symptoms: tuple[str, ...]
    some: bool = False
    where: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()


TABLE = (
    Rule("softmax scale: attention logits divided by sqrt(head size)", ANY, ("scale+",)),
    Rule("softmax scale is not the plan's", ANY, ("scale",)),
    Rule("residual depth factor missing", ANY, ("branch+",)),
    Rule("residual depth factor too small, or applied twice", ANY, ("branch-",)),
    Rule("residual depth factor missing", ANY, ("skip",)),
    Rule("residual init scaled with depth beside the branch", ("hidden_out",), ("init-",), axes=DEPTHS),
    Rule("attention output factor is not the plan's", ANY, ("output_factor",)),
    Rule("rule applied twice", HIDDEN, ("init-", "lr-")),
    Rule("rule applied twice", HIDDEN, ("multiplier-", "lr-")),
    Rule("module left in SP", HIDDEN, ("init+", "lr+"), some=True),
    Rule("module left in SP", HIDDEN, ("init", "multiplier+", "lr+"), some=True),
    Rule("module left in SP", HIDDEN, ("multiplier+", "lr+"), some=True),
    Rule("hidden layers left in SP", HIDDEN, ("init+", "lr+")),
    Rule("hidden layers left in SP", HIDDEN, ("multiplier+", "lr+")),
    Rule("keys and values treated like queries", HIDDEN, ("init",), some=True, where=(".k.", ".v.")),
    Rule("keys and values treated like queries", HIDDEN, ("eps",), some=True, where=(".k.", ".v.")),
    Rule("hidden init not scaled with width", HIDDEN, ("init+",)),
    Rule("hidden init scaled too much", HIDDEN, ("init-",)),
    Rule("hidden multiplier missing", HIDDEN, ("multiplier+",)),
    Rule("depth factor of the learning rate missing", (*HIDDEN, *VECTOR), ("lr+",), axes=DEPTHS),
    Rule("depth factor on rates outside of branches", OUTSIDE, ("lr-",), axes=DEPTHS),
    Rule("hidden LR not divided by width", HIDDEN, ("lr+",)),
    Rule("hidden LR divided too often", HIDDEN, ("lr-",)),
    Rule("tied head multiplier missing", TIED, ("multiplier+",)),
    Rule("readout multiplier missing", READOUT, ("multiplier+",)),
    Rule("readout multiplier too small", (*READOUT, *TIED), ("multiplier-",)),
    Rule("readout LR wrong", READOUT, ("lr",)),
    Rule("readout init wrong", READOUT, ("init",)),
    Rule("embedding LR scaled with width", LOOKUP, ("lr",)),
    Rule("embedding init wrong", LOOKUP, ("init",)),
    Rule("embedding multiplier wrong", LOOKUP, ("multiplier",)),
    Rule("bias or norm-gain LR scaled", VECTOR, ("lr",)),
    Rule("bias or norm-gain multiplier wrong", VECTOR, ("multiplier",)),
    Rule("weight decay not scaled", ANY, ("decay",)),
    Rule("epsilon not scaled with the gradient", ANY, ("eps",)),
)
REPLACED = "init replaced after the plan was applied (or a plan applied after loading)"
# What coordinates alone say, of the first module that is wrong by itself.
BY_COORDINATES = (
    Rule("residual depth factor missing", ANY, ("start+",), axes=("depth",)),
    Rule("depth factor of the learning rate missing", ANY, ("effective+",), axes=("depth",)),
    Rule("hidden init not scaled with width", HIDDEN, ("start+",)),
    Rule("hidden init scaled too much", HIDDEN, ("start-",)),
    Rule("readout init or multiplier not scaled with width", (*READOUT, *TIED), ("start+",)),
    Rule("embedding init scaled with width", LOOKUP, ("start",)),
    Rule("embedding LR scaled with width", LOOKUP, ("effective",)),
    Rule("bias or norm-gain LR scaled", VECTOR, ("effective",)),
    Rule("hidden LR not divided by width", HIDDEN, ("effective+",)),
    Rule("hidden LR divided too often", HIDDEN, ("effective-",)),
    Rule("readout multiplier missing or LR too large", (*READOUT, *TIED), ("effective+",)),
    Rule("readout LR too small", (*READOUT, *TIED), ("effective-",)),
    Rule("attention logits divided by sqrt(head size), or queries and keys too large", ANY, ("logits+",)),
)


@dataclass(frozen=True)
class Suspect:
    """A named mistake, where it is, and what shows it."""

    mistake: str
    where: tuple[str, ...]
    evidence: str

    def __str__(self) -> str:
        shown = ", ".join(self.where[:3]) + (f" and {len(self.where) - 3} more" if len(self.where) > 3 else "")
        return f"{self.mistake}: {shown}; {self.evidence}"


@dataclass(frozen=True)
class _Symptom:
    quantity: str
    sign: str
    evidence: str
    axis: str


def suspects(slopes: Sequence[Slope], wrong: Sequence[Mismatch], roles: Mapping[str, str]) -> list[Suspect]:
    """The mistakes that explain what failed, most telling first; empty where nothing failed."""
    failed = [s for s in slopes if s.status == "fail"]
    by_name = _numbers(failed, wrong)
    if by_name:
        return _ranked(by_name, roles, [s for s in failed if s.kind in COORDINATES])
    return _from_coordinates(failed)


def _numbers(failed: Iterable[Slope], wrong: Sequence[Mismatch]) -> dict[str, dict[str, _Symptom]]:
    """Name -> quantity -> the symptom; the first of several of one quantity, in the order of what they explain."""
    found: dict[str, dict[str, _Symptom]] = defaultdict(dict)
    for m in wrong:
        sign = "+" if m.found > m.wanted else "-"
        text = f"{m.kind} is {m.found:.4g} and not {m.wanted:.4g} at {m.axis} {m.size}"
        found[m.name].setdefault(QUANTITIES.get(m.kind, m.kind), _Symptom(m.kind, sign, text, m.axis))
    exploded = any(s.kind in COORDINATES for s in failed)
    for s in failed:
        if s.kind in NUMBERS:
            if s.kind == "update" and exploded and (s.axis == "raised" or not wrong):
                continue  # the rates are the plan's; gradients are not what it was made for
            quantity = QUANTITIES.get(s.kind, s.kind)
            if s.axis == "raised" and quantity == "lr":
                quantity = "eps"
            sign = "+" if s.slope > 0 else "-"
            text = f"{s.kind} moves against the plan's as {s.axis}^{s.slope:+.2f}"
            found[s.name].setdefault(quantity, _Symptom(s.kind, sign, text, s.axis))
    for symptoms in found.values():
        if "lr" in symptoms:  # decay and the raised epsilon's updates go through the rate
            symptoms.pop("eps", None), symptoms.pop("decay", None)
    return found


def _ranked(
    by_name: Mapping[str, Mapping[str, _Symptom]], roles: Mapping[str, str], coordinates: Sequence[Slope]
) -> list[Suspect]:
    off = {_family(roles.get(name, "")) for name, symptoms in by_name.items() if set(symptoms) == {"init"}}
    if len(off) > 1:
        names = tuple(n for n, s in by_name.items() if "init" in s)
        return [Suspect(REPLACED, _collapse(names), by_name[names[0]]["init"].evidence)]
    cases: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, symptoms in by_name.items():
        partial = _partial(name, by_name, roles)
        place = next((i for i, r in enumerate(TABLE) if _fits(r, name, roles.get(name, ""), symptoms, partial)), None)
        cases[len(TABLE) if place is None else place, "" if place is not None else "/".join(symptoms)].append(name)
    found = []
    for (place, quantities), members in sorted(cases.items()):
        mistake = TABLE[place].mistake if place < len(TABLE) else f"{quantities} is not the plan's"
        seen = [next(iter(by_name[members[0]].values())).evidence, *_seen_in(members, coordinates)]
        found.append(Suspect(mistake, _collapse(members), "; ".join(seen)))
    return found


def _seen_in(names: Sequence[str], coordinates: Sequence[Slope]) -> list[str]:
    """The steepest coordinate of the modules that own some parameters."""
    owners = {name.rpartition(".")[0] for name in names}
    own = [s for s in coordinates if s.name in owners]
    return [_evidence(max(own, key=lambda s: abs(s.slope)))] if own else []


def _family(role: str) -> str:
    return next((group[0] for group in (HIDDEN, LOOKUP, VECTOR) if role in group), role)


def _partial(name: str, by_name: Mapping[str, Mapping[str, _Symptom]], roles: Mapping[str, str]) -> bool:
    """Whether some weight of the name's role is in order, as far as its quantities go."""
    mine = _family(roles.get(name, ""))
    alike = [n for n, r in roles.items() if _family(r) == mine and n.endswith(".weight")]
    return any(set(by_name.get(n, {})) < set(by_name[name]) for n in alike)


def _fits(rule: Rule, name: str, role: str, symptoms: Mapping[str, _Symptom], partial: bool) -> bool:
    signed = {quantity + s.sign for quantity, s in symptoms.items()} | set(symptoms)
    return (
        (not rule.roles or role in rule.roles)
        and set(rule.symptoms) <= signed
        and (partial or not rule.some)
        and (not rule.where or any(part in name for part in rule.where))
        and (not rule.axes or all(s.axis in rule.axes for s in symptoms.values()))
    )


def _from_coordinates(failed: Sequence[Slope]) -> list[Suspect]:
    """The first module, in the order of the forward pass, that is wrong at the start; else by its own updates."""
    starts = [s for s in failed if s.kind == "output" and s.phase == "start"]
    own = [s for s in failed if s.kind == "effective"]
    rest = [s for s in failed if s.kind in COORDINATES]
    for quantity, found in (("start", starts), ("effective", own), ("logits", rest)):
        known = [s for s in found if s.role] or found
        for s in known:
            sign = "+" if s.slope > 0 else "-"
            kind = s.kind if quantity == "logits" else quantity
            symptom = {kind: _Symptom(kind, sign, "", s.axis)}
            rule = next((r for r in BY_COORDINATES if _fits(r, s.name, s.role, symptom, False)), None)
            if rule is not None:
                alike = tuple(o.name for o in known if o.role == s.role and o.slope * s.slope > 0)
                return [Suspect(rule.mistake, _collapse(alike), _evidence(s))]
    return [Suspect("no known mistake", (s.name,), _evidence(s)) for s in sorted(rest, key=lambda s: -abs(s.slope))[:1]]


def _evidence(s: Slope) -> str:
    what = {"effective": "effective update", "propagating": "propagating update"}.get(s.kind, s.kind)
    when = " at step 0" if s.phase == "start" else ""
    return f"{what} of {LAYER.sub('*', s.name)}{when} {'grows' if s.slope > 0 else 'falls'} as {s.axis}^{s.slope:.2f}"


def _collapse(names: Iterable[str]) -> tuple[str, ...]:
    """Names with a star for the layer, without repetition."""
    return tuple(dict.fromkeys(LAYER.sub("*", name) for name in names))
