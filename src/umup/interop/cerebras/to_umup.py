"""A model-zoo config as a umup run that starts from the same weights and updates them alike.

Scheme sp where the numbers are GPT-2's, else mup with the zoo's choices: one epsilon, decay through the rate, initial
weights cut at two stds. What umup's networks cannot do is an error that names the key; what is no matter of the model
(where the data lies, logging) is left out, and said.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import isclose, sqrt
from typing import Any

from umup.config.load import parse_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.interop.cerebras.document import Document, number
from umup.interop.cerebras.keys import KEYS, NONLINEARITIES, NORMS, POSITIONS
from umup.interop.cerebras.numbers import Numbers, faults, numbers, shrinkage
from umup.interop.cerebras.schedule import shape
from umup.interop.config_keys import Key, nested, read, write
from umup.interop.mup_numbers import Sizes, Wanted, base_of, parametrization
from umup.models.families import FAMILIES, Traits

# Keys that go over one by one, and back.
MODEL_KEYS = (
    Key("hidden_size", "model.hidden_size"),
    Key("num_hidden_layers", "model.num_layers"),
    Key("filter_size", "model.intermediate_size"),
    Key("vocab_size", "model.vocab_size"),
    Key("max_position_embeddings", "model.max_seq_len"),
    Key("layer_norm_epsilon", "model.norm_eps"),
    Key("rope_theta", "model.rope_theta"),
    Key("dropout_rate", "model.dropout"),
)
TRAIT_KEYS = (
    Key("share_embedding_weights", "tie_embeddings"),
    Key("embedding_layer_norm", "embedding_norm"),
    Key("use_projection_bias_in_attention", "attention_bias"),
    Key("use_ffn_bias", "mlp_bias"),
    Key("use_bias_in_output", "head_bias"),
)
OPTIMIZERS = ("adamw", "adam", "nadam", "radam")
RECIPES = {"bfloat16": "bf16", "cbfloat16": "bf16", "float16": "fp16", None: "bf16"}
# What the zoo does where umup has a choice.
CHOICES = {"eps": "constant", "decay": "with_rate"}


def to_umup(document: Document, faithful: bool = False) -> tuple[RunConfig, list[str]]:
    """The run and what is to be said of it. Raises ConfigError, naming the key, for what umup cannot express."""
    _check_fixed(document)
    found, notes = numbers(document, faithful), []
    settings = _settings(document)
    legs = shape(document, settings.pop("max_steps"))
    model, optimizer = _model(document), _optimizer(document, legs.peak)
    section, law_notes = _parametrization(document, found)
    schedule = {"name": legs.name, "warmup_steps": legs.warmup, "final_factor": legs.final}
    if legs.decay_fraction is not None:
        schedule["decay_fraction"] = legs.decay_fraction
    if legs.steps is not None:
        settings["train.steps"] = legs.steps
    body = {
        **nested(settings),
        "model": model,
        "parametrization": section,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    notes += [*legs.notes, *law_notes, *faults(document)]
    notes.append("data: the zoo's HDF5 files are not read here; write data.source and data.tokenizer")
    return parse_config(body), notes


def sizes_of(document: Document) -> Sizes:
    """The sizes that the parametrization depends on."""
    m = document.model
    return Sizes(m["hidden_size"], m["filter_size"], m["num_hidden_layers"], m["num_heads"], _kv_heads(document))


def traits_of(document: Document) -> Traits:
    """What the config says of everything that distinguishes families. Raises ConfigError."""
    m = document.model
    norm, gain, bias = _named("norm_type", m["norm_type"], NORMS)
    positions = _named("position_embedding_type", m["position_embedding_type"], POSITIONS)
    activation = _named("nonlinearity", m["nonlinearity"], NONLINEARITIES)
    if m["use_projection_bias_in_attention"] != m["use_ffn_bias_in_attention"]:
        raise ConfigError(
            "model.use_ffn_bias_in_attention differs from model.use_projection_bias_in_attention; umup has both or none"
        )
    parallel = "none" if document.code == "sequential" else "two_norms" if m["use_untied_layer_norm"] else "shared_norm"
    fields: dict[str, Any] = {
        **read(TRAIT_KEYS, m),
        "norm": norm,
        "norm_gain": gain,
        "norm_bias": bias,
        "positions": positions,
        "rotary_interleaved": positions == "rotary",
        "activation": activation,
        "parallel": parallel,
    }
    return Traits(**fields)


def overrides(traits: Traits, preferred: str) -> tuple[str, dict[str, Any]]:
    """The family that is nearest, and the fields in which the network differs from it."""
    idle = _idle(traits)

    def differing(name: str) -> dict[str, Any]:
        own = asdict(FAMILIES[name].traits)
        return {key: value for key, value in asdict(traits).items() if key not in idle and own[key] != value}

    name = min(FAMILIES, key=lambda n: (len(differing(n)), n != preferred))
    return name, differing(name)


def _idle(traits: Traits) -> set[str]:
    """Traits without a meaning beside the others."""
    found = set()
    if traits.norm == "rms" or not traits.norm_gain:
        found.add("norm_bias")
    if traits.positions != "rotary":
        found.add("rotary_interleaved")
    return found


def _check_fixed(document: Document) -> None:
    if document.body.get("sparsity") or document.init.get("sparsity"):
        raise ConfigError("sparsity: umup trains dense weights; remove the section")
    for key in KEYS.values():
        value = document.model[key.name]
        harmless = value in (None, {}, []) or value == key.default
        if key.name == "moe":
            harmless = value is None or number("model.moe.num_experts", value.get("num_experts", 1)) == 1
        if key.name == "memory_tokens":
            harmless = value is None or not value.get("memory_tokens_enabled")
        if key.use == "fixed" and not harmless:
            raise ConfigError(
                f"model.{key.name}: {value!r} is not in umup's networks; remove it, or convert to cerebras-mup"
            )


def _named(key: str, value: Any, table: Mapping[Any, Any]) -> Any:
    if value not in table:
        known = ", ".join(str(name) for name in table)
        raise ConfigError(f"model.{key}: {value!r} is not in umup's networks; known: {known}")
    return table[value]


def _kv_heads(document: Document) -> int:
    m = document.model
    if m["attention_module"] == "aiayn_attention":
        return int(m["num_heads"])
    if m["attention_module"] != "multiquery_attention":
        raise ConfigError(f"model.attention_module: unknown {m['attention_module']!r}; write multiquery_attention")
    groups = m["extra_attention_params"].get("num_kv_groups")
    if groups is None:
        raise ConfigError("model.extra_attention_params.num_kv_groups is missing; multiquery_attention needs it")
    found = number("model.extra_attention_params.num_kv_groups", groups)
    if found < 1 or m["num_heads"] % found:
        raise ConfigError(
            f"model.extra_attention_params.num_kv_groups {groups} does not divide num_heads {m['num_heads']}"
        )
    return int(found)


def _model(document: Document) -> dict[str, Any]:
    m, sizes = document.model, sizes_of(document)
    rates = {key: m[key] for key in ("embedding_dropout_rate", "attention_dropout_rate") if m[key] is not None}
    for key, rate in rates.items():
        if rate != m["dropout_rate"]:
            raise ConfigError(
                f"model.{key} {rate:g} differs from dropout_rate {m['dropout_rate']:g}; umup has one dropout"
            )
    traits = traits_of(document)
    name, differing = overrides(traits, document.family)
    fields: dict[str, Any] = nested(read(MODEL_KEYS, m))["model"]
    fields = {"family": name, **fields, "head_dim": sizes.head_dim, **differing}
    if traits.positions != "rotary":
        del fields["rope_theta"]
    else:
        # The zoo's default is a quarter of the head.
        fields["rotary_dim"] = m["rotary_dim"] if m["rotary_dim"] is not None else int(sizes.head_dim * 0.25)
    if sizes.num_kv_heads != sizes.num_heads or FAMILIES[name].multi_query:
        fields["num_kv_heads"] = sizes.num_kv_heads
    return fields


def _optimizer(document: Document, lr: float) -> dict[str, Any]:
    name, params = document.optimizer_name, document.optimizer
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer {name}: umup trains model-zoo configs with {', '.join(OPTIMIZERS)}")
    if params.get("amsgrad"):
        raise ConfigError("optimizer.amsgrad: umup has no AMSGrad; remove it")
    betas = params.get("betas", [0.9, 0.999])
    if not isinstance(betas, list) or len(betas) != 2:
        raise ConfigError(f"optimizer.betas: expected two numbers, found {betas!r}")
    return {
        "name": name,
        "lr": lr,
        "betas": [number("optimizer.betas", beta) for beta in betas],
        "eps": number("optimizer.eps", params.get("eps", 1e-6)),
        "weight_decay": number("optimizer.weight_decay", params.get("weight_decay", 0.0)),
        "independent_weight_decay": False,
    }


def _settings(document: Document) -> dict[str, Any]:
    """Training settings by our dotted key, and `max_steps`."""
    flat = document.layout == "flat"
    run = document.body.get("runconfig") or {}
    init, trainer = document.init, document.body.get("trainer") or {}
    loop, precision = init.get("loop") or {}, init.get("precision") or {}
    loader = document.body.get("train_input") if flat else (trainer.get("fit") or {}).get("train_dataloader")
    clip = document.optimizer.get("max_gradient_norm") if flat else precision.get("max_gradient_norm")
    enabled = document.model["mixed_precision"] if flat else precision.get("enabled")
    kind = document.model["fp16_type"] if flat else precision.get("fp16_type")
    if kind not in RECIPES:
        raise ConfigError(f"precision.fp16_type: unknown {kind!r}; known: bfloat16, cbfloat16, float16")
    found: dict[str, Any] = {"precision.recipe": RECIPES[kind] if enabled else "fp32"}
    for key, value in {
        "train.seed": run.get("seed") if flat else init.get("seed"),
        "train.batch_size": (loader or {}).get("batch_size"),
        "train.eval_every": run.get("eval_frequency") if flat else loop.get("eval_frequency"),
        "train.checkpoint_every": run.get("checkpoint_steps") if flat else (init.get("checkpoint") or {}).get("steps"),
    }.items():
        if value is not None:
            found[key] = int(number(key, value))
    if clip is not None:
        found["train.grad_clip"] = number("max_gradient_norm", clip)
    steps = run.get("max_steps") if flat else loop.get("max_steps")
    return {**found, "max_steps": None if steps is None else int(number("max_steps", steps))}


def _parametrization(document: Document, found: Numbers) -> tuple[dict[str, Any], list[str]]:
    sizes, notes = sizes_of(document), []
    cut = found.init["attention"].cut == 2.0
    deviation = shrinkage(2.0) if cut else 1.0
    stds: dict[str, float] = {}
    for role, init in found.init.items():
        if role == "head":
            stds |= {} if document.model["share_embedding_weights"] else {"head": init.std}
            continue
        same_law = init.cut == (2.0 if cut else None)
        stds[role] = init.std if same_law else init.deviation / deviation
        if not same_law:
            notes.append(f"initial weights of {role}: drawn by the law of the others, with the config's deviation")
    law = {"init": "truncated"} if cut else {}
    if document.format == "standard" and _is_gpt2(found, stds, sizes):
        sigma = stds["attention"]
        section: dict[str, Any] = {"scheme": "sp", "options": law}
        return section | ({"hparams": {"sigma_init": sigma}} if sigma != 0.02 else {}), notes
    options = {**CHOICES, **law, **({"logits": "inv_sqrt_width"} if found.logits_root else {})}
    wanted = Wanted(stds, found.lr, found.embedding, found.logits, found.attention, options)
    width, filters = found.base or (sizes.hidden, sizes.intermediate)
    if found.base is None:
        notes.append(
            "standard parametrization with other initial stds than GPT-2's: scheme mup at its own base, which is that"
        )
    base = base_of(sizes, width, filters)
    if (base["hidden_size"], base["intermediate_size"]) != (width, filters):
        notes.append(f"base sizes {width:g}, {filters:g} are rounded; the factors by role make up for it")
    return parametrization(sizes, wanted, base), notes


def _is_gpt2(found: Numbers, stds: Mapping[str, float], sizes: Sizes) -> bool:
    """Whether scheme sp has these numbers."""
    sigma, depth = stds["attention"], sqrt(2 * sizes.num_layers)
    expected = {role: sigma / depth if role.endswith("_out") else sigma for role in stds}
    plain = (found.embedding, found.logits, found.attention * sqrt(sizes.head_dim), *found.lr.values())
    return all(isclose(stds[r], s, rel_tol=1e-9) for r, s in expected.items()) and all(
        isclose(x, 1.0, rel_tol=1e-9) for x in plain
    )


def model_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """The one-by-one keys of our model section in the zoo's words."""
    return write(MODEL_KEYS, {f"model.{key}": value for key, value in model.items()})
