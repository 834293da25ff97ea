"""The token file: raw little-endian ids in a `.bin`, as nanoGPT and llm.c write them, read as a memory map.

The format is nanoGPT's: uint16, or uint32 where the vocabulary is larger than 65536. What the bytes cannot say is in a
JSON sidecar, `NAME.bin.json`, which files of ours have. A `.bin` without one is read as llm.c's where it starts with
its header (256 int32: magic, version, token count, zeros), and as nanoGPT's uint16 otherwise.

Not covered: foreign files of headerless uint32, which nothing tells from uint16; write a sidecar for them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umup.data.tokenizer import TokenArray
from umup.errors import DataError

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}


@dataclass(frozen=True)
class TokenSlice:
    """Tokens start..stop of a token file."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def load(self) -> TokenArray:
        """The ids [stop - start], as a view of the memory map."""
        return open_tokens(self.path)[self.start : self.stop]


@dataclass(frozen=True)
class Sidecar:
    """What `NAME.bin.json` holds: `sha256` is the corpus's digest, `documents` its files' relative names."""

    dtype: str
    tokens: int
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    sha256: str
    documents: list[str]


def open_tokens(path: Path) -> TokenArray:
    """The ids [tokens] of a token file, as a read-only np.memmap; DataError if it is missing, cut off or empty."""
    try:
        dtype, offset, count = _layout(path)
        size = path.stat().st_size
        expected = offset + count * dtype.itemsize
        if size != expected:
            raise DataError(
                f"token file {str(path)!r} has {size} bytes where {count} tokens of {dtype} take {expected}; "
                "it is cut off or of another format: write it again"
            )
        if not count:
            raise DataError(f"token file {str(path)!r} holds no tokens; write the path of one that does")
        ids: TokenArray = np.memmap(path, dtype, "r", offset, (count,))
    except OSError as error:
        raise DataError(
            f"cannot read token file {str(path)!r}: {error.strerror}; write the path of an existing .bin"
        ) from error
    return ids


def read_sidecar(path: Path) -> Sidecar | None:
    """What is known of a token file; None where nobody wrote a sidecar."""
    file = sidecar_path(path)
    if not file.exists():
        return None
    try:
        sidecar = Sidecar(**json.loads(file.read_bytes()))
        DTYPES[sidecar.dtype]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{str(file)!r} is not the sidecar of a token file ({error}); delete it") from error
    return sidecar


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a token file lies."""
    return path.with_name(path.name + ".json")


def _layout(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, first byte and number of the tokens that the file claims to hold."""
    sidecar = read_sidecar(path)
    if sidecar is not None:
        return DTYPES[sidecar.dtype], 0, sidecar.tokens
    with path.open("rb") as file:
        start = file.read(12)
    magic, version, count = np.frombuffer(start, "<i4").tolist() if len(start) == 12 else (0, 0, 0)
    if magic not in {known for known, _ in LLMC_DTYPES}:
        return DTYPES["uint16"], 0, path.stat().st_size // 2
    if (magic, version) not in LLMC_DTYPES:
        raise DataError(
            f"token file {str(path)!r} has llm.c's magic {magic} with version {version}; "
            f"known: {', '.join(f'{m} with {v}' for m, v in LLMC_DTYPES)}"
        )
    return DTYPES[LLMC_DTYPES[magic, version]], LLMC_HEADER_BYTES, count
