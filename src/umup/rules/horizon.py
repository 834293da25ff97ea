"""How optimizer settings move with batch size and training length: tables of rules, each with source and evidence.

Tuned at one horizon, settings are moved to another in three stages, each by a rule that the user names:

    batch    batch size changes at constant tokens, so the number of steps changes the other way
    length   tokens change at constant batch size, so steps grow like tokens (a source's "steps" is `tokens` here)
    decay    owns weight decay: from the source horizon to the target at once, given the rate the first two chose

Rules are monomials in ratios target/source, so that all of them are 1 where nothing changes and there-and-back is the
identity. `batch` is tokens per optimizer step. Decay rules speak of the shrinkage per step at the peak rate: lr*wd
under coupled decay (`w *= 1 - lr_t*wd`), wd under independent decay (`w *= 1 - wd*lr_t/lr_peak`). Its inverse is
AdamW's memory in steps, and over the run's steps its `timescale` tau (2405.13698). The weight-decay rule of
2512.22382 is thus no row of its own: its rates with tau kept give its wd ~ steps^-1/2.

Rules of batch size are stated for gradients of the mean loss, whose noise falls as 1/sqrt(batch). Unit-scaled schemes
hand the optimizer sqrt(batch) times those: there Adam's epsilon, and half of SGD's linear rule, have already followed.

Not covered: warmup and schedule, which keep their share of the run; the critical batch size, beyond which no batch rule
here is expected to hold (2505.13738); repeated data, where tau counts in passes over it, not in runs; sequence length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf, prod

from umup.errors import PlanError, did_you_mean
from umup.rules.monomial import Monomial, constant, power

ONE = constant(1.0)
# What rules move. A beta is a memory of 1/(1-beta) steps, and 1-beta is what grows as a power.
LR, ONE_MINUS_BETA, EPS, DECAY_PER_STEP = "lr", "1-beta", "eps", "decay_per_step"


class Evidence(StrEnum):
    """What a rule rests on, best first."""

    THEORY = "theory"  # derived, and checked by its source
    EMPIRICAL = "empirical"  # fitted to, or observed in, its source's runs
    CONTESTED = "contested"  # observed by its source; others measured otherwise


@dataclass(frozen=True)
class Rule:
    """One alternative of an axis.

    `moves` maps a quantity to its factor; what it does not name is kept. `unit_moves` replaces entries of it where
    gradients are unit-scaled.
    """

    name: str
    doc: str
    source: str
    evidence: Evidence
    moves: Mapping[str, Monomial] = field(default_factory=dict)
    unit_moves: Mapping[str, Monomial] = field(default_factory=dict)

    def factor(self, quantity: str, unit_scaled: bool) -> Monomial:
        """The formula that multiplies a quantity; 1 where the rule keeps it."""
        moves = {**self.moves, **self.unit_moves} if unit_scaled else self.moves
        return moves.get(quantity, ONE)


def _table(*rules: Rule) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules}


BATCH_RULES: Mapping[str, Rule] = _table(
    Rule(
        "none",
        "settings are kept; observed within a few doublings (u-muP: batch 64 to 256)",
        "2203.03466; 2407.17465",
        Evidence.CONTESTED,
    ),
    Rule(
        "linear",
        "for SGD: as many samples, as much movement; momentum is kept",
        "1706.02677",
        Evidence.EMPIRICAL,
        {LR: power("batch")},
        unit_moves={LR: power("batch", "1/2")},
    ),
    Rule(
        "sqrt",
        "for Adam: the rate of 'sde' alone, betas and epsilon kept",
        "1404.5997; 2205.10287",
        Evidence.EMPIRICAL,
        {LR: power("batch", "1/2")},
    ),
    Rule(
        "sde",
        "for Adam: the same stochastic differential equation, all its settings moved",
        "2205.10287",
        Evidence.THEORY,
        {LR: power("batch", "1/2"), ONE_MINUS_BETA: power("batch"), EPS: power("batch", "-1/2")},
        unit_moves={EPS: ONE},
    ),
)

LENGTH_RULES: Mapping[str, Rule] = _table(
    Rule(
        "none",
        "settings are kept; against it, 2409.19913 finds that the best rate falls with length",
        "2203.03466; 2407.17465",
        Evidence.CONTESTED,
    ),
    Rule(
        "sde",
        "for Adam: the same stretch of its differential equation in more, finer steps; fits give less ('power')",
        "2512.22382",
        Evidence.THEORY,
        {LR: power("tokens", "-1/2"), ONE_MINUS_BETA: power("tokens", -1), EPS: power("tokens", "1/2")},
    ),
    Rule(
        "power",
        "the best rate falls as tokens^-0.32; 2409.19913 finds exponents of 0.3 to 0.7",
        "2603.28743; 2409.19913",
        Evidence.EMPIRICAL,
        {LR: power("tokens", "-0.32")},
    ),
)

DECAY_RULES: Mapping[str, Rule] = _table(
    Rule(
        "none",
        "weight_decay is kept as a number; coupled, what it does then moves with the rate",
        "torch.optim.AdamW",
        Evidence.CONTESTED,
    ),
    Rule(
        "timescale",
        "tau is kept; 2505.13738 confirms it across batch sizes, but finds tau to fall with tokens/parameters",
        "2405.13698",
        Evidence.CONTESTED,
        {DECAY_PER_STEP: power("batch") * power("tokens", -1)},
    ),
    Rule(
        "tpp",
        "tau ~ (tokens/parameters)^-0.527, exponent between -0.529 and -0.507; below the critical batch size",
        "2505.13738",
        Evidence.EMPIRICAL,
        {DECAY_PER_STEP: power("batch") * power("tokens", "-0.473") * power("parameters", "-0.527")},
    ),
)


@dataclass(frozen=True)
class Horizon:
    """`batch_tokens` per optimizer step and `tokens` of the whole run, one pass over the data.

    `parameters` are wanted by the decay rule 'tpp' alone; count them alike on both sides. Raises PlanError for a batch
    larger than the run and for sizes that are not positive.
    """

    batch_tokens: float
    tokens: float
    parameters: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.batch_tokens <= self.tokens < inf:
            sizes = f"batch_tokens {self.batch_tokens:g}, tokens {self.tokens:g}"
            raise PlanError(f"horizon: {sizes}; write tokens per step and tokens of the run, at least one step")
        if self.parameters is not None and not 0 < self.parameters < inf:
            raise PlanError(f"horizon: parameters {self.parameters:g}; write the model's number of parameters")

    @property
    def steps(self) -> float:
        """Optimizer steps of the run."""
        return self.tokens / self.batch_tokens


@dataclass(frozen=True)
class Settings:
    """What a horizon moves. `betas` are Adam's two, or SGD's momentum, or none; `lr` is the peak rate."""

    lr: float
    weight_decay: float
    betas: tuple[float, ...]
    eps: float
    independent_weight_decay: bool
    unit_scaled: bool = False  # as the scheme's


@dataclass(frozen=True)
class Moved:
    """One quantity: before, after, the factor's formula ("1": kept) and the rules whose axis changed."""

    quantity: str
    old: float
    new: float
    formula: str
    rules: tuple[Rule, ...]

    @property
    def source(self) -> str:
        """Where the rules come from; empty where no rule was asked."""
        return "; ".join(dict.fromkeys(rule.source for rule in self.rules))

    @property
    def evidence(self) -> Evidence | None:
        """That of the weakest rule; None where no rule was asked."""
        return max((rule.evidence for rule in self.rules), key=list(Evidence).index, default=None)

    def __str__(self) -> str:
        subject = f"1-{self.quantity}" if self.quantity.startswith("beta") else self.quantity
        change = f"{self.old:g} kept" if self.formula == "1" else f"{self.old:g} -> {self.new:g}"
        by = "" if self.formula == "1" else f", {subject} * {self.formula}"
        return f"{self.quantity}: {change}{by}" + (f" [{self.evidence}: {self.source}]" if self.rules else "")


def timescale(settings: Settings, horizon: Horizon) -> float:
    """tau: the share of the run that AdamW's weights remember, batch/(tokens * decay per step) (2405.13698).

    At the peak rate and the plan's factor 1; infinite without weight decay.
    """
    per_step = settings.weight_decay * (1.0 if settings.independent_weight_decay else settings.lr)
    return 1.0 / (horizon.steps * per_step) if per_step > 0 else inf


def move(
    settings: Settings, source: Horizon, target: Horizon, *, batch: str, length: str, decay: str
) -> tuple[Settings, list[Moved]]:
    """The settings tuned at `source`, moved to `target`, and one entry per quantity, moved or kept.

    Raises PlanError for rules that do not exist, a parameter count that the decay rule lacks, and betas that would
    leave (0, 1).
    """
    stages = ((_find("batch", batch, BATCH_RULES), "batch"), (_find("length", length, LENGTH_RULES), "tokens"))
    decay_rule = _find("decay", decay, DECAY_RULES)
    ratios = _ratios(source, target)
    asked = tuple(rule for rule, symbol in stages if ratios[symbol] != 1.0)

    def entry(quantity: str, old: float, formula: Monomial, rules: tuple[Rule, ...]) -> Moved:
        return Moved(quantity, old, old * _evaluate(formula, ratios, decay), str(formula), rules)

    rate, memory, epsilon = (_product(asked, q, settings.unit_scaled) for q in (LR, ONE_MINUS_BETA, EPS))
    lr = entry(LR, settings.lr, rate, asked)
    eps = entry(EPS, settings.eps, epsilon, asked)
    betas = [
        Moved(name, beta, _beta(name, beta, _evaluate(memory, ratios, decay)), str(memory), asked)
        for name, beta in ((f"beta{i}", beta) for i, beta in enumerate(settings.betas, start=1))
    ]
    shrinkage = decay_rule.factor(DECAY_PER_STEP, settings.unit_scaled)
    coupled = shrinkage != ONE and not settings.independent_weight_decay
    owners = (decay_rule,) if any(ratio != 1.0 for ratio in ratios.values()) else ()
    wd = entry(
        "weight_decay",
        settings.weight_decay,
        shrinkage * rate**-1 if coupled else shrinkage,
        owners + asked if coupled else owners,
    )
    moved = replace(settings, lr=lr.new, weight_decay=wd.new, betas=tuple(beta.new for beta in betas), eps=eps.new)
    return moved, [lr, *betas, eps, wd]


def _find(axis: str, name: str, table: Mapping[str, Rule]) -> Rule:
    if name not in table:
        raise PlanError(f"horizon.{axis}: unknown rule {name!r}; {did_you_mean(name, table)}")
    return table[name]


def _ratios(source: Horizon, target: Horizon) -> dict[str, float]:
    ratios = {"batch": target.batch_tokens / source.batch_tokens, "tokens": target.tokens / source.tokens}
    if source.parameters is not None and target.parameters is not None:
        ratios["parameters"] = target.parameters / source.parameters
    return ratios


def _product(rules: Sequence[Rule], quantity: str, unit_scaled: bool) -> Monomial:
    return prod((rule.factor(quantity, unit_scaled) for rule in rules), start=ONE)


def _evaluate(formula: Monomial, ratios: Mapping[str, float], decay: str) -> float:
    if "parameters" in dict(formula.powers) and "parameters" not in ratios:
        raise PlanError(f"horizon.decay: rule {decay!r} needs both parameter counts; write Horizon(..., parameters=N)")
    return formula.evaluate(ratios)


def _beta(name: str, beta: float, factor: float) -> float:
    # No average at all stays none: RMSProp's equation has no first moment (2205.10287). And 1-(1-beta) may round.
    if beta == 0 or factor == 1.0:
        return beta
    moved = 1.0 - (1.0 - beta) * factor
    if moved <= 0:
        raise PlanError(
            f"horizon: {name} = {beta:g} would become {moved:g}, as 1-{name} grows {factor:g} times; "
            f"stay below {1 / (1 - beta):g} times, or write the rules that keep betas: batch 'sqrt', length 'power'"
        )
    return moved
