"""A model beside its base: which parameter answers which, and which sizes grow.

Both are built by the user's own code with other sizes, so that names agree but for the number of blocks. A block that
the base lacks is read at the last base block that has such a parameter; blocks that only the base has are left out.
Any other difference between the trees is a PlanError.

A side grows if it differs, with one exception: sizes that count the rows of a lookup table (vocabulary, positions)
are no width, though a proxy's may be smaller. Where nothing differs the sizes that grow are guessed: those of norms
and embeddings, and those that one matrix puts out and another takes in, the model's own input and output apart.
"""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from torch import nn

from umup.adapt.blocks import Blocks, child_names, prefixes
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


@dataclass(frozen=True)
class Survey:
    """A model by full names, those of shared modules and parameters included."""

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    readings: Mapping[str, Reading]


def survey(model: nn.Module) -> Survey:
    """Read every parameter of a model, on any device."""
    modules = dict(model.named_modules(remove_duplicate=False))
    readings = {n: r for name, module in modules.items() for n, r in read_module(name, module).items()}
    return Survey(modules, dict(model.named_parameters(remove_duplicate=False)), readings)


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
        found = {}
        for name, module in self.target.modules.items():
            other = self._counterpart(name, self.base.modules)
            if other is not None and _ATTENTION.search(f"{name.rpartition('.')[2]} {type(module).__name__}"):
                sizes = _head_dim(module), _head_dim(self.base.modules[other])
                if sizes[0] is not None and sizes[1] is not None and sizes[0] != sizes[1]:
                    found[name] = (sizes[0], sizes[1])
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


@dataclass(frozen=True)
class Growth:
    """Whether a size grows with width; `compared` is False where the base did not tell and it was guessed."""

    compared: bool
    test: Callable[[int, int], bool]

    def __call__(self, size: int, base: int) -> bool:
        """A size in the model, and the same in the base."""
        return self.test(size, base)


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
