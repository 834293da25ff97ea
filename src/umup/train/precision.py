"""Ranges of a run's operands: looked at now and then, recorded, and what follows from them.

A look (train/look.py) is a pass over one sequence beside the compiled step, which it leaves as it is and does not
recompile. Output gradients under unit scaling do not depend on how many tokens share a batch, so one sequence shows
their scale. What a look finds out of its band is moved to the band's middle (numerics/ranges.py), for both directions
of drift; a tensor that no constant serves sends its product back to the stream's dtype.
"""

import json
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umup.checkpoint import write_atomic
from umup.errors import CheckpointError
from umup.nn.fp8 import OPERANDS, Encoded, encoded, refresh_weights, write_weights
from umup.nn.modules import Linear
from umup.numerics.formats import FloatFormat
from umup.numerics.ranges import FLUSH_LIMIT, Range, choose
from umup.optim.adamw import step_bound
from umup.train.look import Looks

LOOK = ("step", "product", "operand", "format", "exponent", "rms", "max", "nonfinite", "clip", "flush", "event")
"""A row of ranges.jsonl: one operand (x, g, w) of one product at one look, with the scale that it had then."""

OPERAND_NAMES = {"x": "input", "g": "output gradient"}


class ScaleKeeper:
    """The FP8 products of a model over a run; does nothing where there are none."""

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        every: int,
        record: Path | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.products = encoded(model)
        self.looks = Looks(model, [(p.name, p.matmul, p.weights) for p in self.products])
        self.mode, self.every, self.record, self.notice = mode, every, record, notice

    def due(self, step: int) -> bool:
        """Whether to look before step `step`: at every sampled step, and at powers of two on the way to the first."""
        watching = bool(self.products) and self.mode in ("monitor", "adapt")
        return watching and (step % self.every == 0 or (step < self.every and step & (step - 1) == 0))

    def look(self, step: int, loss: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Measure every operand during `loss(*inputs)` and its backward pass; record; in mode `adapt` move scales.

        On a GPU, looks at a `LookLoss` become a CUDA graph (train/look.py); any other loss may do what it likes.
        """
        ranges = self.looks(loss, *inputs)
        spared = [p.matmul.spared for p in self.products]
        rows = [row for p in self.products for row in self._judge(step, p, ranges)]
        if spared != [p.matmul.spared for p in self.products]:
            torch.compiler.reset()  # another graph from here on; many of them would reach the compiler's limit
        if self.record is not None:
            with self.record.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def _judge(self, step: int, p: Encoded, ranges: dict[tuple[str, str], Range]) -> Iterator[dict[str, Any]]:
        exponents = p.matmul.exponents.tolist()
        moved = list(exponents)
        for i, operand in enumerate(OPERANDS):
            if (p.name, operand) not in ranges:
                continue
            seen, form, event = ranges[p.name, operand], form_of(p, operand), None
            if operand != "w" and not p.matmul.spared:
                choice = choose(seen, form, exponents[i], 1.0 if operand == "g" else FLUSH_LIMIT)
                if not choice.serves:
                    event = "bf16"
                elif choice.exponent != exponents[i]:
                    event, moved[i] = f"2^{exponents[i]} -> 2^{choice.exponent}", choice.exponent
                if event is not None:
                    when = "" if self.mode == "adapt" else " if precision.scales were adapt"
                    self.notice(f"step {step}: {p.name} {OPERAND_NAMES[operand]}: {event}{when} ({choice.reason})")
            if event == "bf16" and self.mode == "adapt":
                p.matmul.spared = True
            yield {
                "step": step,
                "product": p.name,
                "operand": operand,
                "format": form.name,
                "exponent": exponents[i],
                "rms": seen.rms,
                "max": seen.amax,
                "nonfinite": seen.nonfinite,
                "clip": seen.clip_share(form, exponents[i]),
                "flush": seen.flush_share(form, exponents[i]),
                "event": event,
            }
        if self.mode == "adapt" and moved != exponents:
            p.matmul.set_exponents(torch.tensor(moved, dtype=torch.int32))

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the encoded weights equal to the weights from now on: a step-post-hook, so any torch.optim works."""

        def refresh(*_: Any) -> None:
            growth: dict[nn.Parameter, tuple[float, float]] = {}
            changed = {w for group in optimizer.param_groups for w in group["params"]}
            for group in optimizer.param_groups:
                bound = step_bound(optimizer, group)
                if bound is not None and isfinite(bound.absolute):
                    growth.update(dict.fromkeys(group["params"], (bound.absolute, bound.relative)))
            touched = [p for p in self.products if any(w in changed for w in p.weights)]
            bounded = [p for p in touched if all(w in growth for w in p.weights)]
            refresh_weights(bounded, growth)
            refresh_weights([p for p in touched if p not in bounded])

        if self.products:
            optimizer.register_step_post_hook(refresh)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by linear: exponents of x, g, w, whether the product was spared, its formats."""
        return {
            name: torch.cat((p.matmul.exponents.cpu(), torch.tensor([int(p.matmul.spared), *_fields(p)]).int()))
            for p in self.products
            for name in p.names
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with a checkpoint's scales, bit for bit; what it does not hold, or in other formats, starts anew."""
        anew = set()
        for p in self.products:
            kept, *others = (state.get(name, torch.zeros(0)) for name in p.names)
            same = all(torch.equal(kept, other) for other in others)  # they were one product then, too
            if same and kept[4:].tolist() == _fields(p):
                p.matmul.spared = bool(kept[3])
                p.matmul.set_exponents(kept[:3])
                write_weights(p)
            else:
                refresh_weights([p])
                anew |= set(p.names)
        ours = {name for p in self.products for name in p.names}
        for names, what in (
            (anew - state.keys(), "new in low precision, starting from the plan's scales"),
            (anew & state.keys(), "in other formats or groups, starting from the plan's scales"),
            (state.keys() - ours, "no longer in low precision"),
        ):
            if names:
                self.notice(f"{', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}: {what}")

    def rewind(self, step: int) -> None:
        """Drop the records of looks that a resumed run will do again."""
        if self.record is not None and self.record.exists():
            kept = [row for row in read_looks(self.record) if row["step"] < step]
            write_atomic(self.record, "".join(json.dumps(row) + "\n" for row in kept))


def read_looks(path: Path) -> list[dict[str, Any]]:
    """The rows of a ranges.jsonl, less a last line cut short by a kill. Raises CheckpointError for a damaged one."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in LOOK})
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}, line {number}: not a record of ranges; delete that line") from None
    return rows


def _fields(p: Encoded) -> list[int]:
    """Exponent and mantissa bits of a product's two formats: what tells formats apart."""
    return [bits for form in p.matmul.formats[:2] for bits in (form.exponent_bits, form.mantissa_bits)]


def form_of(p: Encoded, operand: str) -> FloatFormat:
    """The format of an operand x, g or w of a product."""
    return p.matmul.formats.gradient if operand == "g" else p.matmul.formats.forward


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first linear, in the order of the forward pass, whose input holds NaN or infinity; None if none does."""
    order: list[tuple[str, int]] = []
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            names.setdefault(module.matmul, name)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        order.append((names[module], int((~args[0].isfinite()).sum())))

    handles = [m.register_forward_pre_hook(hook) for m in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, count in order if count), None)
