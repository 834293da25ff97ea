"""Parameters that share storage: what a plan can express, and what it refuses.

One `nn.Parameter` under several names is one stored parameter and several uses. A plan can say: the embedding's
table is also the head's matrix, or several uses have the same role and the same fans. Two parameters whose memory
overlaps are stepped twice by an optimizer, which no plan can make right.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from umup.errors import PlanError
from umup.rules.roles import ParamSpec, Role


def shared_names(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Groups of names of one parameter, in order. Raises PlanError for different parameters that overlap in memory."""
    uses: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        uses[id(parameter)].append(name)
    _refuse_overlaps({names[0]: parameters[names[0]] for names in uses.values()})
    return [names for names in uses.values() if len(names) > 1]


def check_shared(specs: Iterable[ParamSpec]) -> None:
    """Raises PlanError, by name, for uses of one storage that a plan cannot express."""
    by_name = {spec.name: spec for spec in specs}
    for spec in by_name.values():
        if spec.tied_to is None:
            continue
        owner = by_name[spec.tied_to]
        reversed_fans = (spec.fan_in, spec.fan_out) == (owner.fan_out, owner.fan_in)
        if (owner.role, spec.role) == (Role.EMBEDDING, Role.TIED_READOUT) and reversed_fans:
            continue
        if _use(spec) != _use(owner):
            raise PlanError(
                f"{spec.name} ({spec.role}) shares its storage with {owner.name} ({owner.role}), and no plan can serve "
                "both uses; give each its own nn.Parameter"
            )


def _use(spec: ParamSpec) -> tuple[Role, int, int, bool]:
    return spec.role, spec.fan_in, spec.fan_out, spec.on_residual


def _refuse_overlaps(parameters: Mapping[str, nn.Parameter]) -> None:
    spans: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for name, p in parameters.items():
        if p.numel():
            start = int(p.storage_offset()) * p.element_size()
            last = sum(int((size - 1) * stride) for size, stride in zip(p.shape, p.stride(), strict=True))
            # The address of the data is 0 for every tensor on the meta device; that of the storage's record is not.
            spans[p.untyped_storage()._cdata].append((start, start + (last + 1) * p.element_size(), name))
    for group in spans.values():
        group.sort()
        for (_, end, first), (start, _, second) in pairwise(group):
            if start < end:
                raise PlanError(
                    f"{second} overlaps {first} in memory but is another nn.Parameter; tie them by assigning one "
                    "parameter to both modules"
                )
