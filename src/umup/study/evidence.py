"""What published runs tested, where a transfer leaves it, and which numbers no rule moves.

Warnings are about ranges: rules were observed to hold from proxies of at least FLOORS, over ratios of at most TESTED.
Notes are about numbers that are copied because they have to be something, though nothing says that they transfer.

Not covered: whether the proxy's loss was noisy or its grid coarse; the sweep and the transfer check say that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from umup.config.sections import RunConfig
from umup.models.specs import TRAITS, shape_of
from umup.rules.schemes import scheme as find_scheme

TP5 = "2203.03466 section 6"


@dataclass(frozen=True)
class Caveat:
    """One line for a person, and its source."""

    text: str
    source: str


@dataclass(frozen=True)
class Floor:
    """The smallest proxy from which transfer was observed to be reliable."""

    what: str
    of: Callable[[RunConfig], int]
    least: int
    source: str


FLOORS = (
    Floor("width", lambda c: c.model.hidden_size, 256, f"{TP5}; 2407.17465: the optimum drifts below it"),
    Floor("depth", lambda c: c.model.num_layers, 4, TP5),
    Floor("sequences per step", lambda c: c.train.batch_size * c.train.grad_accum, 32, TP5),
    Floor("sequence length", lambda c: c.model.max_seq_len, 128, TP5),
    Floor("steps", lambda c: c.train.steps, 5000, TP5),
)


@dataclass(frozen=True)
class Tested:
    """The largest ratios over which a scheme's optimum was published to stay; 1: the scheme has no such rule."""

    width: float
    depth: float
    source: str


TESTED: Mapping[str, Tested] = {
    "sp": Tested(1, 1, "2203.03466 figure 1: the optimum drifts"),
    "ntp": Tested(1, 1, "1806.07572"),
    "unit": Tested(1, 1, "2303.11257"),
    "mup": Tested(16, 1, "2203.03466: GPT-3 of width 256 to 4096; depth observed, without a rule"),
    "umup": Tested(32, 4, "2407.17465: width 128 to 4096, depth 4 to 16"),
    "depth_mup": Tested(16, 1, "2310.02244: no depth rule transfers in full for blocks of two layers"),
    "completep": Tested(16, 64, "2505.01618: depth 2 to 128; 2512.22382: width 128 to 2048"),
    "mus": Tested(32, 1, "2502.05967: width 256 to 8192; tau falls with depth"),
    "spectral": Tested(1, 1, "2310.17813: networks of other kinds"),
}
# Over batch and length no rule was published to hold further (2512.22382: batch 1/8 to 4 times; 2407.17465: 4 times).
MOST_BATCH, MOST_LENGTH = 4.0, 4.0


def warnings(proxy: RunConfig, target: RunConfig) -> list[Caveat]:
    """Where the transfer leaves what was tested; `target` is the moved config."""
    found = [
        Caveat(f"proxy {f.what} {f.of(proxy)}: below {f.least} transfer was found unreliable", f.source)
        for f in FLOORS
        if f.of(proxy) < f.least
    ]
    name = proxy.parametrization.scheme
    tested, m, t = TESTED[name], proxy.model, target.model
    ratios = (
        ("width", t.hidden_size / m.hidden_size, tested.width, tested.source),
        ("depth", t.num_layers / m.num_layers, tested.depth, tested.source),
        ("batch", target.tokens_per_step / proxy.tokens_per_step, MOST_BATCH, "2512.22382: 1/8 to 4 times"),
        ("length", tokens(target) / tokens(proxy), MOST_LENGTH, "2407.17465: 8k to 32k steps"),
    )
    for what, ratio, most, source in ratios:
        if ratio > most:
            beyond = f"{name} has no rule that was shown to hold" if most == 1 else f"tested up to {most:g} times"
            found.append(Caveat(f"{what} grows {ratio:.3g} times; {beyond}", source))
    base = target.parametrization.base
    if base is not None and base.hidden_size > t.hidden_size:
        found.append(Caveat(f"the base's width {base.hidden_size} exceeds the target's {t.hidden_size}", "2203.03466"))
    if shape_of(t).traits.tie_embeddings and not find_scheme(name).one_rate:
        found.append(
            Caveat(
                "the head is tied to the embedding, whose rules differ: one rate serves both", "2407.17465 abc table"
            )
        )
    return [*found, *_preconditions(target)]


def _preconditions(target: RunConfig) -> list[Caveat]:
    row = find_scheme(target.parametrization.scheme)
    found: list[Caveat] = []
    if row.one_rate:
        return found
    if shape_of(target.model).traits.norm_gain:
        found.append(
            Caveat(
                "norms have trained gains, which hinder transfer; write model.norm_gain: false",
                "2404.05728; 2407.17465",
            )
        )
    if target.optimizer.weight_decay and not target.optimizer.independent_weight_decay:
        found.append(
            Caveat(
                "weight decay is coupled to the rate, which hinders transfer; write independent_weight_decay: true",
                "2404.05728; 2407.17465",
            )
        )
    return found


def tokens(config: RunConfig) -> int:
    """Of the whole run."""
    return config.tokens_per_step * config.train.steps


def not_transferred(proxy: RunConfig, target: RunConfig) -> list[Caveat]:
    """What is copied or changed without a rule."""
    row = find_scheme(proxy.parametrization.scheme)
    found: list[Caveat] = []
    if row.one_rate and proxy.model.hidden_size != target.model.hidden_size:
        found.append(
            Caveat(f"the learning rate: {row.title} has no width rule, so the copy is only a guess", row.source)
        )
    if not (row.on_residual or row.needs_base_depth) and proxy.model.num_layers != target.model.num_layers:
        found.append(Caveat(f"depth: no rate of {row.name} follows it", row.source))
    if target.optimizer.weight_decay:
        found.append(
            Caveat("weight decay regularises: its best value depends on the data and how often it repeats", TP5)
        )
    if proxy.model.dropout or target.model.dropout:
        found.append(Caveat("dropout regularises: tune it at the target's size, or leave it out", TP5))
    if proxy.train.grad_clip:
        found.append(
            Caveat(
                "train.grad_clip bounds a norm over all parameters, whose size follows their number", "docs/rules.md"
            )
        )
    found += [
        Caveat(f"{field}: tuned at {before}, the target has {after}; no rule is known", "rules/horizon.py")
        for field, before, after in _differences(proxy, target)
        if before != after
    ]
    return found


def _differences(proxy: RunConfig, target: RunConfig) -> list[tuple[str, object, object]]:
    a, b = shape_of(proxy.model), shape_of(target.model)
    return [
        ("model.family", a.family.name, b.family.name),
        ("model.max_seq_len", a.max_seq_len, b.max_seq_len),
        ("model.vocab_size", a.vocab_size, b.vocab_size),
        ("model.head_dim", a.head_dim, b.head_dim),
        *((f"model.{trait}", getattr(a.traits, trait), getattr(b.traits, trait)) for trait in TRAITS),
        ("data.source", proxy.data.source, target.data.source),
        ("data.tokenizer", proxy.data.tokenizer, target.data.tokenizer),
        ("precision.recipe", proxy.precision.recipe, target.precision.recipe),
    ]
