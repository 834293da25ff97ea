"""Token files: formats, the cache, the split, and every error on the way."""

import json
import os
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from umup.config.sections import DataConfig
from umup.data.token_file import TokenSlice, open_tokens, read_sidecar
from umup.data.tokenizer import ByteTokenizer
from umup.data.tokens import prepare
from umup.errors import DataError


@pytest.fixture
def texts(tmp_path):
    """Ten files of ten bytes, each of one letter."""
    root = tmp_path / "texts"
    root.mkdir()
    for letter in "abcdefghij":
        (root / f"{letter}.txt").write_text(letter * 10)
    return root


@pytest.fixture
def config(texts, tmp_path):
    return DataConfig(source=str(texts), val_fraction=0.2, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def words(tmp_path):
    """A word-level tokenizer.json with no separator and a vocabulary of the wanted size."""

    def save(size):
        vocabulary = {"the": 0, "cat": size - 1, "[UNK]": 1}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.save(str(tmp_path / f"words-{size}.json"))
        return str(tmp_path / f"words-{size}.json")

    return save


def write_bin(path, ids, dtype="<u2", header=b""):
    path.write_bytes(header + np.array(ids, dtype).tobytes())
    return path


def llmc_header(magic, version, count):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes()


def text_of(part):
    return bytes(part.load().tolist()).decode()


def with_(config, **changes):
    return config.model_copy(update=changes)


def test_nanogpt_files_are_uint16(tmp_path):
    ids = open_tokens(write_bin(tmp_path / "x.bin", [1, 2, 50256]))
    assert isinstance(ids, np.memmap)
    assert ids.tolist() == [1, 2, 50256]
    assert not ids.flags.writeable


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "ids"), [(20240520, 1, "<u2", [7, 50256]), (20240801, 7, "<u4", [7, 128000, 1])]
)
def test_llmc_files_are_recognised(tmp_path, magic, version, dtype, ids):
    path = write_bin(tmp_path / "x.bin", ids, dtype, llmc_header(magic, version, len(ids)))
    assert open_tokens(path).tolist() == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tokens"),
        (b"abc", "has 3 bytes where 1 tokens of uint16 take 2"),
        (llmc_header(20240520, 1, 0), "holds no tokens"),
        (llmc_header(20240520, 1, 3) + b"1234", "has 1028 bytes where 3 tokens of uint16 take 1030"),
        (llmc_header(20240520, 1, 3)[:512], "has 512 bytes"),
        (llmc_header(20240520, 2, 3), "magic 20240520 with version 2; known: 20240520 with 1, 20240801 with 7"),
    ],
)
def test_files_that_are_cut_off_or_unknown(tmp_path, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_tokens(tmp_path / "x.bin")
    assert "x.bin" in str(caught.value)


@pytest.mark.parametrize("make_folder", [False, True])
def test_a_token_file_that_is_not_a_file(tmp_path, make_folder):
    if make_folder:
        (tmp_path / "x.bin").mkdir()
    with pytest.raises(DataError, match=r"cannot read token file .*x.bin'"):
        open_tokens(tmp_path / "x.bin")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"dtype": "int8"}'])
def test_a_bad_sidecar_is_named(tmp_path, content):
    write_bin(tmp_path / "x.bin", [1])
    (tmp_path / "x.bin.json").write_text(content)
    with pytest.raises(DataError, match=r"x.bin.json' is not the sidecar"):
        open_tokens(tmp_path / "x.bin")


def test_files_are_held_out_and_documents_end_with_the_separator(config):
    files = prepare(config, 256, 1)
    assert text_of(files.val) == "e" * 10 + "\0" + "j" * 10 + "\0"
    assert text_of(files.train) == "".join(c * 10 + "\0" for c in "abcdfghi")
    assert files.tokenizer == ByteTokenizer()
    assert files.record["split"] == "files"
    assert files.record["val"]["documents"] == ["e.txt", "j.txt"]
    assert (files.record["train"]["tokens"], files.record["val"]["tokens"]) == (88, 22)
    assert json.loads(json.dumps(files.record)) == files.record


def test_few_files_are_split_in_the_stream(config, texts):
    files = prepare(with_(config, source=[str(texts / "a.txt"), str(texts / "b.txt")], val_fraction=0.25), 256, 1)
    assert files.record["split"] == "stream"
    assert text_of(files.train) == "a" * 10 + "\0" + "b" * 5
    assert text_of(files.val) == "b" * 5 + "\0"


def test_a_val_source_leaves_the_source_whole(config, texts):
    files = prepare(with_(config, source=str(texts / "a.txt"), val_source=str(texts / "b.txt")), 256, 1)
    assert (text_of(files.train), text_of(files.val)) == ("a" * 10 + "\0", "b" * 10 + "\0")
    assert files.record["split"] == "val_source"


def test_skipped_files_are_recorded_once(config, texts):
    (texts / "z.bmp").write_bytes(b"\0")
    assert prepare(config, 256, 1).record["skipped_files"] == 1


@pytest.mark.parametrize(("size", "dtype"), [(300, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_dtype_holds_the_vocabulary_and_a_sidecar_says_so(config, texts, words, size, dtype):
    (texts / "a.txt").write_text("the cat the dog")
    path = words(size)
    files = prepare(with_(config, source=str(texts / "a.txt"), tokenizer=path, val_fraction=0.5), size, 1)
    assert files.train.load().tolist() + files.val.load().tolist() == [0, size - 1, 0, 1]
    assert files.train.load().dtype == dtype
    sidecar = read_sidecar(files.train.path)
    assert sidecar is not None
    assert files.tokenizer is not None
    assert (sidecar.dtype, sidecar.tokens, sidecar.vocab_size, sidecar.tokenizer) == (dtype, 4, size, path)
    assert (sidecar.documents, sidecar.tokenizer_digest) == (["a.txt"], files.tokenizer.digest)
    assert sidecar.sha256 == files.record["train"]["sha256"]


def test_a_finished_cache_is_reused_without_tokenizing(config, tmp_path):
    calls = []
    first = prepare(config, 256, 1, lambda done, total: calls.append((done, total)))
    assert calls == [(10 * i, 100) for i in range(1, 11)]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sorted(path.suffix for path in stamps) == [".bin", ".bin", ".json", ".json"]
    second = prepare(config, 256, 1, lambda *_: pytest.fail("tokenized again"))
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == stamps


def test_a_changed_corpus_or_tokenizer_makes_a_new_file(config, texts, words):
    def paths(given):
        files = prepare(given, 1000, 1)
        return {files.train.path, files.val.path}

    before = paths(config)
    assert not before & paths(with_(config, tokenizer=words(300)))
    assert not before & paths(with_(config, val_fraction=0.5))
    (texts / "a.txt").write_text("A" * 10)
    assert len(before & paths(config)) == 1  # the training file is new, the validation file is not


def test_a_lost_sidecar_is_written_again(config):
    files = prepare(config, 256, 1)
    before = files.train.path.read_bytes()
    files.train.path.with_name(files.train.path.name + ".json").unlink()
    prepare(config, 256, 1)
    assert read_sidecar(files.train.path) is not None
    assert files.train.path.read_bytes() == before


def test_an_interrupted_write_leaves_nothing_behind(config, tmp_path, monkeypatch):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, 256, 1, stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare(config, 256, 1).train) == 88


def test_writers_that_start_together_agree(config):
    """Every writer waits in its first document until all have started."""
    barrier, found = threading.Barrier(4, timeout=10), []

    def work():
        def meet(done, total):
            if done == 10:
                barrier.wait()

        found.append(prepare(config, 256, 1, meet))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(files == found[0] for files in found)
    assert len(list(found[0].train.path.parent.iterdir())) == 4


@pytest.mark.parametrize("xdg", [True, False])
def test_the_default_cache_follows_xdg(config, tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
    expected = tmp_path / "xdg" / "umup" if xdg else tmp_path / "home" / ".cache" / "umup"
    assert prepare(with_(config, cache_dir=None), 256, 1).train.path.parent == expected


def test_a_cache_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data.cache_dir: cannot write to '.*file/cache'.*write data.cache_dir"):
        prepare(with_(config, cache_dir=str(tmp_path / "file" / "cache")), 256, 1)


def test_a_full_disk_is_named_and_leaves_nothing(config, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"data.cache_dir: .*No space left"):
        prepare(config, 256, 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bin_is_used_where_it_lies(config, tmp_path):
    path = write_bin(tmp_path / "x.bin", range(100))
    files = prepare(with_(config, source=str(path)), 100, 1)
    assert (files.train, files.val) == (TokenSlice(path, 0, 80), TokenSlice(path, 80, 100))
    assert files.val.load().tolist() == list(range(80, 100))
    assert files.tokenizer == ByteTokenizer()
    assert not (tmp_path / "cache").exists()


def test_a_bin_may_have_a_val_source(config, tmp_path):
    train, val = write_bin(tmp_path / "x.bin", range(50)), write_bin(tmp_path / "y.bin", range(9))
    files = prepare(with_(config, source=[str(train)], val_source=str(val)), 256, 1)
    assert (len(files.train), len(files.val)) == (50, 9)


def test_ids_beyond_the_tokenizer_leave_it_unknown(config, tmp_path):
    path = write_bin(tmp_path / "x.bin", [50256] * 10)
    files = prepare(with_(config, source=str(path)), 50304, 1)
    assert files.tokenizer is None
    assert files.record["tokenizer"] is None


def test_a_cached_bin_is_a_source_for_its_own_tokenizer_only(config, words):
    made = prepare(config, 256, 1)
    again = with_(config, source=str(made.train.path))
    assert len(prepare(again, 256, 1).train) == 70
    with pytest.raises(DataError, match=r"was made by tokenizer 'bytes'.*write data.tokenizer: bytes"):
        prepare(with_(again, tokenizer=words(300)), 300, 1)


def test_bins_stand_alone(config, texts, tmp_path):
    path = write_bin(tmp_path / "x.bin", range(50))
    with pytest.raises(DataError, match=r"data.val_source: a .bin token file stands alone, here are 2 sources"):
        prepare(with_(config, val_source=[str(path), str(texts)]), 256, 1)


def test_a_missing_bin_is_named(config, tmp_path):
    with pytest.raises(DataError, match=r"cannot read token file '.*no.bin'"):
        prepare(with_(config, source=str(tmp_path / "no.bin")), 256, 1)


def test_the_tokenizer_must_fit_the_model_and_is_checked_before_the_work(config, tmp_path):
    with pytest.raises(
        DataError, match=r"tokenizer bytes has 256 ids, model.vocab_size is 100; write model.vocab_size"
    ):
        prepare(config, 100, 1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("tail", "wanted"), [(89, 90), (300, 301)])
def test_the_ids_of_a_bin_must_fit_the_model_in_both_parts(config, tmp_path, tail, wanted):
    path = write_bin(tmp_path / "x.bin", [*range(80), *[tail] * 20])
    with pytest.raises(DataError, match=f"x.bin' has {wanted} ids, model.vocab_size is 89; write .*: {wanted}"):
        prepare(with_(config, source=str(path)), 89, 1)


@pytest.mark.parametrize(
    ("changes", "needed", "message"),
    [
        ({}, 89, "the training part has 88 tokens and one batch needs 89; write a longer data.source, a smaller"),
        ({}, 23, "the validation part has 22 tokens and one batch needs 23; write a longer data.source, a larger"),
        (
            {"val_source": "b.txt"},
            12,
            "the validation part has 11 tokens .* write a longer data.val_source, or a smaller",
        ),
    ],
)
def test_too_few_tokens_for_a_batch(config, texts, monkeypatch, changes, needed, message):
    monkeypatch.chdir(texts)
    with pytest.raises(DataError, match=message):
        prepare(with_(config, **changes), 256, needed)


def test_exactly_a_batch_is_enough(config):
    assert len(prepare(config, 256, 22).val) == 22
