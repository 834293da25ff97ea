"""Config files: YAML by 1.2's rules, overrides, and errors that say where and what to write."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from umup.config.load import dump_yaml, load_config, parse_config, read_yaml
from umup.config.sections import RunConfig, Section
from umup.errors import ConfigError, PlanError
from umup.models.specs import plan_for

SECTIONS = sorted(Section.__subclasses__(), key=lambda s: s.__name__)
# Strings that YAML 1.1 or 1.2 reads as something else where they stand bare.
TREACHEROUS = [
    "1e-3",
    ".5e1",
    "0o17",
    "010",
    "09",
    "off",
    "yes",
    "No",
    "null",
    "~",
    "",
    "12:30",
    "1_000",
    "<<",
    "a: b",
    "- x",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("12", 12),
        ("-0", 0),
        ("010", 10),
        ("09", 9),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        *[(word, word) for word in ("off", "Off", "yes", "NO", "on", "y", "n")],
        *[(word, word) for word in ("0b11", "1_000", "12:30", "2001-01-01", "nan", "inf", "tRUE", "0o9")],
        ("'1e-3'", "1e-3"),
        ("[1e-3, off]", [0.001, "off"]),
    ],
)
def test_yaml_is_read_by_the_core_schema_of_1_2(text, value):
    read = read_yaml(text)
    assert (type(read), read) == (type(value), value)


def test_yaml_nan_is_a_number():
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize("text", ["[1,", "a: b: c", "!!int abc", "!!python/object:os.system x", "- \x00", "9" * 5000])
def test_text_that_is_not_yaml_is_a_config_error_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^not YAML: [^\n]+$"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "m: {a: 1, a: 1}", "1: x\n0x1: y"])
def test_a_key_that_stands_twice_is_an_error(text):
    with pytest.raises(ConfigError, match=r"line \d+: the key .* stands twice"):
        read_yaml(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"optimizer": {"lrr": 1.0}}, "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ({"model": {"hiden_size": 64}}, "unknown key 'model.hiden_size'; did you mean 'hidden_size'"),
        (
            {"parametrization": {"base": {"hidden_size": 64, "num_layer": 2}}},
            "unknown key 'parametrization.base.num_layer'; did you mean 'num_layers'",
        ),
        ({"precision": {"zzz": 1}}, "unknown key 'precision.zzz'; known: recipe"),
        ({"precision": {"recipe": "fp9"}}, "^precision.recipe: unknown recipe 'fp9'; did you mean 'fp8'"),
        ({"precision": {"recipe": "simulate:E1M2"}}, "^precision.recipe: .* write simulate:ExMy"),
        ({"precision": {"recipe": 8}}, "^precision.recipe: expected a valid string, found 8"),
        (
            {"precision": {"scales": "adaptive"}},
            "precision.scales: expected 'static', .* or 'dynamic', found 'adaptive'",
        ),
        ({"precision": {"sample_every": 0}}, "precision.sample_every: expected greater than 0, found 0"),
        ({"precision": {"backend": "cutlass"}}, "precision.backend: expected 'auto', 'scaled_mm' or 'emulate', found"),
        ({"precision": {"overrides": ["head"]}}, "precision.overrides: expected a valid dictionary"),
        ({"precision": {"overrides": {"head": 8}}}, "precision.overrides.head: expected a valid string, found 8"),
        # The misspelt key is the cause, the missing one its consequence.
        ({"parametrization": {"base": {"hiden_size": 64}}}, "did you mean 'hidden_size'"),
        ({"parametrization": {"base": {}}}, "parametrization.base.hidden_size is missing"),
        ({"model": {"hidden_size": "128"}}, "model.hidden_size: expected a valid integer, found '128'"),
        ({"model": {"hidden_size": 128.0}}, "model.hidden_size: expected a valid integer, found 128.0"),
        ({"model": {"hidden_size": 0}}, "model.hidden_size: expected greater than 0, found 0"),
        ({"model": {"norm_gain": "yes"}}, "model.norm_gain: expected a valid boolean, found 'yes'"),
        ({"model": 3}, "model: expected .*, found 3"),
        ({"model": None}, "model: expected .*, found None"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas: expected a valid tuple, found 0.9"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1 is missing"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1: expected .* 1, found 1.5"),
        ({"schedule": {"name": "cosin"}}, "schedule.name: expected 'constant', .* or 'wsd', found 'cosin'"),
        ({"parametrization": {"hparams": {"alpha_res": "big"}}}, "hparams.alpha_res: expected .* number, found 'big'"),
        (
            {"schedule": {"warmup_steps": 5}, "train": {"steps": 5}},
            "schedule.warmup_steps 5 leaves nothing of train.steps 5",
        ),
        ({1: 2}, "1: expected .* strings, found 1"),
        ([1], "expected sections such as 'model:', found list"),
        ("model", "expected sections such as 'model:', found str"),
    ],
)
def test_an_error_says_where_and_what_to_write(body, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(body)


NUMBERS = [
    (name, field)
    for name, section in RunConfig.model_fields.items()
    for field, default in section.get_default(call_default_factory=True)
    if isinstance(default, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, True, "1.0", None])
@pytest.mark.parametrize(("section", "field"), NUMBERS)
def test_no_float_field_takes_nan_infinity_negatives_or_another_type(section, field, value):
    with pytest.raises(ConfigError, match=rf"^{section}\.{field}: expected "):
        parse_config({section: {field: value}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_hyperparameters_are_positive_and_finite(value):
    config = parse_config({"parametrization": {"hparams": {"alpha_res": value}}})
    with pytest.raises(PlanError, match=r"hparams\.alpha_res: must be a positive number"):
        plan_for(config)


@pytest.mark.parametrize(("hidden_size", "head_dim", "suggested"), [(100, 64, 50), (128, 256, 128), (96, 64, 48)])
def test_a_head_size_that_does_not_divide_is_refused_and_the_suggestion_works(hidden_size, head_dim, suggested):
    with pytest.raises(ConfigError, match=rf"not a multiple of .*write model.head_dim: {suggested}$"):
        parse_config({"model": {"hidden_size": hidden_size, "head_dim": head_dim}})
    parse_config({"model": {"hidden_size": hidden_size, "head_dim": suggested}})


def test_kv_heads_must_divide_the_heads():
    with pytest.raises(ConfigError, match="num_kv_heads 3 does not divide the 4 query heads"):
        parse_config({"model": {"hidden_size": 256, "head_dim": 64, "num_kv_heads": 3}})


def test_overrides_lie_over_the_file_and_leave_the_rest():
    body = {"optimizer": {"lr": 0.25, "weight_decay": 0.5}, "parametrization": {"hparams": {"alpha_res": 2.0}}}
    overrides = [
        ("optimizer.lr", "1e-3"),
        ("optimizer.betas", "[0.8, 0.9]"),
        ("data.source", "[a, 'b c']"),
        ("data.tokenizer", "off"),
        ("model.num_kv_heads", "2"),
        ("model.tie_embeddings", "true"),
        ("parametrization.hparams.alpha_ffn_act", "0.5"),
        ("parametrization.options", "{depth_count: 2L, depth_alpha: 0.5}"),
        ("parametrization.base.hidden_size", "64"),
        ("train.seed", "1"),
        ("train.seed", "2"),
    ]
    config = parse_config(body, overrides)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.betas) == (0.001, 0.5, (0.8, 0.9))
    assert (config.data.source, config.data.tokenizer) == (["a", "b c"], "off")
    assert (config.model.num_kv_heads, config.model.tie_embeddings) == (2, True)
    assert config.parametrization.hparams == {"alpha_res": 2.0, "alpha_ffn_act": 0.5}
    assert config.parametrization.options == {"depth_count": "2L", "depth_alpha": "0.5"}
    assert config.parametrization.base is not None
    assert config.parametrization.base.hidden_size == 64
    assert config.train.seed == 2
    assert body == {"optimizer": {"lr": 0.25, "weight_decay": 0.5}, "parametrization": {"hparams": {"alpha_res": 2.0}}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("lr", "1"), "override --lr: write --section.key"),
        (("optimizer.lrr", "1"), "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        (("optimiser.lr", "1"), "unknown key 'optimiser'; did you mean 'optimizer'"),
        (("optimizer.lr.x", "1"), "optimizer.lr: expected a valid number"),
        (("optimizer.lr", "fast"), "optimizer.lr: expected a valid number, found 'fast'"),
        (("optimizer.lr", ""), "optimizer.lr: expected a valid number, found None"),
        (("precision.overrides.layers.*.attn.q", "bf16"), "precision.overrides: .* write the pattern whole"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({}, [override])


def test_products_are_overridden_by_one_value_that_keeps_its_order():
    config = parse_config(
        {}, [("precision.overrides", "{'layers.*.attn.q': bf16, '*.down': 'simulate:E3M4', head: fp8}")]
    )
    patterns = [("layers.*.attn.q", "bf16"), ("*.down", "simulate:E3M4"), ("head", "fp8")]
    assert list(config.precision.overrides.items()) == patterns
    again = parse_config(read_yaml(dump_yaml(config)))
    assert list(again.precision.overrides.items()) == patterns


def test_an_override_that_is_not_yaml_is_a_word():
    assert parse_config({}, [("data.source", "[draft")]).data.source == "[draft"


def test_an_empty_file_is_the_default_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == RunConfig() == parse_config({})


def test_a_file_is_read_with_its_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1e-3}\ndata: {source: off}\n", encoding="utf-8")
    config = load_config(str(path), [("train.steps", "7")])
    assert (config.optimizer.lr, config.data.source, config.train.steps) == (0.001, "off", 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\xff\xfe\x00binary", "cannot be read as text"),
        (b"model: {", "not YAML"),
        (b"model: {}\nmodel: {}", "stands twice"),
        (b"model: {hiden_size: 3}", "did you mean 'hidden_size'"),
    ],
)
def test_every_error_of_a_file_names_the_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^config .*run\.yaml: .*{message}"):
        load_config(path)


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path)


words = st.one_of(st.sampled_from(TREACHEROUS), st.text(max_size=12))
floats = st.floats(1e-12, 1e12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(words, st.lists(words, max_size=3), floats, st.dictionaries(words, floats, max_size=2), st.booleans())
@example("1e-3", TREACHEROUS, 1e-8, {"1e-3": 1e22}, True)
def test_a_dumped_config_parses_to_an_equal_one(word, source, number, hparams, flag):
    config = parse_config(
        {
            "data": {"source": source, "tokenizer": word},
            "optimizer": {"lr": number, "betas": [0.5, 0.25], "independent_weight_decay": flag},
            "parametrization": {"scheme": word, "hparams": hparams, "base": {"hidden_size": 64}},
        }
    )
    assert parse_config(read_yaml(dump_yaml(config))) == config


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_of_every_section_is_described(section):
    assert section.__doc__
    if section is not RunConfig:  # its fields are sections, described by their own docstrings
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_sections_are_all_there_is():
    assert {type(section) for _, section in RunConfig()} | {RunConfig} <= set(SECTIONS)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"model": {"vocab_size": 1}}, "model.vocab_size"),
        (
            {"schedule": {"name": "wsd", "warmup_steps": 80, "decay_fraction": 0.5}, "train": {"steps": 100}},
            "decay_fraction",
        ),
    ],
)
def test_values_that_would_only_fail_later_are_refused(section, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(section)


def test_an_unknown_key_that_is_called_like_a_type_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'data\.str'"):
        parse_config({"data": {"str": 1}})


# --- YAML that is an attack -----------------------------------------------------------------------------------------


def test_a_yaml_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="its aliases stand for more than 100000 values"):
        read_yaml("\n".join(lines))


def test_an_alias_within_itself_is_refused():
    with pytest.raises(ConfigError, match="an alias stands within itself"):
        read_yaml("a: &a [*a]")


def test_deep_nesting_is_refused():
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_yaml("[" * 3000 + "]" * 3000)


def test_a_loader_named_twice_is_no_bomb():
    assert read_yaml("a: &x {b: 1}\nc: *x\nd: *x") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}
