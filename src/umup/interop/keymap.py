"""Two programs' tensor names and layouts as one table, read both ways.

    to_ours(table, theirs, shape)     their tensors -> (our name, tensor), one at a time, so that a large file can be
                                      read as it is used
    to_theirs(table, ours, shape)     our tensors -> (their name, tensor)

A row holds one tensor of theirs and the parameters of ours that it is made of, with `{i}` for the layer's number, and
the packing between them. Rows of parameters that a network does not have (biases, norms, a tied head) drop out, so one
table serves all variants of a family. Packings permute; none rounds, so a round trip gives the same bits.

Not covered: numbers. What a multiplier does to a weight on its way is `interop/fold.py`'s business.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from umup.errors import CheckpointError, did_you_mean
from umup.models.specs import Shape, decoder_specs


@dataclass(frozen=True)
class Packing:
    """How one tensor of theirs holds several of ours: `unpack(theirs, shape, sides)`, sides the (rows) of ours."""

    unpack: Callable[[Tensor, Shape, Sequence[int]], Sequence[Tensor]]
    pack: Callable[[Sequence[Tensor], Shape], Tensor]


@dataclass(frozen=True)
class Row:
    """One tensor of theirs. `ours` are the parameters within it, all or none of which a network has."""

    theirs: str
    ours: tuple[str, ...]
    packing: Packing


def row(theirs: str, *ours: str, packing: Packing | None = None) -> Row:
    """A row; without a packing the tensor is ours as it is, or ours one above the other."""
    return Row(theirs, ours, packing or STACKED)


# --- packings ----------------------------------------------------------------------------------------------------

STACKED = Packing(
    lambda tensor, shape, sides: torch.split(tensor, list(sides)),
    lambda parts, shape: parts[0] if len(parts) == 1 else torch.cat(list(parts)),
)
"""Rows of the first of ours, then of the second, ..."""

TRANSPOSED = Packing(
    lambda tensor, shape, sides: torch.split(tensor.t(), list(sides)),
    lambda parts, shape: (parts[0] if len(parts) == 1 else torch.cat(list(parts))).t(),
)
"""The same with (in, out) for (out, in): GPT-2's Conv1D."""


def _by_head(tensor: Tensor, shape: Shape, sides: Sequence[int]) -> Sequence[Tensor]:
    groups, d = shape.num_heads // shape.num_kv_heads, shape.head_dim
    parts = torch.split(tensor.reshape(shape.num_kv_heads, groups + 2, d, *tensor.shape[1:]), [groups, 1, 1], 1)
    return [part.flatten(0, 2) for part in parts]


def _to_heads(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    heads = [part.reshape(shape.num_kv_heads, -1, shape.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(heads, 1).flatten(0, 2)


BY_HEAD = Packing(_by_head, _to_heads)
"""q, k and v by key head: the queries that read it, the key, the value; matrices and biases alike."""


# --- reading a table ---------------------------------------------------------------------------------------------


def to_ours(
    table: Sequence[Row],
    theirs: Mapping[str, Tensor],
    shape: Shape,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, Tensor]]:
    """Every stored parameter of the shape's network, in the table's order.

    `ignored` names of theirs hold nothing that is learned (masks, tables). Raises CheckpointError naming what is
    missing, what is left over and what has another shape, before the first tensor is handed out.
    """
    rows, sizes = _placed(table, shape), _stored(shape)
    wanted = dict.fromkeys(r.theirs for r in rows)
    missing = [name for name in wanted if name not in theirs]
    left = [name for name in theirs if name not in wanted and not ignored(name)]
    faults = [f"{name} is missing" for name in missing[:3]]
    faults += [f"{name} is in no place of this network ({did_you_mean(name, wanted)})" for name in left[:3]]
    if rest := len(missing[3:]) + len(left[3:]):
        faults.append(f"and {rest} more")
    if faults:
        raise CheckpointError("; ".join(faults))
    for r in rows:
        packed, tensor = _packed(r, shape, sizes), theirs[r.theirs]
        if tuple(tensor.shape) != packed:
            raise CheckpointError(f"{r.theirs} has shape {tuple(tensor.shape)}, this network wants {packed}")
        yield from zip(r.ours, r.packing.unpack(tensor, shape, [sizes[name][0] for name in r.ours]), strict=True)


def to_theirs(table: Sequence[Row], ours: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of theirs, in the table's order, contiguous. Raises CheckpointError as `layout` does."""
    for r, _ in layout(table, shape):
        yield r.theirs, r.packing.pack([ours[name] for name in r.ours], shape).contiguous()


def layout(table: Sequence[Row], shape: Shape) -> list[tuple[Row, tuple[int, ...]]]:
    """Every tensor of theirs: its row, with layers counted out, and its shape.

    Raises CheckpointError for parameters without a row.
    """
    rows, sizes = _placed(table, shape), _stored(shape)
    found = {name for r in rows for name in r.ours}
    if homeless := [name for name in sizes if name not in found]:
        raise CheckpointError(f"the format has no place for {', '.join(homeless[:3])}")
    return [(r, _packed(r, shape, sizes)) for r in rows]


def _packed(r: Row, shape: Shape, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(r.packing.pack([torch.empty(sizes[name], device="meta") for name in r.ours], shape).shape)


def _placed(table: Sequence[Row], shape: Shape) -> list[Row]:
    """The table with layers counted out, less what the network does not have."""
    stored = _stored(shape)
    found = []
    for r in table:
        layers = range(shape.num_layers) if "{i}" in r.theirs else range(1)
        for i in layers:
            ours = tuple(name.format(i=i) for name in r.ours)
            if all(name in stored for name in ours):
                found.append(Row(r.theirs.format(i=i), ours, r.packing))
    return found


def _stored(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in decoder_specs(shape) if spec.tied_to is None}
