"""What a module does with example inputs, as a graph of torch functions: the dry run of adapt/unit_scale.py.

Three questions need the whole graph. Which sums are *residual*: one operand is computed from the other, by a path with
a weight or attention on it (a hand-written GELU has no such path). Where the backward factor of a residual branch may
be *delayed* to its start, so that gradients inside stay unit: where every path into the branch, and every path out of
it, runs through the two ends, so that no parameter sums gradients of different factors. Which products are *readouts*:
those that no other product follows.

Sets of nodes are bit masks in an int. Not seen: what torch.autograd.Functions of the module do, whose results are
linked to their inputs through the autograd graph alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from umup.adapt.unit_ops import ADDMM, CROSS_ENTROPY, FUNCTIONS, FUSED, LINEAR, MATMUL, MSE, SOFTMAX, SUM, Op
from umup.adapt.unit_products import Factors, product_factors, readout_factors
from umup.errors import PlanError

# Functions that move, select or normalise values: what is of unit scale stays so.
NEUTRAL = frozenset(
    [
        "__get__",
        "__getitem__",
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "movedim",
        "t",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "cat",
        "concat",
        "stack",
        "contiguous",
        "clone",
        "to",
        "type",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "narrow",
        "select",
        "index_select",
        "gather",
        "roll",
        "flip",
        "masked_fill",
        "masked_fill_",
        "where",
        "pad",
        "detach",
        "identity",
    ]
)
NORMALISING = frozenset({"group_norm", "batch_norm", "instance_norm"})
PRODUCTS = {LINEAR.name, ADDMM.name, MATMUL.name}


@dataclass(eq=False)
class Node:
    """One call, or one tensor from elsewhere. `parents` are in the order of the arguments."""

    name: str
    where: str
    parents: tuple[int, ...]
    ancestors: int = 0
    consumers: int = 0
    op: Op | None = None
    factors: Factors = ()
    differentiable: bool = False
    unit: bool = False
    parameter: str | None = None
    width: int = 0
    skip: int | None = None  # of a residual sum: which of its two parents is the skip
    root: int | None = None  # of a residual sum: the node where the branch starts
    delayed: bool = False
    readout: bool = False

    @property
    def covered(self) -> bool:
        """Whether the call will run scaled."""
        return self.op is not None and self.differentiable and bool(self.factors or self.skip is not None)


def known_op(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op | None:
    """The op that covers a call, by types and flags alone: the same for the dry run, at run time and when compiled."""
    op = FUNCTIONS.get(function)
    return op if op is not None and op.applies(*args, **kwargs) else None


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Node]:
    """Run the module once and return its calls in order, classified. Raises PlanError for activation checkpointing."""
    mode = _Trace(module)
    handles = [hook for name, m in module.named_modules() for hook in mode.watch(name, m)]
    try:
        with torch.enable_grad(), mode.saved_tensors(), mode:
            out = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    mode.finish(out)
    return mode.nodes


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def bits(mask: int) -> Iterator[int]:
    """The members of a set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _checkpointed(where: str) -> PlanError:
    return PlanError(
        f"{where or 'the module'}: activation checkpointing inside the module recomputes without its scales; "
        "turn it off there and checkpoint the unit-scaled module as a whole"
    )


class _Trace(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.nodes: list[Node] = []
        self.path: list[str] = []
        self.of_tensor: dict[int, int] = {}
        self.of_function: dict[Any, int] = {}  # autograd node -> node
        self.alive: list[Tensor] = []  # else ids are reused
        self.saved = 0

    def watch(self, name: str, module: nn.Module) -> Iterable[Any]:
        def leave(*_: Any) -> None:
            self.path.pop()

        yield module.register_forward_pre_hook(lambda *_: self.path.append(name))
        yield module.register_forward_hook(leave)

    def saved_tensors(self) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            self.saved += 1
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parents = [self.node(t) for t in tensors((args, kwargs))]
        op, saved = known_op(function, args, kwargs), self.saved
        out = function(*args, **kwargs)
        outs = list(tensors(out))
        same = {id(t) for t in tensors((args, kwargs))} >= {id(t) for t in outs}
        if not outs or (same and function.__name__ in NEUTRAL):  # such as a conversion that converts nothing
            return out
        name = resolve_name(function) or function.__name__
        node = Node(name, self.where, tuple(parents), op=op, width=outs[0].shape[-1] if outs[0].ndim else 1)
        node.differentiable = any(t.requires_grad for t in outs)
        if op is not None and node.differentiable:
            if op in (LINEAR, FUSED) and saved == self.saved:  # someone else's hooks took what autograd saves
                raise _checkpointed(self.where)
            node.factors = op.measure(out, *args, **kwargs)
        self.append(node, outs)
        self.classify(node, function.__name__, args)
        return out

    @property
    def where(self) -> str:
        return self.path[-1] if self.path else ""

    def node(self, tensor: Tensor) -> int:
        """The node that made a tensor; one that nobody saw being made gets its own."""
        if type(tensor.grad_fn).__name__ == "CheckpointFunctionBackward":
            raise _checkpointed(self.where)
        number = self.of_tensor.get(id(tensor))
        # One that a torch.autograd.Function returned was made without gradients, before our eyes, and then given some.
        if number is None or (tensor.requires_grad and not self.nodes[number].differentiable):
            name = "leaf" if tensor.grad_fn is None else type(tensor.grad_fn).__name__
            node = Node(name, self.where, tuple(self.seen_before(tensor)), differentiable=tensor.requires_grad)
            node.parameter = self.names.get(id(tensor))
            self.append(node, [tensor])
        return self.of_tensor[id(tensor)]

    def seen_before(self, tensor: Tensor) -> Iterator[int]:
        """The nearest known nodes above a tensor, through the autograd graph."""
        queue, seen = deque([tensor.grad_fn]), set()
        while queue:
            function = queue.popleft()
            if function is None or function in seen:
                continue
            seen.add(function)
            if function in self.of_function:
                yield self.of_function[function]
            else:
                queue.extend(parent for parent, _ in function.next_functions)

    def append(self, node: Node, outs: list[Tensor]) -> None:
        number = len(self.nodes)
        for parent in node.parents:
            node.ancestors |= self.nodes[parent].ancestors | 1 << parent
            self.nodes[parent].consumers |= 1 << number
        self.nodes.append(node)
        self.alive += outs
        for t in outs:
            self.of_tensor[id(t)] = number
            if t.grad_fn is not None:
                self.of_function[t.grad_fn] = number

    def classify(self, node: Node, name: str, args: tuple[Any, ...]) -> None:
        """What can be said of a call once it is known where its operands come from."""
        known = [self.nodes[p] for p in node.parents]
        if node.op is SUM:
            self.classify_sum(node)
        elif node.op is not None:
            node.unit = node.differentiable
            if node.op is MATMUL and known[1].parameter is not None:
                node.factors = product_factors(args[0].numel() / args[0].shape[-1], args[0].shape[-1])
        elif name in NEUTRAL:
            node.parameter = known[0].parameter if len(known) == 1 else None
            node.unit = node.differentiable and all(p.unit for p in known if p.differentiable)
        elif name == "mul":
            node.unit = len(known) == 2 and all(p.unit for p in known)
        else:
            node.unit = name in NORMALISING

    def classify_sum(self, node: Node) -> None:
        a, b = node.parents
        left, right = self.nodes[a], self.nodes[b]
        for skip, (start, branch) in enumerate(((a, b), (b, a))):
            root = self.nodes[start].root if self.is_branch(self.nodes[start].root, branch) else None
            if self.is_branch(start, branch) or root is not None:
                node.skip, node.unit = skip, True
                node.root = start if self.is_branch(start, branch) else root
                return
        node.unit = left.unit and right.unit
        if not node.unit or a == b:
            node.factors = ()

    def is_branch(self, start: int | None, end: int) -> bool:
        """Whether a path leads from `start` to `end` over something with a weight."""
        if start is None or not self.nodes[end].ancestors >> start & 1:
            return False
        inside = (self.nodes[end].ancestors | 1 << end) >> (start + 1) << (start + 1)
        on_path = (n for n in map(self.nodes.__getitem__, bits(inside)) if n.ancestors >> start & 1)
        return any(n.op is not None and n.op.mixes for n in on_path)

    def finish(self, out: Any) -> None:
        """Decide what depends on what comes after."""
        end, scalars = 1 << len(self.nodes), []
        for t in tensors(out):
            self.nodes[self.node(t)].consumers |= end
            if t.numel() == 1:
                scalars.append(self.node(t))
        self.alive.clear()
        differentiable = sum(1 << i for i, n in enumerate(self.nodes) if n.differentiable) | end
        for i, node in enumerate(self.nodes):
            node.delayed = node.skip is not None and self.may_delay(i, node, differentiable)
        self.find_readouts()
        self.share_loss_factor(scalars, differentiable)

    def share_loss_factor(self, scalars: list[int], differentiable: int) -> None:
        """One factor for all losses, or their sum would be another one's; none where a term goes around them."""
        losses = {i: n for i, n in enumerate(self.nodes) if n.op in (CROSS_ENTROPY, MSE) and n.factors}
        inside = 0
        for n in losses.values():
            inside |= n.ancestors
        outside = [self.nodes[i] for s in scalars for i in bits((self.nodes[s].ancestors | 1 << s) & ~inside)]
        inputs = {p for n in outside if n not in losses.values() for p in n.parents if 1 << p & inside & differentiable}
        shared = () if inputs - losses.keys() else next((n.factors for n in losses.values()), ())
        for n in losses.values():
            n.factors = shared

    def may_delay(self, number: int, node: Node, differentiable: int) -> bool:
        """Whether the branch's only differentiable ways in and out are its start and the sum itself."""
        assert node.skip is not None
        start, branch = node.parents[node.skip], node.parents[1 - node.skip]
        source = self.nodes[start].op
        if node.root != start or source is None or source is FUSED or (node.name.endswith("add_") and node.skip == 0):
            return False
        above = self.nodes[start].ancestors | 1 << start
        inside = (self.nodes[branch].ancestors | 1 << branch) & ~above & differentiable
        ways_out = inside | 1 << number
        members = [self.nodes[i] for i in bits(inside)]
        if any(m.consumers & differentiable & ~ways_out for m in [*members, self.nodes[start]]):
            return False
        parents = (p for m in members for p in m.parents)
        return all(p == start or 1 << p & (inside | ~differentiable) for p in parents)

    def find_readouts(self) -> None:
        later, ratio = 0, None
        followed = 0
        for number, node in reversed(list(enumerate(self.nodes))):
            mixes = node.op is not None and node.op.mixes
            if node.op is SOFTMAX and not later >> number & 1:
                node.factors = ()
            if mixes:
                later |= node.ancestors
            if (
                node.op is not None
                and node.op.name in PRODUCTS
                and self.has_weight(node)
                and not followed >> number & 1
            ):
                node.readout = node.differentiable
            if mixes or node.skip is not None:
                followed |= node.ancestors
        for node in self.nodes:
            if node.readout:
                node.factors = readout_factors(node.factors, node.width, ratio)
                ratio = ratio or node.factors[1] / node.factors[0]

    def has_weight(self, node: Node) -> bool:
        return any(self.nodes[p].parameter is not None for p in node.parents)
