"""SignRound: offsets of elements and factors of ranges, learned by the signs of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from qsim_rounding.cells import Grid
from qsim_rounding.learning import Choice, LearnedRounding, flat


class Offsets(Choice):
    """v [..., B, n] is added to each element, in units of the distance of its neighbours, and then it is rounded."""

    def __init__(self, grid: Grid, ranges: bool) -> None:
        super().__init__(grid)
        self.offset = torch.zeros_like(grid.blocks).requires_grad_()
        self.factor = torch.ones_like(grid.exact).requires_grad_(ranges)

    @property
    def learned(self) -> list[Tensor]:
        return [self.offset, *([self.factor] if self.factor.requires_grad else [])]

    def soft(self) -> Tensor:
        scale, zero = self.grid.scales(self.factor)
        return self.grid.join(self._units(scale, zero), scale, zero)

    def hard(self) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            scale, zero = self.grid.scales(self.factor)
            return self.grid.join(self._units(scale, zero), scale, zero), scale, zero

    def _units(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        units = self.grid.units(scale, zero)
        cells = self.grid.cells(units)
        up = (cells.share + self.offset.detach()).round().clamp(0, 1)
        moved = units + self.offset * cells.step
        return moved + (cells.low + up * cells.step - moved).detach()


class SignRound(LearnedRounding):
    """Adds to each element in units of its scale an offset of -1/2 to 1/2, and multiplies each range by a factor.

    Both follow the signs of their gradients, with a rate that falls from 1 / steps to 0. What had the least error in a
    step is kept. Source: SignRound (arXiv 2309.05516), as in intel/auto-round. The README lists every difference.
    """

    name = "signround"
    steps: int = Field(200, gt=0, description="steps for each block")
    ranges: bool = Field(True, description="learn a factor of each range too, from 0 to 1")

    def choice(self, grid: Grid) -> Offsets:
        return Offsets(grid, self.ranges)

    def learn(self, choices: Sequence[Choice], gradients: Iterator[tuple[float, list[Tensor]]]) -> None:
        learned, least = flat(choices), float("inf")
        best = [x.detach().clone() for x in learned]
        for step, (error, by_rows) in enumerate(gradients):
            if error < least:
                least, best = error, [x.detach().clone() for x in learned]
            rate = (1 - step / self.steps) / self.steps
            for choice, gradient in zip(choices, by_rows, strict=True):
                of = torch.autograd.grad(choice.soft(), choice.learned, gradient.to(choice.grid.blocks.dtype))
                with torch.no_grad():
                    for x, direction, bounds in zip(choice.learned, of, ((-0.5, 0.5), (0.0, 1.0)), strict=False):
                        x.sub_(rate * direction.sign()).clamp_(*bounds)
        with torch.no_grad():
            for x, kept in zip(learned, best, strict=True):
                x.copy_(kept)
