"""Which range a scale covers: a calibrator looks at the values and gives a lowest and a highest.

`minmax` and `absmax` cover every value, `percentile` all but a few, `mse` what makes the error least.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core.component import Component

Rounded = Callable[[Tensor, Tensor], Tensor]
"""The difference that quantizing makes to the values under a range (lowest, highest)."""


class Calibrator(Component):
    """Chooses the range that a scale covers. One method to write: `range`."""

    kind: ClassVar[str] = "calibrator"

    @abstractmethod
    def range(self, blocks: Tensor, error: Rounded) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value to cover, [..., B] each, for blocks [..., B, n].

        For a scale without a zero point the blocks hold magnitudes, and the lowest does not count.
        `error(lowest, highest)` is how far quantizing under a range moves each value, [..., B, n]. A block with NaN
        or ±Inf must give a range that is not finite, so that it shows.
        """


class MinMax(Calibrator):
    """From the lowest to the highest value."""

    name = "minmax"

    def range(self, blocks: Tensor, error: Rounded) -> tuple[Tensor, Tensor]:
        return blocks.amin(-1), blocks.amax(-1)


class AbsMax(Calibrator):
    """As far to either side as the largest magnitude."""

    name = "absmax"

    def range(self, blocks: Tensor, error: Rounded) -> tuple[Tensor, Tensor]:
        highest = blocks.abs().amax(-1)
        return -highest, highest


class Percentile(Calibrator):
    """All but the outermost values: p percent of the magnitudes, or, with a zero point, p percent at either end.

    Between two values it interpolates linearly, as numpy's `percentile` does by default.
    """

    name = "percentile"
    p: float = Field(99.9, gt=50, le=100, description="percent of the values to cover")

    def range(self, blocks: Tensor, error: Rounded) -> tuple[Tensor, Tensor]:
        ordered = blocks.sort(-1).values
        ends = ordered[..., 0], ordered[..., -1]
        shares = (1 - self.p / 100, self.p / 100)
        low, high = (
            torch.where(end.isfinite(), _quantile(ordered, share), end) for end, share in zip(ends, shares, strict=True)
        )
        return low, high


class MSE(Calibrator):
    """The range, shrunk step by step from the minimum and maximum, that makes the error least.

    Of the candidates 1, 1 - 1/steps, … times the whole range, those above `lowest`, the first with the least sum of
    |error|^norm is taken. Source: the grid search of GPTQ's reference implementation (arXiv 2210.17323), whose
    norm 2.4, 100 steps and 0.2 are the defaults.
    """

    name = "mse"
    norm: float = Field(2.4, gt=0, description="power of the error")
    steps: PositiveInt = Field(100, description="candidates from the whole range to none of it")
    lowest: float = Field(0.2, ge=0, lt=1, description="share of the range where the search ends")

    def range(self, blocks: Tensor, error: Rounded) -> tuple[Tensor, Tensor]:
        low, high = blocks.amin(-1), blocks.amax(-1)
        least = torch.full_like(high, torch.inf)
        best = torch.ones_like(high)
        for step in range(int((1 - self.lowest) * self.steps + 1e-9)):
            share = 1 - step / self.steps
            found = error(share * low, share * high).abs().pow(self.norm).sum(-1)
            better = found < least
            least, best = torch.where(better, found, least), torch.where(better, share, best)
        return best * low, best * high


def _quantile(ordered: Tensor, share: float) -> Tensor:
    place = share * (ordered.shape[-1] - 1)
    below = int(place)
    low, high = ordered[..., below], ordered[..., min(below + 1, ordered.shape[-1] - 1)]
    return low + (high - low) * (place - below)
