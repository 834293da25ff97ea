"""A model beside its base: which parameter answers which, and which sizes grow.

Both are built by the user's own code with other sizes, so that names agree but for the number of blocks. A block that
the base lacks is read at the last base block that has such a parameter; blocks that only the base has are left out.
Any other difference between the trees is a PlanError.

A side grows if it differs, with one exception: sizes that count the rows of a lookup table (vocabulary, positions)
are no width, though a proxy's may be smaller. Where nothing differs the sizes that grow are guessed: those of norms
and embeddings, and those that one matrix puts out and another takes in, the model's own input and output apart.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from umup.adapt.blocks import Blocks, child_names, parent, prefixes
from umup.adapt.readings import Kind, Reading, own_factors, read_module
from umup.errors import PlanError

# A parameter read in the model, and in its base.
Pair = tuple[Reading, Reading]

# Attributes that hold the size of an attention head, and (width, number of heads) pairs that imply it.
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size", "d_head", "dim_head")
WIDTH_AND_HEADS = (
    *(("embed_dim", "num_heads"), ("hidden_size", "num_heads"), ("hidden_size", "num_attention_heads")),
    *(("n_embd", "n_head"), ("d_model", "num_heads"), ("d_model", "n_heads"), ("dim", "num_heads"), ("dim", "n_heads")),
)
_ATTENTION = re.compile(r"atten|attn", re.IGNORECASE)
# Classes that put a prefix in front of their module's names.
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Survey:
    """A model by full names, those of shared modules and parameters included."""

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    readings: Mapping[str, Reading]


def survey(model: nn.Module) -> Survey:
    """Read every parameter of a model, on any device. Raises PlanError for wrapped models and unreadable parameters."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if type(module).__name__ in WRAPPERS:
            raise PlanError(
                f"{name or 'the model'} is wrapped in {type(module).__name__}: plan and apply before wrapping; "
                "param_groups takes the wrapped model"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, p in parameters.items():
        _check_readable(name, p, parameters)
    readings = {n: r for name, module in modules.items() for n, r in read_module(name, module).items()}
    return Survey(modules, parameters, readings)


def _check_readable(name: str, p: nn.Parameter, others: Container[str]) -> None:
    if is_lazy(p):
        raise PlanError(f"{name} is lazy and has no shape yet; run one batch first, through model and base")
    if p.is_complex():
        raise PlanError(f"{name} is complex, and no rule covers that; store its real and imaginary parts")
    if name.endswith("_g") and f"{name[:-1]}v" in others:
        raise PlanError(f"{name} is a part of weight_norm, which no plan knows; first remove_weight_norm(module)")


@dataclass(frozen=True)
class Growth:
    """Whether a size grows with width; `compared` is False where the base did not tell and it was guessed."""

    compared: bool
    test: Callable[[int, int], bool]

    def __call__(self, size: int, base: int) -> bool:
        """A size in the model, and the same in the base."""
        return self.test(size, base)


@dataclass(frozen=True)
class Pairing:
    """A model, its base, and the base's blocks per container of blocks."""

    target: Survey
    base: Survey
    blocks: Blocks
    base_blocks: Mapping[str, list[str]]

    @property
    def base_num_layers(self) -> int:
        """The base's number of blocks."""
        return sum(map(len, self.base_blocks.values()))

    def pairs(self) -> dict[str, Pair]:
        """Every parameter of the model beside that of the base. Raises PlanError where the trees differ."""
        known = {block for blocks in self.base_blocks.values() for block in blocks}
        for name in self.base.readings.keys() - self.target.readings.keys():
            if known.isdisjoint(prefixes(name)):
                raise _tree_error(name, "is in the base but not in the model")
        found = {}
        for name, mine in self.target.readings.items():
            other = self._counterpart(name, self.base.readings)
            if other is None:
                raise _tree_error(name, "is in the model but not in the base")
            theirs = self.base.readings[other]
            if mine.kind is not theirs.kind or len(mine.shape) != len(theirs.shape):
                raise _tree_error(name, f"is {_says(mine)} in the model and {_says(theirs)} in the base")
            found[name] = (mine, theirs)
        return found

    def head_dims(self) -> dict[str, tuple[int, int]]:
        """Attention modules whose head size differs -> (target, base)."""
        return {n: (a, b) for n, (a, b) in self._heads().items() if a is not None and b is not None and a != b}

    def unknown_heads(self, grows: Growth) -> tuple[str, ...]:
        """Attention modules with two or more growing matrices of their own and no head size that is known."""
        matrices: dict[str, int] = defaultdict(int)
        for name, (a, b) in self.pairs().items():
            if a.kind is Kind.MATRIX and (grows(a.features_in, b.features_in) or grows(a.fan_out, b.fan_out)):
                matrices[parent(parent(name))] += 1
        return tuple(name for name, sizes in self._heads().items() if None in sizes and matrices[name] > 1)

    def _heads(self) -> dict[str, tuple[int | None, int | None]]:
        found = {}
        for name, module in self.target.modules.items():
            other = self._counterpart(name, self.base.modules)
            if other is not None and _ATTENTION.search(f"{name.rpartition('.')[2]} {type(module).__name__}"):
                found[name] = (_head_dim(module), _head_dim(self.base.modules[other]))
        return found

    def own_factors(self) -> dict[str, tuple[float, float]]:
        """Parameters whose module's forward multiplies by a number of its own -> (target, base)."""
        mine, theirs = _own_factors(self.target), _own_factors(self.base)
        return {name: (factor, theirs[name]) for name, factor in mine.items()}

    def _counterpart(self, name: str, known: Container[str]) -> str | None:
        block = self.blocks.block_of(name)
        if name in known or block is None:
            return name if name in known else None
        stand_ins = reversed(self.base_blocks[self.blocks.containers[block]])
        names = (stand_in + name.removeprefix(block) for stand_in in stand_ins)
        return next((n for n in names if n in known), None)


def pair(target: Survey, base: Survey, blocks: Blocks) -> Pairing:
    """Lay a model beside its base; `blocks` are the model's."""
    children = child_names(base.modules)
    classes: dict[str, set[str]] = {}
    for block, container in blocks.containers.items():
        classes.setdefault(container, set()).add(type(target.modules[block]).__name__)
    base_blocks = {
        container: [c for c in children.get(container, ()) if type(base.modules[c]).__name__ in names]
        for container, names in classes.items()
    }
    return Pairing(target, base, blocks, base_blocks)


def growth(pairs: Mapping[str, Pair]) -> Growth:
    """Tell widths from fixed sizes by the pairs (see the module's docstring)."""
    tables = [p for p in pairs.values() if p[0].kind is Kind.TABLE]
    streams = {(a.fan_out, b.fan_out) for a, b in pairs.values() if a.kind in (Kind.TABLE, Kind.GAIN)}
    rows = {(a.fan_in, b.fan_in) for a, b in tables} - streams
    sides = {side for a, b in pairs.values() for side in zip(a.shape, b.shape, strict=True)}
    if any(a != b for a, b in sides - rows):
        return Growth(True, lambda size, base: size != base and (size, base) not in rows)
    matrices = [a for a, _ in pairs.values() if a.kind is Kind.MATRIX]
    passed_on = {m.features_in for m in matrices} & {m.fan_out for m in matrices}
    ends = {matrices[0].features_in, matrices[-1].fan_out} if matrices else set()
    widths = {width for width, _ in streams} | (passed_on - ends)
    return Growth(False, lambda size, base: size in widths)


def unsure_writers(pairs: Mapping[str, Pair], grows: Growth, blocks: Blocks) -> Iterator[str]:
    """Matrices that may write to the stream unknown, beside one that is known to.

    Such a matrix puts out as much as the known one of its block and takes in another growing width.
    """
    streams = {(blocks.block_of(name), pairs[name][0].fan_out) for name in blocks.writers}
    for name, (a, b) in pairs.items():
        matrix = a.kind is Kind.MATRIX and name not in blocks.writers
        wide = a.features_in != a.fan_out and grows(a.features_in, b.features_in) and grows(a.fan_out, b.fan_out)
        if matrix and wide and (blocks.block_of(name), a.fan_out) in streams:
            yield name


def lone_sides(pairs: Mapping[str, Pair], grows: Growth, blocks: Blocks) -> dict[str, tuple[int, int]]:
    """Matrices outside the blocks with two growing sides, one of them by a ratio that no other layer's side has."""
    layers: dict[float, set[str]] = defaultdict(set)
    grown = {}
    for name, (a, b) in pairs.items():
        sides = [s for s in ((a.features_in, b.features_in), (a.fan_out, b.fan_out)) if grows(*s)]
        for size, base in sides:
            layers[size / base].add(parent(name))
        if a.kind is Kind.MATRIX and len(sides) == 2 and blocks.block_of(name) is None:
            grown[name] = sides
    alone = {name: [(s, b) for s, b in sides if layers[s / b] == {parent(name)}] for name, sides in grown.items()}
    return {name: sides[0] for name, sides in alone.items() if len(sides) == 1}


def _own_factors(model: Survey) -> dict[str, float]:
    return {n: factor for name, module in model.modules.items() for n, factor in own_factors(name, module).items()}


def _head_dim(module: nn.Module) -> int | None:
    attributes = vars(module)
    for name in HEAD_SIZES:
        if isinstance(attributes.get(name), int):
            return int(attributes[name])
    for width, heads in WIDTH_AND_HEADS:
        if isinstance(attributes.get(width), int) and isinstance(attributes.get(heads), int):
            return int(attributes[width] // attributes[heads])
    return None


def _says(reading: Reading) -> str:
    return f"a {reading.kind.name.lower()} {reading.shape}"


def _tree_error(name: str, what: str) -> PlanError:
    return PlanError(f"{name} {what}; build both from the same class and change only sizes and the number of blocks")
