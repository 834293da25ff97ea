"""Text to ids and back, whole and as a stream."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from umup.data.tokenizer import ByteTokenizer, StreamDecoder, load_tokenizer
from umup.errors import DataError

TEXT = "the cat — 猫 — sat 🐈 on the mat"


def byte_level():
    """Every byte is a token, as in GPT-2's vocabulary before its merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback():
    """Llama's kind: a few pieces, else <0xNN>, and a leading space that decoding strips."""
    pieces = ["<unk>", "▁", "t", "h", "e", "c", "a", "s", "o", "n", "m", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {p: i for i, p in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


@pytest.fixture
def saved(tmp_path):
    def save(backend, name="tokenizer.json"):
        backend.save(str(tmp_path / name))
        return str(tmp_path / name)

    return save


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_bytes_are_what_the_table_says():
    tokenizer = ByteTokenizer()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator) == ("bytes", 256, 0)
    assert tokenizer.decode([0xE2, 0x82, 65]) == "\ufffdA"
    assert tokenizer.decode(np.array([65, 256, 50256, 66], np.uint16)) == "AB"


def test_a_hugging_face_file_round_trips_and_counts_added_tokens(saved):
    backend = byte_level()
    backend.add_special_tokens(["</s>", "<|endoftext|>"])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 256)])
    path = saved(backend)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint32
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator) == (path, 258, 257)
    assert tokenizer.decode([257, *ids, 256]) == TEXT


def test_the_vocabulary_reaches_to_the_largest_id(saved):
    tokenizer = load_tokenizer(saved(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))))
    assert tokenizer.vocab_size == 10
    assert tokenizer.separator is None


def test_truncation_and_padding_are_off(saved):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert len(load_tokenizer(saved(backend)).encode("abcdefgh")) == 8


def test_the_digest_is_of_the_content_and_a_folder_will_do(saved, tmp_path):
    first, copy = saved(byte_level()), saved(byte_level(), "copy.json")
    assert load_tokenizer(first).digest == load_tokenizer(copy).digest == load_tokenizer(str(tmp_path)).digest
    assert load_tokenizer(saved(byte_fallback(), "other.json")).digest != load_tokenizer(first).digest


@pytest.mark.parametrize("content", [None, "", "not json", json.dumps({"vocab": {}})])
def test_a_bad_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "tok.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"data.tokenizer: .*tok.json'.*; write bytes, or the path of") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


@pytest.fixture(params=["bytes", "byte level", "byte fallback"])
def any_tokenizer(request, saved):
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(saved(byte_level() if request.param == "byte level" else byte_fallback()))


@pytest.mark.parametrize("text", [TEXT, "猫", "🐈🐈", "the", "e\u0301 🐈‍⬛猫!"])
def test_a_stream_gives_the_text_without_half_characters(any_tokenizer, text):
    stream = StreamDecoder(any_tokenizer)
    pieces = [stream.push(int(i)) for i in any_tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert len([piece for piece in pieces if piece]) > len(text) // 2


def test_a_stream_ends_with_what_it_held_back():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(i) for i in (65, 0xE2, 0x82)] == ["A", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_stream_to_what_decoding_gives(ids):
    stream = StreamDecoder(ByteTokenizer())
    assert "".join([*map(stream.push, ids), stream.finish()]) == ByteTokenizer().decode(ids)


def test_a_special_token_streams_to_nothing(saved):
    backend = byte_level()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    stream = StreamDecoder(load_tokenizer(saved(backend)))
    assert stream.push(256) == ""
