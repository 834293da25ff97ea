"""One look at the operands of a model's products, and how a look is made cheap enough to repeat.

A look is one eager forward and backward pass whose operands are measured on the way (numerics/ranges.py). It is a
program of tensors: all measurements come out as one tensor, and nothing waits for the device before that. Eagerly it is
a thousand small kernels, and a GPU runs them in a fifth of the time in which the host launches them. So `Looks` makes
the first look eagerly, records the second as a CUDA graph, and replays that on the tokens of all later ones. What a
graph knows is addresses: weights and scales that change in place are seen. Whatever takes another address, a product
spared, a layer frozen, a batch of another shape: each starts over with an eager look.

Recorded is only what is known to replay: a decoder's own loss (`LookLoss`), without dropout, on one GPU, in one
process, as long as the graph takes little of the GPU's memory; for it keeps what an eager look gives back, all
activations of LOOK_TOKENS tokens. Every other look stays eager.

Not covered: hooks that are added to the model between looks.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umup.models.decoder import Decoder
from umup.nn.fp8 import StaticMatmul
from umup.nn.modules import Attention, Dropout, Matmul, join
from umup.numerics.ranges import Range, measure
from umup.ops.loss import cross_entropy

# What a look reads: enough for shares of 2^-20, and little beside a hundred steps.
LOOK_TOKENS = 1024
WEIGHT_SAMPLE = 2**20
# Of the GPU's memory, the most that a graph may keep.
GRAPH_SHARE = 1 / 20

Product = tuple[str, Matmul, tuple[nn.Parameter, ...]]
"""A product's name, its module and its weights."""
Operand = tuple[str, str]
"""A product's name, and x, g or w."""
Program = Callable[..., Tensor]
"""A function of tensors."""


@dataclass(frozen=True)
class LookLoss:
    """The loss of the beginning of a microbatch, its logits made by the head's own module so that they are seen."""

    model: Decoder

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, S), (B, S) -> the loss of the first LOOK_TOKENS tokens of the first sequence."""
        tokens, targets = tokens[:1, :LOOK_TOKENS], targets[:1, :LOOK_TOKENS]
        return cross_entropy(self.model(tokens), targets, self.model.loss_multiplier, self.model.loss_grad)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        parts = (m for m in self.model.modules() if isinstance(m, Attention | Dropout))
        return any(m.training and m.probability > 0 for m in parts)


class Look:
    """`look(loss, *inputs)`: what one pass of `loss(*inputs)` measures, (operands, 1027); `operands` names its rows.

    No parameter's gradient is touched. An operand that is not computed (frozen parts) is left out.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self.operands: tuple[Operand, ...] = ()

    def __call__(self, loss: Program, *inputs: Tensor) -> Tensor:
        """As the class says."""
        found: dict[Operand, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with _watch(self.products, found, outputs):
            total = loss(*inputs)
        wanted = {name: out for name, out in outputs.items() if out.requires_grad}
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if wanted else ()
        found |= {(name, "g"): measure(grad) for name, grad in zip(wanted, grads, strict=True) if grad is not None}
        for name, matmul, weights in self.products:
            found[name, "w"] = measure(join(tuple(w.detach()[:: -(-w.numel() // WEIGHT_SAMPLE)] for w in weights)))
            if isinstance(matmul, StaticMatmul) and not matmul.spared:  # the last refresh saw every element
                found[name, "w"][0] = matmul.amax[0]
        self.operands = tuple(found)
        return torch.stack(list(found.values()))


class Looks:
    """All looks at a model over a run.

    `recorders`, by kind of device: a program and inputs like those to come -> an equal program that is faster.
    `recorded`: what came of it, while it serves.
    """

    def __init__(self, model: nn.Module, products: Sequence[Product]) -> None:
        self.model, self.look = model, Look(products)
        self.recorders: Mapping[str, Callable[[Program, Sequence[Tensor]], Program]] = {"cuda": as_cuda_graph}
        self._key: Hashable = None
        self.recorded: Program | None = None

    def __call__(self, loss: Program, *inputs: Tensor) -> dict[Operand, Range]:
        """(product, operand) -> what one pass of `loss(*inputs)` shows of it, on all ranks together.

        Random numbers that the pass draws are put back.
        """
        tensors = (*self.model.parameters(), *self.model.buffers())
        with _random_numbers_kept(tensors):
            measured = self._program(loss, inputs, tensors)(*inputs)
        return _ranges(self.look.operands, measured)

    def _program(self, loss: Program, inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Program:
        eager = partial(self.look, loss)
        recorder = self.recorders.get(tensors[0].device.type)
        if recorder is None or not _replays(loss, (*inputs, *tensors)):
            return eager
        if (key := self._key_of(loss, inputs, tensors)) != self._key:
            self._key, self.recorded = key, None
            return eager
        self.recorded = self.recorded or recorder(eager, inputs)
        return self.recorded

    def _key_of(self, loss: Program, inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Hashable:
        """Equal for looks that one recording serves."""
        return (
            loss,
            tuple((x.shape, x.dtype) for x in inputs),
            tuple((t.data_ptr(), t.dtype, t.requires_grad) for t in tensors),
            tuple(matmul.spared for _, matmul, _ in self.look.products if isinstance(matmul, StaticMatmul)),
            tuple(module.training for module in self.model.modules()),
        )


def measure_operands(products: Sequence[Product], loss: Program, *inputs: Tensor) -> dict[Operand, Range]:
    """A single look, always eager."""
    look = Look(products)
    with _random_numbers_kept(w for _, _, weights in products for w in weights):
        measured = look(loss, *inputs)
    return _ranges(look.operands, measured)


def _ranges(operands: Sequence[Operand], measured: Tensor) -> dict[Operand, Range]:
    return dict(zip(operands, map(Range.of, agreed(measured).cpu()), strict=True))


def agreed(measured: Tensor) -> Tensor:
    """The looks of all ranks as one, (operands, numbers): largest values compared, the rest added up.

    Every rank then takes the same decisions. Without a process group there is nothing to agree on.
    """
    if dist.is_available() and dist.is_initialized():
        largest = measured[:, 0].clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(measured)
        measured[:, 0] = largest
    return measured


def _random_numbers_kept(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    return torch.random.fork_rng({t.device for t in tensors if t.is_cuda})


# --- recording ----------------------------------------------------------------------------------------------------


def _replays(loss: Program, tensors: Iterable[Tensor]) -> bool:
    """Whether a look at `loss` needs nothing but one device."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return alone and isinstance(loss, LookLoss) and not loss.draws and len({t.device for t in tensors}) == 1


def as_cuda_graph(program: Program, inputs: Sequence[Tensor]) -> Program:
    """`program` as a CUDA graph; itself, where the graph would keep more than GRAPH_SHARE of the GPU's memory."""
    with torch.cuda.device(inputs[0].device):
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        _warm_up(stream, lambda: program(*inputs))
        if torch.cuda.memory_reserved() - before > GRAPH_SHARE * torch.cuda.mem_get_info()[1]:
            return program
        return in_place(program, inputs, partial(_capture, stream))


def _warm_up(stream: torch.cuda.Stream, call: Callable[[], object]) -> None:
    """What libraries make at their first use of a stream, they cannot make while it is recorded."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(stream: torch.cuda.Stream, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    # Other threads (a loader that pins memory) may go on as they like.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = call()
    return out, graph.replay


def in_place(
    program: Program,
    inputs: Sequence[Tensor],
    record: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]],
) -> Program:
    """`program` that reads its inputs from, and leaves its result in, tensors which stay where they are.

    `record` gets the program on those tensors; it returns the result's tensor, and what fills it anew. Every result is
    the same tensor: read it before the next call.
    """
    buffers = [x.clone() for x in inputs]
    out, replay = record(lambda: program(*buffers))

    def replayed(*inputs: Tensor) -> Tensor:
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        replay()
        return out

    return replayed


# --- watching -----------------------------------------------------------------------------------------------------


@contextmanager
def _watch(products: Sequence[Product], found: dict[Operand, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Measure the inputs of the modules, and keep their outputs, while the block runs."""

    def before(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *weights = args
            found[name, "x"] = measure(x.detach())
            # The engine would make the weights' gradients, too, and nobody wants them.
            return (x, *(w.detach() for w in weights)) if x.requires_grad else args

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            outputs[name] = out

        return hook

    handles = []
    static = [matmul for _, matmul, _ in products if isinstance(matmul, StaticMatmul)]
    for name, matmul, _ in products:
        handles += [matmul.register_forward_pre_hook(before(name)), matmul.register_forward_hook(after(name))]
    for matmul in static:
        matmul.watched = True
    try:
        yield
    finally:
        for matmul in static:
            matmul.watched = False
        for handle in handles:
            handle.remove()
