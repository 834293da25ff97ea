"""Which open points of a study a worker trains as one program (stacked.py), and how many.

By default up to STACKED where runs are on a GPU and what its free memory should hold, else one: on a CPU of one thread
a stack of 8 gained 1.3 times at width 32 (1024 tokens), 1.1 at 64, and lost from 128 on. Where a stack fails, those of
its shape are halved from then on.

Not covered: memory that other processes take while a stack runs; on a CPU, memory.
"""

from collections.abc import Collection, Sequence
from functools import partial
from itertools import islice

from umup.config.sections import RunConfig
from umup.study.stacked import members_that_fit, stack_key, unstackable
from umup.study.todo import Point, Study
from umup.train.runtime import device_of

STACKED = 16


class Stacks:
    """The choices of one worker; `most`: members of a stack, None for the default."""

    def __init__(self, study: Study, most: int | None) -> None:
        self.study, self.most = study, most
        self._keys: dict[str, str] = {}
        self._halved: dict[str, int] = {}

    def choose(self, points: Sequence[Point], failed: Collection[str], share: int) -> list[Point]:
        """The first of the open points, and up to `share` with it that may run in its program.

        Points that have failed (by name) run alone.
        """
        first = points[0]
        most = 1 if self.study.command is not None or first.name in failed else min(share, self._most(first))
        if most == 1:
            return [first]
        alike = partial(self._together, first)
        return [first, *islice((p for p in points[1:] if p.name not in failed and alike(p)), most - 1)]

    def halve(self, config: RunConfig, members: int) -> int:
        """Stacks of the config's shape have half as many members from now on; how many."""
        self._halved[stack_key(config)] = members // 2
        return members // 2

    def _most(self, point: Point) -> int:
        config = self.study.config_of(point)
        device = device_of(config)
        most = self.most or (STACKED if device.type == "cuda" else 1)
        if most == 1 or unstackable(config) is not None:
            return 1
        return min(most, self._halved.get(self._key(point), most), members_that_fit(config, device))

    def _together(self, first: Point, other: Point) -> bool:
        return first.stage == other.stage and self._key(first) == self._key(other)

    def _key(self, point: Point) -> str:
        if point.name not in self._keys:
            self._keys[point.name] = stack_key(self.study.config_of(point))
        return self._keys[point.name]
