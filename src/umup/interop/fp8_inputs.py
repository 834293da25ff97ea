"""Static scales for the inputs of FP8 products: those that a run trained with, or those that one look chooses.

A run with FP8 products and constant scales keeps them in its checkpoints (by linear: the exponents of input, gradient
and weight, whether the product was spared, and its formats). Anything else is looked at: random prompts go through the
network and `numerics.ranges.choose` takes an exponent from the histogram of each input, with its margins. Random
prompts are no text: a model whose activations depend strongly on its data is better trained, or served, otherwise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from umup.checkpoint import load_latest
from umup.config.sections import RunConfig
from umup.interop.compare import loaded, watch_inputs
from umup.interop.source import RUN, Source
from umup.models.specs import shape_of
from umup.numerics.formats import E4M3
from umup.numerics.ranges import Range, choose, measure
from umup.rules.plan import READOUTS, Plan
from umup.rules.precision import find_recipe, products

FIELDS = [E4M3.exponent_bits, E4M3.mantissa_bits]
PROMPTS = 8


def low_products(config: RunConfig, plan: Plan) -> list[str]:
    """The products that an FP8 export encodes: the run's own, or all hidden ones; never the head, which vLLM has not.

    Raises ConfigError for sides that FP8 kernels do not take.
    """
    own = find_recipe(config.precision.recipe)
    uses = own.forward == E4M3.name and not own.simulated
    recipe, overrides = (own, config.precision.overrides) if uses else (find_recipe("fp8"), {})
    # "dynamic": which scheme trained the weights does not matter to scales that are looked for.
    found = products(plan, recipe, overrides, "dynamic").values()
    return [p.name for p in found if p.forward == E4M3.name and p.role not in READOUTS]


def input_exponents(source: Source, weights: Mapping[str, Tensor], say: Callable[[str], None]) -> dict[str, int]:
    """Exponents of the inputs of those of `low_products` that FP8 serves; `say` is told where they are from."""
    names = low_products(source.config, source.plan)
    known = _recorded(source)
    if known and all(name in known for name in names):
        say("input scales: those of the run's last checkpoint")
        return {name: exponent for name in names if (exponent := known[name]) is not None}
    say(f"input scales: measured on {PROMPTS} random prompts")
    return _measured(source, weights, names, say)


def _recorded(source: Source) -> dict[str, int | None]:
    """Exponents by linear, None for spared ones; nothing where the run's scales are no constants."""
    if source.format != RUN or source.config.precision.scales == "dynamic" or not _has_checkpoints(source.path):
        return {}
    state, _ = load_latest(source.path)
    kept = {} if state is None else state.precision
    rows = {name: row.tolist() for name, row in kept.items() if row[4:6].tolist() == FIELDS}
    return {name: None if row[3] else row[0] for name, row in rows.items()}


def _has_checkpoints(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


@torch.no_grad()
def _measured(
    source: Source, weights: Mapping[str, Tensor], names: list[str], say: Callable[[str], None]
) -> dict[str, int]:
    shape = shape_of(source.config.model)
    model = loaded(shape, source.plan, weights.items())
    seen: dict[str, Tensor] = {}
    watch_inputs(model, names, lambda name, x: seen.update({name: measure(x)}))
    generator = torch.Generator().manual_seed(1)
    model(torch.randint(shape.vocab_size, (PROMPTS, min(shape.max_seq_len, 512)), generator=generator))
    found: dict[str, int] = {}
    first = names[0]
    for name in names:
        first = name if name in seen else first  # q, k, v and gate, up may be one product
        choice = choose(Range.of(seen[first]), E4M3, 0)
        if choice.serves:
            found[name] = choice.exponent
        else:
            say(f"{name} stays as it is: {choice.reason}")
    return found
