"""GPT-2 as llm.c and nanoGPT save it.

llm.c: one file of little-endian numbers. 256 int32: magic 20240326 (`source.py` looks for it), version (3: float32, 5:
bfloat16), maximal length, vocabulary, layers, heads, width, padded vocabulary. Then each kind of tensor for all layers,
in the order of LLMC. Matrices are (out, in); the rows of the token table that pad the vocabulary are dropped. The
network is OpenAI's: tanh GELU, biases, epsilon 1e-5, a tied head. (karpathy/llm.c, `write_model` of train_gpt2.py and
dev/eval/export_hf.py.)

nanoGPT: `ckpt.pt`, a pickle of plain values with `model_args` and `model` (karpathy/nanoGPT, train.py). Exact GELU, and
`bias: False` for linears and norms without biases.

Neither holds a tokenizer: a tokenizer.json beside the file is taken. Not covered: llm.c's Llama files, states of
optimizers, nanoGPT's forks, whose further `model_args` are refused by name.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umup.checkpoint import load_pickled
from umup.config.load import parse_config
from umup.errors import CheckpointError, ConfigError
from umup.interop.hf_config import model_section
from umup.interop.hf_tensors import gpt2_rows
from umup.interop.huggingface import HEAD, Renamed
from umup.interop.keymap import Row, row, to_ours
from umup.interop.source import Source
from umup.models.specs import Shape, plan_for, shape_of

LLMC_HEADER = 1024
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}
# Their name -> ours within a layer, and the shape in units of the width.
LLMC_LAYER: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ln1w": (("attn.norm.weight",), (1,)),
    "ln1b": (("attn.norm.bias",), (1,)),
    "qkvw": (("attn.q.weight", "attn.k.weight", "attn.v.weight"), (3, 1)),
    "qkvb": (("attn.q.bias", "attn.k.bias", "attn.v.bias"), (3,)),
    "attprojw": (("attn.out.weight",), (1, 1)),
    "attprojb": (("attn.out.bias",), (1,)),
    "ln2w": (("mlp.norm.weight",), (1,)),
    "ln2b": (("mlp.norm.bias",), (1,)),
    "fcw": (("mlp.up.weight",), (4, 1)),
    "fcb": (("mlp.up.bias",), (4,)),
    "fcprojw": (("mlp.down.weight",), (1, 4)),
    "fcprojb": (("mlp.down.bias",), (1,)),
}
LLMC: tuple[Row, ...] = (
    row("wte", "embed.weight"),
    row("wpe", "positions.weight"),
    *(row(f"{name}.{{i}}", *(f"layers.{{i}}.{o}" for o in ours)) for name, (ours, _) in LLMC_LAYER.items()),
    row("lnfw", "norm.weight"),
    row("lnfb", "norm.bias"),
)

NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
# Of nanoGPT-mup: numbers without effect unless one of these switches is on.
NANOGPT_SWITCHES = ("mup_enabled", "depth_alpha_enabled")
NANOGPT_IDLE = ("mup_", "depth_", "init_std")


def open_llmc(path: Path) -> Source:
    """Raises CheckpointError for other versions and for files that are cut off."""
    header = np.fromfile(path, "<i4", LLMC_HEADER // 4)
    version, length, vocab, layers, heads, width, padded = header[1:8].tolist() if len(header) == 256 else [0] * 7
    if version not in LLMC_DTYPES:
        known = ", ".join(map(str, LLMC_DTYPES))
        raise CheckpointError(f"{path}: llm.c's version {version}; umup reads {known}: write it again by a newer llm.c")
    sizes = {"vocab_size": vocab, "max_seq_len": length, "hidden_size": width, "num_layers": layers, "heads": heads}
    source = _source(
        "llm.c", path, sizes, {"activation": "gelu_tanh"}, lambda shape: (_llmc(path, shape, padded), LLMC)
    )
    expected = LLMC_HEADER + _llmc_size(shape_of(source.config.model), padded) * LLMC_DTYPES[version].itemsize
    if (found := path.stat().st_size) != expected:
        raise CheckpointError(
            f"{path} has {found} bytes where its header takes {expected}; it is cut off: fetch it again"
        )
    return source


def _llmc_layout(shape: Shape, padded: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Every kind of tensor in the file's order: name, how many of it lie one after the other, shape."""
    c = shape.hidden_size
    yield from (("wte", 1, (padded, c)), ("wpe", 1, (shape.max_seq_len, c)))
    for name, (_, sides) in LLMC_LAYER.items():
        yield name, shape.num_layers, tuple(side * c for side in sides)
    yield from (("lnfw", 1, (c,)), ("lnfb", 1, (c,)))


def _llmc_size(shape: Shape, padded: int) -> int:
    return sum(count * prod(sides) for _, count, sides in _llmc_layout(shape, padded))


def _llmc(path: Path, shape: Shape, padded: int) -> Mapping[str, Tensor]:
    """The file's tensors as views of its memory map."""
    dtype = LLMC_DTYPES[int(np.fromfile(path, "<i4", 2)[1])]
    # Copy on write: torch has no read-only tensors.
    flat = torch.from_numpy(np.memmap(path, np.uint8, "c", LLMC_HEADER)).view(dtype)
    found: dict[str, Tensor] = {}
    start = 0
    for name, count, sides in _llmc_layout(shape, padded):
        size = prod(sides)
        for i in range(count):
            found[f"{name}.{i}" if name in LLMC_LAYER else name] = flat[start : start + size].view(sides)
            start += size
    return {**found, "wte": found["wte"][: shape.vocab_size]}


def open_nanogpt(path: Path) -> Source:
    """Raises CheckpointError for other pickles, and for arguments of a model that GPT-2 is not."""
    file = path / "ckpt.pt" if path.is_dir() else path
    body = load_pickled(file)
    if not isinstance(body, dict) or not isinstance(body.get("model_args"), dict) or "model" not in body:
        raise CheckpointError(f"{file}: not a checkpoint of nanoGPT (no model_args and model)")
    args, tensors = body["model_args"], body["model"]
    _check_args(file, args)
    try:
        sizes = {
            "vocab_size": args["vocab_size"],
            "max_seq_len": args["block_size"],
            "hidden_size": args["n_embd"],
            "num_layers": args["n_layer"],
            "heads": args["n_head"],
        }
    except KeyError as error:
        raise CheckpointError(f"{file}: model_args has no {error}") from None
    biases = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), args.get("bias", True))
    fields = {"activation": "gelu", "dropout": args.get("dropout", 0.0), **biases}
    named = Renamed(tensors, {name.removeprefix("_orig_mod."): name for name in tensors})
    return _source("nanoGPT", file, sizes, fields, lambda shape: (named, gpt2_rows({})))


def _check_args(file: Path, args: Mapping[str, Any]) -> None:
    for switch in NANOGPT_SWITCHES:
        if args.get(switch):
            raise CheckpointError(f"{file}: model_args has {switch}: True, and only GPT-2's own network is read")
    unknown = [name for name in args if name not in NANOGPT_ARGS and not name.startswith(NANOGPT_IDLE)]
    if unknown:
        raise CheckpointError(f"{file}: model_args has {unknown[0]}, which nanoGPT's GPT-2 has not")


def _source(
    form: str,
    file: Path,
    sizes: Mapping[str, Any],
    fields: Mapping[str, Any],
    read: Callable[[Shape], tuple[Mapping[str, Tensor], tuple[Row, ...]]],
) -> Source:
    width, heads = sizes["hidden_size"], sizes["heads"]
    if not all(isinstance(n, int) and n > 0 for n in sizes.values()) or width % heads:
        raise CheckpointError(f"{file}: sizes {dict(sizes)} are those of no network")
    mine = {name: n for name, n in sizes.items() if name != "heads"}
    mine |= {"head_dim": width // heads, "intermediate_size": 4 * width, "tie_embeddings": True, "norm_eps": 1e-5}
    model = model_section(("gpt2", "gpt3"), {**mine, **fields})
    tokenizer = file.parent / "tokenizer.json"
    body = {"model": model, "parametrization": {"scheme": "sp"}, "data": {"tokenizer": str(tokenizer)}}
    try:
        config = parse_config(body)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    shape = shape_of(config.model)

    def weights() -> Iterator[tuple[str, Tensor]]:
        tensors, table = read(shape)
        masks = (".attn.bias", ".attn.masked_bias")
        return to_ours(table, tensors, shape, lambda name: name == HEAD or name.endswith(masks))

    known = tokenizer if tokenizer.is_file() else None
    notes = () if known else (f"no tokenizer: copy GPT-2's tokenizer.json to {tokenizer}",)
    return Source(form, file, config, plan_for(config), weights, known, notes)
