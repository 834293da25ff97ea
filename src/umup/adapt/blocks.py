"""The residual blocks of a module tree, and the matrices in them that write to the residual stream.

Depth rules need both, and neither shows in a shape: an attention's output projection looks like its query
projection. So names decide (WRITERS), and what a name claims must be able to be true: a writer's fan_out is the
width of the stream, i.e. the size of some norm or embedding. In an `nn.Sequential` inside a block, the last matrix
writes.

Blocks are modules of one class that repeat in an `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`, and are not
plain layers. Where such groups nest, the innermost one with a writer in it counts: the layers of a Swin stage, not
the stages; a GPT's blocks, not the heads in them.

Not covered: how often a block runs (ALBERT's one shared block counts once), and branches that are registered apart
from each other (a list of attentions and a list of MLPs count as two layers).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain

from torch import nn

from umup.adapt.readings import Kind, Reading

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

# The last segments of a module's name.
WRITERS = (
    *("o_proj", "out_proj", "c_proj", "proj", "proj_out", "to_out", "to_out.0", "out_lin", "linear_out"),
    *("o", "wo", "Wo", "out", "attention.dense", "attn.dense", "self_attention.dense", "self_attn.dense"),
    *("down_proj", "dense_4h_to_h", "fc2", "fc_out", "linear2", "lin2", "w2", "down", "ffn_output", "output.dense"),
)
_WRITER = re.compile(rf"(^|\.)({'|'.join(map(re.escape, WRITERS))})$")


@dataclass(frozen=True)
class Blocks:
    """`containers` maps each block to the container it lies in; `writers` names weights that write to the stream."""

    containers: Mapping[str, str]
    writers: frozenset[str]

    @property
    def unwritten(self) -> tuple[str, ...]:
        """The blocks in which no writer was found: depth rules would miss their branches."""
        written = set(chain.from_iterable(map(prefixes, self.writers)))
        return tuple(block for block in self.containers if block not in written)

    def block_of(self, name: str) -> str | None:
        """The block that a parameter or module lies in."""
        return next((prefix for prefix in prefixes(name) if prefix in self.containers), None)


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`: the name and the modules around it, innermost first."""
    while name:
        yield name
        name = parent(name)


def parent(name: str) -> str:
    """The module that holds a parameter or module; the root is ''."""
    return name.rpartition(".")[0]


def child_names(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module -> its children's full names, in order; the root is ''."""
    children: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        if name:
            children[parent(name)].append(name)
    return children


def find_blocks(
    modules: Mapping[str, nn.Module],
    readings: Mapping[str, Reading],
    told: Set[str] = frozenset(),
    others: Set[str] = frozenset(),
) -> Blocks:
    """Blocks and writers of a model, from its modules and its parameters' readings, both by full name.

    told: parameters that write, whatever their names say; others: parameters that do not.
    """
    children = child_names(modules)
    claimed = _claimed_writers(modules, readings) - others | told
    groups = list(_groups(modules, children))
    chosen = _innermost(groups, claimed) or _outermost([g for g in groups if len(g) > 1], modules)
    members = set(chain.from_iterable(chosen))
    containers = {name: parent(name) for name in modules if name in members}
    return Blocks(containers, frozenset(name for name in claimed if not members.isdisjoint(prefixes(name))))


def _groups(modules: Mapping[str, nn.Module], children: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Children of one class that are built alike and are no plain layers; an only child may be a block, too."""
    inside: dict[str, set[str]] = defaultdict(set)
    for name in modules:
        for outer in prefixes(parent(name)):
            inside[outer].add(name.removeprefix(outer))
    for container in (name for name, module in modules.items() if isinstance(module, CONTAINERS)):
        by_class: dict[type, list[str]] = defaultdict(list)
        for child in children.get(container, ()):
            if child in children:
                by_class[type(modules[child])].append(child)
        for group in by_class.values():
            first, *others = (inside[child] for child in group)
            alike = any(first <= other or other <= first for other in others)
            if alike or len(children[container]) == 1:
                yield group


def _innermost(groups: list[list[str]], claimed: set[str]) -> list[list[str]]:
    written = set(chain.from_iterable(map(prefixes, claimed)))
    writing = [group for group in groups if not written.isdisjoint(group)]
    around = {outer for group in writing for outer in prefixes(parent(group[0]))}
    return [group for group in writing if around.isdisjoint(group)]


def _outermost(groups: list[list[str]], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """For models in which nothing is named like a writer; bare containers are stages, not blocks."""
    solid = [group for group in groups if type(modules[group[0]]) not in CONTAINERS]
    members = set(chain.from_iterable(solid))
    return [group for group in solid if members.isdisjoint(prefixes(parent(group[0])))]


def _claimed_writers(modules: Mapping[str, nn.Module], readings: Mapping[str, Reading]) -> set[str]:
    """Matrices with a writer's name or place whose fan_out is a width of the stream, inside a block or not."""
    streams = {r.fan_out for r in readings.values() if r.kind in (Kind.TABLE, Kind.GAIN)}
    matrices = {parent(name): name for name, r in readings.items() if r.kind is Kind.MATRIX}
    stacks: dict[str, list[str]] = defaultdict(list)
    for owner in matrices:
        if owner and isinstance(modules[parent(owner)], nn.Sequential):
            stacks[parent(owner)].append(owner)
    last = {stack[-1] for stack in stacks.values() if len(stack) > 1}
    named = {owner for owner in matrices if owner in last or _WRITER.search(owner)}
    return {matrices[owner] for owner in named if readings[matrices[owner]].fan_out in streams}
