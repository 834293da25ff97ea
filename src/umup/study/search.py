"""Learning-rate lines: loss against log2 lr on a grid, extra seeds near the optimum, the grid extended at its edges.

Trials are independent runs in worker processes of one thread each, which on small networks beats one process with
many threads. Results go into a journal as they come.

Not covered: other hyperparameters and strategies, trials over several devices.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from statistics import mean

from umup.config.sections import RunConfig
from umup.data.tokens import TokenFiles, prepare
from umup.errors import DivergedError
from umup.study.journal import Journal, Trial, key_of

MakeConfig = Callable[[float, int], RunConfig]
Observe = Callable[[int, int], None]
ROUNDS = 8


@dataclass(frozen=True)
class Line:
    """A learning-rate line: validation losses by log2 lr, one per seed; a diverged seed is infinity."""

    losses: Mapping[float, tuple[float, ...]]

    def mean(self, log2_lr: float) -> float:
        """Mean loss over the seeds at a rate."""
        return mean(self.losses[log2_lr])

    @property
    def best(self) -> float:
        """The log2 lr of the lowest mean loss."""
        return min(self.losses, key=self.mean)

    @property
    def step(self) -> float:
        """The grid's spacing, in octaves."""
        grid = sorted(self.losses)
        return min(b - a for a, b in pairwise(grid))

    @property
    def optimum(self) -> float:
        """The vertex of the parabola through the best point and its neighbours, at most half a step from it."""
        grid = sorted(self.losses)
        i = grid.index(self.best)
        if not 0 < i < len(grid) - 1:
            return self.best
        low, mid, high = (self.mean(grid[j]) for j in (i - 1, i, i + 1))
        if not (isfinite(low) and isfinite(high)) or low + high <= 2 * mid:
            return self.best
        offset = 0.5 * self.step * (low - high) / (low - 2 * mid + high)
        return self.best + min(max(offset, -self.step / 2), self.step / 2)

    @property
    def on_edge(self) -> bool:
        """Whether the best rate is the grid's first or last, so that the optimum may lie outside."""
        return self.best in (min(self.losses), max(self.losses))


class Runner:
    """Runs configs through a journal and a pool; `observe` hears (trials finished, trials asked for so far)."""

    def __init__(self, journal: Journal, pool: ProcessPoolExecutor, observe: Observe) -> None:
        self.journal, self.pool, self.observe = journal, pool, observe
        self._asked: set[str] = set()

    def run(self, configs: Iterable[RunConfig]) -> list[Trial]:
        """One trial per config, in order; those in the journal are not run again."""
        wanted = list(configs)
        fresh = {key_of(config): config for config in wanted if self.journal.get(config) is None}
        pending: set[Future[Trial]] = {self.pool.submit(run_trial, config) for config in fresh.values()}
        self._asked |= {key_of(config) for config in wanted}
        self._report(pending)
        try:
            while pending:
                done = wait(pending, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda f: f.exception() is not None):  # a failure loses no result
                    pending.remove(future)
                    self.journal.add(future.result())
                    self._report(pending)
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        trials = [self.journal.get(config) for config in wanted]
        return [trial for trial in trials if trial is not None]

    def _report(self, pending: set[Future[Trial]]) -> None:
        self.observe(len(self._asked) - len(pending), len(self._asked))


_prepared: dict[tuple[str, int, int], TokenFiles] = {}


def run_trial(config: RunConfig) -> Trial:
    """One run, nothing written; divergence is a result. A worker prepares each corpus once."""
    from umup.train.loop import run_training

    data = (config.data.model_dump_json(), config.model.vocab_size, config.tokens_per_batch)
    if data not in _prepared:
        _prepared[data] = prepare(config.data, *data[1:])
    try:
        result = run_training(config, files=_prepared[data])
    except DivergedError:
        return Trial(key_of(config), inf, inf)
    return Trial(key_of(config), result.val_loss, result.train_loss)


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one torch thread each; on an error or Ctrl-C what has not started is dropped."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def search_lines(
    runner: Runner, lines: Mapping[str, MakeConfig], grid: Mapping[str, list[float]], seeds: int
) -> dict[str, Line]:
    """Search several lines at once, so that the pool never idles between them.

    `lines` maps a label to (lr, seed) -> config, `grid` to its log2 rates, evenly spaced. One seed everywhere; while a
    line's best is on its edge the grid grows by a step there, and the best rate and its neighbours get `seeds` seeds,
    until the best by mean has them. After ROUNDS rounds a line may still end on its edge: `on_edge` tells.
    """
    points = {label: {(x, 0) for x in grid[label]} for label in lines}
    for _ in range(ROUNDS):
        found = evaluate(runner, lines, points)
        missing = {label: _wanted(line, seeds) - points[label] for label, line in found.items()}
        if not any(missing.values()):
            break
        for label in lines:
            points[label] |= missing[label]
    return evaluate(runner, lines, points)


def _wanted(line: Line, seeds: int) -> set[tuple[float, int]]:
    """What a line needs beside what it has: a point beyond its edge, or else seeds around its best."""
    if line.on_edge:
        return {(line.best - line.step if line.best == min(line.losses) else line.best + line.step, 0)}
    grid = sorted(line.losses)
    at = grid.index(line.best)
    return {(x, seed) for x in grid[at - 1 : at + 2] for seed in range(seeds)}


def evaluate(
    runner: Runner, lines: Mapping[str, MakeConfig], points: Mapping[str, set[tuple[float, int]]]
) -> dict[str, Line]:
    """Lines at exactly these (log2 lr, seed) points; points in the journal cost nothing."""
    # The slow ones (wide, listed last) start first, so that none is left running alone at the end.
    jobs = [(label, x, seed) for label in reversed(list(lines)) for x, seed in sorted(points[label])]
    trials = runner.run(lines[label](2.0**x, seed) for label, x, seed in jobs)
    losses: dict[str, dict[float, list[float]]] = {label: {} for label in lines}
    for (label, x, _), trial in zip(jobs, trials, strict=True):
        losses[label].setdefault(x, []).append(trial.val_loss)
    return {label: Line({x: tuple(seeds) for x, seeds in sorted(by_rate.items())}) for label, by_rate in losses.items()}


def _one_thread() -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
