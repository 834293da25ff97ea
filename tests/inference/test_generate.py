"""Text from a run: the same tokens with and without a cache, whole characters, stop texts that never show."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from umup.checkpoint import RunState, save_checkpoint
from umup.cli.main import main
from umup.config.load import dump_yaml, parse_config
from umup.data.tokenizer import ByteTokenizer
from umup.errors import CheckpointError, InputError
from umup.inference import completion as completion_module
from umup.inference.completion import Completion, LoadedRun, load_run
from umup.inference.generate import Sampling, generate, pick
from umup.models.build import build
from umup.models.specs import plan_for
from umup.train.loop import run_training

CONTEXT = 24
GREEDY = Sampling(temperature=0.0)
every_model = pytest.mark.parametrize(
    ("family", "scheme"), [(f, s) for f in ("llama", "gpt2") for s in ("sp", "mup", "umup")]
)


def config_for(family="llama", scheme="umup", **sections):
    base = {"base": {"hidden_size": 16}} if scheme == "mup" else {}
    body = {
        "model": {"family": family, "hidden_size": 32, "num_layers": 2, "head_dim": 16, "max_seq_len": CONTEXT},
        "parametrization": {"scheme": scheme, **base},
        "train": {"steps": 2, "batch_size": 2, "eval_batches": 1},
    }
    return parse_config({k: {**body.get(k, {}), **sections.get(k, {})} for k in {**body, **sections}})


def sharpened(config):
    """An untrained model whose next-token distribution is far from uniform."""
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@every_model
def test_greedy_is_the_chain_of_likeliest_tokens(family, scheme):
    model = sharpened(config_for(family, scheme)).eval()
    ids = [3, 1, 4, 1, 5]
    chain = [token for token, _ in generate(model, ids, CONTEXT, GREEDY)]
    with torch.no_grad():
        for token in chain:
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids = [*ids, token]
    assert len(ids) == CONTEXT + 1


@every_model
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_k=50, top_p=0.95, seed=4)], ids=["greedy", "sampled"])
def test_cached_and_uncached_agree(family, scheme, sampling):
    model = sharpened(config_for(family, scheme))
    cached, plain = (list(generate(model, [7, 8, 9], CONTEXT, sampling, use_cache=c)) for c in (True, False))
    assert [token for token, _ in cached] == [token for token, _ in plain]
    left, right = (torch.stack([logits for _, logits in side]) for side in (cached, plain))
    assert right.std() > 0.1
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_generation_stops_where_the_context_is_full():
    model = build(config_for())
    assert len(list(generate(model, [1] * 20, CONTEXT, GREEDY))) == CONTEXT - 20 + 1
    assert len(list(generate(model, [1] * CONTEXT, CONTEXT, GREEDY))) == 1


@pytest.mark.parametrize(("length", "message"), [(0, "the prompt is empty"), (25, "25 tokens, the model's context 24")])
def test_a_prompt_that_does_not_fit_is_refused(length, message):
    with pytest.raises(InputError, match=message):
        next(generate(build(config_for()), [1] * length, CONTEXT, GREEDY))


LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.5, -1.0])


def counts(sampling, draws=4000):
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(pick(LOGITS, sampling, generator) for _ in range(draws))


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-3), Sampling(temperature=1e-320)],
    ids=["temperature 0", "top_k 1", "top_p tiny", "temperature small", "temperature denormal"],
)
def test_these_are_greedy(sampling):
    assert set(counts(sampling, 200)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(temperature):
    found = counts(Sampling(temperature))
    expected = (LOGITS / temperature).softmax(0)
    assert [found[i] / 4000 for i in range(5)] == pytest.approx(expected.tolist(), abs=0.03)


def test_top_k_keeps_the_k_likeliest_in_proportion():
    found = counts(Sampling(top_k=2))
    assert set(found) == {1, 3}
    assert found[1] / 4000 == pytest.approx(LOGITS[[1, 3]].softmax(0)[0].item(), abs=0.03)
    assert set(counts(Sampling(top_k=99))) == set(range(5))


def test_top_p_keeps_the_fewest_that_reach_the_share():
    shares = LOGITS.softmax(0).sort(descending=True).values.cumsum(0)
    assert set(counts(Sampling(top_p=shares[0].item() - 0.01))) == {1}
    assert set(counts(Sampling(top_p=shares[0].item() + 0.01))) == {1, 3}
    assert set(counts(Sampling(top_p=shares[1].item() + 0.01))) == {1, 3, 2}


def test_a_seed_fixes_the_text_and_another_changes_it():
    model = build(config_for())
    first, again, other = (
        [token for token, _ in generate(model, [1], CONTEXT, Sampling(seed=seed))] for seed in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "numbers",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_sampling_that_means_nothing_is_refused_by_its_option(numbers):
    option = "--" + next(iter(numbers)).replace("_", "-")
    with pytest.raises(InputError, match=option):
        Sampling(**numbers)


@pytest.fixture
def scripted(monkeypatch):
    """A run that writes given bytes, whatever its model thinks."""

    def make(written):
        def ids(model, prompt, context, sampling):
            yield from ((token, None) for token in list(written)[: context + 1 - len(prompt)])

        monkeypatch.setattr(completion_module, "generate", ids)
        config = config_for()
        return LoadedRun(build(config), ByteTokenizer(), config, plan_for(config), None)

    return make


def streamed(run, max_tokens=100, stop=()):
    *pieces, last = run.stream("p", max_tokens, GREEDY, stop)
    assert isinstance(last, Completion)
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(pieces) == last.text
    assert run.complete("p", max_tokens, GREEDY, stop) == last
    return pieces, last


def test_the_stream_is_the_completion_and_ends_at_max_tokens_or_context(scripted):
    pieces, last = streamed(scripted(b"abcdef"), max_tokens=4)
    assert (pieces, last) == (["a", "b", "c", "d"], Completion("abcd", list(b"abcd"), "length"))
    assert streamed(scripted(b"x" * 99))[1] == Completion("x" * CONTEXT, list(b"x" * CONTEXT), "context")


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        (b"one\n\ntwo", ("\n\n",), "one"),
        (b"aab aabc", ("aabc",), "aab "),
        (b"aaab", ("aab",), "a"),
        (b"abcd", ("cd", "bcx"), "ab"),
        (b"abcd", ("abcd",), ""),
        (b"xyz", ("zz",), "xyz"),
        ("aé!".encode(), ("é",), "a"),
    ],
)
def test_a_stop_text_never_shows(scripted, written, stop, text):
    pieces, last = streamed(scripted(written), max_tokens=len(written), stop=stop)
    assert last.text == text
    assert last.finish_reason == ("stop" if text.encode() != written else "length")
    whole = ""
    for piece in pieces:
        whole += piece
        assert text.startswith(whole)


def test_the_end_of_text_token_stops(scripted):
    assert streamed(scripted(b"ab\0cd"))[1] == Completion("ab", list(b"ab"), "stop")


def test_characters_of_several_tokens_are_streamed_whole(scripted):
    written = "é€😀".encode()
    assert streamed(scripted(written), max_tokens=len(written))[0] == ["é", "€", "😀"]


def test_an_unfinished_character_is_marked_at_the_end(scripted):
    assert streamed(scripted("a😀".encode()), max_tokens=3)[0] == ["a", "\ufffd"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        text = "\n".join(f"def f{j}(x):\n    return {i} * x + {j}" for j in range(60))
        (folder / f"{i}.py").write_text(text)
    return {"source": str(folder), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2}


def test_a_trained_run_writes_through_the_command_line(corpus, tmp_path, capsys):
    run_training(config_for(data=corpus), tmp_path / "run")
    command = ["generate", str(tmp_path / "run"), "--prompt", "def", "--max-tokens", "8", "--seed", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert printed == "def" + document["text"] + "\n"
    assert document["prompt"] == "def"
    assert document["finish_reason"] in {"length", "stop"}


def test_a_run_with_its_own_tokenizer_json(corpus, tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train([str(p) for p in (tmp_path / "corpus").iterdir()], trainer)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    vocabulary = backend.get_vocab_size()
    assert vocabulary > 257
    config = config_for(model={"vocab_size": vocabulary}, data={**corpus, "tokenizer": str(path)})
    run_training(config, tmp_path / "run")
    path.unlink()  # the run keeps its own
    loaded = load_run(tmp_path / "run")
    assert loaded.tokenizer.vocab_size == vocabulary
    *pieces, last = loaded.stream("def f1(x):", 12, Sampling(seed=2))
    assert "".join(pieces) == last.text == loaded.tokenizer.decode(last.tokens)
    assert max(last.tokens) < vocabulary


def test_a_prompt_longer_than_the_context_is_refused_in_tokens(corpus, tmp_path):
    run_training(config_for(data=corpus), tmp_path / "run")
    with pytest.raises(InputError, match="the prompt has 25 tokens, the model's context 24"):
        load_run(tmp_path / "run").complete("é" * 12 + "x", 5, GREEDY)


def test_loaded_weights_are_the_trained_ones(corpus, tmp_path):
    run_training(config_for(data=corpus), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    twin, config = build(loaded.config), config_for(data=corpus)
    assert loaded.config == config
    assert loaded.plan == plan_for(config)
    assert loaded.step is None
    assert not torch.equal(loaded.model.head.weight, twin.head.weight)


def unfinished(tmp_path, *steps):
    """A run directory with checkpoints of constant weights and no final model."""
    config = config_for()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config))
    (run / "plan.json").write_text(plan_for(config).to_json())
    (run / "data.json").write_text('{"tokenizer": {"name": "bytes"}}')
    for step in steps:
        weights = {name: torch.full_like(p, float(step)) for name, p in build(config).named_parameters()}
        save_checkpoint(run, RunState(step, {}, weights, {}, {"cpu": torch.get_rng_state()}, {}), keep=9)
    return run


def test_an_unfinished_run_is_read_from_its_newest_checkpoint(tmp_path):
    loaded = load_run(unfinished(tmp_path, 3, 5, 7))
    assert loaded.step == 7
    assert all((p == 7).all() for p in loaded.model.parameters())


def test_a_run_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights yet"):
        load_run(unfinished(tmp_path))


def test_what_is_no_run_directory_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="is no run directory"):
            load_run(path)
    (unfinished(tmp_path, 1) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load_run(tmp_path / "run")


def test_a_run_on_foreign_ids_asks_for_their_tokenizer(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 4000)
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    config = parse_config(
        {
            "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16, "vocab_size": 300},
            "data": {"source": str(tmp_path / "ids.bin")},
            "train": {"steps": 1, "batch_size": 2},
        }
    )
    run_training(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_run(tmp_path / "run")
