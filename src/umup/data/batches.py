"""Batches from a token stream, with the place in the stream as a value.

An epoch cuts the stream into windows of seq_len + 1 tokens that overlap by one, so that every token is a target once,
and visits them in a random order. The cut starts at an offset drawn anew each epoch, so windows do not always break at
the same places; fewer than seq_len tokens are left over at either end. Offset and order depend on (seed, epoch) alone:
the state {"epoch": e, "position": windows visited} is all that a checkpoint must keep to resume exactly.

Not covered: attention masks at document ends (windows run across them), mixtures of sources, and ranks: a data-parallel
run draws the global batch on every rank and takes its rows.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from umup.data.tokenizer import TokenArray
from umup.errors import DataError

State = dict[str, int]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batches:
    """Random batches of `tokens` [length]: int64 inputs and targets [batch_size, seq_len], targets one token ahead."""

    tokens: TokenArray
    batch_size: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.seq_len:
            raise DataError(
                f"data: {len(self.tokens)} tokens are less than one window of {self.seq_len + 1}; "
                f"write a larger data.source or a smaller model.max_seq_len"
            )

    def start(self) -> State:
        """The state before the first batch."""
        return {"epoch": 0, "position": 0}

    def next(self, state: State) -> tuple[Ids, Ids, State]:
        """The batch at `state` and the state after it; `state` itself is left alone.

        A batch that runs past the end of an epoch is filled from the next one. DataError if the state is not of this
        stream.
        """
        epoch, position = state["epoch"], state["position"]
        starts: list[Ids] = []
        missing = self.batch_size
        while missing:
            order = epoch_starts(len(self.tokens), self.seq_len, self.seed, epoch)
            if position >= len(order):
                raise DataError(
                    f"data: the run stopped at window {position} of epoch {epoch}, which now has {len(order)}; "
                    "resume with the data and model.max_seq_len it was started with"
                )
            starts.append(order[position : position + missing])
            missing -= len(starts[-1])
            position += len(starts[-1])
            if position == len(order):
                epoch, position = epoch + 1, 0
        return *self._gather(np.concatenate(starts)), {"epoch": epoch, "position": position}

    def fixed(self, count: int) -> list[tuple[Ids, Ids]]:
        """`count` batches of evenly spread windows, the same on every call; windows repeat where there are too few."""
        windows = (len(self.tokens) - 1) // self.seq_len
        total = count * self.batch_size
        starts = np.arange(total, dtype=np.int64) * windows // total * self.seq_len
        return [self._gather(rows) for rows in starts.reshape(count, self.batch_size)]

    def _gather(self, starts: Ids) -> tuple[Ids, Ids]:
        windows = self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


@lru_cache(maxsize=2)
def epoch_starts(length: int, seq_len: int, seed: int, epoch: int) -> Ids:
    """First tokens of an epoch's windows, in the order of the visit (read-only)."""
    rng = np.random.default_rng([seed, epoch])
    offset = int(rng.integers(min(seq_len, length - seq_len)))  # a short stream must keep one window
    windows = (length - 1 - offset) // seq_len
    starts = rng.permutation(windows).astype(np.int64) * seq_len + offset
    starts.flags.writeable = False
    return starts
