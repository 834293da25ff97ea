"""A good config to spoil, and a corpus for it."""

import pytest

from umup.config.load import dump_yaml, parse_config


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.py").write_text("\n".join(f"def f{j}(x):\n    return {i} * x + {j}" for j in range(60)))
    return folder


@pytest.fixture
def body(corpus, tmp_path):
    return {
        "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16},
        "data": {"source": str(corpus), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2},
        "train": {"steps": 2, "batch_size": 2, "eval_batches": 1},
    }


@pytest.fixture
def config(body, tmp_path):
    """The path of a config that trains in a moment."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(parse_config(body)))
    return path
