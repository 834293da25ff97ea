"""A umup run as a model-zoo config: the current format in the trainer layout.

The plan is what is written: initial stds, multipliers and rates of its parameters, role by role. A plan that says more
than the zoo's keys can is refused with the number that has no key: epsilon and decay that differ from parameter to
parameter, weights of residual branches (u-muP's, CompleteP's), backward factors that are not the gradient's.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import isclose
from typing import Any

from umup.config.sections import RunConfig
from umup.errors import ConfigError
from umup.interop.cerebras.convert import Converted, base_value, write_inits
from umup.interop.cerebras.document import Body, Document, read_document
from umup.interop.cerebras.keys import MODELS, NONLINEARITIES, NORMS
from umup.interop.cerebras.numbers import RESIDUAL, Init, ratios
from umup.interop.cerebras.schedule import legs_of
from umup.interop.cerebras.to_umup import TRAIT_KEYS, model_keys
from umup.interop.config_keys import write
from umup.models.specs import Shape, plan_for, shape_of
from umup.rules.plan import CUT, Plan
from umup.rules.roles import OpKind, Role

CLOSE = 1e-9
# The zoo's roles -> our parameters, by the end of their name inside a layer, or whole.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("embed.weight", "positions.weight"),
    "attention": ("attn.q.weight", "attn.k.weight", "attn.v.weight"),
    "attention_out": ("attn.out.weight",),
    "ffn_in": ("mlp.up.weight", "mlp.gate.weight"),
    "ffn_out": ("mlp.down.weight",),
    "head": ("head.weight",),
}
# Numbers of sites that the zoo's models have no key for.
ONES = ("branch", "skip", "split_grad", "branch_grad", "output", "mult")
VECTORS = (Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)
FP16_TYPES = {"bf16": (True, "bfloat16"), "fp16": (True, "float16"), "fp32": (False, None)}
ACTIVATIONS = {ours: theirs for theirs, ours in reversed(list(NONLINEARITIES.items()))}
NORM_TYPES = {ours: theirs for theirs, ours in NORMS.items()}
WRITTEN_SCHEMES = ("sp", "mup")
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "nadam": "NAdam", "radam": "RAdam"}


def from_umup(config: RunConfig) -> Converted:
    """The config in the zoo's words, SP or muP as its scheme is. Raises ConfigError for what the zoo cannot say."""
    plan, shape = plan_for(config), shape_of(config.model)
    if config.optimizer.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name {config.optimizer.name}: written are {', '.join(OPTIMIZERS)}")
    refuse_schemes(config)
    _check(plan)
    model, notes = _model(config, shape)
    stds = {role: _same(plan, role, "init_std") for role in PARAMETERS if role != "head"}
    decay = _decay(config, plan)
    optimizer = {
        "betas": list(config.optimizer.betas),
        "eps": config.optimizer.eps or 1e-8,
        "weight_decay": decay,
        "correct_bias": True,
    }
    body = _trainer(config, model, optimizer)
    cut = plan.params["layers.0.attn.q.weight"].values.get(CUT)
    inits = {role: Init(std, None if cut is None else cut.number) for role, std in stds.items()}
    if not shape.traits.tie_embeddings:
        model["initializer_range"] = plan.params["head.weight"]["init_std"]
    _write_muP(config, plan, read_document(body), model, optimizer, inits)
    notes.append("fit.train_dataloader.data_dir: the zoo reads HDF5 files of its own; prepare and name them")
    return Converted(body, tuple(notes))


def refuse_schemes(config: RunConfig) -> None:
    """Raises ConfigError for schemes that the zoo's keys cannot say, with the reason."""
    scheme = config.parametrization.scheme
    if scheme in WRITTEN_SCHEMES:
        return
    plan = plan_for(config)
    lost = next((f"{name}.{q} is {op[q]:g}" for name, op in plan.ops.items() for q in ONES if _lost(op.values, q)), "")
    reason = f"{lost}, and model-zoo configs have no key for it" if lost else "its numbers have no keys there"
    raise ConfigError(
        f"parametrization.scheme {scheme}: {reason}; take muP (for a umup config --to umup --scheme mup), or train here"
    )


def _lost(values: Mapping[str, Any], quantity: str) -> bool:
    return quantity in values and not isclose(values[quantity].number, 1.0, rel_tol=CLOSE)


def _check(plan: Plan) -> None:
    """Raises ConfigError for numbers without a key, naming the first."""
    for name, p in plan.params.items():
        for quantity in ("grad_input", "grad_weight"):
            if not isclose(p[quantity], p["multiplier"], rel_tol=CLOSE):
                raise ConfigError(f"{name}: its backward factor {quantity} {p[quantity]:g} has no key in the model zoo")
        multiplied = p.spec.role in (Role.EMBEDDING, Role.POSITION, Role.READOUT, Role.TIED_READOUT)
        if not multiplied and not isclose(p["multiplier"], 1.0, rel_tol=CLOSE):
            raise ConfigError(f"{name}: its multiplier {p['multiplier']:g} has no key in the model zoo")
    for name, p in plan.stored.items():
        if not isclose(p["eps"], 1.0, rel_tol=CLOSE):
            raise ConfigError(
                f"{name}: its epsilon is {p['eps']:g} times the others', and the model zoo has one; write "
                "parametrization.options: {eps: constant}"
            )
        if p.spec.role in (*VECTORS, Role.READOUT) and not isclose(p["lr"], 1.0, rel_tol=CLOSE):
            raise ConfigError(
                f"{name}: its rate is {p['lr']:g} times the others', and no group of the model zoo holds it"
            )
    for name, op in plan.ops.items():
        for quantity in ONES:
            if _lost(op.values, quantity):
                raise ConfigError(f"{name}: {quantity} {op[quantity]:g} has no key in the model zoo")


def _same(plan: Plan, role: str, quantity: str) -> float:
    """A number that all of a role's parameters share. Raises ConfigError where they do not."""
    found = {
        name: p[quantity]
        for name, p in plan.stored.items()
        if name in PARAMETERS[role] or any(name.endswith(f".{end}") for end in PARAMETERS[role])
    }
    first = next(iter(found.values()))
    for name, value in found.items():
        if not isclose(value, first, rel_tol=CLOSE):
            raise ConfigError(f"{name}: {quantity} {value:g} differs from {first:g}; the model zoo has one per role")
    return first


def _decay(config: RunConfig, plan: Plan) -> float:
    """The zoo's weight decay, which acts through each parameter's rate."""
    o = config.optimizer
    if not o.weight_decay:
        return 0.0
    found = {
        name: p["weight_decay"] * o.weight_decay / (o.lr * p["lr"] if o.independent_weight_decay else 1.0)
        for name, p in plan.stored.items()
        if p.spec.role not in VECTORS
    }
    first = next(iter(found.values()))
    for name, value in found.items():
        if not isclose(value, first, rel_tol=CLOSE):
            raise ConfigError(
                f"{name}: decays {value / first:g} times as fast as {next(iter(found))}; the zoo has one decay; "
                "write parametrization.options: {decay: with_rate}"
            )
    return first


def _model(config: RunConfig, shape: Shape) -> tuple[dict[str, Any], list[str]]:
    traits, m, notes = shape.traits, config.model, []
    if traits.norm_placement != "pre":
        raise ConfigError(
            f"model.norm_placement {traits.norm_placement}: the zoo's decoders normalise branch inputs (pre)"
        )
    key = (traits.norm, traits.norm_gain, traits.norm_bias if traits.norm == "layer" and traits.norm_gain else False)
    if key not in NORM_TYPES:
        raise ConfigError(
            f"model.norm {traits.norm} without gains: the model zoo has no such norm; write norm_gain: true"
        )
    if traits.activation not in ACTIVATIONS:
        raise ConfigError(
            f"model.activation {traits.activation}: the model zoo has none; known: {', '.join(ACTIVATIONS)}"
        )
    fields = {**m.model_dump(), "intermediate_size": shape.intermediate_size}
    if traits.positions != "rotary":
        del fields["rope_theta"]
    found: dict[str, Any] = {
        "name": _name(m.family, traits.parallel),
        **model_keys(fields),
        **write(TRAIT_KEYS, asdict(traits)),
        "num_heads": shape.num_heads,
        "position_embedding_type": None if traits.positions == "none" else traits.positions,
        "norm_type": NORM_TYPES[key],
        "nonlinearity": ACTIVATIONS[traits.activation],
        "attention_type": "scaled_dot_product",
        "use_ffn_bias_in_attention": traits.attention_bias,
    }
    found |= dict.fromkeys(("embedding_dropout_rate", "attention_dropout_rate"), m.dropout)
    if traits.parallel != "none":
        found["residual_dropout_rate"] = found.pop("dropout_rate")
        found["use_untied_layer_norm"] = traits.parallel == "two_norms"
    if shape.num_kv_heads != shape.num_heads:
        found["attention_module"] = "multiquery_attention"
        found["extra_attention_params"] = {"num_kv_groups": shape.num_kv_heads}
    if traits.positions == "rotary":
        found["rotary_dim"] = shape.rotary_dim
        if not traits.rotary_interleaved:
            notes.append("rotary positions turn neighbouring features there and halves here: another order of features")
    return found, notes


def _name(family: str, parallel: str) -> str:
    """A class whose blocks are like these."""
    code = "sequential" if parallel == "none" else "parallel"
    return family if MODELS.get(family) == code else {"sequential": "gpt2", "parallel": "gptj"}[code]


def _trainer(config: RunConfig, model: dict[str, Any], optimizer: dict[str, Any]) -> Body:
    o, s, t = config.optimizer, config.schedule, config.train
    recipe = config.precision.recipe
    if recipe not in FP16_TYPES:
        raise ConfigError(f"precision.recipe {recipe}: the model zoo has {', '.join(FP16_TYPES)}")
    enabled, kind = FP16_TYPES[recipe]
    precision: dict[str, Any] = {"enabled": enabled, **({"fp16_type": kind} if kind else {})}
    if t.grad_clip:
        precision["max_gradient_norm"] = t.grad_clip
    sources = config.data.source
    init = {
        "backend": {"backend_type": "CSX"},
        "seed": t.seed,
        "model": model,
        "optimizer": {OPTIMIZERS[o.name]: optimizer},
        "schedulers": legs_of(s.name, o.lr, s.warmup_steps, t.steps, s.final_factor, s.decay_fraction),
        "precision": precision,
        "loop": {"max_steps": t.steps, "eval_frequency": t.eval_every},
        "checkpoint": {"steps": t.checkpoint_every},
    }
    loader = {
        "data_processor": "GptHDF5MapDataProcessor",
        "data_dir": sources if isinstance(sources, str) else list(sources),
        "batch_size": t.batch_size * t.grad_accum,
    }
    return {"trainer": {"init": init, "fit": {"train_dataloader": loader}}}


def _write_muP(
    config: RunConfig,
    plan: Plan,
    document: Document,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    inits: Mapping[str, Init],
) -> None:
    """Initializers, multipliers and rates: base values where the scheme has a base, else the numbers themselves."""
    base = config.parametrization.base
    sdpa = next(op for op in plan.ops.values() if op.site.kind is OpKind.SDPA)
    head_dim = config.model.head_dim
    embedding, logits = plan.params["embed.weight"]["multiplier"], plan.params["head.weight"]["multiplier"]
    if base is None:
        write_inits(model, inits, Init.times, {}, faithful=False)
        return
    filters = base.intermediate_size or document.model["filter_size"] * base.hidden_size / document.model["hidden_size"]
    sizes = (float(base.hidden_size), float(filters))
    grown = ratios(document, sizes)
    depth = (2 * document.model["num_hidden_layers"]) ** -0.5
    factors = {role: r**-0.5 * (depth if role in RESIDUAL else 1.0) for role, r in grown.items()}
    write_inits(model, inits, base_value, factors, faithful=False)
    root = config.parametrization.options.get("logits") == "inv_sqrt_width"
    width = document.model["hidden_size"] / base.hidden_size
    model |= {
        "mup_base_hidden_size": sizes[0],
        "mup_base_filter_size": sizes[1],
        "embeddings_scale": embedding,
        "output_logits_alpha": logits * (width**0.5 if root else width),
        "scale_output_logits_by_d": not root,
        "scale_qk_dot_by_d": True,
        "attention_logits_alpha": sdpa["logits"] * head_dim,
    }
    groups = {
        "embedding": _same(plan, "embedding", "lr"),
        "decoder_attention": _same(plan, "attention", "lr") * grown["attention"],
        "decoder_input_ffn": _same(plan, "ffn_in", "lr") * grown["ffn_in"],
        "decoder_output_ffn": _same(plan, "ffn_out", "lr") * grown["ffn_out"],
    }
    roles = {"decoder_attention": "attention", "decoder_input_ffn": "ffn_in", "decoder_output_ffn": "ffn_out"}
    adjusted = {
        group: factor / grown[roles[group]] if group in roles else factor
        for group, factor in groups.items()
        if not isclose(factor, 1.0, rel_tol=CLOSE)
    }
    if adjusted:
        optimizer["adjust_learning_rate"] = adjusted
