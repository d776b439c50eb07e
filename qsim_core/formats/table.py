"""A format's table in order, and rounding by search in it: the reference that every faster way is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core.formats.random_bits import uniform
from qsim_core.formats.rounding import Rounding


@dataclass(frozen=True)
class OrderedTable:
    """The values of a format in ascending order, with their codes and the points where rounding turns."""

    table: Tensor
    """The value of each code, float64 [number of codes]."""
    finite: Tensor
    """The finite values, ascending, each once: float64."""
    code: Tensor
    """The code of each, the lowest if there are several."""
    negative_zero: int | None
    points: Tensor
    """`finite`, and where the format can overflow the values that would come next on either side."""
    turns: Tensor
    """x <= turns[i] rounds to points[i] or below it; ties are decided by moving a turn down by one ulp."""
    beyond: float

    @classmethod
    def of(
        cls,
        table: Tensor,
        boundaries: Callable[[Tensor], Tensor],
        following: Callable[[Tensor], float],
        overflow: float | None,
        rounding: Rounding,
    ) -> OrderedTable:
        """The table of a format, by its own boundaries between values and the value that follows the largest."""
        table = table.double()
        finite, place = torch.sort(table[table.isfinite()], stable=True)
        code = table.isfinite().nonzero().flatten()[place]
        zero = (finite == 0) & finite.signbit()
        negative_zero = int(code[zero][0]) if zero.any() else None
        first = torch.cat([torch.tensor([True]), finite[1:] != finite[:-1]])  # of equal values, that of the lowest code
        finite, code = finite[first], code[first]
        points, parity, beyond = finite, code % 2, following(finite)
        if overflow is not None:
            above = torch.tensor([beyond], dtype=torch.float64)
            points, parity = torch.cat([points, above]), torch.cat([parity, 1 - parity[-1:]])
            if finite[0] < 0:
                points, parity = torch.cat([-above, points]), torch.cat([1 - parity[:1], parity])
        turns = _turns(boundaries(points), rounding, points, parity)
        return cls(table, finite, code, negative_zero, points, turns, beyond)

    @property
    def width(self) -> int:
        """Bits of one code."""
        return max(1, (len(self.table) - 1).bit_length())

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.finite[-1])

    @property
    def min(self) -> float:
        """The lowest finite value."""
        return float(self.finite[0])

    def nearest(self, x: Tensor, rounding: Rounding, seed: int) -> Tensor:
        """The point that each element rounds to, in the dtype of `x`. NaN stays NaN."""
        wide, points = x.double().contiguous(), self.points.to(x.device)
        if rounding == "stochastic":
            index = (torch.bucketize(wide, points, right=True) - 1).clamp(0, len(points) - 2)
            below, above = points[index], points[index + 1]
            y = torch.where(uniform(x, seed) < (wide - below) / (above - below), above, below)
        else:
            y = points[torch.bucketize(wide, self.turns.to(x.device))]
        if self.negative_zero is not None:
            y = torch.where(y == 0, torch.copysign(y, wide), y)
        return torch.where(wide.isnan(), wide, y).to(x.dtype)

    def codes_of(self, values: Tensor, has_nan: bool) -> tuple[Tensor, float | None]:
        """The code of each value, and the first value that has none (None: all have one)."""
        wide, finite, code = values.double().contiguous(), self.finite.to(values.device), self.code.to(values.device)
        index = torch.bucketize(wide, finite).clamp(max=len(finite) - 1)
        codes = code[index]
        if self.negative_zero is not None:
            codes = torch.where((wide == 0) & wide.signbit(), self.negative_zero, codes)
        found = finite[index] == wide
        for special in (torch.inf, -torch.inf, *((torch.nan,) if has_nan else ())):
            places = (self.table.isnan() if special != special else self.table == special).nonzero()
            if len(places):
                here = wide.isnan() if special != special else wide == special
                codes, found = torch.where(here, places[0].item(), codes), found | here
        return codes, None if found.all() else wide[~found][0].item()


def _turns(turns: Tensor, rounding: Rounding, points: Tensor, parity: Tensor) -> Tensor:
    """The largest number between each two points that rounds to the lower one; `turns` are the points' boundaries."""
    low, high = points[:-1], points[1:]
    if rounding == "zero":
        turns = torch.where(low >= 0, high, torch.where(high <= 0, low, turns))
        up = torch.zeros_like(turns, dtype=torch.bool)
    elif rounding == "away":
        up = turns >= 0
    else:
        both_even = (parity[:-1] == 0) & (parity[1:] == 0)
        up = torch.where(both_even, high.abs() < low.abs(), parity[1:] == 0)
    up = (up & (turns > low)) | (turns >= high)  # a value is no tie
    return torch.where(up, torch.nextafter(turns, torch.tensor(-torch.inf, dtype=turns.dtype)), turns)
