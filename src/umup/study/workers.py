"""A study's workers, started by one command: in this process, or in several of one torch thread each."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from umup.config.sections import RunConfig
from umup.data.tokens import prepare
from umup.errors import RunError
from umup.study.ledger import Ledger
from umup.study.todo import Attempt, Observe, Say, Study, ignore
from umup.study.worker import Crew, work

PATIENCE = 5.0
GLANCE = 1.0


def corpus_of(config: RunConfig) -> str:
    """What identifies a config's data, wherever it lies."""
    record = prepare(config.data, config.model.vocab_size, config.tokens_per_batch).record
    return "/".join(record[part].get("sha256", record[part].get("sampled_sha256")) for part in ("train", "val"))


def run_study(
    study: Study, folder: Path, crew: Crew, say: Say = ignore, observe: Observe = ignore
) -> Sequence[Attempt]:
    """Work on a study until it is finished, in several processes (one: in this process); all attempts.

    Its directory exists (todo.py). With several processes `say` must be a function of a module, and the caller be below
    `if __name__ == "__main__":`. Raises as `work`; RunError also if all processes died.
    """
    ledger = Ledger(folder)
    if ledger.recovered:
        say(ledger.recovered)
    if crew.workers == 1:
        work(study, folder, say, observe, crew)
    else:
        _processes(study, folder, crew, say, observe)
    attempts = Ledger(folder).attempts()
    if not study.to_do(attempts).finished:
        raise RunError(f"study {folder} is not finished and no worker of this command is left; repeat the command")
    return attempts


def _processes(study: Study, folder: Path, crew: Crew, say: Say, observe: Observe) -> None:
    context = multiprocessing.get_context("spawn")
    errors: SimpleQueue[Exception] = context.SimpleQueue()
    children = [context.Process(target=_child, args=(study, folder, crew, say, errors)) for _ in range(crew.workers)]
    # Ctrl-C is for workers, not for the imports of a process that is about to become one.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in children:
        child.start()
    signal.signal(signal.SIGINT, before)
    ledger = Ledger(folder)
    try:
        alive = children
        while alive:
            wait([child.sentinel for child in alive], None if observe is ignore else GLANCE)
            with suppress(RunError):  # the workers meet it, too
                left = study.to_do(ledger.attempts())
                observe(left.done, left.wanted)
            # is_alive also lets a dead process go, which other workers take for living as long as nobody does.
            alive = [child for child in alive if child.is_alive()]
    except KeyboardInterrupt:
        _interrupt(children)
        raise
    if not errors.empty():
        raise errors.get()


def _interrupt(children: Sequence[BaseProcess]) -> None:
    """A terminal interrupts all; but one may have been starting, or this process been interrupted alone."""
    for child in children:
        child.join(1.0)
    while alive := [child for child in children if child.is_alive()]:
        for child in alive:
            if child.pid is not None:
                os.kill(child.pid, signal.SIGINT)
        for child in alive:
            child.join(PATIENCE)


def _child(study: Study, folder: Path, crew: Crew, say: Say, errors: "SimpleQueue[Exception]") -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        work(study, folder, say, crew=crew)
    except KeyboardInterrupt:
        return
    except Exception as error:
        errors.put(error)
