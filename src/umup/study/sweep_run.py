"""Work on a sweep from one command, and say what was found."""

from pathlib import Path

from umup.config.sections import RunConfig
from umup.errors import CheckpointError
from umup.study.sweep import Sweep, load_study
from umup.study.sweep_report import Finding, conclude
from umup.study.todo import Say
from umup.study.worker import Crew
from umup.study.workers import corpus_of, run_study


def check_joins(folder: Path, sweep: Sweep, config: RunConfig) -> None:
    """Raise CheckpointError if the study is of another config, or this host's corpus is another."""
    if sweep.config != config:
        raise CheckpointError(f"study {folder} was made by another config; join it with the one in its study.json")
    if sweep.corpus and sweep.corpus != corpus_of(config):
        raise CheckpointError(f"study {folder}: the corpus here is not the one it began with; copy that here")


def find(folder: Path, crew: Crew, say: Say) -> Finding:
    """Work on the sweep in a directory until it is finished, as `run_study`, and conclude."""
    sweep = load_study(folder)
    return conclude(sweep, run_study(sweep, folder, crew, say))
