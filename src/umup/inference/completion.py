"""A trained run as something to ask for text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from umup.checkpoint import load_latest, load_model, load_weights
from umup.config.load import load_config
from umup.config.sections import RunConfig
from umup.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from umup.errors import CheckpointError, InputError
from umup.inference.generate import Sampling, generate
from umup.models.build import decoder, stream_of
from umup.models.decoder import Decoder
from umup.models.specs import shape_of
from umup.rules.plan import Plan


@dataclass(frozen=True)
class Completion:
    """`finish_reason` is "length" (max_tokens), "stop" (a stop text or the end-of-text token) or "context"."""

    text: str
    tokens: list[int]
    finish_reason: str


@dataclass(frozen=True)
class LoadedRun:
    """A run's model under the plan it was trained with, its tokenizer and config."""

    model: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    plan: Plan
    step: int | None

    def stream(
        self, prompt: str, max_tokens: int, sampling: Sampling, stop: tuple[str, ...] = ()
    ) -> Iterator[str | Completion]:
        """Pieces of text as they are complete, then the Completion; the prompt is not repeated.

        Stop texts are cut off. Raises InputError for an empty prompt or one longer than the context.
        """
        context = self.config.model.max_seq_len
        try:
            ids = [int(i) for i in self.tokenizer.encode(prompt)]
        except UnicodeEncodeError:
            raise InputError("the prompt is not valid text (UTF-8); write it again") from None
        decode, text, sent, tokens = StreamDecoder(self.tokenizer), "", 0, []
        reason = "context"
        for token, _ in islice(generate(self.model, ids, context, sampling), max_tokens):
            if token == self.tokenizer.separator:
                reason = "stop"
                break
            tokens.append(token)
            text += decode.push(token)
            found = [at for s in stop if (at := text.find(s)) >= 0]
            if found:
                text, reason = text[: min(found)], "stop"
                break
            ready = len(text) - _held_back(text, stop)
            if ready > sent:
                yield text[sent:ready]
                sent = ready
        else:
            text += decode.finish()
            reason = "length" if len(tokens) == max_tokens else reason
        if len(text) > sent:
            yield text[sent:]
        yield Completion(text, tokens, reason)

    def complete(self, prompt: str, max_tokens: int, sampling: Sampling, stop: tuple[str, ...] = ()) -> Completion:
        """The finished completion of a prompt."""
        *_, last = self.stream(prompt, max_tokens, sampling, stop)
        assert isinstance(last, Completion)
        return last


def load_run(path: str | Path) -> LoadedRun:
    """A run directory's final weights, or its newest checkpoint if it has not finished. Raises CheckpointError."""
    run = Path(path)
    if not (run / "config.yaml").is_file() or not (run / "plan.json").is_file():
        raise CheckpointError(
            f"{run} is no run directory (no config.yaml and plan.json); write the --out of a training"
        )
    config = load_config(run / "config.yaml")
    plan = Plan.from_json((run / "plan.json").read_text())
    step = None
    if (run / "model.safetensors").exists():
        weights = load_model(run / "model.safetensors")
    else:
        state, _ = load_latest(run)
        if state is None:
            raise CheckpointError(f"run {run} has no weights yet; train it first")
        weights, step = state.model, state.step
    model = decoder(shape_of(config.model), plan, stream_of(config))
    load_weights(model, weights.items(), f"run {run}")
    return LoadedRun(model, _tokenizer(run, config), config, plan, step)


def _tokenizer(run: Path, config: RunConfig) -> Tokenizer:
    own = run / "tokenizer.json"
    if own.exists():
        return load_tokenizer(str(own))
    try:
        known = json.loads((run / "data.json").read_text())["tokenizer"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{run / 'data.json'} is missing or damaged; train the run again") from None
    if not known:
        raise CheckpointError(f"run {run} was trained on ids of an unknown tokenizer; copy its tokenizer.json there")
    return load_tokenizer(config.data.tokenizer)


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many last characters might begin a stop text."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def completion_json(prompt: str, completion: Completion) -> str:
    """The one JSON document of `umup generate --json`."""
    return json.dumps({"prompt": prompt, **completion.__dict__}, ensure_ascii=False)
