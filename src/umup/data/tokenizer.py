"""Text to ids and back: UTF-8 bytes, or any Hugging Face tokenizer.json.

A tokenizer is what its ids mean, so it carries a digest: token files record it, and two tokenizers of one name cannot
be mixed up. `separator` is the id that ends a document. Ids a model may emit beyond the vocabulary (its size is often
padded) decode to nothing.

Text is encoded without the tokens a template would add (BOS and the like). A special token that is spelled out in the
text becomes that token, which is the `tokenizers` package's rule. Not covered: training a tokenizer, chat templates,
SentencePiece's own model files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from umup.errors import DataError

TokenArray = npt.NDArray[np.unsignedinteger[Any]]

SEPARATORS = ("<|end_of_text|>", "<|endoftext|>", "</s>")
REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What `data.tokenizer` says."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included."""

    @property
    def digest(self) -> str:
        """SHA-256 of what defines the ids."""

    @property
    def separator(self) -> int | None:
        """The id that ends a document; None if there is none."""

    def encode(self, text: str) -> TokenArray:
        """Ids [tokens] of a text, without special tokens added."""

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        """The text of ids; incomplete characters become U+FFFD."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids are UTF-8 bytes; 0 ends a document, since text holds no NUL."""

    name: str = "bytes"
    vocab_size: int = 256
    digest: str = sha256(b"utf-8 bytes, separator 0").hexdigest()
    separator: int | None = 0

    def encode(self, text: str) -> TokenArray:
        """Bytes [tokens] as uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        """The text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i < self.vocab_size).decode(errors="replace")


def byte_tokenizer_json() -> str:
    """`ByteTokenizer` as a Hugging Face tokenizer.json, for programs that want one: the same ids of every text.

    Its model is BPE without merges over the 256 letters that stand for bytes there (GPT-2's: bytes that print as
    themselves in Latin-1, the others from U+0100 on). The separator is no special token in it, as its letter may occur.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    body: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": None,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }
    return json.dumps(body, ensure_ascii=False, indent=1)


class HuggingFaceTokenizer:
    """A tokenizer.json, or a folder that holds one, read by the `tokenizers` package.

    Truncation and padding that the file asks for are switched off.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Backend

        file = tokenizer_file(path)
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"data.tokenizer: cannot read {str(file)!r}: {error.strerror}; "
                "write bytes, or the path of a Hugging Face tokenizer.json"
            ) from error
        try:
            self._backend = Backend.from_buffer(raw)
        except Exception as error:  # the package raises nothing narrower
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"data.tokenizer: {str(file)!r} is not a Hugging Face tokenizer.json ({reason}); "
                "write bytes, or the path of one"
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = path
        self.digest = sha256(raw).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.separator = next((vocabulary[token] for token in SEPARATORS if token in vocabulary), None)

    def encode(self, text: str) -> TokenArray:
        """Ids [tokens] as uint32."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        """The text of the ids, special tokens left out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that a path names: the file itself, or the one in that folder."""
    file = Path(path).expanduser()
    return file / "tokenizer.json" if file.is_dir() else file


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json or of a folder that holds one."""
    return ByteTokenizer() if name_or_path == "bytes" else HuggingFaceTokenizer(name_or_path)


@dataclass
class StreamDecoder:
    """Ids to text one at a time, never half a character.

    All ids so far are decoded and only what is new is returned, because an id alone does not know its leading space. A
    tail of U+FFFD may be an unfinished character and waits. The cost is quadratic in the length, small against a model.
    """

    tokenizer: Tokenizer
    _ids: list[int] = field(default_factory=list, init=False)
    _sent: int = field(default=0, init=False)

    def push(self, token: int) -> str:
        """The text that this id completes, often none."""
        self._ids.append(token)
        return self._advance(self.tokenizer.decode(self._ids).rstrip(REPLACEMENT))

    def finish(self) -> str:
        """The text still held back, an unfinished character as U+FFFD."""
        return self._advance(self.tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        # A byte-fallback decoder turns a whole run of bytes into U+FFFD while its last character is unfinished, so the
        # text can shrink for a while; what was sent stays sent.
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new
