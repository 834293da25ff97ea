"""The model zoo's config keys as tables: what they are called, what they default to, what umup makes of them.

Read in releases 2.2.1 and 2.10.0. Two classes serve the decoders: GPT-2's, whose blocks are sequential (GPT-2 and 3,
BLOOM, Llama, MPT, StarCoder and relatives), and GPT-J's, whose blocks are parallel (GPT-J, GPT-NeoX, Falcon). Their
defaults differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Use = Literal["read", "fixed", "ignored"]
Code = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Key:
    """A key of the model section.

    `kind` is what its value must be; `parallel` the default of GPT-J's class, where it differs. `use`: umup reads it
    (read), can only do what its default says (fixed), or trains the same whatever it says (ignored).
    """

    name: str
    kind: type | None
    default: Any
    use: Use = "read"
    parallel: Any = ...

    def default_in(self, code: Code) -> Any:
        """The class' default."""
        return self.default if code == "sequential" or self.parallel is ... else self.parallel


def _keys(use: Use, *rows: tuple[Any, ...]) -> list[Key]:
    return [Key(name, kind, default, use, *more) for name, kind, default, *more in rows]


INITIALIZERS = (
    "embedding_initializer",
    "initializer",
    "output_layer_initializer",
    "ffn_initializer",
    "ffn_output_layer_initializer",
)

KEYS: Mapping[str, Key] = {
    key.name: key
    for key in [
        *_keys(
            "read",
            ("name", str, None),
            ("vocab_size", int, 50257),
            ("hidden_size", int, None),
            ("num_hidden_layers", int, None),
            ("num_heads", int, 12),
            ("filter_size", int, 3072),
            ("max_position_embeddings", int, 1024),
            ("position_embedding_type", str, "learned", "rotary"),
            ("rotary_dim", int, None),
            ("rope_theta", float, 10000.0),
            ("share_embedding_weights", bool, True),
            ("embedding_layer_norm", bool, False),
            ("norm_type", str, "layernorm"),
            ("layer_norm_epsilon", float, 1e-5),
            ("use_untied_layer_norm", bool, False),
            ("attention_type", str, "scaled_dot_product"),
            ("attention_module", str, "aiayn_attention"),
            ("extra_attention_params", dict, {}),
            ("use_projection_bias_in_attention", bool, True),
            ("use_ffn_bias_in_attention", bool, True),
            ("nonlinearity", str, "gelu"),
            ("use_ffn_bias", bool, True, False),
            ("use_bias_in_output", bool, False),
            ("dropout_rate", float, 0.1),
            ("embedding_dropout_rate", float, None, 0.1),
            ("attention_dropout_rate", float, 0.1),
            ("initializer_range", float, 0.02),
            *((name, None, None) for name in INITIALIZERS),
            ("mup_base_hidden_size", float, None),
            ("mup_base_filter_size", float, None),
            ("embeddings_scale", float, 1.0),
            ("output_logits_scale", float, None),
            ("output_logits_alpha", float, None),
            ("scale_output_logits_by_d", bool, True),
            ("scale_qk_dot_by_d", bool, None),
            ("attention_logits_alpha", float, 1.0),
        ),
        *_keys(
            "fixed",
            ("position_embedding_offset", int, 0),
            ("constant_pos_embedding", int, None),
            ("num_extra_input_vocab_tokens", int, 0),
            ("alibi_trainable_slopes", bool, False),
            ("pos_scaling_factor", float, 1.0),
            ("pos_scaling_type", str, "linear"),
            ("pos_scaling_extra_args", None, None),
            ("rel_distance_mode", str, "default"),
            ("rel_distance_extra_args", None, None),
            ("scale_qk_dot_by_layer_idx", bool, False),
            ("attention_inner_dim", int, None),
            ("attention_sliding_window_length", int, None),
            ("sliding_window_every_other_decoder_layer", bool, False),
            ("attention_sink_tokens", int, None),
            ("attention_vertical_column_spacing", int, None),
            ("attention_vertical_column_width", int, None),
            ("attention_chunk_size", int, None),
            ("attention_qk_norm_layer", str, None),
            ("attention_logit_softcapping", float, None),
            ("final_logit_softcapping", float, None),
            ("fixed_sparse_attention", None, None),
            ("norm_first", bool, True),
            ("norm_first_sandwich", bool, False),
            ("extra_ffn_params", None, {}),
            ("cross_attention_layers", None, []),
            ("memory_tokens", None, None),
            ("moe", None, None),
            ("lr_adjustment_groups", None, None),
            ("lora_params", None, None),
            ("selective_grad", None, None),
        ),
        *_keys(
            "ignored",
            ("num_relative_attention_buckets", int, 32),
            ("attention_qk_norm_eps", float, 1e-5),
            ("attention_softmax_fp32", bool, True),
            ("attention_kernel", None, None),
            ("fold_rope_consts", bool, False),
            ("pad_rope", bool, False),
            ("use_experimental_flex_api", bool, False),
            ("boundary_casting", bool, False),
            ("loss_scaling", str, "num_tokens"),
            ("loss_weight", float, 1.0),
            ("compute_eval_metrics", bool, True),
            ("mixed_precision", bool, False),
            ("fp16_type", str, None),
            ("dtype", None, None),
            ("compression", None, None),
            ("start_token", None, None),
            ("loop_dim", int, 1),
            ("stop_sequences", None, None),
            ("max_tokens", int, None),
            ("temperature", float, None),
            ("top_k", int, None),
            ("top_p", float, None),
        ),
    ]
}

ALIASES: Mapping[str, str] = {
    "embd_pdrop": "embedding_dropout_rate",
    "residual_dropout_rate": "dropout_rate",
    "attention_initializer": "initializer",
    "moe_params": "moe",
    "memory_tokens_config": "memory_tokens",
    "alibi_implementation": "attention_kernel",
}

# Model names -> class. What is missing is read by neither.
MODELS: Mapping[str, Code] = {
    **dict.fromkeys(
        (
            *("gpt2", "gpt3", "bloom", "llama", "mistral", "mixtral", "mpt", "starcoder", "santacoder"),
            *("btlm", "jais", "gemma2", "gpt2lmheadmodel"),
        ),
        "sequential",
    ),
    **dict.fromkeys(("gptj", "gpt-neox", "falcon"), "parallel"),
}
ENCODERS = ("bert", "t5", "transformer", "roberta", "esm2", "ul2", "dpr")
# The flat layout has no name. Keys that only the parallel class has, and what else tells families apart.
PARALLEL_KEYS = ("use_untied_layer_norm", "residual_dropout_rate")

# Optimizer classes, lower case. muP's rates are those of the second line's.
ADAMS = ("adamw", "adam", "nadam", "radam", "lion")
OPTIMIZERS = (*ADAMS, *("adadelta", "adafactor", "adagrad", "adamax", "asgd", "lamb", "rmsprop", "rprop", "sgd"))
OPTIMIZER_KEYS = (
    *("optimizer_type", "learning_rate", "adjust_learning_rate", "betas", "eps", "weight_decay", "correct_bias"),
    *(
        "amsgrad",
        "momentum",
        "nesterov",
        "dampening",
        "maximize",
        "rho",
        "lr_decay",
        "alpha",
        "centered",
        "lambd",
        "t0",
    ),
    *("initial_accumulator_value", "etas", "step_sizes", "beta1", "clip_threshold", "decay_rate", "relative_step"),
    *("scale_parameter", "warmup_init", "adam", "params", "foreach"),
    *("max_gradient_norm", "max_gradient_value", "loss_scaling_factor", "initial_loss_scale", "steps_per_increase"),
    *("min_loss_scale", "max_loss_scale", "log_summaries", "grad_accum_steps"),
)
GROUPS = ("embedding", "decoder_attention", "decoder_input_ffn", "decoder_output_ffn")
LEGACY_GROUP = "decoder_kernel"

# Scheduler classes without their LR -> the rates that each must name.
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "Constant": ("learning_rate",),
    "Linear": ("initial_learning_rate", "end_learning_rate"),
    "CosineDecay": ("initial_learning_rate", "end_learning_rate"),
    "Polynomial": ("initial_learning_rate", "end_learning_rate"),
    "Exponential": ("initial_learning_rate",),
    "InverseExponentialTimeDecay": ("initial_learning_rate",),
    "InverseSquareRootDecay": ("initial_learning_rate",),
    "Step": ("initial_learning_rate",),
    "MultiStep": ("initial_learning_rate",),
    "PiecewiseConstant": ("learning_rates",),
    "CosineAnnealing": ("initial_learning_rate",),
    "CosineAnnealingWarmRestarts": ("initial_learning_rate",),
    "Cyclic": ("base_lr", "max_lr"),
    "OneCycle": ("initial_learning_rate", "max_lr"),
}
# Keys of a scheduler that are learning rates; InverseSquareRootDecay's scale is one, too.
RATES = (
    *("learning_rate", "learning_rates", "initial_learning_rate", "end_learning_rate", "eta_min", "base_lr", "max_lr"),
    "scale",
)

# The sections of the two layouts.
FLAT_SECTIONS = ("train_input", "eval_input", "model", "optimizer", "runconfig", "sparsity", "wandb")
TRAINER_SECTIONS = ("init", "fit", "validate", "validate_all")
INIT_SECTIONS = (
    *("backend", "device", "model_dir", "seed", "model", "optimizer", "schedulers", "precision", "sparsity", "loop"),
    *("checkpoint", "logging", "callbacks", "loggers"),
)

NONLINEARITIES: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "swiglu": "gated_silu",
    "geglu": "gated_gelu",
}
# norm_type -> norm, norm_gain, norm_bias.
NORMS: Mapping[str, tuple[str, bool, bool]] = {
    "layernorm": ("layer", True, True),
    "biasless-layernorm": ("layer", True, False),
    "nonparametric-layernorm": ("layer", False, False),
    "rmsnorm": ("rms", True, False),
}
POSITIONS: Mapping[str | None, str] = {
    "learned": "learned",
    "rotary": "rotary",
    "alibi": "alibi",
    None: "none",
}
