"""Bandwidth of the FP8 kernels on this GPU, each launch configuration against a plain device copy of as many bytes.

    python benchmarks/kernels.py

Printed per shape: GB/s (bytes read plus written) and the share of the copy's; the default of each kernel is marked.
Medians of 50 launches timed by CUDA events, over buffers that together exceed the L2 cache, on normal data. Needs a
CUDA GPU.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from statistics import median

import torch
from torch import Tensor

from umup.numerics.kernels import Tile, cast, cross_entropy, rope, swiglu, transpose

SHAPES = ((16384, 4096), (16384, 11008), (4096, 12288))
# Chunks of the loss: tokens and vocabulary.
LOGITS = ((4096, 32768), (1024, 131072))
REPEATS = 50
WARMUP = 5
# Several times the 50 MB of L2 that Hopper has.
WORKING_SET = 400 * 2**20
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

Launch = Callable[[], None]


def microseconds(launches: list[Launch]) -> float:
    """Median device time of one launch, taking the launches in turn."""
    turns = cycle(launches)
    for _ in range(max(WARMUP, len(launches))):
        next(turns)()
    # Work ahead of the first event, so that the device is busy while the host queues the launches.
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    marks: list[torch.cuda.Event] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(REPEATS + 1)
    ]
    marks[0].record()
    for mark in marks[1:]:
        next(turns)()
        mark.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return 1000 * median(times)


def sets(moved: int) -> range:
    """As many sets of buffers as exceed the L2 cache, each moving `moved` bytes."""
    return range(max(2, -(-WORKING_SET // moved)))


def copies(moved: int) -> list[Launch]:
    """Device copies that read and write `moved` bytes together."""
    pairs = [(torch.randn(moved // 8, device="cuda"), torch.empty(moved // 8, device="cuda")) for _ in sets(moved)]
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]


def transposes(rows: int, columns: int, tile: Tile) -> list[Launch]:
    """`transpose8` of (rows, columns)."""
    x = torch.randn(rows, columns, device="cuda").to(E4M3)
    pairs = [(x.clone(), x.new_empty(columns, rows)) for _ in sets(2 * x.numel())]
    return [lambda x=x, out=out: transpose.launch(x, out, tile) for x, out in pairs]  # type: ignore[misc]


def casts(rows: int, columns: int, tile: Tile, source: torch.dtype, dtype: torch.dtype, amax: bool) -> list[Launch]:
    """`cast_transpose`, or with `amax` `cast_weights`, of (rows, columns)."""
    x = torch.randn(rows, columns, device="cuda").to(source)
    scale = torch.ones((), device="cuda")
    top = torch.zeros((), device="cuda") if amax else None

    def one(x: Tensor) -> Launch:
        row = torch.empty(rows, columns, dtype=dtype, device="cuda")
        column = row.new_empty(columns, rows)
        return lambda: cast.launch(x, scale, dtype, row, column, top, tile)

    return [one(x.clone()) for _ in sets((x.element_size() + 2) * x.numel())]


def swiglus(rows: int, columns: int, tile: Tile, source: torch.dtype) -> list[Launch]:
    """`swiglu_backward` of an activation (rows, columns), gate and up in `source`."""
    one = torch.ones((), device="cuda")

    def launch(da: Tensor, gu: Tensor) -> Launch:
        row = torch.empty(rows, 2 * columns, dtype=E5M2, device="cuda")
        outputs = row, row.new_empty(2 * columns, rows), torch.empty(columns, rows, dtype=E4M3, device="cuda")
        return lambda: swiglu.launch(da, gu, 1.0, 1.7, one, one, *outputs, tile)

    da, gu = (torch.randn(rows, n * columns, device="cuda") for n in (1, 2))
    return [launch(da.bfloat16(), gu.to(source)) for _ in sets(11 * rows * columns)]


def ropes(rows: int, columns: int, tile: Tile, by_heads: bool) -> list[Launch]:
    """`rope_backward` into (rows, columns): heads of 128, 8 of them keys; memory `by_heads` or by positions first."""
    batch, kv_heads, size = 4, 8, 128
    positions, heads = rows // batch, columns // size - 2 * kv_heads
    one = torch.ones((), device="cuda")
    cos, sin = (torch.randn(positions, size // 2, device="cuda").bfloat16() for _ in range(2))

    def gradient(n: int) -> Tensor:
        shape = (batch, n, positions, size) if by_heads else (batch, positions, n, size)
        grad = torch.randn(shape, device="cuda").bfloat16()
        return grad if by_heads else grad.transpose(1, 2)

    def launch() -> Launch:
        dq, dk, dv = (gradient(n) for n in (heads, kv_heads, kv_heads))
        row = torch.empty(rows, columns, dtype=E5M2, device="cuda")
        column = row.new_empty(columns, rows)
        return lambda: rope.launch(dq, dk, dv, cos, sin, one, row, column, tile)

    return [launch() for _ in sets(4 * rows * columns)]


def losses(rows: int, columns: int, tile: Tile, dtype: torch.dtype | None) -> list[Launch]:
    """`token_losses` of bfloat16 logits (rows, columns), their gradient in `dtype` or left out."""
    targets = torch.randint(columns, (rows,), device="cuda")
    scale = torch.ones((), device="cuda") if dtype == E5M2 else None

    def launch() -> Launch:
        logits, found = torch.randn(rows, columns, device="cuda").bfloat16(), torch.empty(rows, device="cuda")
        gradient = None if dtype is None else torch.empty(rows, columns, dtype=dtype, device="cuda")
        return lambda: cross_entropy.launch(logits, targets, 1.0, 1.0, scale, found, gradient, tile)

    return [launch() for _ in sets(2 * rows * columns)]


def loss_measurements(rows: int, columns: int) -> Iterator[tuple[str, int, list[Launch]]]:
    """As `measurements`, of the loss; logits count as read once."""
    for name, dtype in (("to E5M2", E5M2), ("to bf16", torch.bfloat16), ("alone", None)):
        for tile in cross_entropy.CONFIGS:
            moved = (2 if dtype is None else 2 + dtype.itemsize) * rows * columns
            launches = losses(rows, columns, tile, dtype)
            yield f"token_losses {name}{label(tile, cross_entropy.DEFAULT)}", moved, launches


def measurements(rows: int, columns: int) -> Iterator[tuple[str, int, list[Launch]]]:
    """Name, bytes moved and launches of everything measured at one shape."""
    size = rows * columns
    for tile in transpose.CONFIGS:
        yield f"transpose8{label(tile, transpose.DEFAULT)}", 2 * size, transposes(rows, columns, tile)
    for name, source, dtype, amax in (
        ("cast_transpose bf16 to E4M3", torch.bfloat16, E4M3, False),
        ("cast_transpose bf16 to E5M2", torch.bfloat16, E5M2, False),
        ("cast_weights bf16", torch.bfloat16, E4M3, True),
        ("cast_weights fp32", torch.float32, E4M3, True),
    ):
        for tile in cast.CONFIGS:
            moved = (source.itemsize + 2) * size
            yield name + label(tile, cast.DEFAULT), moved, casts(rows, columns, tile, source, dtype, amax)
    for name, source in (("swiglu_backward bf16", torch.bfloat16), ("swiglu_backward gu in E4M3", E4M3)):
        for tile in swiglu.CONFIGS:
            moved = (7 + 2 * source.itemsize) * size
            yield name + label(tile, swiglu.DEFAULT), moved, swiglus(rows, columns, tile, source)
    for name, by_heads in (("rope_backward bhsd", True), ("rope_backward bshd", False)):
        for tile in rope.CONFIGS:
            yield name + label(tile, rope.DEFAULT), 4 * size, ropes(rows, columns, tile, by_heads)


def label(tile: Tile, default: Tile) -> str:
    """How a configuration is printed."""
    return f" {tile.rows}x{tile.columns}/{tile.warps}{' (default)' if tile == default else ''}"


def report(
    rows: int, columns: int, bytes_each: tuple[int, ...], measured: Iterator[tuple[str, int, list[Launch]]]
) -> None:
    """Measure and print one shape; `bytes_each` lists the bytes per element that its measurements move."""
    print(f"\n[{rows}, {columns}]")
    copied = {moved: moved / microseconds(copies(moved)) / 1000 for moved in (n * rows * columns for n in bytes_each)}
    print("  device copy, GB/s: " + ", ".join(f"{rate:.0f} of {moved >> 20} MiB" for moved, rate in copied.items()))
    for name, moved, launches in measured:
        rate = moved / microseconds(launches) / 1000
        print(f"  {name:<52}{rate:6.0f} GB/s {100 * rate / copied[moved]:5.0f}%")
        del launches


def main() -> None:
    """Measure and print."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; tile rows x columns / warps")
    for shape in SHAPES:
        report(*shape, (2, 4, 6, 9, 11), measurements(*shape))
    for shape in LOGITS:
        report(*shape, (2, 3, 4), loss_measurements(*shape))


if __name__ == "__main__":
    main()
