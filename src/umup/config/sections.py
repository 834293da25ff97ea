"""The sections of a run config. Every field's docstring is what `--help` prints."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from umup.errors import ConfigError
from umup.rules.hparams import choice_name
from umup.rules.precision import Scales, find_recipe

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The network: a family (row of models/families.py) and its sizes."""

    family: str = "llama"
    """architecture: llama, gpt2, ... (a row of models/families.py)"""
    hidden_size: Positive = 256
    """width of the residual stream"""
    num_layers: Positive = 4
    """number of blocks, each one attention and one MLP branch"""
    head_dim: Positive = 64
    """features per attention head; hidden_size is a multiple of it"""
    num_kv_heads: Positive | None = None
    """key and value heads (grouped-query attention); default: the family's, as many as query heads or one"""
    intermediate_size: Positive | None = None
    """inner width of the MLP; default: the family's ratio times hidden_size"""
    vocab_size: Annotated[int, Field(gt=1)] = 256
    """token ids the model knows"""
    max_seq_len: Annotated[int, Field(gt=1)] = 256
    """context length; also the training length that fixes u-muP's attention scale"""
    norm: Literal["rms", "layer"] | None = None
    """RMS norm or layer norm; like the fields down to tie_embeddings it defaults to the family's"""
    norm_gain: bool | None = None
    """trainable norm gains (and biases)"""
    norm_bias: bool | None = None
    """biases beside the gains of layer norms"""
    norm_placement: Literal["pre", "post", "res_post"] | None = None
    """what a block normalises: the input of a branch, the sum after it, or its output before the sum (scheme mus)"""
    embedding_norm: bool | None = None
    """a norm on the embedding"""
    parallel: Literal["none", "shared_norm", "two_norms"] | None = None
    """attention and MLP both read the block's input, through one norm or through one each"""
    positions: Literal["rotary", "learned", "alibi", "none"] | None = None
    """how tokens know their positions"""
    rotary_interleaved: bool | None = None
    """rotary turns neighbouring features instead of the two halves of a head"""
    activation: Literal["gated_silu", "gated_gelu", "gated_gelu_tanh", "silu", "gelu", "gelu_tanh", "relu"] | None = (
        None
    )
    """of the MLP; gated ones have a third matrix"""
    attention_bias: bool | None = None
    """biases of q, k, v and attention-out"""
    mlp_bias: bool | None = None
    """biases of the MLP"""
    head_bias: bool | None = None
    """bias of the output head"""
    tie_embeddings: bool | None = None
    """share the embedding with the output head"""
    rotary_dim: Positive | None = None
    """features of a head that rotary positions turn, an even number; default: the family's share of head_dim"""
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    """base of the rotary frequencies"""
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """epsilon of the norms"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout on the embedding, attention weights and branch outputs"""


class BaseShape(Section):
    """The shape where a relative scheme equals SP. What is absent keeps the target's ratio (head_dim: its value)."""

    hidden_size: Positive
    """width at which hyperparameters were tuned"""
    num_layers: Positive | None = None
    """depth at which they were tuned; schemes with a depth rule need it, the others record it"""
    head_dim: Positive | None = None
    """head size there"""
    num_kv_heads: Positive | None = None
    """key and value heads there"""
    intermediate_size: Positive | None = None
    """inner width of the MLP there"""


class ParametrizationConfig(Section):
    """The rules table to apply."""

    scheme: str = "umup"
    """parametrization: sp, mup, umup, completep, ... (`umup rules` lists them)"""
    hparams: dict[str, float] = Field(default_factory=dict)
    """the scheme's multipliers that differ from their defaults"""
    options: dict[str, Annotated[str, BeforeValidator(choice_name)]] = Field(default_factory=dict)
    """contested choices that differ from their defaults"""
    base: BaseShape | None = None
    """base shape, for schemes that are relative to one"""


class OptimizerConfig(Section):
    """The optimizer and its numbers at the plan's factor 1."""

    name: str = "adamw"
    """adamw, adam, nadam, radam, sgd or adafactor; `umup explain` knows more (`umup rules` lists them)"""
    lr: Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)] = 1.0
    """peak learning rate; the plan multiplies it per parameter"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """decay of Adam's first and second moments; SGD's momentum is the first"""
    eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    """epsilon, which the plan multiplies per parameter; default: torch's for the optimizer (Adam's 1e-8)"""
    weight_decay: NonNegative = 0.0
    """weight decay of matrices; norms and biases have none"""
    independent_weight_decay: bool = True
    """true: w *= 1 - wd * lr_t/lr_peak; false: torch's w *= 1 - lr_t * wd"""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """dtype of AdamW's two moments; bf16 halves their memory and is rounded stochastically"""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """dtype of the parameters and their gradients; bf16 halves them and is rounded stochastically"""


class ScheduleConfig(Section):
    """The factor on every learning rate, step by step."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """shape after warmup; wsd is flat, then linear over decay_fraction"""
    warmup_steps: Count = 0
    """steps of linear warmup from 1/warmup_steps"""
    final_factor: Fraction = 0.1
    """factor at the last step (constant ignores it)"""
    decay_fraction: Fraction = 0.2
    """wsd: share of all steps spent decaying"""


class DataConfig(Section):
    """What to train on."""

    source: str | list[str] = "python-stdlib"
    """python-stdlib, or files, folders and globs of text, or one .bin token file"""
    val_source: str | list[str] | None = None
    """the same for validation; default: a share of the source's files"""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """share of the source held out, by file where there are enough"""
    cache_dir: str | None = None
    """where token files are kept; default: umup under the user's cache folder"""


class TrainConfig(Section):
    """The loop."""

    steps: Positive = 500
    """optimizer steps"""
    batch_size: Positive = 16
    """sequences per microbatch"""
    grad_accum: Positive = 1
    """microbatches per optimizer step"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the initial weights, the data order and dropout"""
    eval_every: Positive = 100
    """steps between evaluations; the last step always evaluates"""
    eval_batches: Positive = 8
    """microbatches of an evaluation"""
    checkpoint_every: Positive = 100
    """steps between checkpoints; the last step always writes one"""
    keep_checkpoints: Positive = 2
    """how many checkpoints stay"""
    grad_clip: NonNegative = 0.0
    """clip the global gradient norm, in the units of the plan; 0: no clipping"""
    compile: bool = False
    """torch.compile the model"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""


class PrecisionConfig(Section):
    """Number formats of activations and of products (the matmuls of linears)."""

    recipe: str = "fp32"
    """fp32, bf16, fp16; fp8 (hidden products), fp8_partial (spares attention-out and FFN-down), fp8_e4m3 (gradients
    in E4M3 too), fp8_head (the head too); or simulate:ExMy, e.g. simulate:E4M3 (rows of rules/precision.py)"""
    overrides: dict[str, str] = Field(default_factory=dict)
    """recipe by glob pattern on product names, e.g. {'*.mlp.down': bf16, head: fp8}; later patterns win, and the
    recipe's dtype of activations spares a product"""
    scales: Scales = "adapt"
    """of FP8 inputs and gradients: static (constants), monitor (constants, and a warning where they stop serving),
    adapt (constants that follow sampled ranges), dynamic (from each tensor's maximum); weights always follow"""
    sample_every: Positive = 100
    """monitor, adapt: steps between two looks at the ranges"""
    compact: bool = False
    """FP8: keep gate and up for the backward pass in E4M3 as well; about a fifth less activation memory"""
    backend: Literal["auto", "scaled_mm", "emulate"] = "auto"
    """of FP8 products: scaled_mm (torch's FP8 kernels), emulate (float32 arithmetic on FP8 values, on any device), or
    auto: scaled_mm, refused where there is no GPU with FP8"""

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        return find_recipe(name).name

    @field_validator("overrides", mode="before")
    @classmethod
    def _undotted(cls, given: Any) -> Any:
        # `--precision.overrides.layers.0.attn.q bf16` is split at every dot, those of the pattern included.
        if isinstance(given, dict) and any(isinstance(value, dict) for value in given.values()):
            raise ConfigError(
                "precision.overrides: expected one recipe per pattern, found a section; write the pattern whole, as in "
                "--precision.overrides \"{'layers.*.attn.q': bf16}\""
            )
        return given


class RunConfig(Section):
    """A complete run. Sections that are absent take their defaults."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    parametrization: ParametrizationConfig = Field(default_factory=ParametrizationConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        m, s, t = self.model, self.schedule, self.train
        if m.hidden_size % m.head_dim:
            raise ValueError(
                f"model.hidden_size {m.hidden_size} is not a multiple of model.head_dim {m.head_dim}; "
                f"write model.head_dim: {_divisor_near(m.hidden_size, m.head_dim)}"
            )
        heads = m.hidden_size // m.head_dim
        if m.num_kv_heads is not None and heads % m.num_kv_heads:
            raise ValueError(f"model.num_kv_heads {m.num_kv_heads} does not divide the {heads} query heads")
        if self.optimizer.master_dtype == "bf16" and t.grad_accum > 1:
            raise ValueError(
                f"optimizer.master_dtype bf16 would add up the gradients of train.grad_accum {t.grad_accum} "
                "microbatches in bf16; write master_dtype: fp32, or one larger microbatch"
            )
        if s.warmup_steps >= t.steps:
            raise ValueError(f"schedule.warmup_steps {s.warmup_steps} leaves nothing of train.steps {t.steps}")
        if s.name == "wsd" and s.warmup_steps + s.decay_fraction * t.steps > t.steps:
            raise ValueError(
                f"schedule.decay_fraction {s.decay_fraction} of {t.steps} steps begins within the warmup of "
                f"{s.warmup_steps}; write a smaller one"
            )
        return self

    @property
    def tokens_per_batch(self) -> int:
        """What one microbatch takes of a corpus: its inputs and the last target."""
        return self.train.batch_size * self.model.max_seq_len + 1

    @property
    def tokens_per_step(self) -> int:
        """Global tokens of one optimizer step."""
        return self.train.batch_size * self.train.grad_accum * self.model.max_seq_len


def _divisor_near(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
