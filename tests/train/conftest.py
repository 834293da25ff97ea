"""A corpus of 30 kB and configs whose steps take milliseconds."""

import pytest

from umup.config.load import dump_yaml, parse_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        lines = [f"def f{j}(x):\n    return {i} * x + {j}\n" for j in range(300)]
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
    """Sections as keywords, laid over the tiny config."""
    body = {
        "model": {"hidden_size": 32, "num_layers": 1, "head_dim": 16, "max_seq_len": 16},
        "data": {"source": str(corpus), "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "schedule": {"name": "constant"},
        "train": {"steps": 20, "batch_size": 4, "eval_every": 1000, "eval_batches": 2, "checkpoint_every": 1000},
    }

    def make(**sections):
        return parse_config({name: {**body.get(name, {}), **sections.get(name, {})} for name in {**body, **sections}})

    return make


@pytest.fixture
def written(tmp_path):
    """A config as the path of a YAML file."""

    def write(config):
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(config))
        return path

    return write
