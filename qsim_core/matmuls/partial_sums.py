"""The running sums of a product along its reduction axis, as an accumulator sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOOKED_AT = 2**15
"""Outputs that are looked at for one matmul."""
EXACT = 2.0**-22
"""A sum that is nearer than this share of it has lost nothing to narrow additions: float32 itself rounds to 2^-24."""


@dataclass
class PartialSums:
    """Counts of the outputs of products, and the extremes of their running sums."""

    outputs: int = 0
    """The outputs that were looked at."""
    could_overflow: int | None = None
    """The outputs whose magnitudes add up to more than the accumulator holds; None: it has no such range."""
    overflowed: int = 0
    """The outputs of which any running sum left the accumulator's range, also if a later one came back."""
    inexact: int = 0
    """The outputs that are not the exact sum. Where sums wrap around, only the last one decides."""
    lowest: float = 0.0
    """The lowest running sum, in units of the scales if the accumulator adds up codes."""
    highest: float = 0.0
    whole: bool = False
    """True if the sums are whole numbers."""
    safe_rows: int | None = None
    """The rows of the right operand for which no left operand can cause an overflow; None: not known."""
    rows: int = 0
    """The rows of the right operand."""

    def __add__(self, other: PartialSums) -> PartialSums:
        if not self.outputs:
            return other
        return PartialSums(
            self.outputs + other.outputs,
            _plus(self.could_overflow, other.could_overflow),
            self.overflowed + other.overflowed,
            self.inexact + other.inexact,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.whole and other.whole,
            _plus(self.safe_rows, other.safe_rows),
            self.rows + other.rows,
        )

    @property
    def bits(self) -> int | None:
        """The bits of the largest running sum in two's complement; None for sums that are not whole numbers."""
        if not self.whole or not math.isfinite(self.highest - self.lowest):
            return None
        return 1 + max(int(self.highest).bit_length(), (-int(self.lowest) - 1).bit_length() if self.lowest < 0 else 0)


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def some_rows(left: Tensor, right: Tensor) -> Tensor:
    """Choose rows of the left operand `[..., M, K]`, evenly, so that few enough outputs are looked at."""
    batch = math.prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    count = max(1, LOOKED_AT // max(1, batch * right.shape[-2]))
    return torch.linspace(0, left.shape[-2] - 1, min(count, left.shape[-2]), device=left.device).long()


class Running(NamedTuple):
    """The running sums of each output, `[..., M, N]` each in float64."""

    low: Tensor
    high: Tensor
    total: Tensor
    magnitude: Tensor
    """The sum of magnitudes."""
    largest: Tensor
    """The magnitude of the largest product."""


def running(left: Tensor, right: Tensor, every: int = 1) -> Running:
    """Add up products of rows `[..., M, K]` and `[..., N, K]` one by one, from zero.

    A running sum counts for the lowest and the highest after each `every` products, and at the end.
    """
    shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-2])
    low, high, total, magnitude, largest, product = (
        torch.zeros(shape, dtype=torch.float64, device=left.device) for _ in range(6)
    )
    columns = [x.double().movedim(-1, 0).contiguous() for x in (left, right)]
    for place, (x, w) in enumerate(zip(*columns, strict=True), 1):
        torch.mul(x.unsqueeze(-1), w.unsqueeze(-2), out=product)
        total += product
        magnitude += product.abs_()
        torch.maximum(largest, product, out=largest)
        if place % every == 0 or place == left.shape[-1]:
            torch.minimum(low, total, out=low)
            torch.maximum(high, total, out=high)
    return Running(low, high, total, magnitude, largest)


def compared(left: Tensor, right: Tensor, product: Tensor) -> PartialSums:
    """Compare a product `[..., M, N]` of rows with the exact one: what overflowed, and what lost low bits."""
    chosen = some_rows(left, right)
    left, product = left.index_select(-2, chosen), product.index_select(-2, chosen).double()
    exact = left.double() @ right.double().transpose(-1, -2)
    low, high, *_ = running(left, right)
    proper = exact.isfinite()
    return PartialSums(
        outputs=product.numel(),
        overflowed=int((proper & ~product.isfinite()).sum()),
        inexact=int((proper & ~((product - exact).abs() <= EXACT * exact.abs())).sum()),
        lowest=float(low.nan_to_num(0.0).min()),
        highest=float(high.nan_to_num(0.0).max()),
        rows=right.shape[-2],
    )
