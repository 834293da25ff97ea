"""Run a sweep's workers from one command, and find what they found."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from umup.config.sections import RunConfig
from umup.data.tokens import prepare
from umup.errors import CheckpointError, RunError
from umup.study.ledger import Ledger
from umup.study.sweep import Sweep, load_study, to_do
from umup.study.sweep_report import Finding, conclude
from umup.study.worker import Say, work

PATIENCE = 5.0


def corpus_of(config: RunConfig) -> str:
    """What identifies a config's data, wherever it lies."""
    record = prepare(config.data, config.model.vocab_size, config.tokens_per_batch).record
    return "/".join(record[part].get("sha256", record[part].get("sampled_sha256")) for part in ("train", "val"))


def check_joins(folder: Path, sweep: Sweep, config: RunConfig) -> None:
    """Raise CheckpointError if the study is of another config, or this host's corpus is another."""
    if sweep.config != config:
        raise CheckpointError(f"study {folder} was made by another config; join it with the one in its study.json")
    if sweep.corpus and sweep.corpus != corpus_of(config):
        raise CheckpointError(f"study {folder}: the corpus here is not the one it began with; copy that here")


def find(folder: Path, workers: int, say: Say) -> Finding:
    """Work on a study until it is finished, in `workers` processes (one: in this process), and conclude.

    `say` hears a line per trial; with several processes it must be a function of a module. Raises as study/worker.py's
    `work`; RunError also if all processes died.
    """
    ledger = Ledger(folder)
    if ledger.recovered:
        say(ledger.recovered)
    if workers == 1:
        work(folder, say)
    else:
        _processes(folder, workers, say)
    sweep, attempts = load_study(folder), Ledger(folder).attempts()
    if not to_do(sweep, attempts).finished:
        raise RunError(f"study {folder} is not finished and no worker of this command is left; repeat the command")
    return conclude(sweep, attempts)


def _processes(folder: Path, workers: int, say: Say) -> None:
    context = multiprocessing.get_context("spawn")
    errors: SimpleQueue[Exception] = context.SimpleQueue()
    children = [context.Process(target=_child, args=(folder, say, errors)) for _ in range(workers)]
    # Ctrl-C is for workers, not for the imports of a process that is about to become one.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in children:
        child.start()
    signal.signal(signal.SIGINT, before)
    try:
        alive = children
        while alive:
            wait([child.sentinel for child in alive])
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


def _child(folder: Path, say: Say, errors: "SimpleQueue[Exception]") -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        work(folder, say)
    except KeyboardInterrupt:
        return
    except Exception as error:
        errors.put(error)
