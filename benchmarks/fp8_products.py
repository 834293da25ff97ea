"""Rates of every FP8 product of a layer stack, whole and split along tokens or output features, fast and slow.

    python benchmarks/fp8_products.py [--hidden-size 4096] [--inner 11008] [--vocab 32768] [--tokens 16384]

Every candidate runs for the same time, in turns with the others of its product and after a warm-up that brings the GPU
to the power at which it trains: a GEMM timed alone on a cool chip promises more than a training step gets. Printed are
TFLOP/s, and the best candidate against the whole product. Splitting is worth its launches only where a product runs far
below its neighbours.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from umup.study.rooflines import Stopwatch

ROUNDS = 5
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random normal values, contiguous along the contraction."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(dtype)


def product(a: Tensor, b: Tensor, one: Tensor, fast: bool, parts: tuple[int, int]) -> Callable[[], list[Tensor]]:
    """a b^T in a number of pieces along the rows of a and of b."""
    pieces = [(x, y) for x in a.chunk(parts[0]) for y in b.chunk(parts[1])]
    return lambda: [
        torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast) for x, y in pieces
    ]


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """Mean time of a call, repeated for about `seconds`."""
    repeats = max(3, int(1000 * seconds / _run(call, 1)))
    return _run(call, repeats) / repeats


def _run(call: Callable[[], object], repeats: int) -> float:
    watch = Stopwatch("cuda")
    watch.mark()
    for _ in range(repeats):
        call()
    watch.mark()
    return watch.milliseconds()[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=0.02)
    args = parser.parse_args()
    d, t = args.hidden_size, args.tokens
    linears = {
        "qkv": (d, 3 * d),
        "out": (d, d),
        "up": (d, 2 * args.inner),
        "down": (args.inner, d),
        "head": (d, args.vocab),
    }
    splits = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))
    one = torch.ones(1, 1, device="cuda")
    hot = product(operand(8192, 8192, E4M3), operand(8192, 8192, E4M3), one, False, (1, 1))
    milliseconds(hot, 2.0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s by accumulation, pieces of rows x columns"
    )
    for name, (fan_in, fan_out) in linears.items():
        shapes = {
            "forward": (operand(t, fan_in, E4M3), operand(fan_out, fan_in, E4M3)),
            "input": (operand(t, fan_out, E5M2), operand(fan_in, fan_out, E4M3)),
            "weight": (operand(fan_out, t, E5M2), operand(fan_in, t, E4M3)),
        }
        for which, (a, b) in shapes.items():
            calls = {(fast, s): product(a, b, one, fast, s) for fast in (True, False) for s in splits}
            times: dict[tuple[bool, tuple[int, int]], list[float]] = {key: [] for key in calls}
            for _ in range(ROUNDS):
                for key, call in calls.items():
                    times[key].append(milliseconds(call, args.seconds))
            rates = {key: 2e-9 * t * fan_in * fan_out / median(found) for key, found in times.items()}
            best = max(rates, key=rates.__getitem__)
            shown = "  ".join(f"{'fast' if f else 'slow'} {s[0]}x{s[1]} {rate:.0f}" for (f, s), rate in rates.items())
            print(
                f"{name:5s}{which:8s} {shown}  best +{100 * (rates[best] / rates[best[0], (1, 1)] - 1):.1f}% {best[1]}"
            )


if __name__ == "__main__":
    main()
