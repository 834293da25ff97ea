"""The coordinates of a network while it takes its first steps: how large is everything, at this size?

One run of a few steps gives rows of (name, kind, step, value); coord_check.py compares them over sizes. Kinds:

    output        RMS of a module's output                      change        RMS of output minus that of step 0
    effective     RMS of (W_t - W_0) applied to x_t             propagating   RMS of W_0 applied to x_t minus x_0
    logits        RMS of attention logits                       scale         the factor on q.k
    weight        RMS of a parameter at step 0                  gradient      RMS of its first gradient
    update        RMS of one step's change of a parameter       ratio         update over weight
    decay         share of a parameter that the first step takes away
    multiplier, logit_factor, output_factor, branch, skip, lr, eps, weight_decay
                  a number found in the model or its optimizer

The split of a change into effective and propagating updates says which layer is at fault: a layer with a wrong rate
has a wrong effective update, the layers after it only propagate it (2505.22491). It is taken at every call of a module
that owns parameters, by calling it once more with its initial weights, so that any module has it, whatever it computes.

Outputs are measured on the first batch before training and after every step, in eval mode: dropout is off throughout.
A module that runs twice counts with its last call. A row's `expected` is what a plan says the value is proportional to.
Not covered: the split inside `umup.unit_scale`d modules, whose calls cannot be repeated; logits of attention that
neither calls torch's scaled_dot_product_attention nor softmax; what a fused kernel hides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from umup.adapt.unit_scale import UnitScaled

SOFTMAX: tuple[Any, ...] = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Point:
    """One size and seed. What is given of the rest replaces the network's and its optimizer's own."""

    width: int
    depth: int
    head_dim: int
    seed: int
    num_kv_heads: int | None = None
    eps: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Row:
    """One measured size; `expected`: what a plan says it is proportional to, None where none says anything."""

    point: Point
    step: int
    name: str
    kind: str
    value: float
    expected: float | None = None


@dataclass(frozen=True)
class Subject:
    """A network ready to train, and what is known of it.

    `loss` trains, `forward` is watched (a forward pass that calls every module). `roles`: module or parameter -> role.
    `expected`: (parameter or module, kind) -> what its value is proportional to. `constants`: rows that were read off.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], Tensor]
    forward: Callable[[Any], object]
    roles: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[tuple[str, str], float] = field(default_factory=dict)
    constants: Sequence[tuple[str, str, float, float]] = ()


Make = Callable[[Point], Subject]


def measure(subject: Subject, point: Point, batches: Sequence[Any], steps: int) -> list[Row]:
    """Train for `steps` steps, cycling over the batches; every row of the run."""
    watch = _Watch(subject.model)
    weights = dict(subject.model.named_parameters())
    subject.model.eval()
    found = [(0, *r) for r in watch.look(lambda: subject.forward(batches[0]))]
    found += [(0, name, "weight", _rms(p)) for name, p in weights.items()]
    for step in range(1, steps + 1):
        before = {name: p.detach().clone() for name, p in weights.items()}
        subject.optimizer.zero_grad(set_to_none=True)
        subject.loss(batches[(step - 1) % len(batches)]).backward()  # type: ignore[no-untyped-call]
        subject.optimizer.step()
        found += [(step, *r) for name, p in weights.items() for r in _moved(name, p, before[name], step)]
        found += [(step, *r) for r in watch.look(lambda: subject.forward(batches[0]))]
    constants = [Row(point, 0, *c) for c in subject.constants]
    expected = [(*r, subject.expected.get(r[1:3])) for r in found]
    return [*constants, *(Row(point, *r) for r in expected if r[-1] != 0)]  # decay of what does not decay is noise


def _moved(name: str, p: Tensor, before: Tensor, step: int) -> Iterator[tuple[str, str, float]]:
    if p.grad is None:
        return
    update, weight = p.detach() - before, _rms(before)
    if step == 1:
        yield name, "gradient", _rms(p.grad)
        if weight and p.dim() > 1:  # gains start equal, and so may their updates be
            # What is proportional to the weight; the rest of an update has, on average, no part of that.
            share = -float((update * before).sum() / before.square().sum())
            yield name, "decay", share
            update = update + share * before
    yield name, "update", _rms(update)
    if weight:
        yield name, "ratio", _rms(update) / weight


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


class _Watch:
    """Forward passes of one model: what each call put out, and how that splits."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.splits = model, not isinstance(model, UnitScaled)
        self.owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self.start = {id(p): p.detach().clone() for p in model.parameters()}
        self.first: dict[str, Tensor] = {}
        self.open: list[str] = []
        self.busy = False
        self.found: dict[tuple[str, str], float] = {}

    @torch.no_grad()
    def look(self, run: Callable[[], object]) -> list[tuple[str, str, float]]:
        """(name, kind, value) of one forward pass; the first pass is what changes are counted from."""
        self.found, hooks = {}, []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            with _Logits(self):
                run()
        finally:
            for hook in hooks:
                hook.remove()
        return [(name, kind, value) for (name, kind), value in self.found.items()]

    def _enter(self, name: str) -> None:
        if not self.busy:
            self.open.append(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.busy:
            return
        name, out = self.open.pop(), _tensor(result)
        handed = [self.owners[id(a)] for a in args if id(a) in self.owners]
        around = self.model.get_submodule(self.open[-1]) if self.open else self.model
        if handed and any(a is p for a in args for p in around.parameters(recurse=False)):
            return  # a product inside the module that owns its weight, which is watched itself
        name = "+".join(handed) or name
        if out is None or not name:
            return
        self.found[name, "output"] = _rms(out)
        start = self.first.setdefault(name, out.clone())
        own = dict(module.named_parameters(recurse=False))
        if start is out or start.shape != out.shape:
            return
        self.found[name, "change"] = _rms(out - start)
        if self.splits and (own or handed):
            old = self._with_initial(module, own, args, kwargs)
            self.found[name, "effective"] = _rms(out - old)
            self.found[name, "propagating"] = _rms(old - start)

    def _with_initial(
        self, module: nn.Module, own: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The output of the same call had the weights stayed as they were."""
        # Not the bias beside a matrix: softmax sees no bias of the keys, whose gradient is rounding noise that becomes
        # steps under Adam.
        kept = {name for name, p in own.items() if p.ndim > 1} or own.keys()
        initial = {name: self.start[id(p)] for name, p in own.items() if name in kept}
        self.busy = True
        try:
            old = _tensor(
                torch.func.functional_call(module, initial, tuple(self.start.get(id(a), a) for a in args), kwargs)
            )
        finally:
            self.busy = False
        assert old is not None  # it was a tensor a moment ago
        return old

    def saw_logits(self, logits: Tensor, scale: float | None) -> None:
        """Attention logits of the module that runs now."""
        if self.busy or not self.open:
            return
        self.found[self.open[-1], "logits"] = _rms(logits[logits.isfinite() & (logits > -1e30)])
        if scale is not None:
            self.found[self.open[-1], "scale"] = scale


class _Logits(TorchFunctionMode):
    """Sees calls of attention and softmax."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            scale = kwargs.get("scale")
            scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
            self.watch.saw_logits(q @ k.mT * scale, scale)
        elif func in SOFTMAX and args and args[0].dim() > 3:
            self.watch.saw_logits(args[0], None)
        return func(*args, **kwargs)


def _tensor(result: Any) -> Tensor | None:
    first = result[0] if isinstance(result, tuple | list) and result else result
    return first if isinstance(first, Tensor) and first.is_floating_point() else None
