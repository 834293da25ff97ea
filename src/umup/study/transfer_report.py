"""A finished study and a target -> everything there is to say before the target is launched, as data and as Markdown.

It holds the moves with their rules, the rates that every kind of parameter will get, what does not transfer, what
leaves tested ranges, and the cost; outputs of `umup transfer-check` are quoted with their verdict and figure.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.models.memory import GIB
from umup.models.specs import plan_for
from umup.optim.groups import FAMILIES
from umup.rules.explain import narrow_table, parameter_rows
from umup.study.cost import Cost, bench_speed, cost_of, flops_per_token
from umup.study.evidence import Caveat, not_transferred, warnings
from umup.study.planner import HorizonRules, Transfer, transfer
from umup.study.tuned import CheckSummary, Study, read_check

WIDTH = 120


@dataclass(frozen=True)
class TransferPlan:
    """A transfer with all that a person should know before launching it."""

    study: Study
    transfer: Transfer
    target_cost: Cost
    tuning_flops: float
    caveats: tuple[Caveat, ...]
    not_transferred: tuple[Caveat, ...]
    checks: tuple[CheckSummary, ...]

    @property
    def tuning_share(self) -> float:
        """Tuning's FLOPs over the target's; all trials counted at the proxy's size."""
        return self.tuning_flops / self.target_cost.flops


def plan_transfer(
    study: Study,
    target: RunConfig,
    rules: HorizonRules | None = None,
    bench: Path | None = None,
    checks: Sequence[Path] = (),
) -> TransferPlan:
    """Move the study's values to the target. Raises ConfigError for a smaller target, and as `transfer`."""
    for field in ("hidden_size", "num_layers"):
        small, large = getattr(study.proxy.model, field), getattr(target.model, field)
        if large < small:
            raise ConfigError(
                f"target model.{field} {large} is smaller than the proxy's {small}; write a target at least as large, "
                "or tune a smaller proxy"
            )
    moved = transfer(study.proxy, target, rules)
    speed = None if bench is None else bench_speed(bench, moved.config)
    return TransferPlan(
        study,
        moved,
        cost_of(moved.config, speed),
        flops_per_token(study.proxy) * study.tokens,
        tuple(warnings(study.proxy, moved.config)),
        tuple(not_transferred(study.proxy, moved.config)),
        tuple(read_check(path) for path in checks),
    )


def document(plan: TransferPlan) -> dict[str, Any]:
    """The plan as one JSON document."""
    cost = plan.target_cost
    return {
        "umup_transfer": 1,
        "values": dict(plan.study.values),
        "proxy": plan.study.proxy.model_dump(mode="json"),
        "config": plan.transfer.config.model_dump(mode="json"),
        "moved": [asdict(move) for move in plan.transfer.moved],
        "replaced": dict(plan.transfer.replaced),
        "not_transferred": [asdict(c) for c in plan.not_transferred],
        "warnings": [asdict(c) for c in plan.caveats],
        "cost": {**asdict(cost), "memory_bytes": cost.memory_bytes},
        "tuning": {
            "trials": plan.study.trials,
            "tokens": plan.study.tokens,
            "loss": plan.study.loss,
            "flops": plan.tuning_flops,
            "share_of_target": plan.tuning_share,
        },
        "checks": [{"axis": c.axis, "scheme": c.scheme, "verdict": c.verdict} for c in plan.checks],
    }


def plan_text(plan: TransferPlan) -> str:
    """What the terminal shows."""
    parts = [narrow_table(rows, WIDTH) for rows in (_moves(plan), _rates(plan))]
    parts += ["\n".join(["does not transfer:", *_bullets(plan.not_transferred)])] * bool(plan.not_transferred)
    parts += ["\n".join(["outside tested ranges:", *_bullets(plan.caveats)])] * bool(plan.caveats)
    replaced = [f"the target's own {k} {v} is replaced" for k, v in plan.transfer.replaced.items()]
    return "\n\n".join(
        [
            *parts,
            *(["\n".join(replaced)] if replaced else []),
            "\n".join(_cost_lines(plan)),
            narrow_table(_memory(plan.target_cost), WIDTH),
        ]
    )


def markdown(plan: TransferPlan) -> str:
    """The report."""
    m, study = plan.transfer.config.model, plan.study
    loss = "" if study.loss is None else f", validation loss {study.loss:.4f}"
    parts = [
        f"# Transfer to width {m.hidden_size}, depth {m.num_layers}",
        f"Scheme `{study.proxy.parametrization.scheme}`, tuned at width {study.proxy.model.hidden_size}, depth "
        f"{study.proxy.model.num_layers} in {study.trials} trials of {study.tokens:,} tokens in all{loss}. "
        "`config.yaml` beside this report runs as it is: `umup train config.yaml`.",
        *(["![what the sweep found](sweep.png)"] if study.figure is not None else []),
        "## What moved",
        _markdown(_moves(plan)),
        *(f"- The target's own `{k}: {v}` is replaced." for k, v in plan.transfer.replaced.items()),
        "## Rates per parameter",
        "The peak learning rate, epsilon and decay that the plan gives, at the proxy and at the target.",
        _markdown(_rates(plan)),
        *_section("What does not transfer", plan.not_transferred),
        *_section("Outside tested ranges", plan.caveats),
        "## Cost",
        "\n".join(f"- {line}" for line in _cost_lines(plan)),
        _markdown(_memory(plan.target_cost)),
        *_checks(plan.checks),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, caveats: Sequence[Caveat]) -> list[str]:
    return [f"## {title}", "\n".join(_bullets(caveats))] if caveats else []


def _bullets(caveats: Sequence[Caveat]) -> list[str]:
    return [f"- {c.text} [{c.source}]" for c in caveats]


def figure_name(check: CheckSummary) -> str:
    """A check's figure beside the report."""
    return f"transfer-{check.axis}.png"


def _checks(checks: Sequence[CheckSummary]) -> list[str]:
    parts = []
    for c in checks:
        said = "\n".join(f"    {line}" for line in c.lines)
        parts += [f"## Transfer check over {c.axis} ({c.scheme}): {c.verdict.upper()}", said]
        parts += [f"![loss over {c.axis}]({figure_name(c)})"] * (c.figure is not None)
    return parts


Rows = list[tuple[str, ...]]


def _moves(plan: TransferPlan) -> Rows:
    head = ("number", "proxy", "target", "rule")
    return [
        head,
        *(
            (m.field, _shown(m.before), _shown(m.after), m.rule + _cited(m.evidence, m.source))
            for m in plan.transfer.moved
        ),
    ]


def _rates(plan: TransferPlan) -> Rows:
    """Peak rate, epsilon and decay of every parameter, before and after; layers that agree are one row."""
    sides = []
    for config in (plan.study.proxy, plan.transfer.config):
        o = config.optimizer
        factors = (
            ("lr", o.lr),
            ("eps", FAMILIES[o.name].eps if o.eps is None else o.eps),
            ("weight_decay", o.weight_decay),
        )
        rows = parameter_rows(plan_for(config))
        sides.append({r.name: [_shown(f * r.values[q].number) for q, f in factors if q in r.values] for r in rows})
    before, after = sides
    head = ("parameter", "lr, eps, decay at the proxy", "at the target")
    return [head, *((n, " ".join(before.get(n, ["-"])), " ".join(now)) for n, now in after.items() if now)]


def _memory(cost: Cost) -> Rows:
    rows: Rows = [("component", "dtype", "GiB")]
    rows += [(r.component, r.dtype, f"{r.bytes / GIB:.3f}") for r in cost.memory]
    return [*rows, ("total, without activations", "", f"{cost.memory_bytes / GIB:.3f}")]


def _cost_lines(plan: TransferPlan) -> list[str]:
    cost = plan.target_cost
    lines = [
        f"{cost.parameters:,} parameters, {cost.tokens:,} tokens, {cost.flops:.3g} FLOPs",
        f"{cost.memory_bytes / GIB:.3f} GiB on each GPU before activations, without sharding",
        f"tuning took {plan.tuning_flops:.3g} FLOPs, {100 * plan.tuning_share:.2g}% of the target's",
    ]
    if cost.gpu_hours is None:
        return [*lines, "hours: unknown; write --bench FILE with the output of umup bench --shape TARGET --json"]
    return [*lines, f"{cost.gpu_hours:,.2f} GPU hours at {cost.tokens_per_second:,.0f} tokens/s, as benched"]


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


def _cited(evidence: str, source: str) -> str:
    found = ": ".join(text for text in (evidence, source) if text)
    return f" [{found}]" if found else ""


def _markdown(rows: Rows) -> str:
    head, *rest = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
