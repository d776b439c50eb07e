"""The running sums of a product along its reduction axis, as an accumulator sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOOKED_AT = 2**25
"""Products that are looked at for one matmul."""
HELD = 2**22
"""Products that are held in memory at a time."""
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
    """The outputs of which a running sum left the accumulator's range."""
    inexact: int = 0
    """The outputs that are not the exact sum."""
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
    """Choose rows of the left operand `[..., M, K]`, evenly, so that few enough products are looked at."""
    *batch, n, k = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]) + right.shape[-2:]
    count = max(1, LOOKED_AT // max(1, math.prod(batch) * n * k))
    return torch.linspace(0, left.shape[-2] - 1, min(count, left.shape[-2]), device=left.device).long()


def running(left: Tensor, right: Tensor, every: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Give the lowest and the highest running sum, and the sum of magnitudes, of each output.

    left `[..., M, K]`, right `[..., N, K]` -> three times `[..., M, N]` in float64. A running sum counts after each
    `every` products. It starts at zero.
    """
    shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-2])
    low, high, total, magnitude = (torch.zeros(shape, dtype=torch.float64, device=left.device) for _ in range(4))
    length = max(every, HELD // max(1, total.numel()) // every * every)
    for x, w in zip(left.double().split(length, -1), right.double().split(length, -1), strict=True):
        products = x.unsqueeze(-2) * w.unsqueeze(-3)
        sums = products.cumsum(-1) + total.unsqueeze(-1)
        total, magnitude = sums[..., -1], magnitude + products.abs().sum(-1)
        seen = torch.cat([sums[..., every - 1 :: every], total.unsqueeze(-1)], -1)
        low, high = torch.minimum(low, seen.amin(-1)), torch.maximum(high, seen.amax(-1))
    return low, high, magnitude


def compared(left: Tensor, right: Tensor, product: Tensor) -> PartialSums:
    """Compare a product `[..., M, N]` of rows with the exact one: what overflowed, and what lost low bits."""
    chosen = some_rows(left, right)
    left, product = left.index_select(-2, chosen), product.index_select(-2, chosen).double()
    exact = left.double() @ right.double().transpose(-1, -2)
    low, high, _ = running(left, right)
    proper = exact.isfinite()
    return PartialSums(
        outputs=product.numel(),
        overflowed=int((proper & ~product.isfinite()).sum()),
        inexact=int((proper & ~((product - exact).abs() <= EXACT * exact.abs())).sum()),
        lowest=float(low.nan_to_num(0.0).min()),
        highest=float(high.nan_to_num(0.0).max()),
        rows=right.shape[-2],
    )
