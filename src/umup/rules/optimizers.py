"""Optimizer families: how their rates and epsilons follow from a scheme's Adam column.

A scheme says how large one entry's update may be (its `lr` column: Adam's update has entries of size lr) and how large
one entry of the gradient is (`grad`). What another optimizer needs for updates of the same effect is arithmetic:

    sgd         update = lr * gradient                   lr = Adam's / grad
    adafactor   update = lr * RMS(weight)                lr = Adam's / weight
    muon        update = lr * s * (orthogonal matrix)    lr = Adam's * sqrt(fan_in * fan_out) / s

The last: Adam's updates align with the features, so that their spectral norm is lr * sqrt(fan_in * fan_out), and an
orthogonal one's is lr * s, s being the implementation's own factor. For muP this gives table 3 of 2203.03466 (SGD), the
Adafactor rule of 2407.05872 and sqrt(fan_out/fan_in) for Muon, Shampoo and SOAP (2310.17813, 2512.05620).
Symbols: `grad` and `weight` are the scheme's formulas for an entry of the gradient and of the initial weight, without
coefficients and hyperparameters; `columns` is the last side of the stored matrix. Where a scheme is relative to a base
shape, so is everything here. A scheme with one rate for all parameters (sp) has it under every optimizer.

Decay is decoupled in all of them (without momentum, SGD's L2 term is the same thing): torch's Adam, NAdam and RAdam are
told so. 2512.05620 recommends an independent decay of 1/width; the tables keep the schemes' own.
Not covered: decay added to a gradient that is normalised afterwards (Adam with L2), for which no rule is published;
RAdam's first five steps, which are SGD at Adam's rate; torch's Adafactor once min(lr, 1/sqrt(step)) binds, which then
gives all parameters one relative rate; momentum on SGD's decay, which acts 1/(1 - momentum) times as strongly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from umup.errors import PlanError, did_you_mean
from umup.rules.monomial import SIZES, Monomial, constant, power, ratio
from umup.rules.roles import ParamSpec, Role

ONE = constant(1.0)
GRAD, WEIGHT = power("grad"), power("weight")
ALIGNED = power("fan_in", "1/2") * power("fan_out", "1/2")


@dataclass(frozen=True)
class Optimizer:
    """`lr` multiplies Adam's rate; `eps` is what epsilon compares itself with (None: there is none).

    Muon-like families train matrices inside the network alone; `rest` names the family of all other parameters.
    """

    name: str
    lr: Monomial
    eps: Monomial | None
    source: str
    evidence: str
    rest: str | None = None

    def trains(self, spec: ParamSpec) -> "Optimizer":
        """The family that trains a parameter: this one, or `rest`."""
        matrix = spec.role in (Role.HIDDEN, Role.HIDDEN_OUT) and len(spec.shape) == 2
        return self if self.rest is None or matrix else OPTIMIZERS[self.rest]

    def under_shift(self, theta: float, gain: float = 1.0) -> dict[str, float]:
        """Factors on lr and eps when weights are stored theta times larger, and gradients `gain` times too."""
        found = {"lr": theta * self._shifted(self.lr, theta, gain)}
        if self.eps is not None:
            found["eps"] = self._shifted(self.eps, theta, gain)
        return found

    @staticmethod
    def _shifted(formula: Monomial, theta: float, gain: float) -> float:
        powers = dict(formula.powers)
        on_grad, on_weight = (float(powers.get(symbol, 0)) for symbol in ("grad", "weight"))
        return float((gain / theta) ** on_grad * theta**on_weight)


def convert(formula: Monomial, grad: Monomial, weight: Monomial, relative: bool) -> Monomial:
    """A formula of this table with a scheme's `grad` and initial `weight` put in."""
    sizes: Mapping[str, Monomial] = {s: ratio(s) for s in SIZES} if relative else {}
    constant_weight = weight.coefficient == 0  # zeros and ones: gains and biases
    own = {"grad": grad.variation(relative), "weight": ONE if constant_weight else weight.variation(relative)}
    return formula.substitute({**sizes, **own})


TP5 = "2203.03466 table 3"
DERIVED = "derived from the Adam column"
SPECTRAL = "2310.17813; 2512.05620"

OPTIMIZERS: Mapping[str, Optimizer] = {
    o.name: o
    for o in (
        Optimizer("sgd", GRAD ** Fraction(-1), None, TP5, "theory"),
        Optimizer("adam", ONE, GRAD, TP5, "theory"),
        Optimizer("adamw", ONE, GRAD, f"{TP5}; 1711.05101", "theory"),
        Optimizer("nadam", ONE, GRAD, f"{DERIVED}: an Adam with another momentum", "theory"),
        Optimizer("radam", ONE, GRAD, f"{DERIVED}: an Adam with a warm-up", "theory"),
        Optimizer("lion", ONE, None, "2302.06675; 2502.05967; 2404.05728 finds transfer fragile", "contested"),
        Optimizer("signsgd", ONE, None, "1802.04434; an Adam without memory", "theory"),
        Optimizer("adafactor", WEIGHT ** Fraction(-1), WEIGHT, "1804.04235; 2407.05872", "theory"),
        # torch.optim.Muon's default: s = sqrt(max(1, rows/columns)).
        Optimizer(
            "muon",
            ALIGNED * power("columns", "1/2") * power("max_fan", "-1/2"),
            GRAD * ALIGNED,
            SPECTRAL,
            "theory",
            rest="adamw",
        ),
        # adjust_lr_fn="match_rms_adamw": s = 0.2 sqrt(max(rows, columns)); the 0.2 is left to the base rate.
        Optimizer(
            "muon_match_rms_adamw",
            ALIGNED * power("max_fan", "-1/2"),
            GRAD * ALIGNED,
            f"2502.16982; {SPECTRAL}",
            "theory",
            rest="adamw",
        ),
        Optimizer("shampoo", ALIGNED, (GRAD * ALIGNED) ** 2, "1802.09568; 2512.05620", "theory", rest="adamw"),
        # Adam in the gradient's own basis, where an aligned gradient is one entry: what it adds is orthogonal, too.
        Optimizer("soap", ALIGNED, GRAD * ALIGNED, "2409.11321; 2512.05620", "theory", rest="adamw"),
    )
}


def optimizer(name: str) -> Optimizer:
    """The named optimizer, or a PlanError naming the nearest."""
    if name not in OPTIMIZERS:
        raise PlanError(f"optimizer.name: unknown optimizer {name!r}; {did_you_mean(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]
