"""What a sweep found: the ranking with its dynamics, the choice and its reason, as report.md and best.json."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from umup.checkpoint import write_atomic
from umup.study.space import apply_values
from umup.study.strategies import Independent
from umup.study.sweep import SHORTLIST, Candidate, Sweep, candidates, independent_of, pick
from umup.study.todo import Attempt, State

SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """A finished sweep. `ranked` are the points of the deciding stage, best first; `tokens` all that was trained on."""

    sweep: Sweep
    ranked: tuple[Candidate, ...]
    proxies: tuple[Candidate, ...]
    choice: Candidate
    why: str
    trials: int
    failures: tuple[Attempt, ...]
    tokens: int
    lines: Independent | None

    def json(self) -> dict[str, Any]:
        """best.json: what `umup transfer` reads, and the reasons. `config` is the proxy's, with the values in it."""
        return {
            "values": dict(self.choice.values),
            "loss": self.choice.loss,
            "config": apply_values(self.sweep.config, self.choice.values).model_dump(mode="json"),
            "trials": self.trials,
            "tokens": self.tokens,
            "stage": self.choice.stage,
            "dynamics": self.choice.dynamics.__dict__,
            "why": self.why,
            "strategy": self.sweep.strategy,
            "interaction": None if self.lines is None else _finite(self.lines.interaction),
            "edges": edges(self),
        }


def conclude(sweep: Sweep, attempts: Sequence[Attempt]) -> Finding:
    """Rank, choose and say why."""
    proxies = candidates(sweep, attempts)
    ranked = proxies if sweep.intermediate is None else candidates(sweep, attempts, SHORTLIST)
    choice, why = pick(ranked)
    done = [a.outcome for a in attempts if a.outcome is not None]
    return Finding(
        sweep,
        tuple(ranked),
        tuple(proxies),
        choice,
        why,
        len(done),
        tuple(a for a in attempts if a.state == State.FAILED),
        sum(outcome.tokens for outcome in done),
        independent_of(sweep, attempts),
    )


def edges(finding: Finding) -> list[str]:
    """Axes on whose end the choice lies, so that the optimum may lie beyond."""
    chosen = finding.choice.values
    if finding.lines is not None:
        return [line.key for line in finding.lines.lines if line.on_edge and chosen[line.key] == line.best]
    return [axis.key for axis in finding.sweep.space if chosen[axis.key] in (axis.values[0], axis.values[-1])]


def write_report(folder: Path, finding: Finding, figure: str | None = None) -> None:
    """best.json and report.md, which shows a figure that lies beside it."""
    write_atomic(folder / "report.md", report(finding, figure))
    write_atomic(folder / "best.json", json.dumps(finding.json(), indent=1))


def report(f: Finding, figure: str | None = None) -> str:
    """Markdown."""
    sweep = f.sweep
    lines = [
        "# Sweep",
        "",
        f"Strategy `{sweep.strategy}`, scheme `{sweep.config.parametrization.scheme}`, width "
        f"{sweep.config.model.hidden_size}, {sweep.config.train.steps} steps of {sweep.config.tokens_per_step} tokens; "
        f"{f.trials} runs, {f.tokens:,} tokens in all.",
        "",
        "## The choice",
        "",
        *(f"- `{key}`: {value:.6g}" for key, value in f.choice.values.items()),
        "",
        f"Loss {f.choice.loss:.4f}: {f.why}.",
        *(f"\n`{key}` is best at the end of its range: the optimum may lie beyond." for key in edges(f)),
        "",
        *([f"![loss against every hyperparameter]({figure})", ""] if figure else []),
        *_independent(f.lines, f.proxies),
        "## Ranking" + (" of the shortlist" if sweep.intermediate is not None else ""),
        "",
        *_table(f.ranked, f.choice),
    ]
    if sweep.intermediate is not None:
        m, t = sweep.intermediate.model, sweep.intermediate.train
        lines += ["", f"At width {m.hidden_size}, {m.num_layers} layers, {t.steps} steps.", ""]
        lines += ["## Ranking of the proxy", "", *_table(f.proxies, f.choice)]
    if f.failures:
        lines += ["", "## Failed attempts", "", *(f"- trial {a.number} on {a.host}: {a.error}" for a in f.failures)]
    return "\n".join(lines) + "\n"


def summary(f: Finding) -> str:
    """One paragraph for the terminal."""
    values = ", ".join(f"{key} {value:.4g}" for key, value in f.choice.values.items())
    said = [f"best: {values}", f"loss {f.choice.loss:.4f}: {f.why}"]
    said += [f"{key} is best at the end of its range: the optimum may lie beyond" for key in edges(f)]
    if f.lines is not None and len(f.sweep.space) > 1 and isfinite(f.lines.interaction):
        said.append(f"interaction: combining the lines' best costs {f.lines.interaction:+.4f} nats beyond their gains")
    return "\n".join([*said, f"{f.trials} runs, {f.tokens:,} tokens"])


def _independent(found: Independent | None, proxies: Sequence[Candidate]) -> Iterator[str]:
    if found is None:
        return
    yield from ("## Lines", "", "| hyperparameter | best | gain (nats) | |", "|---|---|---|---|")
    for line in found.lines:
        yield f"| `{line.key}` | {line.best:.6g} | {line.gain:.4f} | {'on its edge' * line.on_edge} |"
    yield ""
    if isfinite(found.interaction):
        yield f"All together: {found.promised:.4f} promised, {found.measured:.4f} measured."
        yield f"The interaction error is {found.interaction:+.4f} nats."
    else:
        yield f"All together: {found.promised:.4f} promised, but it diverged."
    if found.measured > proxies[0].loss:
        yield "A point of a line is better than all bests together: here these hyperparameters act on each other, and"
        yield "`--strategy tpe` or `random` on the few that gain most may find more."
    yield ""


def _table(ranked: Sequence[Candidate], choice: Candidate) -> Iterator[str]:
    keys = list(choice.values)
    yield "| rank | loss | seeds | dynamics | " + " | ".join(key.rpartition(".")[2] for key in keys) + " | trials |"
    yield "|" + "---|" * (len(keys) + 5)
    for rank, c in enumerate(ranked[:SHOWN], 1):
        mark = " **chosen**" * (c.values == choice.values)
        seeds = f"{min(c.losses):.4f} to {max(c.losses):.4f}" if len(c.losses) > 1 else ""
        faults = "given up" if c.given_up else c.dynamics.faults
        values = " | ".join(f"{c.values[key]:.4g}" for key in keys)
        yield f"| {rank}{mark} | {c.loss:.4f} | {seeds} | {faults} | {values} | {', '.join(map(str, c.attempts))} |"
    if len(ranked) > SHOWN:
        yield f"\n{len(ranked) - SHOWN} more in journal.log."


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
