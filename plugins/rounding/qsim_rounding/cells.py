"""The two values of a format between which each element lies, and the values that a choice between them gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsim_core import Scheme
from qsim_core.quantizers.scheme import divisor_of


class Cells(NamedTuple):
    """For each element of a weight, divided by its scale and with its zero point added."""

    low: Tensor
    """The value of the format below it, or at it."""
    step: Tensor
    """The distance to the value above."""
    share: Tensor
    """The share of this distance at which it lies, 0 to 1."""


class Grid:
    """The grid of one weight: its blocks [..., B, n], and the scales [..., B] that its scheme gives them.

    Scales of scales stay as they are.
    """

    def __init__(self, rows: Tensor, scheme: Scheme) -> None:
        self.rows, self.scheme = rows, scheme
        self.blocks, self.exact, self.zero, self.of_scales = scheme.measured(rows)
        table = scheme.coded.table()
        self.values = table[table.isfinite()].unique().to(self.blocks)

    def scales(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The rounded scales and zero points [..., B, 1], of ranges that are `factor` [..., B] times as wide.

        The gradient passes straight through the rounding of both.
        """
        exact, zero = self.exact, self.zero
        if factor is not None and zero is not None:
            element, offset = self.scheme.coded, zero.squeeze(-1)
            low, high = (element.min - offset) * exact * factor, (element.max - offset) * exact * factor
            exact, zero = self.scheme.covering(low, high, self.of_scales)
        elif factor is not None:
            exact = exact * factor
        rounded = self.scheme.rounded_scale(exact.detach(), self.of_scales)
        scale = exact + (rounded - exact).detach()
        return scale.unsqueeze(-1), zero

    def units(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The elements in units of their scales, inside the format's range."""
        units = self.blocks / divisor_of(scale)
        return (units if zero is None else units + zero).clamp(self.values[0], self.values[-1])

    def cells(self, units: Tensor) -> Cells:
        """The neighbours of elements in the format."""
        units = units.detach().contiguous()
        place = torch.searchsorted(self.values, units, right=True).sub_(1).clamp_(0, len(self.values) - 2)
        low = self.values[place]
        step = self.values[place + 1] - low
        return Cells(low, step, (units - low) / step)

    def join(self, units: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The rows that have these values of the format, in the dtype of the arithmetic."""
        return self.scheme.join((units if zero is None else units - zero) * scale, self.rows)
