"""A corpus: an ordered list of text files, split by file into train and validation.

Order, names and split must not depend on the machine, or two runs of one config would see different data. So files are
sorted by their name relative to the folder that all of them share, every document carries its SHA-256, and which files
are held out follows from the order alone. Bytes are taken as they are: no newline is translated, no BOM removed.

`python-stdlib` is the text every machine has: the standard library of the running Python, about 10 MB. Tests, GUIs,
bundled wheels and the files an installer generates are left out, so installs of one Python version agree. A
distribution that splits the library (Debian's python3-tk, say) has fewer files; the digest then tells.

Not covered: documents within a file (one file is one document), compressed files, JSON lines, downloads, and files
larger than memory. Folders are read with their hidden files; symbolic links to folders inside them are not followed.
"""

import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from hashlib import sha256
from itertools import pairwise
from math import floor
from pathlib import Path

from umup.errors import DataError

STDLIB = "python-stdlib"

# Any part of the path below the standard library that matches one of these leaves the file out.
STDLIB_EXCLUDED = (
    *("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"),
    *("site-packages", "dist-packages", "__pycache__"),
    *("config-*", "_sysconfigdata*", "sitecustomize.py", "usercustomize.py", "_distutils_system_mod.py"),
)


@dataclass(frozen=True)
class Document:
    """One text file: `name` is relative to the corpus, `size` is in bytes."""

    name: str
    path: Path
    size: int
    sha256: str

    def text(self) -> str:
        """The text that was hashed; DataError if the file has changed since."""
        raw = _read(self.path)
        if sha256(raw).hexdigest() != self.sha256:
            raise DataError(f"{self.path} changed while the corpus was read; start again when nothing writes to it")
        return raw.decode()


@dataclass(frozen=True)
class Corpus:
    """Documents in order; `skipped` counts the binary files that were left out."""

    documents: tuple[Document, ...]
    skipped: int

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(document.size for document in self.documents)

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and contents, in order."""
        lines = (f"{d.sha256} {d.size} {d.name}\n" for d in self.documents)
        return sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def split(self, val_fraction: float) -> tuple["Corpus", "Corpus | None"]:
        """Train and validation by file: of every 1/val_fraction files the last is held out.

        Validation is None where that would hold out no file; the caller then splits the token stream.
        """
        marks = [floor(i * val_fraction + 1e-9) for i in range(len(self.documents) + 1)]
        held = [after > before for before, after in pairwise(marks)]
        train = tuple(d for d, out in zip(self.documents, held, strict=True) if not out)
        val = tuple(d for d, out in zip(self.documents, held, strict=True) if out)
        return replace(self, documents=train), Corpus(val, 0) if val else None


def load_corpus(source: str | Sequence[str], key: str = "data.source") -> Corpus:
    """The corpus of `python-stdlib`, of files, folders and globs, or of a list of these; DataErrors name `key`."""
    entries = [source] if isinstance(source, str) else source
    files = {path.parent.resolve() / path.name for entry in entries for path in _expand(entry, key)}
    root = Path(os.path.commonpath([path.parent for path in files])) if files else Path()
    documents, skipped = [], 0
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        raw = _read(path)
        if _is_text(raw):
            documents.append(Document(name, path, len(raw), sha256(raw).hexdigest()))
        else:
            skipped += 1
    if not any(document.size for document in documents):
        raise DataError(
            f"{key}: {source!r} is an empty corpus ({skipped} binary and {len(documents)} empty files); "
            f"write files of UTF-8 text, or {STDLIB}"
        )
    return Corpus(tuple(documents), skipped)


def _expand(entry: str, key: str) -> Iterable[Path]:
    if entry == STDLIB:
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return [p for p in path.rglob("*") if p.is_file()]
    if not any(character in entry for character in "*?["):
        raise DataError(f"{key}: no file or folder {entry!r}; write an existing path, a glob, or {STDLIB}")
    found = [p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file()]
    if not found:
        raise DataError(f"{key}: the glob {entry!r} matches no file; write one that does, or {STDLIB}")
    return found


def _stdlib_files(root: Path) -> list[Path]:
    def excluded(path: Path) -> bool:
        return any(fnmatch(part, pattern) for part in path.relative_to(root).parts for pattern in STDLIB_EXCLUDED)

    return [path for path in root.rglob("*.py") if path.is_file() and not excluded(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable or leave it out") from error


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in raw
