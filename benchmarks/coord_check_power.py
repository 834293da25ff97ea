"""How many known mistakes does the coordinate check catch, does it name them, and does it ever cry wolf?

    python benchmarks/coord_check_power.py [--quick] [--write benchmarks/results/coord-check-power.md]

Each mistake is injected alone into a small decoder: in the plan it is built with, in its weights, or in its optimizer;
the check, over widths or over depths, knows only the plan that should have been. A case counts as caught if the verdict
is FAIL, and as named if the first suspect is the mistake. The correct schemes are checked with five sets of seeds each:
any FAIL is a false alarm.
The column "by" says what showed it: coordinates (outputs and updates), measured numbers (initial sizes and steps,
against the plan's), or constants that were read off; another says what would have been named had nothing been read off.

Not covered: two mistakes at once; foreign modules (tests/study/test_coord_check.py has some).
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.models.specs import plan_for
from umup.rules.plan import USE_QUANTITIES, Plan
from umup.rules.roles import OpKind, Role
from umup.study.coord_check import RUNS, CoordReport, batches_of, check
from umup.study.coord_subjects import audited, config_subject, sized
from umup.study.coord_suspects import Suspect, suspects
from umup.study.coord_verdict import COORDINATES, NUMBERS, SIZES
from umup.study.coordinates import Point, Subject

SIZES_OF = {"width": (64, 128, 256), "depth": (2, 4, 8)}
WIDTHS = SIZES_OF["width"]
STEPS, SEEDS = 3, 3
RATES = {"mup": 0.004, "depth_mup": 0.004, "completep": 0.004, "spectral": 0.2, "umup": 0.5, "unit": 0.1, "mus": 0.5}
RATES |= {"sp": 0.004, "ntp": 0.1}
HIDDEN = (Role.HIDDEN, Role.HIDDEN_OUT)
VECTORS = (Role.BIAS, Role.NORM_GAIN, Role.NORM_BIAS)
# On each axis the schemes that must pass, and those that cannot.
CORRECT = {
    "width": ("mup", "umup", "mus", "depth_mup", "completep", "spectral"),
    "depth": ("umup", "depth_mup", "completep"),
}
OTHERS = {"width": ("unit", "sp", "ntp"), "depth": ("mup", "mus", "spectral", "unit", "sp", "ntp")}

Edit = Callable[[Plan, float], Plan]


def small_config(scheme: str, family: str, **sections: Mapping[str, Any]) -> RunConfig:
    """A decoder of two layers: llama with grouped queries, gpt2 with biases and a tied head."""
    unit = scheme in ("umup", "unit", "mus")
    model = {
        "family": family,
        "hidden_size": WIDTHS[0],
        "num_layers": 2,
        "head_dim": 16,
        "max_seq_len": 16,
        "vocab_size": 64,
        "num_kv_heads": 2 if family == "llama" else None,
        "norm_gain": False if unit else None,
        "norm_placement": "res_post" if scheme == "mus" else "pre",
    }
    return parse_config(
        {
            "model": {**model, **sections.get("model", {})},
            "parametrization": {"scheme": scheme, **sections.get("parametrization", {})},
            "optimizer": {"lr": RATES[scheme], **sections.get("optimizer", {})},
        }
    )


@dataclass(frozen=True)
class Mistake:
    """One mistake in one network: what to spoil (the plan, given the size over the smallest; or the network), and the
    start of the suspect's name that is right. `axis`: the check that shall find it."""

    name: str
    suspect: str
    scheme: str
    family: str
    plan: Edit = lambda plan, m: plan
    after: Callable[[Subject], None] = lambda subject: None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    axis: str = "width"


def times(roles: Sequence[Role], pattern: str = "", **powers: float) -> Edit:
    """Multiply quantities of the parameters of some roles by powers of the ratio of sizes."""

    def edit(plan: Plan, m: float) -> Plan:
        factors: dict[str, float] = {}
        for quantity, power in powers.items():
            factors |= dict.fromkeys(USE_QUANTITIES if quantity == "multiplier" else (quantity,), m**power)
        params = {
            name: p.scaled({q: f for q, f in factors.items() if q in p.values}, "spoiled", "spoiled")
            if p.spec.role in roles and pattern in name
            else p
            for name, p in plan.params.items()
        }
        return replace(plan, params=params)

    return edit


def put(roles: Sequence[Role], pattern: str = "", **numbers: float) -> Edit:
    """Set quantities to numbers."""

    def edit(plan: Plan, m: float) -> Plan:
        params = dict(plan.params)
        for name, p in plan.params.items():
            if p.spec.role in roles and pattern in name:
                given = {q: numbers[q] for q in numbers if q in p.values}
                params[name] = replace(
                    p, values={**p.values, **{q: replace(p.values[q], number=n) for q, n in given.items()}}
                )
        return replace(plan, params=params)

    return edit


def at_sites(kinds: Sequence[OpKind], change: Callable[[Plan, str], Mapping[str, float]]) -> Edit:
    """Set numbers of operation sites."""

    def edit(plan: Plan, m: float) -> Plan:
        ops = dict(plan.ops)
        for name, op in plan.ops.items():
            if op.site.kind in kinds:
                new = {q: replace(op.values[q], number=n) for q, n in change(plan, name).items()}
                ops[name] = replace(op, values={**op.values, **new})
        return replace(plan, ops=ops)

    return edit


def root_softmax(plan: Plan, site: str) -> dict[str, float]:
    """1/sqrt(d), equal to the plan's at heads of 16."""
    return {"logits": plan.ops[site]["logits"] * sqrt(plan.sizes.head_dim / 16)}


def keys_like_queries(plan: Plan, m: float) -> Plan:
    """Keys and values get their layer's query numbers."""
    params = dict(plan.params)
    for name, p in plan.params.items():
        if ".attn.k." in name or ".attn.v." in name:
            query = plan.params[name.replace(".attn.k.", ".attn.q.").replace(".attn.v.", ".attn.q.")]
            params[name] = replace(p, values=query.values)
    return replace(plan, params=params)


def depth_rate(plan: Plan, m: float) -> Plan:
    """The factor of depth on rates inside branches, undone."""
    params = {
        name: p.scaled({"lr": sqrt(plan.sizes.num_layers / 2)}, "spoiled", "spoiled") if p.spec.on_residual else p
        for name, p in plan.params.items()
    }
    return replace(plan, params=params)


@torch.no_grad()
def redraw(subject: Subject) -> None:
    """torch's own init, after the plan's."""
    for p in subject.model.parameters():
        if p.dim() == 2:
            nn.init.kaiming_uniform_(p, a=sqrt(5))


def coupled(factor: float) -> dict[str, Any]:
    """An optimizer with lr-coupled decay."""
    return {"optimizer": {"independent_weight_decay": False, "weight_decay": factor}}


RESIDUALS = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)
ONE_BRANCH: dict[str, float] = {"branch": 1.0, "branch_grad": 1.0}
SHALLOW = {"parametrization": {"base": {"hidden_size": 64, "num_layers": 2, "num_kv_heads": 2}}}


def mistakes() -> Iterator[Mistake]:
    """Every mistake in every network where it can be made."""
    for family in ("llama", "gpt2"):
        yield Mistake("hidden init not scaled", "hidden init", "mup", family, times(HIDDEN, init_std=0.5))
        for scheme, half in (("mup", 1.0), ("umup", 0.5)):
            yield Mistake("hidden LR not scaled", "hidden LR not", scheme, family, times(HIDDEN, lr=half))
            yield Mistake("embedding LR scaled", "embedding LR", scheme, family, times((Role.EMBEDDING,), lr=-1))
            scale = at_sites((OpKind.SDPA,), root_softmax)
            yield Mistake("attention 1/sqrt(d), growing heads", "softmax scale", scheme, family, scale)
            yield Mistake("rule applied twice", "rule applied twice", scheme, family, twice(scheme))
            yield Mistake("init after load", "init replaced", scheme, family, after=redraw)
            left = times(HIDDEN, "layers.1.mlp.up", lr=1, init_std=0.5)
            if scheme == "umup":
                numbers = {"lr": 1.0, "init_std": 0.02, **dict.fromkeys(USE_QUANTITIES, 1.0)}
                left = put(HIDDEN, "layers.1.mlp.up", **numbers)
            yield Mistake("one module left in SP", "module left in SP", scheme, family, left)
            head, text = (Role.READOUT, "readout") if family == "llama" else (Role.TIED_READOUT, "tied head")
            name = f"{text} multiplier missing"
            yield Mistake(name, name, scheme, family, times((head,), multiplier=1))
        eps = "epsilon not scaled"
        yield Mistake(eps, eps, "mup", family, put((*HIDDEN, *VECTORS, Role.EMBEDDING, Role.READOUT), eps=1.0))
        vectors = times(VECTORS, lr=-1)
        yield Mistake("bias or norm-gain LR scaled", "bias or norm-gain LR", "mup", family, vectors)
        decay = put(HIDDEN, weight_decay=1.0)
        yield Mistake("weight decay not scaled", "weight decay", "mup", family, decay, sections=coupled(0.0))
        for scheme in ("depth_mup", "completep"):
            whole = at_sites(RESIDUALS, lambda plan, site: ONE_BRANCH)
            yield Mistake("residual depth factor missing", "residual depth", scheme, family, whole)
        yield Mistake("residual depth factor missing", "residual depth", "umup", family, whole)
        yield Mistake("depth LR factor missing", "depth factor of the learning rate", "depth_mup", family, depth_rate)
        yield Mistake("depth LR factor missing", "depth factor of the learning rate", "umup", family, depth_rate)
        yield from depth_mistakes(family)
    for scheme in ("mup", "umup"):
        yield Mistake("readout LR wrong", "readout LR", scheme, "llama", times((Role.READOUT,), lr=-1))
    for scheme in ("mup", "spectral"):
        yield Mistake("K/V treated like Q (GQA)", "keys and values", scheme, "llama", keys_like_queries)


def branches(power: float, pattern: str = "") -> Edit:
    """Multiply branches by powers of the ratio of sizes."""

    def edit(plan: Plan, m: float) -> Plan:
        sites = [name for name, op in plan.ops.items() if op.site.kind in RESIDUALS and pattern in name]
        ops = dict(plan.ops)
        for name in sites:
            values = dict(plan.ops[name].values)
            for q in ("branch", "branch_grad"):
                values[q] = replace(values[q], number=values[q].number * m**power)
            ops[name] = replace(plan.ops[name], values=values)
        return replace(plan, ops=ops)

    return edit


def depth_mistakes(family: str) -> Iterator[Mistake]:
    """Those that a check over depth shall find."""
    whole = at_sites(RESIDUALS, lambda plan, site: ONE_BRANCH)
    missing, rate = "residual depth factor missing", "depth factor of the learning rate"

    def mistake(name: str, suspect: str, scheme: str, plan: Edit) -> Mistake:
        return Mistake(name, suspect, scheme, family, plan, axis="depth")

    for scheme in CORRECT["depth"]:
        yield mistake(missing, missing, scheme, whole)
    for scheme in ("depth_mup", "umup"):
        yield mistake("depth LR factor missing", rate, scheme, depth_rate)
    yield mistake("branches of 1/sqrt(depth) at CompleteP's rates", missing, "completep", branches(0.5))
    yield mistake("one layer without its branch factor", missing, "completep", branches(1, "layers.1."))
    twice = "residual depth factor too small"
    yield mistake("branch factor applied twice", twice, "depth_mup", branches(-0.5))
    for scheme in ("depth_mup", "completep"):
        init = times((Role.HIDDEN_OUT,), init_std=-0.5)
        yield mistake("residual init scaled with depth, too", "residual init scaled with depth", scheme, init)
    outside = times((Role.EMBEDDING, Role.READOUT, Role.POSITION), lr=-0.5)
    yield mistake("depth factor on all rates", "depth factor on rates outside", "depth_mup", outside)
    eps = times((*HIDDEN, *VECTORS), "layers.", eps=1)
    yield mistake("epsilon not scaled with depth", "epsilon not scaled", "completep", eps)


def twice(scheme: str) -> Edit:
    """The width rule on top of itself."""
    if scheme == "umup":
        return times(HIDDEN, multiplier=-0.5, lr=-0.5)
    return times(HIDDEN, init_std=-0.5, lr=-1)


def run(config: RunConfig, mistake: Mistake | None = None, first_seed: int = 0, axis: str | None = None) -> CoordReport:
    """The config's check, spoiled or not, along the mistake's axis if none is given."""
    along = axis or (mistake.axis if mistake else "width")
    sizes = SIZES_OF[along]

    def make(point: Point) -> Subject:
        at = sized(config, point)
        reference = plan_for(at)
        if mistake is None:
            return config_subject(at)
        subject = config_subject(at, mistake.plan(reference, SIZES[along](point) / sizes[0]))
        mistake.after(subject)
        return audited(subject, reference, at)

    runs = RUNS[along](config, sizes, STEPS, SEEDS)
    moved = [replace(p, seed=p.seed + first_seed) for p in runs.points]
    further = {axis: [replace(p, seed=p.seed + first_seed) for p in ps] for axis, ps in runs.further.items()}
    return check(make, replace(runs, points=moved, further=further), batches_of(config))


def shown_by(report: CoordReport) -> str:
    """Which parts of the check failed."""
    failed = [s for s in report.slopes if s.status == "fail"]
    parts = {
        "coordinates": any(s.kind in COORDINATES for s in failed),
        "numbers": any(s.kind in NUMBERS for s in failed),
        "constants": any(m.kind != "weight" for m in report.mismatches),
        "init": any(m.kind == "weight" for m in report.mismatches),
    }
    return ", ".join(name for name, there in parts.items() if there)


def by_behaviour(report: CoordReport) -> list[Suspect]:
    """The suspects that slopes alone give, as if no factor, rate or epsilon had been read off."""
    return suspects(report.slopes, [], {s.name: s.role for s in report.slopes})


def page(quick: bool) -> Iterator[str]:
    """The benchmark's tables, line by line as they are made."""
    began = perf_counter()
    yield "| mistake | over | scheme | family | verdict | named | without the plan's constants | by | first suspect |"
    yield "|---|---|---|---|---|---|---|---|---|"
    cases = [m for m in mistakes() if not quick or m.family == "llama"]
    caught = named = alone = 0
    for m in cases:
        report = run(small_config(m.scheme, m.family, **m.sections), m)
        first = str(report.suspects[0]) if report.suspects else "-"
        right = first.startswith(m.suspect)
        caught, named = caught + (report.verdict == "FAIL"), named + right
        blind = next(map(str, by_behaviour(report)), "nothing")
        alone += blind.startswith(m.suspect)
        told = "named" if blind.startswith(m.suspect) else blind.partition(":")[0]
        verdict = [report.verdict, "yes" if right else "no"]
        cells = [m.name, m.axis, m.scheme, m.family, *verdict, told, shown_by(report), first]
        yield f"| {' | '.join(cells)} |"
    yield ""
    count = f"{len({m.name for m in cases})} mistakes, {len(cases)} cases"
    yield f"{count}: {caught} caught, {named} named; {alone} named without constants."
    yield ""
    yield "| scheme | over | family | verdicts of sets of seeds | furthest |"
    yield "|---|---|---|---|---|"
    alarms = total = 0
    for axis, scheme in ((a, s) for a in SIZES_OF for s in (*CORRECT[a], *OTHERS[a])):
        correct = scheme in CORRECT[axis]
        for family in ("llama", "gpt2"):
            sets = 1 if quick or not correct else 5
            reports = [run(small_config(scheme, family), None, 10 * i, axis) for i in range(sets)]
            verdicts = [r.verdict for r in reports]
            if correct:
                alarms, total = alarms + verdicts.count("FAIL"), total + len(verdicts)
            s = max((r.worst[0] for r in reports), key=lambda s: max(abs(s.low), abs(s.high)) / s.limit)
            found = f"{s.axis}: {s.kind} of {s.name} {s.slope:+.2f}"
            yield f"| {scheme} | {axis} | {family} | {' '.join(verdicts)} | {found} |"
    yield ""
    yield f"{alarms} false alarms in {total} checks of correct schemes. {perf_counter() - began:.0f} s in all."


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="llama only, one set of seeds")
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in page(arguments.quick):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        text = (
            "# What the coordinate check catches\n\nMade by `python benchmarks/coord_check_power.py --write ...`.\n\n"
        )
        arguments.write.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
