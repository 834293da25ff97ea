"""FP8 weights with static scales in the layout of compressed-tensors, which vLLM and transformers read.

    <module>.weight         float8_e4m3fn, (out, in)
    <module>.weight_scale   (1): the weight is `weight * weight_scale`
    <module>.input_scale    (1): the product reads `cast(x / input_scale)`

and in config.json a `quantization_config` of format "float-quantized", symmetric, strategy "tensor", not dynamic. Read
in compressed-tensors 0.20.1 (quantization/lifecycle/initialize.py: the scales' shapes; compressors/naive_quantized:
the names) and in vLLM's compressed_tensors_w8a8_fp8.py at commit 00cb05c39f77.

vLLM joins q, k, v and gate, up into one product with the largest of their scales, and encodes the others anew; so each
such group has one scale here and nothing is rounded twice. All scales are powers of two, which bf16 holds exactly.

Not covered: scales per channel or token, the key-value cache, and formats whose layers are no plain linears.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import frexp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umup.errors import CheckpointError
from umup.numerics.formats import E4M3, encode

SCALE, INPUT = ".weight_scale", ".input_scale"
ARGUMENTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
# What vLLM runs as one product.
GROUPS = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"))


def quantization_config(ignored: Sequence[str]) -> dict[str, Any]:
    """config.json's part; `ignored` are the linears that stay as they are."""
    group = {"targets": ["Linear"], "weights": ARGUMENTS, "input_activations": ARGUMENTS, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def weight_exponent(largest: float) -> int:
    """The largest e with largest * 2^e inside E4M3."""
    return frexp(E4M3.max / largest)[1] - 1 if largest else 0


def encode_weight(weight: Tensor, exponent: int) -> Tensor:
    """The weight times 2^exponent in E4M3."""
    return encode(weight, 2.0**exponent, E4M3)


def scale_of(exponent: float) -> Tensor:
    """What undoes 2^exponent, as these files hold it."""
    return torch.tensor([2.0**-exponent])


class Dequantised(Mapping[str, Tensor]):
    """The tensors of such files with weights as float32; scales of inputs are left out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._names = dict.fromkeys(n for n in tensors if not n.endswith((SCALE, INPUT)))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        scale = name.removesuffix(".weight") + SCALE
        return tensor.float() * self._tensors[scale].float() if scale in self._tensors else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def dequantised(file: Path, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors as they are, or decoded where config.json says that they are ours in FP8.

    Raises CheckpointError for any other quantization.
    """
    found = body.get("quantization_config")
    if found is None:
        return tensors
    groups = found.get("config_groups", {}) if isinstance(found, dict) else {}
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    ours = weights and all(w.get(key) == value for w in weights for key, value in ARGUMENTS.items())
    if not ours or found.get("format") != "float-quantized":
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"{file}: quantization_config: {method!r} in this form is not supported (only compressed-tensors' "
            "float-quantized, per tensor); write the directory of the unquantized weights"
        )
    return Dequantised(tensors)
