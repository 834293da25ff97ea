"""Logits of two forms of a model on the same random prompts: the proof that ends every export.

`error` is |a - b| / |a| over all logits (relative L2), `largest` the largest difference over the RMS of a. How far two
forms may be apart depends on how finely weights are held: TOLERANCES. In float32 a wrong factor anywhere shows, while
rounding and the order of sums give about 1e-6; a coarser format's tolerance is the rounding of its weights through tens
of layers, which is why a form's constants are best checked in fp32 first.

The other form is run by transformers where it is installed, else by this library from the written files.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umup.checkpoint import load_weights
from umup.errors import CheckpointError
from umup.models.build import decoder
from umup.models.decoder import Decoder
from umup.models.specs import Shape
from umup.nn.modules import LayerNorm, Linear, Matmul
from umup.numerics.formats import E4M3, encode
from umup.rules.plan import Plan

TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "fp8": 0.2}
PROMPTS, LENGTH = 4, 32


@dataclass(frozen=True)
class Comparison:
    """`against`: what ran the written form. See the module for the numbers."""

    against: str
    prompts: int
    length: int
    error: float
    largest: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the forms agree; NaN is no agreement."""
        return self.error <= self.tolerance

    def text(self) -> str:
        """One line."""
        verdict = "within" if self.passed else "NOT within"
        return (
            f"logits on {self.prompts} random prompts of {self.length} tokens, against {self.against}: "
            f"relative L2 {self.error:.1e}, largest {self.largest:.1e} of their RMS; {verdict} {self.tolerance:g}"
        )


def prompts(shape: Shape) -> Tensor:
    """(PROMPTS, at most LENGTH) random ids, the same every time."""
    length = min(LENGTH, shape.max_seq_len)
    return torch.randint(shape.vocab_size, (PROMPTS, length), generator=torch.Generator().manual_seed(0))


def compare(ours: Tensor, theirs: Tensor, against: str, precision: str) -> Comparison:
    """Logits (prompts, positions, vocab) of the source and of the written form."""
    a, b = ours.double(), theirs.double()
    error = float((a - b).norm() / a.norm())
    largest = float((a - b).abs().max() / a.square().mean().sqrt())
    return Comparison(against, a.shape[0], a.shape[1], error, largest, TOLERANCES[precision])


@torch.no_grad()
def our_logits(
    shape: Shape,
    plan: Plan,
    weights: Iterable[tuple[str, Tensor]],
    tokens: Tensor,
    prepare: Callable[[Decoder], None] = lambda model: None,
) -> Tensor:
    """What the loss's softmax sees, float32. `prepare` may hang hooks on the model."""
    model = loaded(shape, plan, weights)
    prepare(model)
    logits: Tensor = model(tokens) * model.loss_multiplier
    return logits


def loaded(shape: Shape, plan: Plan, weights: Iterable[tuple[str, Tensor]]) -> Decoder:
    """The decoder in float32, for inference."""
    model = decoder(shape, plan).eval()
    load_weights(model, weights, "the source")
    return model


def through_fp8(model: Decoder, scales: Mapping[str, float]) -> None:
    """Let the inputs of these products go through E4M3, each at its scale."""
    watch_inputs(model, scales, lambda name, x: encode(x, 1 / scales[name], E4M3).to(x.dtype) * scales[name])


def watch_squares(model: Decoder, norms: Iterable[str], squares: dict[str, list[float]]) -> None:
    """Put the mean squares of what these norms read into `squares`, one for each token (layer norms: variances)."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double()
            x = x - x.mean(-1, keepdim=True) if isinstance(module, LayerNorm) else x
            squares[name] = x.square().mean(-1).flatten().tolist()

        return hook

    for name in norms:
        model.get_submodule(name).register_forward_pre_hook(watch(name))


def watch_inputs(model: Decoder, products: Iterable[str], see: Callable[[str, Tensor], Tensor | None]) -> None:
    """Let `see(product, x)` have the inputs of products, and replace those for which it returns something.

    Linears that share a product share its input: it is seen once, under the first one's name.
    """

    def watch(name: str) -> Callable[..., tuple[Tensor, ...] | None]:
        def hook(module: Matmul, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = see(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return hook

    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    first = {linears[name].matmul: name for name in reversed(list(products))}
    for matmul, name in first.items():
        matmul.register_forward_pre_hook(watch(name))


@torch.no_grad()
def transformers_logits(directory: Path, tokens: Tensor, needs: str | None = None) -> tuple[Tensor, str] | None:
    """Logits of the directory's model by transformers in float32, and its version.

    None where it, or the other package that it `needs` for this directory, is not installed. Raises CheckpointError
    where it cannot load the directory.
    """
    if any(find_spec(package) is None for package in ("transformers", needs) if package):
        return None
    import transformers

    said: Any = transformers.utils.logging
    verbosity, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader: Any = transformers.AutoModelForCausalLM
            model = loader.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
            return model(tokens).logits.float(), f"transformers {transformers.__version__}"
    except Exception as error:  # whatever another program finds wrong with a file
        raise CheckpointError(f"transformers cannot load {directory} ({type(error).__name__}: {error})") from None
    finally:
        said.set_verbosity(verbosity)
        if bars:
            said.enable_progress_bar()
