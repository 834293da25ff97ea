"""From a data section to train and validation tokens: tokenized once into a cache, then memory-mapped.

Cached files are named by a digest of what is in them (documents, tokenizer, separator): a changed corpus makes a new
file, and a file that exists is complete, because it is written beside its place and then moved there. Processes that
start together may each do the work; they write the same bytes. Every document ends with the tokenizer's separator.

A source that is a `.bin` is used where it lies. Validation is val_source where there is one, else held-out files, else
the end of the token stream.

Not covered: shards (one `.bin` is one source), cleaning the cache, and ids beyond the first million tokens of a foreign
file, which are not checked against the vocabulary.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from umup.config.sections import DataConfig
from umup.data.corpus import Corpus, load_corpus
from umup.data.token_file import DTYPES, Sidecar, TokenSlice, open_tokens, read_sidecar, sidecar_path
from umup.data.tokenizer import Tokenizer, load_tokenizer
from umup.errors import DataError

Progress = Callable[[int, int], None]

SAMPLED_TOKENS = 1_000_000


@dataclass(frozen=True)
class TokenFiles:
    """Prepared data; `tokenizer` is None where a given .bin holds ids that data.tokenizer does not know.

    `record` is JSON for the run directory: what was read, by which digest, and how it was split.
    """

    train: TokenSlice
    val: TokenSlice
    tokenizer: Tokenizer | None
    record: dict[str, Any]


def prepare(config: DataConfig, model_vocab_size: int, min_tokens: int, progress: Progress | None = None) -> TokenFiles:
    """Train and validation tokens of a data section, tokenized into the cache where they are not there yet.

    `min_tokens` is what one batch needs of each; `progress(done, total)` is called with bytes of text while tokenizing.
    DataError if a source is unusable or too short, the cache cannot be written, or ids do not fit `model_vocab_size`.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    split, source, val_source = _sources(config)
    sources = [part for part in (source, val_source) if part is not None]
    corpora = [part for part in sources if isinstance(part, Corpus)]
    if corpora:
        _check_vocab(f"tokenizer {tokenizer.name}", tokenizer.vocab_size, model_vocab_size)
    cache = _Cache(_cache_dir(config.cache_dir), tokenizer)
    cache.fill(corpora, progress)
    slices = [_whole(part if isinstance(part, Path) else cache.path(part)) for part in sources]
    train, val = slices if len(slices) == 2 else _cut(slices[0], config.val_fraction)
    _check_lengths(train, val, min_tokens, split)
    given = [part for part, origin in ((train, source), (val, val_source or source)) if isinstance(origin, Path)]
    known = max([_check_given(part, tokenizer, model_vocab_size) for part in given], default=0) <= tokenizer.vocab_size
    made_by = {"name": tokenizer.name, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    record = {
        "source": config.source,
        "val_source": config.val_source,
        "split": split,
        "tokenizer": made_by if known else None,
        "skipped_files": sum(corpus.skipped for corpus in corpora),
        "train": _record(train),
        "val": _record(val),
    }
    return TokenFiles(train, val, tokenizer if known else None, record)


@dataclass(frozen=True)
class _Cache:
    folder: Path
    tokenizer: Tokenizer

    def path(self, corpus: Corpus) -> Path:
        content = (corpus.digest, self.tokenizer.digest, self.tokenizer.separator, self.tokenizer.vocab_size)
        return self.folder / f"tokens-{sha256(repr(content).encode()).hexdigest()[:24]}.bin"

    def fill(self, corpora: list[Corpus], progress: Progress | None) -> None:
        """Tokenizes every corpus that has no file yet."""
        try:
            missing = [c for c in corpora if not (self.path(c).exists() and sidecar_path(self.path(c)).exists())]
            tick = _ticker(sum(corpus.size for corpus in missing), progress)
            for corpus in missing:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write(self.path(corpus), corpus, tick)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: cannot write to {str(self.folder)!r}: {error.strerror}; "
                "write data.cache_dir: a folder with room that you may write to"
            ) from error

    def _write(self, path: Path, corpus: Corpus, tick: Callable[[int], None]) -> None:
        tokenizer = self.tokenizer
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        with _replacing(path) as temporary:
            with temporary.open("xb") as file:
                count = _tokenize(corpus, tokenizer, DTYPES[dtype], file, tick)
            names = [document.name for document in corpus.documents]
            sidecar = Sidecar(
                dtype, count, tokenizer.name, tokenizer.digest, tokenizer.vocab_size, corpus.digest, names
            )
            with _replacing(sidecar_path(path)) as note:  # moved first, so that a .bin is never alone
                note.write_text(json.dumps(asdict(sidecar), indent=1))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block succeeds."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _ticker(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return tick


def _tokenize(
    corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype[Any], file: BinaryIO, tick: Callable[[int], None]
) -> int:
    """Writes every document and the separator that ends it; returns the number of tokens."""
    end = np.array([] if tokenizer.separator is None else [tokenizer.separator], dtype)
    count = 0
    for document in corpus.documents:
        ids = np.concatenate([tokenizer.encode(document.text()).astype(dtype), end])
        file.write(ids.tobytes())
        count += len(ids)
        tick(document.size)
    file.flush()
    os.fsync(file.fileno())
    return count


def _cache_dir(configured: str | None) -> Path:
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "umup"


def _sources(config: DataConfig) -> tuple[str, Path | Corpus, Path | Corpus | None]:
    """How the data is split, and what to read; without a second source the split is in the token stream."""
    source = _source(config.source, "data.source")
    if config.val_source is not None:
        return "val_source", source, _source(config.val_source, "data.val_source")
    if isinstance(source, Corpus):
        train, val = source.split(config.val_fraction)
        return ("files" if val else "stream"), train, val
    return "stream", source, None


def _source(source: str | list[str], key: str) -> Path | Corpus:
    entries = [source] if isinstance(source, str) else source
    if not any(entry.endswith(".bin") for entry in entries):
        return load_corpus(source, key)
    if len(entries) > 1:
        raise DataError(
            f"{key}: a .bin token file stands alone, here are {len(entries)} sources; write one .bin, or text"
        )
    return Path(entries[0]).expanduser()


def _whole(path: Path) -> TokenSlice:
    return TokenSlice(path, 0, len(open_tokens(path)))


def _cut(whole: TokenSlice, val_fraction: float) -> tuple[TokenSlice, TokenSlice]:
    cut = whole.stop - round(len(whole) * val_fraction)
    return TokenSlice(whole.path, 0, cut), TokenSlice(whole.path, cut, whole.stop)


def _check_lengths(train: TokenSlice, val: TokenSlice, min_tokens: int, split: str) -> None:
    for part, name, key, change in (
        (train, "training", "data.source", "smaller"),
        (val, "validation", "data.val_source", "larger"),
    ):
        advice = f"a longer {key}" if split == "val_source" else f"a longer data.source, a {change} data.val_fraction"
        if len(part) < min_tokens:
            raise DataError(
                f"data: the {name} part has {len(part)} tokens and one batch needs {min_tokens}; "
                f"write {advice}, or a smaller train.batch_size or model.max_seq_len"
            )


def _check_given(part: TokenSlice, tokenizer: Tokenizer, model_vocab_size: int) -> int:
    """How many ids a file of the user's knows, as far as it tells; DataError if that is too many."""
    sidecar = read_sidecar(part.path)
    if sidecar is not None and sidecar.tokenizer_digest != tokenizer.digest:
        raise DataError(
            f"token file {str(part.path)!r} was made by tokenizer {sidecar.tokenizer!r} and data.tokenizer is "
            f"{tokenizer.name!r}; write data.tokenizer: {sidecar.tokenizer}"
        )
    ids = int(part.load()[:SAMPLED_TOKENS].max()) + 1 if sidecar is None else sidecar.vocab_size
    _check_vocab(f"token file {str(part.path)!r}", ids, model_vocab_size)
    return ids


def _check_vocab(owner: str, ids: int, model_vocab_size: int) -> None:
    if ids > model_vocab_size:
        raise DataError(f"{owner} has {ids} ids, model.vocab_size is {model_vocab_size}; write model.vocab_size: {ids}")


def _record(part: TokenSlice) -> dict[str, Any]:
    sidecar = read_sidecar(part.path)
    if sidecar is None:
        ids = part.load()
        sample = np.concatenate([ids[:SAMPLED_TOKENS], ids[-SAMPLED_TOKENS:]])
        known: dict[str, Any] = {"sampled_sha256": sha256(sample.tobytes()).hexdigest()}
    else:
        known = {"sha256": sidecar.sha256, "documents": sidecar.documents}
    return {"path": str(part.path), "start": part.start, "stop": part.stop, "tokens": len(part), **known}
