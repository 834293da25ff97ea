"""A trained run as something to ask for text."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from umup.checkpoint import load_weights
from umup.config.sections import RunConfig
from umup.data.tokenizer import StreamDecoder, Tokenizer
from umup.errors import InputError
from umup.inference.generate import Sampling, generate
from umup.interop.source import open_source, tokenizer_of, watched
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


def load_run(path: str | Path, notice: Callable[[str], None] = lambda line: None) -> LoadedRun:
    """Whatever `interop.source` reads: a run's final weights, or its newest checkpoint; a Hugging Face directory.

    `notice` is told what a person should know of it. Raises CheckpointError, and what the reader raises.
    """
    source = open_source(path)
    for line in source.notes:
        notice(line)
    model = decoder(shape_of(source.config.model), source.plan, stream_of(source.config))
    load_weights(model, watched(source, notice), str(source.path))
    return LoadedRun(model, tokenizer_of(source), source.config, source.plan, source.step)


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many last characters might begin a stop text."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def completion_json(prompt: str, completion: Completion) -> str:
    """The one JSON document of `umup generate --json`."""
    return json.dumps({"prompt": prompt, **completion.__dict__}, ensure_ascii=False)
