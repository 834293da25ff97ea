"""Which law a fresh parameter was drawn by, told from its standard deviation.

muP scales a weight from its *base* size, so one must know how the module's own init varies with width: torch's default
falls as 1/sqrt(fan_in) by itself, GPT-2's normal(0.02) does not. All layers' copies of a parameter are tested together
against the laws below; a matrix that writes to the residual stream is first held against those of the other matrices
over sqrt(2L) and the like. Large parameters come first, and small ones, to which many laws fit, get the law of a larger
one if they can. What fits nothing is no fresh init: a checkpoint was loaded, weights were trained.

A round number fits much by accident if few weights were drawn, and counts only where enough were. So small parameters
of unusual inits must be told (`inits={pattern: 0.0137}`), and tiny ones may get a law that gives nearly the same std.
Not covered: laws of more than fans and depth (T5's queries, where the head size grows); weights that were multiplied
from one round number to another.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor, inf, log, log10, prod, sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from umup.errors import PlanError, did_you_mean
from umup.rules.precision import LAYER
from umup.rules.roles import ParamSpec, Role


@dataclass(frozen=True)
class Init:
    """A law; `std` of a parameter in a model of so many layers."""

    name: str
    std: Callable[[ParamSpec, int], float]


@dataclass(frozen=True)
class Sample:
    """A parameter's measured spread; `ends` is half its range in stds. Exact zeros (padding rows) do not count."""

    spec: ParamSpec
    std: float
    ends: float
    elements: int


def _fans(spec: ParamSpec) -> tuple[int, int]:
    """As torch.nn.init counts them: of the stored tensor, fused parts together. A bias takes its matrix's."""
    if len(spec.shape) < 2:
        return spec.fan_in, spec.fan_out
    taps = prod(spec.shape[2:])
    return spec.shape[1] * taps, spec.shape[0] * taps


def _law(name: str, formula: Callable[[int, int], float]) -> Init:
    return Init(name, lambda spec, layers: formula(*_fans(spec)))


def _over_root(head_dim: int) -> Init:
    """T5's queries: its attention does not divide by the root of the head size, which is the same at every width."""
    return _law(f"lecun/sqrt({head_dim})", lambda fan_in, fan_out: 1 / sqrt(fan_in * head_dim))


def told(std: float, name: str = "") -> Init:
    """A std that does not depend on the shape."""
    return Init(name or f"std {std:g}", lambda spec, layers: std)


LAWS: Mapping[str, Init] = {
    law.name: law
    for law in (
        # That of Linear and Conv, a uniform Kaiming with a = sqrt(5).
        _law("torch_default", lambda fan_in, fan_out: 1 / sqrt(3 * fan_in)),
        _law("lecun", lambda fan_in, fan_out: 1 / sqrt(fan_in)),
        _law("kaiming_fan_in", lambda fan_in, fan_out: sqrt(2 / fan_in)),
        _law("kaiming_fan_out", lambda fan_in, fan_out: sqrt(2 / fan_out)),
        _law("xavier", lambda fan_in, fan_out: sqrt(2 / (fan_in + fan_out))),
        # Of the flattened matrix: a kernel's taps count on one side.
        Init("orthogonal", lambda spec, layers: 1 / sqrt(max(_fans(spec)[0], spec.shape[0]))),
        _law("small", lambda fan_in, fan_out: sqrt(2 / (5 * fan_in))),  # 1910.05895
        *(_over_root(head_dim) for head_dim in (16, 32, 64, 128)),
    )
}
NEVER_UNIFORM = ("orthogonal", "small", "lecun/")
# The only law of fans that a bias has: torch.nn.init's want two sides.
DEFAULT = LAWS["torch_default"]
ZERO, CONSTANT = (Init(name, lambda spec, layers: 0.0) for name in ("zero", "constant"))
# Stds that are usual enough to be believed of few weights: nn.Embedding's, GPT-2's, and that of older networks.
USUAL_STDS = (1.0, 0.02, 0.01)
# How matrices that write to the residual stream are drawn: a factor on the other matrices' law, of (layer, layers).
DEPTH: Mapping[str, Callable[[int, int], float]] = {
    "": lambda layer, layers: 1.0,
    "/sqrt(2L)": lambda layer, layers: 1 / sqrt(2 * layers),  # GPT-2
    "/sqrt(L)": lambda layer, layers: 1 / sqrt(layers),
    "/sqrt(2(l+1))": lambda layer, layers: 1 / sqrt(2 * (layer + 1)),  # OLMo, torchtitan
}
# A normal that is cut at so many of its stds keeps that share of its std; of so many weights that are not cut, some lie
# further out.
CUTS = ((2, 0.8796256610342398, 1_000), (3, 0.9865783925581086, 10_000))
# In standard deviations of the measure: five are a coincidence of one in a million, three a rare one.
DEVIATIONS, FEW_DEVIATIONS = 5.0, 3.0
# From so many weights on, a sample that looks uniform is.
SURELY = 256
# How probable it may be that a round number fits by accident; and fewer weights than these fit what is nearest.
ACCIDENT, TINY = 0.25, 32


def measure(specs: Iterable[ParamSpec], parameters: Mapping[str, Tensor]) -> dict[str, Sample]:
    """The spread of every parameter, sharded ones (DTensor) as a whole."""
    found = {}
    for spec in specs:
        p = parameters[spec.name].detach().double()
        drawn = p != 0
        elements = int(_number(drawn.double().sum()))
        centred = torch.where(drawn, p - _number(p.sum()) / (elements or 1), 0.0)
        std, half_range = sqrt(_number(centred.square().sum()) / (elements or 1)), _number(p.max() - p.min()) / 2
        if std < 1e-12 * _number(p.abs().max()):  # what rounding leaves of a constant
            std = 0.0
        found[spec.name] = Sample(spec, std, half_range / (std or 1.0), elements)
    return found


def _number(t: Tensor) -> float:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.tensor import DTensor  # most of a second, and only sharded runs have them

        t = t.full_tensor() if isinstance(t, DTensor) else t
    return float(t)


def identify(samples: Mapping[str, Sample], num_layers: int, inits: Mapping[str, str | float]) -> dict[str, Init]:
    """The law of every parameter; `inits` (pattern -> name of a law, or a std) tells what the tables do not know.

    Raises PlanError for parameters that fit no law, or not the one told, and for patterns that match nothing.
    """
    given = _given(inits, samples)
    laws = {name: CONSTANT if s.elements else ZERO for name, s in samples.items() if s.std == 0.0}
    groups: dict[tuple[str, Init | None], list[Sample]] = defaultdict(list)
    for name, sample in samples.items():
        if name not in laws:
            groups[LAYER.sub("*", name), given.get(name)].append(sample)
    seen: dict[str, Init] = {}
    for (pattern, init), members in sorted(groups.items(), key=lambda group: _order(group[1])):
        hidden = {law.name: law for name, law in laws.items() if samples[name].spec.role is Role.HIDDEN}
        weight = laws.get(members[0].spec.name.removesuffix("bias") + "weight")
        default_weight = weight is not None and weight.name == DEFAULT.name
        law = _fitting(members, num_layers, init, hidden.values(), seen.values(), default_weight)
        if law is None:
            raise _unknown(pattern, members[0], init, num_layers)
        laws.update(dict.fromkeys((s.spec.name for s in members), law))
        if init is None and len(members[0].spec.shape) > 1:
            seen[law.name] = law
    return laws


def _order(members: list[Sample]) -> tuple[bool, bool, int]:
    """Vectors after matrices, and residual outputs after the others, which tell of them; then by size."""
    spec = members[0].spec
    return len(spec.shape) < 2, spec.role is Role.HIDDEN_OUT, -_elements(members)


def _unknown(pattern: str, sample: Sample, init: Init | None, layers: int) -> PlanError:
    expected = f"its init {init.name!r} gives {init.std(sample.spec, layers):.4g}" if init else "no known init"
    return PlanError(
        f"{pattern} has a std of {sample.std:.4g}, {expected}: apply() wants freshly initialised weights (not a "
        f"checkpoint, not twice); if they are, tell their law, inits={{{pattern!r}: {sample.std:.3g}}} if their std is "
        f"that at every size, or one of {', '.join(LAWS)}"
    )


def _given(inits: Mapping[str, str | float], names: Iterable[str]) -> dict[str, Init]:
    names, found = list(names), {}
    for pattern, init in inits.items():
        if isinstance(init, str) and init not in LAWS:
            raise PlanError(f"inits[{pattern!r}]: unknown init {init!r}; {did_you_mean(init, LAWS)}")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise PlanError(f"inits[{pattern!r}] matches no parameter; names look like {names[0]!r}")
        found.update(dict.fromkeys(matches, LAWS[init] if isinstance(init, str) else told(init)))
    return found


def _fitting(
    members: list[Sample],
    layers: int,
    init: Init | None,
    hidden: Iterable[Init],
    seen: Iterable[Init],
    default_weight: bool,
) -> Init | None:
    if init is not None:
        return _closest(members, layers, [init], DEVIATIONS)
    vector, at_most = len(members[0].spec.shape) < 2, DEVIATIONS if _elements(members) >= TINY else inf
    if vector and default_weight and (law := _closest(members, layers, [DEFAULT], at_most)):
        return law
    usual = _cut(_possible([DEFAULT] if vector else LAWS.values(), members), members)
    by_depth = _over_depth(hidden)
    return (
        (_closest(members, layers, by_depth, FEW_DEVIATIONS) if members[0].spec.role is Role.HIDDEN_OUT else None)
        or (None if vector else _closest(members, layers, seen, FEW_DEVIATIONS))
        or _closest(members, layers, usual, FEW_DEVIATIONS)
        or _closest(members, layers, _round_numbers(members), FEW_DEVIATIONS)
        # A gate may be drawn like its residual output, and three deviations happen.
        or (_closest(members, layers, by_depth, FEW_DEVIATIONS) if members[0].spec.on_residual else None)
        or _closest(members, layers, usual, at_most)
    )


def _possible(laws: Iterable[Init], members: list[Sample]) -> list[Init]:
    if not (_uniform(members) and _elements(members) >= SURELY):
        return [*laws, *map(told, USUAL_STDS)]
    return [law for law in laws if not law.name.startswith(NEVER_UNIFORM)]


def _closest(members: list[Sample], layers: int, candidates: Iterable[Init], within: float) -> Init | None:
    # Of laws that are the same on this shape, the first: rounding shall not choose.
    scored = [(round(_misfit(members, layers, law), 6), i, law) for i, law in enumerate(candidates)]
    misfit, _, law = min(scored, default=(inf, 0, CONSTANT), key=lambda entry: entry[:2])
    return law if misfit <= within else None


def _misfit(members: list[Sample], layers: int, law: Init) -> float:
    """Deviations, of all members as one sample, between the variance found and the law's."""
    ratios = [(s.elements, (s.std / law.std(s.spec, layers)) ** 2) for s in members]
    return abs(log(sum(n * ratio for n, ratio in ratios) / _elements(members))) / _noise(members)


def _noise(members: list[Sample]) -> float:
    """The standard deviation of a sample's log variance."""
    elements = _elements(members)
    return sqrt((0.8 if _uniform(members) and elements > TINY**2 else 2.0) / elements)


def _elements(members: list[Sample]) -> int:
    return sum(s.elements for s in members)


def _uniform(members: list[Sample]) -> bool:
    return _end(members, sqrt(3))


def _end(members: list[Sample], stds: float) -> bool:
    """Whether no weight lies further out."""
    return all(s.ends < stds * (1 + FEW_DEVIATIONS / sqrt(2 * s.elements)) for s in members)


def _cut(laws: list[Init], members: list[Sample]) -> list[Init]:
    """The laws; and the same cut, if the sample is."""
    elements = _elements(members)
    share = next((share for cut, share, enough in CUTS if elements > enough and _end(members, cut / share)), None)
    if share is None or _uniform(members):
        return laws
    return [*laws, *(_times(law, ", cut", lambda layer, layers: share) for law in laws)]


def _over_depth(laws: Iterable[Init]) -> list[Init]:
    return [_times(law, label, factor) for law in laws for label, factor in DEPTH.items()]


def _times(law: Init, label: str, factor: Callable[[int, int], float]) -> Init:
    def std(spec: ParamSpec, layers: int) -> float:
        number = LAYER.search(spec.name)
        return law.std(spec, layers) * factor(int(number[0]) if number else 0, layers)

    return Init(law.name + label, std)


def _round_numbers(members: list[Sample]) -> list[Init]:
    """Stds, or bounds of a uniform, of one digit or two, if enough weights say so."""
    elements, unit = _elements(members), sqrt(3) if _uniform(members) else 1.0
    spread = unit * sqrt(sum(s.elements * s.std**2 for s in members) / elements)
    found = []
    for digits in (1, 2):
        places = digits - 1 - floor(log10(spread))
        number = round(spread, places)
        # The window that counts as a fit, over the distance of such numbers.
        if FEW_DEVIATIONS * _noise(members) * number * 10 ** (digits - 1 - floor(log10(number))) < ACCIDENT:
            found.append(told(number / unit))
    return _cut(found, members)
