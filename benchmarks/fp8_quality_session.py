"""What a sitting of fp8_quality.py runs, as data: sizes, trials, and which trial comes next."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from benchmarks.fp8_quality_peers import PEERS

from umup.config.load import parse_config
from umup.config.sections import RunConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A llama and how long it trains."""

    hidden_size: int
    num_layers: int
    head_dim: int
    intermediate_size: int
    seq_len: int
    batch_size: int
    eval_batches: int
    steps: int


SIZES = {
    "tiny": Size(64, 2, 16, 176, 32, 4, 2, 12),
    "35m": Size(512, 8, 64, 2048, 1024, 32, 16, 800),
    "100m": Size(1024, 8, 64, 2816, 1024, 32, 16, 800),
}
NETWORK_FIELDS = ("hidden_size", "num_layers", "head_dim", "intermediate_size")


@dataclass(frozen=True)
class Trial:
    """One training run of `steps`, the first `common` of which are its scheme's in BF16."""

    variant: str
    lr: float
    seed: int
    steps: int
    common: int = 0

    @property
    def scheme(self) -> str:
        """sp or umup."""
        return self.variant.split("/")[0]

    @property
    def products(self) -> str:
        """A recipe, or a peer's name."""
        return self.variant.split("/")[1]

    @property
    def leader(self) -> "Trial":
        """The BF16 run that takes the common steps."""
        return replace(self, variant=f"{self.scheme}/bf16")


@dataclass(frozen=True)
class Session:
    """What the command line asked for."""

    size: str
    steps: int
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    source: tuple[str, ...]
    device: torch.device
    backend: str
    common: int = 0
    then: tuple[str, ...] = ()
    tune_steps: int | None = None
    umup_hparams: Mapping[str, float] = field(default_factory=dict)

    def hparams(self, trial: Trial) -> dict[str, float]:
        """The multipliers of a trial."""
        return dict(self.umup_hparams) if trial.scheme == "umup" else {}

    def body(self, trial: Trial) -> Row:
        """The run of a trial, as a config file would say it; peers start from BF16."""
        size, scales = SIZES[self.size], trial.variant.split("/")[2:]
        model = {name: value for name, value in asdict(size).items() if name in NETWORK_FIELDS}
        # u-muP's transfer asks for norms without gains; SP keeps its own.
        gains = {"norm_gain": False} if trial.scheme == "umup" else {}
        hparams = {"hparams": found} if (found := self.hparams(trial)) else {}
        recipe = "bf16" if trial.products in PEERS else trial.products
        return {
            "model": {"family": "llama", "vocab_size": 256, "max_seq_len": size.seq_len, **model, **gains},
            "parametrization": {"scheme": trial.scheme, **hparams},
            "optimizer": {"lr": trial.lr, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": trial.steps // 10, "final_factor": 0.1},
            "train": {"steps": trial.steps, "batch_size": size.batch_size, "seed": trial.seed},
            "precision": {"recipe": recipe, "scales": (scales or ["adapt"])[0]},
        }

    def config(self, trial: Trial) -> RunConfig:
        """The same with what makes no difference to the numbers: where the text lies, and the backend."""
        body = self.body(trial)
        data = {"source": list(self.source), "tokenizer": "bytes"}
        return parse_config({**body, "data": data, "precision": {**body["precision"], "backend": self.backend}})

    def key(self, trial: Trial, digest: str) -> str:
        """Equal for trials that would repeat one another."""
        identity = [trial.variant, self.body(trial), digest, *([trial.common] if trial.common else [])]
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def every_variant(self) -> tuple[str, ...]:
        """What is compiled, in the order of need."""
        schemes = dict.fromkeys(v.split("/")[0] for v in (*self.variants, *self.then))
        return tuple(dict.fromkeys((*(f"{s}/bf16" for s in schemes), *self.variants, *self.then)))

    def next(self, loss: Callable[[Trial], float | None]) -> Trial | None:
        """The first trial without a loss: learning rates, `variants` seed by seed, `then`; None when all are done."""
        tuned: dict[str, float] = {}
        for scheme in dict.fromkeys(variant.split("/")[0] for variant in self.every_variant()):
            trials = [self._tuning(scheme, lr) for lr in sorted(self.lrs[scheme])]
            trial = trials[0] if len(trials) == 1 else search(trials, loss)
            if loss(trial) is None and len(trials) > 1:
                return trial
            tuned[scheme] = trial.lr
        return next((trial for trial in self._wanted(tuned) if loss(trial) is None), None)

    def _tuning(self, scheme: str, lr: float) -> Trial:
        if self.tune_steps is not None:
            return Trial(f"{scheme}/bf16", lr, self.seeds[0], self.tune_steps)
        return Trial(f"{scheme}/bf16", lr, self.seeds[0], self.steps, self.common)

    def _wanted(self, tuned: Mapping[str, float]) -> Iterator[Trial]:
        for variants in (self.variants, self.then):
            for seed in self.seeds:
                for variant in variants:
                    yield Trial(variant, tuned[variant.split("/")[0]], seed, self.steps, self.common)


def search(trials: list[Trial], loss: Callable[[Trial], float | None]) -> Trial:
    """The best of trials in rising order of learning rate, or one that must run before it is known to be the best."""
    losses = [loss(trial) for trial in trials]
    if None in losses:
        return trials[losses.index(None)]
    best = min(zip(losses, trials, strict=True), key=lambda pair: pair[0] or 0.0)[1]
    if best == trials[-1]:
        return search([*trials, replace(best, lr=2 * best.lr)], loss)
    if best == trials[0]:
        return search([replace(best, lr=best.lr / 2), *trials], loss)
    return best
