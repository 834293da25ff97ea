"""Unit scaling of an ordinary module, without rewriting it (2303.11257, 2407.17465).

    scaled = umup.unit_scale(model, tokens, targets)     # runs the model once on these, then re-initialises it
    print(scaled.report())                               # what is scaled, by which factors, and what is not
    scaled(tokens, targets).backward()                   # every tensor near RMS 1, forward and backward

The dry run (adapt/unit_trace.py) numbers the calls of known torch functions (adapt/unit_ops.py) in order of execution
and gives each its factors. At run time a TorchFunctionMode meets the same calls in the same order and runs them scaled;
torch.compile traces through it, fullgraph included. Factors are floats fixed by the example's shapes: give a batch of
the size that one backward pass sees. A pass may end early (no loss, say), but one that takes another path is an error.

Residual sum i of n weighs its branch by tau/sqrt(1 + tau^2) and its skip by 1/sqrt(1 + tau^2), tau^2 = 1/(n/2 + i), so
that all branches together weigh twice the embedding (rules/opscales.py, every hyperparameter 1). The branch's backward
factor is delayed to its start where that leaves every parameter's gradient exact up to a factor; elsewhere the sum's
gradient is the exact one, and tensors inside the branch have smaller gradients. The report counts both.

Not covered:
- the optimizer: u-muP's rate is eta/sqrt(fan_in) for hidden weights, under Adam, which ignores a gradient's scale;
- losses outside of the module: put them in, or use ops.loss.cross_entropy, for unit gradients at the logits. Known
  losses share one factor, and get none where another term of the loss goes around them;
- einsum, tanh, sigmoid, nn.MultiheadAttention asked for its weights: they run as they are, and are reported;
- parameters that do not require gradients during the dry run;
- a weight read by two kinds of op (a tied embedding): two gradients of different factors, as in rules/schemes.py;
- activation checkpointing inside the module, which is refused: checkpoint the whole.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from umup.adapt.unit_ops import CROSS_ENTROPY, LINEAR, MSE, NORM, in_place
from umup.adapt.unit_products import Factors, run_encoded
from umup.adapt.unit_trace import NEUTRAL, NORMALISING, Node, known_op, trace
from umup.errors import PlanError
from umup.nn.modules import Matmul
from umup.ops.residual import residual_add, residual_split
from umup.ops.scaled import scale


@dataclass(frozen=True)
class Residual:
    """A residual sum: the position of its skip operand, the weights; `delayed`: the branch's backward factor is."""

    skip_position: int
    branch: float
    skip: float
    delayed: bool


@dataclass(frozen=True)
class Site:
    """One call of a known function. `factors` None: it runs as it is. `splits`: the residual sum that starts here."""

    op: str
    where: str
    factors: Factors | None = None
    residual: Residual | None = None
    splits: int | None = None
    parameters: tuple[str, ...] = ()


class UnitScaled(nn.Module):
    """A module that runs unit-scaled. Parameters, buffers and submodules, and their names, are those of `module`.

    `sites`: the calls in order of execution. `encoded`: products that run in formats of their own, by their weights.
    """

    def __init__(self, module: nn.Module, sites: tuple[Site, ...], report: str) -> None:
        super().__init__()
        # Shared, not registered, so that no name gets a prefix.
        self.__dict__["module"] = module
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        self.sites, self._report = sites, report
        self.encoded: dict[str, Matmul] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, scaled. Raises PlanError where it calls other functions than with the example inputs."""
        with _Scaling(self.sites, self.encoded):
            return self.__dict__["module"](*args, **kwargs)

    def train(self, mode: bool = True) -> "UnitScaled":
        """As the module's."""
        self.__dict__["module"].train(mode)
        self.training = mode
        return self

    def linear_factors(self) -> dict[str, Factors]:
        """`nn.Linear` modules in order of execution -> (forward, towards the input, towards weight and bias)."""
        linears = {f"{name}.weight": name for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        read = [(s.parameters[0], s.factors) for s in self.sites if s.op == LINEAR.name and s.factors and s.parameters]
        return {linears[weight]: factors for weight, factors in read if weight in linears}

    def encode(self, matmuls: Mapping[str, Matmul]) -> None:
        """Run the products of the named linears by modules of their own (adapt/to_fp8.py)."""
        self.encoded.update((f"{name}.weight", matmul) for name, matmul in matmuls.items())

    def report(self) -> str:
        """Covered functions with their rules, and what runs as it is, with counts and places."""
        return self._report


class _Scaling(TorchFunctionMode):
    """Runs the sites' calls scaled; one per pass."""

    def __init__(self, sites: tuple[Site, ...], encoded: Mapping[str, Matmul]) -> None:
        super().__init__()
        self.sites, self.encoded, self.position = sites, encoded, 0
        self.skips: dict[int, Tensor] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = known_op(function, args, kwargs)
        if op is None:
            return function(*args, **kwargs)
        number, self.position = self.position, self.position + 1
        if number >= len(self.sites) or self.sites[number].op != op.name:
            raise _other_path(self.sites, number, op.name)
        site = self.sites[number]
        if site.residual is not None:
            out = self.residual(function, number, site.residual, args)
        elif site.factors is None:
            out = function(*args, **kwargs)
        elif site.op == LINEAR.name and site.parameters and site.parameters[0] in self.encoded:
            out = run_encoded(self.encoded[site.parameters[0]], site.factors, *args, **kwargs)
        else:
            out = op.run(function, site.factors, *args, **kwargs)
        if site.splits is not None:
            after = self.sites[site.splits].residual
            assert after is not None
            out, self.skips[site.splits] = residual_split(out, after.branch, after.skip)
        return out

    def residual(self, function: Callable[..., Any], number: int, site: Residual, args: tuple[Tensor, ...]) -> Tensor:
        branch, skip = args[1 - site.skip_position], args[site.skip_position]
        if site.delayed:
            out = residual_add(branch, self.skips.pop(number), site.branch, 1.0, site.skip)
        else:
            out = scale(branch, site.branch, site.branch) + scale(skip, site.skip, site.skip)
        return in_place(function, args[0], out)


def unit_scale(module: nn.Module, *example_inputs: Any, init: bool = True, **example_keywords: Any) -> UnitScaled:
    """The module, running unit-scaled on its own parameters, after one dry run on the example inputs.

    Call it in training mode, on a batch of the shape that one backward pass will see. `init` gives every parameter that
    a covered function reads its u-muP value from torch's generator: weights normal(0, 1), norm gains 1, biases 0;
    without it the values stay, to be loaded. Raises PlanError for a module without a known function and for activation
    checkpointing inside it.
    """
    nodes = trace(module, example_inputs, example_keywords)
    if not any(n.covered for n in nodes):
        raise PlanError(
            f"{type(module).__name__} calls no function that unit scaling knows on a path that needs gradients; "
            "pass example inputs that run its layers, with parameters that require gradients"
        )
    if init:
        _initialise(module, nodes)
    return UnitScaled(module, _sites(nodes), _describe(module, nodes))


def residual_pair(position: int, count: int) -> tuple[float, float]:
    """(branch, skip) weights of residual sum `position` of `count`: rules/opscales.residual_weights with alphas 1."""
    tau = 1 / sqrt(count / 2 + position)
    return tau / sqrt(1 + tau**2), 1 / sqrt(1 + tau**2)


def _sites(nodes: list[Node]) -> tuple[Site, ...]:
    numbers = {n: i for i, n in enumerate(n for n, node in enumerate(nodes) if node.op is not None)}
    sums = [n for n in numbers if nodes[n].skip is not None]
    splits = {nodes[n].root: numbers[n] for n in sums if nodes[n].delayed}
    sites = []
    for n in numbers:
        node, residual = nodes[n], None
        assert node.op is not None
        if node.skip is not None:
            residual = Residual(node.skip, *residual_pair(sums.index(n), len(sums)), node.delayed)
        factors = node.factors if node.covered and residual is None else None
        sites.append(Site(node.op.name, node.where, factors, residual, splits.get(n), _parameters(nodes, node)))
    return tuple(sites)


def _parameters(nodes: list[Node], node: Node) -> tuple[str, ...]:
    return tuple(name for p in node.parents if (name := nodes[p].parameter) is not None)


@torch.no_grad()
def _initialise(module: nn.Module, nodes: list[Node]) -> None:
    parameters = dict(module.named_parameters())
    done: set[str] = set()
    for node in nodes:
        if not node.covered or node.op is None or node.skip is not None:
            continue
        for position, name in enumerate(_parameters(nodes, node)):
            p = parameters[name]
            if name in done:
                continue
            done.add(name)
            if node.op is NORM:
                p.fill_(1.0 if position == 0 else 0.0)
            elif p.ndim == 1:
                p.zero_()
            else:
                p.normal_()
    for m in module.modules():
        if isinstance(m, nn.Embedding) and m.padding_idx is not None:
            m.weight[m.padding_idx] = 0.0


def _other_path(sites: tuple[Site, ...], number: int, called: str) -> PlanError:
    if number < len(sites):
        expected = f"{sites[number].op} in {sites[number].where or 'the module itself'}"
    else:
        expected = "no further call"
    return PlanError(
        f"call {number + 1} of this pass is {called}, with the example inputs it was {expected}; "
        "call unit_scale with inputs that take the path of training"
    )


def _describe(module: nn.Module, nodes: list[Node]) -> str:
    scaled: Counter[tuple[str, str]] = Counter()
    plain: dict[str, list[str]] = {}
    for node in nodes:
        if node.skip is not None:
            kind = "factor delayed to the branch's start" if node.delayed else "exact gradient"
            scaled["residual add", f"tau/sqrt(1+tau^2), 1/sqrt(1+tau^2); {kind}"] += 1
        elif node.covered and node.op is not None:
            rule = "1/fan_in, 1/sqrt(fan_out) to the input" if node.readout else node.op.rule
            scaled["readout" if node.readout else node.op.name, rule] += 1
        elif node.differentiable and node.name != "leaf" and not _keeps_scale(node):
            plain.setdefault(node.name, []).append(node.where or "the module itself")
    lines = ["scaled:", *(f"  {name:20} {count:5}  {rule}" for (name, rule), count in scaled.items())]
    if plain:
        lines.append("not covered, runs as it is:")
        lines += [f"  {name:20} {len(where):5}  {_places(where)}" for name, where in plain.items()]
    if not any(node.op in (CROSS_ENTROPY, MSE) for node in nodes):
        lines.append("no loss inside: gradients are not unit-scaled; put the loss in forward")
    read = {name for node in nodes if node.covered for name in _parameters(nodes, node)}
    others = [name for name, _ in module.named_parameters() if name not in read]
    if others:
        lines.append(f"parameters that no covered function reads keep their values: {_places(others)}")
    return "\n".join(lines)


def _keeps_scale(node: Node) -> bool:
    name = node.name.rpartition(".")[2]
    return name in NEUTRAL or name in NORMALISING or (name == "mul" and node.unit)


def _places(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:4]) + (f" and {len(unique) - 4} more" if len(unique) > 4 else "")
