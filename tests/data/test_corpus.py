"""Which files make a corpus, in which order, and how they are split."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umup.data.corpus import Corpus, Document, load_corpus
from umup.errors import DataError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / "b.txt").write_text("bee")
    (root / "a.txt").write_text("ay")
    (root / "sub" / "c.md").write_text("sea\r\n")
    return root


def names(corpus):
    return [document.name for document in corpus.documents]


def many(count):
    return Corpus(tuple(Document(f"{i:05}", Path(f"{i:05}"), 1, "0" * 64) for i in range(count)), 0)


def test_a_folder_is_read_recursively_in_name_order(folder):
    corpus = load_corpus(str(folder))
    assert names(corpus) == ["a.txt", "b.txt", "sub/c.md"]
    assert [d.text() for d in corpus.documents] == ["ay", "bee", "sea\r\n"]
    assert corpus.size == 10


def test_files_folders_and_globs_are_merged_without_duplicates(folder):
    sources = [str(folder / "b.txt"), str(folder / "*.txt"), str(folder / "sub"), str(folder / "sub" / ".." / "a.txt")]
    assert load_corpus(sources) == load_corpus(sources[::-1]) == load_corpus(str(folder))


def test_globs_may_be_relative_recursive_and_match_folders(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(load_corpus("**/*.md")) == ["c.md"]
    assert names(load_corpus("*")) == ["a.txt", "b.txt"]


def test_a_path_with_glob_characters_is_a_path_first(folder):
    (folder / "[x].txt").write_text("x")
    assert names(load_corpus(str(folder / "[x].txt"))) == ["[x].txt"]


def test_the_digest_follows_content_and_names_but_not_place(folder, tmp_path):
    before = load_corpus(str(folder)).digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert load_corpus(str(moved)).digest == before
    (moved / "a.txt").write_text("AY")
    changed = load_corpus(str(moved)).digest
    assert changed != before
    (moved / "a.txt").rename(moved / "aa.txt")
    assert load_corpus(str(moved)).digest not in (before, changed)


def test_binary_files_are_skipped_and_counted(folder):
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    corpus = load_corpus(str(folder))
    assert names(corpus) == ["a.txt", "b.txt", "sub/c.md"]
    assert corpus.skipped == 2


def test_a_document_that_changed_after_hashing_is_an_error(folder):
    document = load_corpus(str(folder)).documents[0]
    document.path.write_text("other")
    with pytest.raises(DataError, match=r"a.txt changed while"):
        document.text()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "data.val_source: no file or folder 'missing.txt'"),
        ("python-stdlb", "no file or folder 'python-stdlb'.*python-stdlib"),
        ("*.nothing", r"the glob '\*.nothing' matches no file"),
        ("binary", r"'binary' is an empty corpus \(1 binary and 0 empty files\)"),
        ("hollow", r"'hollow' is an empty corpus \(0 binary and 1 empty files\)"),
        ("void", r"'void' is an empty corpus \(0 binary and 0 empty files\)"),
        ([], r"\[\] is an empty corpus"),
    ],
)
def test_sources_that_give_no_text(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for name in ("binary", "hollow", "void"):
        (tmp_path / name).mkdir()
    (tmp_path / "binary" / "x").write_bytes(b"\0")
    (tmp_path / "hollow" / "x").write_bytes(b"")
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(source, "data.val_source")
    assert "\n" not in str(caught.value)


@given(st.integers(2, 40), st.integers(0, 400))
def test_every_kth_file_is_held_out(k, count):
    train, val = many(count).split(1 / k)
    held = [int(d.name) for d in val.documents] if val else []
    assert held == list(range(k - 1, count, k))
    assert sorted([int(d.name) for d in train.documents] + held) == list(range(count))
    assert (val is None) == (count < k)


@given(st.floats(0.001, 0.999), st.integers(1, 300))
def test_any_fraction_is_held_out_to_within_a_file_and_some_file_is_left(fraction, count):
    train, val = many(count).split(fraction)
    assert abs((len(val.documents) if val else 0) - count * fraction) < 1
    assert train.documents


def test_skipped_files_are_counted_once_after_a_split():
    train, val = Corpus(many(4).documents, 3).split(0.5)
    assert val is not None
    assert (train.skipped, val.skipped) == (3, 0)


def test_the_standard_library_is_the_same_in_every_process_and_holds_no_tests():
    corpus = load_corpus("python-stdlib")
    assert corpus.size > 1_000_000
    assert {"abc.py", "json/decoder.py"} <= set(names(corpus))
    assert names(corpus) == sorted(names(corpus))
    parts = {part for name in names(corpus) for part in name.split("/")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "turtledemo"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)
    code = "from umup.data.corpus import load_corpus; print(load_corpus('python-stdlib').digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert other.stdout.strip() == corpus.digest


def test_what_an_installer_adds_does_not_change_the_standard_library(tmp_path, monkeypatch):
    for name in (
        "abc.py",
        "test/t.py",
        "site-packages/p.py",
        "config-3.11-arm/c.py",
        "_sysconfigdata_x.py",
        "json/a.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert names(load_corpus("python-stdlib")) == ["abc.py", "json/a.py"]
