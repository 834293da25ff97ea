"""The demo's study: learning-rate lines over three widths in SP and u-muP, transfer, and a run at the widest.

Everything is small enough for two CPU cores, and nothing is special to it: configs, search, planner and trainer are the
ones that a real study uses. What it reports is measured where it runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.study.lines import Line
from umup.study.transfer_check import CheckPlan
from umup.study.verdicts import Tolerance, TransferCheck


@dataclass(frozen=True)
class DemoPlan:
    """The size of the story. `grids`: log2 learning rates of each scheme's lines; the first width is the proxy."""

    widths: tuple[int, ...]
    grids: Mapping[str, tuple[float, ...]]
    steps: int
    seeds: int
    final_steps: int

    @property
    def proxy(self) -> int:
        """The width where rates are tuned."""
        return self.widths[0]


FULL = DemoPlan(
    widths=(32, 64, 128),
    grids={"sp": (-9, -8, -7, -6, -5), "umup": (-1, 0, 1, 2, 3)},
    steps=160,
    seeds=3,
    final_steps=400,
)
FAST = DemoPlan(
    widths=(32, 64),
    grids={"sp": (-8, -7, -6, -5, -4), "umup": (-1, 0, 1, 2, 3)},
    steps=50,
    seeds=2,
    final_steps=100,
)


# The demo's grid has steps of an octave.
TOLERANCE = Tolerance(drift=1.0)
VERDICTS = {
    "pass": f"the optimum stays within {TOLERANCE.drift:g} octave, not re-tuning costs up to {TOLERANCE.penalty} nats",
    "fail": f"the optimum moves by over {TOLERANCE.drift:g} octave, or not re-tuning costs over {TOLERANCE.penalty}",
    "undecided": "the seeds do not tell, or the optimum lies outside a grid",
}


def proxy_config(demo: DemoPlan, scheme: str) -> RunConfig:
    """The proxy: a two-layer llama on the bytes of Python's own library, 1024 tokens a step.

    Norm gains are off where the scheme's papers say so, which is u-muP's precondition for transfer; SP keeps them.
    """
    schemes: Mapping[str, dict[str, object]] = {"sp": {}, "umup": {"norm_gain": False}}
    return parse_config(
        {
            "model": {
                "hidden_size": demo.proxy,
                "num_layers": 2,
                "head_dim": 16,
                "max_seq_len": 64,
                **schemes[scheme],
            },
            "parametrization": {"scheme": scheme},
            "schedule": {"name": "linear", "warmup_steps": demo.steps // 10, "final_factor": 0.0},
            "train": {
                "device": "cpu",
                "steps": demo.steps,
                "batch_size": 16,
                "eval_every": demo.steps,
                "eval_batches": 24,
            },
        }
    )


def check_of(demo: DemoPlan, scheme: str) -> CheckPlan:
    """The scheme's lines over the widths."""
    return CheckPlan(
        proxy_config(demo, scheme), demo.widths[1:], demo.grids[scheme], seeds=demo.seeds, tolerance=TOLERANCE
    )


def final_config(demo: DemoPlan, transfer: TransferCheck) -> RunConfig:
    """The widest model at the transferred rate, trained for longer than the sweep's runs."""
    config = check_of(demo, transfer.scheme).config(demo.widths[-1], 2.0**transfer.rate, 0)
    steps = demo.final_steps
    schedule = config.schedule.model_copy(update={"warmup_steps": steps // 10})
    train = config.train.model_copy(update={"steps": steps, "eval_every": steps // 4, "checkpoint_every": steps // 4})
    return config.model_copy(update={"schedule": schedule, "train": train})


def summary(transfers: Sequence[TransferCheck]) -> list[str]:
    """What was measured, in plain words, whatever it is."""
    lines = []
    for t in transfers:
        proxy = t.lines[t.proxy]
        lines.append(f"{t.scheme}: tuned at width {t.proxy}, best rate {_best(proxy)}, loss {_loss(proxy)}")
        for width, line in t.lines.items():
            if width != t.proxy:
                lines.append(f"  width {width}: own best rate {_best(line)}, loss {_loss(line)}")
                lines.append(
                    f"    optimum moved by {_octaves(t.drift(width))} octaves; not re-tuning {_cost(t.penalty(width))}"
                )
        lines.append(f"  transfer check: {t.verdict.upper()} ({VERDICTS[t.verdict]})")
    lines.append(_comparison(transfers))
    return lines


def _loss(line: Line) -> str:
    losses = line.losses[line.best]
    return f"{line.mean(line.best):.3f} (seeds {min(losses):.3f} to {max(losses):.3f})"


def _best(line: Line) -> str:
    return f"2^{line.best:g}" + (" (on the edge of the grid: the optimum may lie beyond)" if line.on_edge else "")


def _octaves(drift: float) -> str:
    return f"{round(drift, 2) + 0.0:+.2f}"


def _cost(penalty: tuple[float, ...]) -> str:
    if not all(map(isfinite, penalty)):
        return "diverges"
    if not any(penalty):
        return "costs nothing: it is the same rate"
    average = sum(penalty) / len(penalty)
    return f"costs {average:+.3f} nats (seeds {min(penalty):+.3f} to {max(penalty):+.3f})"


def _comparison(transfers: Sequence[TransferCheck]) -> str:
    """One sentence on the widest model: which scheme lost less by transferring, if the seeds can tell."""
    widest = max(transfers[0].lines)
    ranked = sorted(transfers, key=lambda t: t.mean_penalty(widest))
    least, most = ranked[0], ranked[-1]
    apart = max(least.penalty(widest)) < min(most.penalty(widest))
    diverged = [t.scheme for t in transfers if not all(map(isfinite, t.penalty(widest)))]
    drifts = ", ".join(f"{t.scheme} {_octaves(t.drift(widest))}" for t in transfers)
    if diverged:
        verdict = f"the transferred rate diverged under {' and '.join(diverged)}"
    elif apart:
        gap = most.mean_penalty(widest) - least.mean_penalty(widest)
        verdict = f"transferring cost {most.scheme} {gap:.3f} nats more than {least.scheme}, in every seed"
    else:
        verdict = "the seeds do not separate what transferring cost the two schemes"
    return f"from width {transfers[0].proxy} to {widest}: {verdict}; optimum drift in octaves: {drifts}"
