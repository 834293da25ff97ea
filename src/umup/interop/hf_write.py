"""A Source as a Hugging Face directory: config.json, sharded safetensors, tokenizer, generation config, model card.

The network is rewritten without losing a bit of what it computes: multipliers go into weights (`fold.py`), norms
without gains get ones, missing biases zeros, a tied head a matrix of its own where the two uses differ, and rows of q
and k move where rotary pairs other features. Weights come one at a time from the source, are folded in float32, rounded
once, and written.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umup.checkpoint import TensorLayout, write_tensors
from umup.data.tokenizer import byte_tokenizer_json
from umup.errors import ConfigError
from umup.interop.compressed import (
    GROUPS,
    INPUT,
    SCALE,
    encode_weight,
    quantization_config,
    scale_of,
    weight_exponent,
)
from umup.interop.fold import Fold, fold, kept
from umup.interop.hf_config import CONFIG, expressible, plain, write
from umup.interop.hf_formats import FORMATS
from umup.interop.hf_tensors import TABLES
from umup.interop.keymap import Row, layout
from umup.interop.source import Source
from umup.models.specs import Shape, decoder_specs, shape_of
from umup.rules.roles import Role

# What a directory may hold beside tokenizer.json, and is copied as it is.
CARRIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Target:
    """The network that is written: the row of FORMATS, its shape, its config's multipliers, and the way there."""

    name: str
    source: Shape
    shape: Shape
    multipliers: Mapping[str, float]
    fold: Fold

    def config(self) -> dict[str, Any]:
        """config.json, less what is no part of the network."""
        return write(FORMATS[self.name], self.shape, self.multipliers)

    def corrected(self, squares: Mapping[str, Sequence[float]]) -> "Target":
        """With gains that make up for epsilon (`fold.py`)."""
        return replace(self, fold=self.fold.corrected(squares, self.source.norm_eps))

    def rows(self) -> list[tuple[Row, tuple[int, ...]]]:
        """Their tensors."""
        return layout(TABLES[self.name](self.shape), self.shape)


def target_of(source: Source, name: str, tolerance: float) -> Target:
    """The source in the format. Raises ConfigError for what it cannot express, epsilon included (`fold.py`)."""
    shape = shape_of(source.config.model)
    theirs = expressible(name, shape)
    multipliers = kept(source.plan, shape) if FORMATS[name].multipliers else plain(shape)
    found = fold(source.plan, shape, multipliers)
    if found.epsilon_error > tolerance:
        raise ConfigError(
            f"--to hf-{name}: model.norm_eps {shape.norm_eps:g} acts on a stream whose scale falls by layers, and "
            f"{FORMATS[name].architecture} has one epsilon for all norms: they would be off by "
            f"{found.epsilon_error:.0e}; write a coarser --dtype, or --to umup"
        )
    tied = shape.traits.tie_embeddings and not found.unties
    traits = replace(theirs.traits, tie_embeddings=tied)
    return Target(name, shape, replace(theirs, traits=traits, norm_eps=found.norm_eps), multipliers, found)


class Folded(Mapping[str, Tensor]):
    """The target's parameters by our names, in float32, each made from the source's when it is asked for."""

    def __init__(self, target: Target, weights: Mapping[str, Tensor]) -> None:
        self._target, self._weights = target, weights
        self._specs = {spec.name: spec for spec in decoder_specs(target.shape) if spec.tied_to is None}

    def __getitem__(self, name: str) -> Tensor:
        spec, factor = self._specs[name], self._target.fold.factors.get(name, 1.0)
        given = self._weights.get("embed.weight" if self._untied(name) else name)
        if given is None:
            return torch.full(spec.shape, factor if spec.role is Role.NORM_GAIN else 0.0)
        tensor = given.float() if factor == 1.0 else given.float() * factor
        return self._turned(tensor) if ".attn.q." in name or ".attn.k." in name else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _untied(self, name: str) -> bool:
        return name == "head.weight" and self._target.source.traits.tie_embeddings

    def _turned(self, tensor: Tensor) -> Tensor:
        """Rows of q or k so that the same pairs turn: (2j, 2j+1) of a head become (j, j+r/2), or back."""
        ours, theirs = (s.traits.rotary_interleaved for s in (self._target.source, self._target.shape))
        r = self._target.shape.rotary_dim
        if ours == theirs or not r:
            return tensor
        d = self._target.shape.head_dim
        heads = tensor.reshape(-1, d, *tensor.shape[1:])
        sides = (r // 2, 2) if ours else (2, r // 2)
        pairs = heads[:, :r].reshape(-1, *sides, *tensor.shape[1:]).transpose(1, 2).flatten(1, 2)
        return torch.cat((pairs, heads[:, r:]), 1).flatten(0, 1)


@dataclass(frozen=True)
class Fp8:
    """Products by our names: exponents of their inputs and weights."""

    inputs: Mapping[str, int]
    weights: Mapping[str, int]


def fp8_weights(target: Target, weights: Mapping[str, Tensor], inputs: Mapping[str, int]) -> Fp8:
    """Exponents for the products that have an input exponent, one for each group that runs as one product."""
    largest = {name: float(weights[f"{name}.weight"].abs().amax()) for name in inputs}
    found = {name: weight_exponent(value) for name, value in largest.items()}
    for i in range(target.shape.num_layers):
        for group in GROUPS:
            names = [f"layers.{i}.{part}" for part in group if f"layers.{i}.{part}" in found]
            found |= dict.fromkeys(names, min((found[n] for n in names), default=0))
    return Fp8(inputs, found)


def write_weights(
    out: Path, target: Target, weights: Mapping[str, Tensor], dtype: torch.dtype, fp8: Fp8 | None, shard_bytes: int
) -> list[str]:
    """The safetensors, sharded by size, and their index; returns the files' names."""
    parts = [part for r, shape in target.rows() for part in _parts(r, shape, dtype, fp8)]
    shards: list[list[TensorLayout]] = [[]]
    for part in parts:
        if shards[-1] and sum(p.bytes for p in shards[-1]) + part.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(part)
    tensors = _tensors(target, weights, dtype, fp8)
    many = len(shards) > 1
    names = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(out / name, shard, (next(tensors) for _ in shard))
    if many:
        homes = {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": sum(p.bytes for p in parts)}, "weight_map": homes}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return names


def _product(r: Row, fp8: Fp8 | None) -> str | None:
    """The FP8 product whose weight a row is."""
    name = r.ours[0].removesuffix(".weight")
    return name if fp8 is not None and name in fp8.weights and r.ours[0].endswith(".weight") else None


def _parts(r: Row, shape: tuple[int, ...], dtype: torch.dtype, fp8: Fp8 | None) -> Iterator[TensorLayout]:
    if _product(r, fp8) is None:
        yield TensorLayout(r.theirs, dtype, shape)
        return
    yield TensorLayout(r.theirs, torch.float8_e4m3fn, shape)
    module = r.theirs.removesuffix(".weight")
    yield from (TensorLayout(module + suffix, torch.float32, (1,)) for suffix in (SCALE, INPUT))


def _tensors(target: Target, weights: Mapping[str, Tensor], dtype: torch.dtype, fp8: Fp8 | None) -> Iterator[Tensor]:
    for r, _ in target.rows():
        tensor = r.packing.pack([weights[name] for name in r.ours], target.shape)
        product = _product(r, fp8)
        if fp8 is None or product is None:
            yield tensor.to(dtype)
        else:
            yield encode_weight(tensor, fp8.weights[product])
            yield from (scale_of(exponents[product]) for exponents in (fp8.weights, fp8.inputs))


def write_config(out: Path, target: Target, dtype: torch.dtype, ids: Mapping[str, Any], fp8: Fp8 | None) -> None:
    """config.json and generation_config.json. `ids` are those of special tokens."""
    known = {key: ids.get(key) for key in TOKEN_IDS}
    body = {**target.config(), **known, "torch_dtype": str(dtype).removeprefix("torch.")}
    if fp8 is not None:
        matrices = [r for r, shape in target.rows() if len(shape) == 2 and "embed" not in r.ours[0]]
        plain_ones = [r.theirs.removesuffix(".weight") for r in matrices if _product(r, fp8) is None]
        tied = ["lm_head"] if target.shape.traits.tie_embeddings else []
        body["quantization_config"] = quantization_config([*plain_ones, *tied])
    (out / CONFIG).write_text(json.dumps(body, indent=2) + "\n")
    generation = {key: value for key, value in known.items() if value is not None}
    if not (out / "generation_config.json").exists():
        (out / "generation_config.json").write_text(
            json.dumps({"_from_model_config": True, **generation}, indent=2) + "\n"
        )


def write_tokenizer(out: Path, source: Source, separator: int | None) -> None:
    """tokenizer.json and what belongs to it; a directory's own files are copied, else the little that is known."""
    if source.tokenizer is not None:
        shutil.copyfile(source.tokenizer, out / "tokenizer.json")
        for name in CARRIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, out / name)
    else:
        (out / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    if (out / "tokenizer_config.json").exists():
        return
    body: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    added = json.loads((out / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or []
    body |= next(({"eos_token": token["content"]} for token in added if token["id"] == separator), {})
    (out / "tokenizer_config.json").write_text(json.dumps(body, indent=2) + "\n")
