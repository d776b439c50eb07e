"""The values of a format in ascending order, and rounding by a search in them: the reference for all faster code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core.formats.random_bits import uniform
from qsim_core.formats.rounding import Rounding


@dataclass(frozen=True)
class OrderedTable:
    """The values of a format in ascending order, with their codes and the boundaries of rounding."""

    table: Tensor
    """The value of each code, float64 [number of codes]."""
    finite: Tensor
    """The finite values in ascending order without repetition, float64."""
    code: Tensor
    """The code of each finite value, the lowest if it has several."""
    negative_zero: int | None
    """The code of -0; None without -0."""
    points: Tensor
    """`finite`; for a format that can overflow also the values that would follow on either side."""
    turns: Tensor
    """x <= turns[i] rounds to points[i] or below. Where a tie goes up, the turn is one ulp below the boundary."""
    beyond: float
    """The value that would follow the largest."""

    @classmethod
    def of(
        cls,
        table: Tensor,
        boundaries: Callable[[Tensor], Tensor],
        following: Callable[[Tensor], float],
        overflow: float | None,
        rounding: Rounding,
    ) -> OrderedTable:
        """Put the table of a format in order.

        `boundaries` gives the boundaries between ascending values, `following` the value after the largest.
        """
        table = table.double()
        finite, place = torch.sort(table[table.isfinite()], stable=True)
        code = table.isfinite().nonzero().flatten()[place]
        zero = (finite == 0) & finite.signbit()
        negative_zero = int(code[zero][0]) if zero.any() else None
        first = torch.cat([torch.tensor([True]), finite[1:] != finite[:-1]])  # of equal values the one of lowest code
        finite, code = finite[first], code[first]
        points = finite
        parity = code % 2
        beyond = following(finite)
        if overflow is not None:
            above = torch.tensor([beyond], dtype=torch.float64)
            points = torch.cat([points, above])
            parity = torch.cat([parity, 1 - parity[-1:]])
            if finite[0] < 0:
                points = torch.cat([-above, points])
                parity = torch.cat([1 - parity[:1], parity])
        turns = _turns(boundaries(points), rounding, points, parity)
        return cls(table, finite, code, negative_zero, points, turns, beyond)

    @property
    def width(self) -> int:
        """The number of bits of one code."""
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
        """Round each element to one of the points, in the dtype of `x`. NaN stays NaN."""
        wide = x.double().contiguous()
        points = self.points.to(x.device)
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
        """The code of each value, and the first value without a code (None: every value has one)."""
        wide = values.double().contiguous()
        finite = self.finite.to(values.device)
        code = self.code.to(values.device)
        index = torch.bucketize(wide, finite).clamp(max=len(finite) - 1)
        codes = code[index]
        if self.negative_zero is not None:
            codes = torch.where((wide == 0) & wide.signbit(), self.negative_zero, codes)
        found = finite[index] == wide
        specials = [
            (self.table == torch.inf, wide == torch.inf),
            (self.table == -torch.inf, wide == -torch.inf),
        ]
        if has_nan:
            specials.append((self.table.isnan(), wide.isnan()))
        for in_table, in_values in specials:
            special_codes = in_table.nonzero()
            if len(special_codes):
                codes = torch.where(in_values, special_codes[0].item(), codes)
                found = found | in_values
        return codes, None if found.all() else wide[~found][0].item()


def _turns(turns: Tensor, rounding: Rounding, points: Tensor, parity: Tensor) -> Tensor:
    """The largest number between two neighbouring points that rounds to the lower one, for all neighbours.

    `turns` are the boundaries between the points. `parity` is 1 for a point with an odd code.
    """
    low, high = points[:-1], points[1:]
    if rounding == "zero":
        turns = torch.where(low >= 0, high, torch.where(high <= 0, low, turns))
        up = torch.zeros_like(turns, dtype=torch.bool)
    elif rounding == "away":
        up = turns >= 0
    else:
        both_even = (parity[:-1] == 0) & (parity[1:] == 0)
        up = torch.where(both_even, high.abs() < low.abs(), parity[1:] == 0)
    up = (up & (turns > low)) | (turns >= high)  # a boundary at a point is not a tie
    return torch.where(up, torch.nextafter(turns, torch.tensor(-torch.inf, dtype=turns.dtype)), turns)
