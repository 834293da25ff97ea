"""What this machine can do at a model's shapes, and what follows: the floor of a step, and whether FP8 pays.

Measured, on random normal data: the three products of every linear (joined where they run joined) in BF16 and in FP8,
with slow accumulation, ours; causal attention forward and backward; a copy. The floor of forward + backward is
the sum of these over the model plus the bytes that must move besides, in BF16 and at the copy's speed:

    tokens * (layers * (32 d + 8 (d + kv) + 16 f) + 6 V)

that is per layer two norms with residuals (8 d forward, 8 d backward each), rotary, SwiGLU (6 f, 10 f), and logits
written, read and turned into their gradient. It is the same for all number formats, and an optimum nobody reaches.

A GPU that trains runs at its power limit, and matrix products slow down with it. Rates are therefore measured twice:
after a pause, as a floor that no run can beat, and `steady`, each after a third of a second of nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from umup.config.sections import RunConfig
from umup.models.specs import Shape, plan_for, shape_of
from umup.numerics.formats import E4M3, E5M2
from umup.numerics.gemm import Formats, forward_product
from umup.ops.attention import attention
from umup.rules.precision import Product, find_recipe, products

REPEATS = 10
STEADY_MS = 300.0
COPY_BYTES = 2**30
# Predictions closer to 1 than this do not tell.
MARGIN = 1.05


class Stopwatch:
    """Marks in time on a device; CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._marks: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Now, in the order of the device's work."""
        if self.cuda:
            event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._times.append(1000 * perf_counter())

    def milliseconds(self) -> list[float]:
        """Between successive marks."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]


@dataclass(frozen=True)
class Site:
    """A product as it runs: `parts` are the names of its linears within a layer (or the model), `count` how often."""

    name: str
    fan_in: int
    fan_out: int
    count: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Rates:
    """Milliseconds of one run of each site (forward, input gradient, weight gradient), of one attention; bytes per ms.

    `fp8` is empty where the device has no FP8 products.
    """

    bf16: Mapping[str, tuple[float, float, float]]
    fp8: Mapping[str, tuple[float, float, float]]
    attention: float
    copy: float


def sites(s: Shape) -> tuple[Site, ...]:
    """The products of a decoder, those that read one input joined."""
    d, f, n = s.hidden_size, s.intermediate_size, s.num_layers
    gated = s.gated
    return (
        Site("qkv", d, d + 2 * s.kv_size, n, ("attn.q", "attn.k", "attn.v")),
        Site("out", d, d, n, ("attn.out",)),
        Site("up", d, 2 * f if gated else f, n, ("mlp.gate", "mlp.up") if gated else ("mlp.up",)),
        Site("down", f, d, n, ("mlp.down",)),
        Site("head", d, s.vocab_size, 1, ("head",)),
    )


def has_fp8() -> bool:
    """Whether this machine's GPU multiplies FP8."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def measure_rates(s: Shape, batch: int, steady: bool = False) -> Rates:
    """Time everything at `batch` sequences of the shape's length, on the GPU, after a pause or at steady power."""
    settle = STEADY_MS if steady else 0.0
    tokens = batch * s.max_seq_len
    low = has_fp8()
    bf16, fp8 = {}, {}
    for site in sites(s):
        x, w, g = (
            torch.randn(n, dtype=torch.bfloat16, device="cuda")
            for n in ((tokens, site.fan_in), (site.fan_out, site.fan_in), (tokens, site.fan_out))
        )
        bf16[site.name] = _bf16_products(x, w, g, settle)
        if low:
            fp8[site.name] = _fp8_products(x, w, g, settle)
    return Rates(bf16, fp8, _attention(s, batch, settle), _copy())


def _bf16_products(x: Tensor, w: Tensor, g: Tensor, settle: float) -> tuple[float, float, float]:
    return _three(settle, lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x)


def _fp8_products(x: Tensor, w: Tensor, g: Tensor, settle: float) -> tuple[float, float, float]:
    formats, scales = Formats(E4M3, E5M2, "scaled_mm"), torch.ones(8, 1, 4, device=x.device)
    x8, w8, g8 = (t.to(d) for t, d in ((x, E4M3.dtype), (w, E4M3.dtype), (g, E5M2.dtype)))
    x8t, w8t, g8t = (t.view(torch.uint8).t().contiguous().view(t.dtype) for t in (x8, w8, g8))

    return _three(
        settle,
        lambda: forward_product(x8, w8, formats, scales, x.dtype),
        lambda: forward_product(g8, w8t, formats, scales, x.dtype),
        lambda: forward_product(g8t, x8t, formats, scales, x.dtype),
    )


def _three(settle: float, *calls: Callable[[], object]) -> tuple[float, float, float]:
    a, b, c = (_time(call, settle) for call in calls)
    return a, b, c


def _time(call: Callable[[], object], settle: float = 0.0) -> float:
    """Milliseconds, median; `settle`: for how many of them it runs before."""
    for _ in range(3):
        call()
    watch, began = Stopwatch("cuda"), perf_counter()
    while 1000 * (perf_counter() - began) < settle:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    watch.mark()
    for _ in range(REPEATS):
        call()
        watch.mark()
    return median(watch.milliseconds())


def _attention(s: Shape, batch: int, settle: float) -> float:
    q, k, v = (
        torch.randn(batch, s.max_seq_len, heads, s.head_dim, dtype=torch.bfloat16, device="cuda")
        .transpose(1, 2)
        .requires_grad_()
        for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)
    )
    upstream = torch.randn_like(q)
    return _time(lambda: torch.autograd.grad(attention(q, k, v, s.head_dim**-0.5, 1.0), (q, k, v), upstream), settle)


def _copy() -> float:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _time(lambda: target.copy_(source))


def moved_bytes(s: Shape, tokens: int) -> int:
    """The formula at the top."""
    d, f, kv = s.hidden_size, s.intermediate_size, s.kv_size
    return tokens * (s.num_layers * (32 * d + 8 * (d + kv) + 16 * f) + 6 * s.vocab_size)


def floor_ms(s: Shape, tokens: int, formats: Mapping[str, Product], rates: Rates) -> float:
    """Milliseconds of forward + backward with every product at its best rate in its format."""
    by_part = {part: site for site in sites(s) for part in site.parts}
    total = s.num_layers * rates.attention + moved_bytes(s, tokens) / rates.copy
    for product in formats.values():
        site = by_part[_part(product.name)]
        times = (rates.bf16 if product.forward is None else rates.fp8)[site.name]
        total += sum(times) * product.fan_out / site.fan_out
    return total


def _part(name: str) -> str:
    """ "layers.3.attn.q" -> "attn.q"."""
    return name.split(".", 2)[-1] if name.startswith("layers.") else name


@dataclass(frozen=True)
class Advice:
    """Predicted milliseconds of an optimizer step's forward and backward passes, and their ratio BF16 / FP8."""

    recipe: str
    bf16_ms: float
    fp8_ms: float
    ratio: float
    verdict: str


def advise(config: RunConfig) -> Advice:
    """Whether FP8 would be faster for a config on this GPU, predicted from rates measured at its shapes.

    FP8 pays for encoding x (1 byte written) and g (2 read, 1 written) and for their transposes (2 bytes each) per
    token and feature, and for encoding the weights once per step. Of a BF16 config the recipe `fp8` is judged. What
    launching kernels costs, which decides below some 4096 tokens or 1024 features, is not predicted.
    """
    s, plan = shape_of(config.model), plan_for(config)
    batch, repeats = config.train.batch_size, config.train.grad_accum
    recipe, overrides = find_recipe(config.precision.recipe), config.precision.overrides
    if recipe.forward is None or recipe.simulated:
        recipe, overrides = find_recipe("fp8"), {}
    chosen = products(plan, recipe, overrides, "dynamic")
    plain = products(plan, find_recipe("bf16"), {}, "dynamic")
    rates = measure_rates(s, batch)
    tokens = batch * s.max_seq_len
    low = {_part(p.name) for p in chosen.values() if p.forward is not None}
    used = [site for site in sites(s) if low & set(site.parts)]
    per_pass = sum(site.count * tokens * (3 * site.fan_in + 5 * site.fan_out) for site in used)
    master = 2 if config.optimizer.master_dtype == "bf16" else 4
    per_step = sum(site.count * site.fan_in * site.fan_out * (master + 2) for site in used)
    bf16 = repeats * floor_ms(s, tokens, plain, rates)
    fp8 = repeats * (floor_ms(s, tokens, chosen, rates) + per_pass / rates.copy) + per_step / rates.copy
    ratio = bf16 / fp8
    verdict = (
        f"FP8 pays: predicted {ratio:.2f}x"
        if ratio >= MARGIN
        else f"FP8 does not pay: predicted {ratio:.2f}x, less than {MARGIN} is within the prediction's error"
    )
    return Advice(recipe.name, bf16, fp8, ratio, verdict)
