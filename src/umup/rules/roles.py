"""What a parameter or an operation *is*: the key under which every table answers.

A role says how the two sides of a weight behave as the model grows ("infinite" or fixed), which is all that
a parametrization needs to know (2203.03466, section 4). Sites are the places between the weights whose scale
is not a monomial of the weight's shape.
"""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """How a parameter's sides grow with width."""

    EMBEDDING = "embedding"  # fixed -> width, looked up by token
    POSITION = "position"  # fixed -> width, looked up by position
    INPUT = "input"  # fixed -> width, a matrix or convolution (patches, features; depthwise kernels)
    HIDDEN = "hidden"  # width -> width
    HIDDEN_OUT = "hidden_out"  # width -> width, writing to the residual stream
    READOUT = "readout"  # width -> fixed
    TIED_READOUT = "tied_readout"  # width -> fixed, on the embedding's own storage
    NORM_GAIN = "norm_gain"  # elementwise on width
    NORM_BIAS = "norm_bias"  # elementwise on width
    BIAS = "bias"  # added to a matrix product
    SCALAR = "scalar"  # neither side grows


@dataclass(frozen=True)
class ParamSpec:
    """One parameter, as the tables see it.

    `fan_in` and `fan_out` count features, not storage: an embedding of shape (vocab, hidden) has fan_in vocab;
    a bias takes the fan_in of its matrix. `on_residual` marks parameters inside a residual branch. `tied_to`
    names the parameter that owns the storage.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    on_residual: bool = False
    tied_to: str | None = None


class OpKind(StrEnum):
    """Kinds of operation sites."""

    ADD = "add"  # sum of two unit-scale tensors (token and position embedding)
    RESIDUAL_ATTN = "residual_attn"
    RESIDUAL_MLP = "residual_mlp"
    SDPA = "sdpa"  # scaled dot-product attention, causal
    GATED_SILU = "gated_silu"
    GATED_GELU = "gated_gelu"
    SILU = "silu"
    GELU = "gelu"
    RELU = "relu"
    DROPOUT = "dropout"
    LOSS = "loss"


@dataclass(frozen=True)
class OpSite:
    """One operation site, e.g. `layers.3.attn.residual`; sites are listed in execution order."""

    name: str
    kind: OpKind


@dataclass(frozen=True)
class Sizes:
    """What the formulas may depend on besides a parameter's own shape.

    `num_layers` counts blocks. `tokens` is global, per optimizer step. `seq_len` is the training length: u-muP's
    attention scale is fixed there, so that a KV cache decodes with the constant it was trained with. `norm_placement`
    says what a block normalises: "pre", a branch's input, "post", the sum, or "res_post", a branch's output.
    """

    num_layers: int
    tokens: int
    seq_len: int
    head_dim: int
    vocab_size: int
    dropout: float = 0.0
    norm_placement: str = "pre"


@dataclass(frozen=True)
class Architecture:
    """Everything the rules need of a model: its parameters, its sites, its sizes."""

    params: tuple[ParamSpec, ...]
    sites: tuple[OpSite, ...]
    sizes: Sizes
