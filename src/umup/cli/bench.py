"""`umup bench`: the speed table of this machine, and whether FP8 pays for a config."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from umup.cli.arguments import Parser
from umup.config.load import load_config
from umup.errors import did_you_mean


def run(arguments: list[str]) -> int:
    """Measure and print; with --advise only what a config's FP8 would gain here."""
    parser = Parser(
        "bench",
        "BF16, FP8 and, where it is installed, torchao: speed, memory, share of the roofline and loss, side by side.",
    )
    parser.add_argument("--shape", default="7b", metavar="NAME", help="7b, 1b, tiny, or a config's path [7b]")
    parser.add_argument("--variants", metavar="A,B,...", help="rows of the table, or all [eight of them]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant [3]")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a turn [10]")
    parser.add_argument("--loss-steps", type=int, default=40, help="training steps before the loss is read [40]")
    parser.add_argument("--resident", type=int, help="variants on the GPU at one time [what fits]")
    parser.add_argument("--advise", type=Path, metavar="CONFIG", help="only predict whether FP8 pays for a config")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    known = parser.parse_strictly(arguments)
    for option in ("rounds", "steps", "loss_steps"):
        if getattr(known, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, not {getattr(known, option)}")
    if known.resident is not None and known.resident < 2:
        parser.error(f"--resident must be 2 or more, the reference and one other, not {known.resident}")
    if known.advise is not None:
        return _advise(known.advise, known.json)

    from umup.study.bench import BenchPlan, bench_json, bench_text, run_bench
    from umup.study.bench_variants import DEFAULT_VARIANTS, SHAPES, VARIANTS, bench_shape, named_shape

    shape = named_shape(known.shape) if known.shape in SHAPES else bench_shape(load_config(known.shape))
    chosen = {"all": tuple(VARIANTS), None: DEFAULT_VARIANTS}.get(known.variants) or tuple(known.variants.split(","))
    for name in chosen:
        if name not in VARIANTS:
            parser.error(f"--variants: unknown variant {name!r}; {did_you_mean(name, VARIANTS)}")
    plan = BenchPlan(shape, chosen, known.rounds, known.steps, known.loss_steps, known.resident)
    result = run_bench(plan, lambda line: print(line, file=sys.stderr, flush=True))
    print(bench_json(result) if known.json else bench_text(result))
    return 0


def _advise(path: Path, as_json: bool) -> int:
    config = load_config(path)

    from umup.study.rooflines import advise, has_fp8

    if not has_fp8():
        verdict = "this machine has no GPU with FP8 products, so FP8 does not pay here"
        print(json.dumps({"verdict": verdict}) if as_json else verdict)
        return 0
    advice = advise(config)
    if as_json:
        print(json.dumps(asdict(advice)))
    else:
        print(f"bf16 {advice.bf16_ms:.2f} ms, {advice.recipe} {advice.fp8_ms:.2f} ms a step (forward and backward)")
        print(advice.verdict)
    return 0
