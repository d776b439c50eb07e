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

from qsim_core.components.component import Component
from qsim_core.quantizers.observers import Extremes, Histogram, Observer

ErrorOf = Callable[[Tensor, Tensor], Tensor]
"""The difference that quantizing makes to the values under a range (lowest, highest)."""


class Calibrator(Component):
    """Chooses the range that a scale covers. One method to write: `range`.

    The same calibrator serves a scale that is found anew for each tensor and a static one, found once in calibration
    data: then `observer` gathers what has passed, and `range` is given values with counts.
    """

    kind: ClassVar[str] = "calibrator"
    hook: ClassVar[str] = "qsim_calibrators"

    @abstractmethod
    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value to cover, [..., B] each, for blocks [..., B, n].

        For a scale without a zero point the blocks hold magnitudes, and the lowest does not count.
        `error(lowest, highest)` is how far quantizing under a range moves each value, [..., B, n]. `counts`, in the
        shape of the blocks, says how many values each stands for (None: one); the zeros that fill up a short last block
        stand for none. A block with NaN or ±Inf must give a
        range that is not finite, so that it shows.
        """

    def observer(self) -> Observer:
        """What gathers the values for a static scale; by default a histogram."""
        return Histogram()


class MinMax(Calibrator):
    """From the lowest to the highest value."""

    name = "minmax"

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        return blocks.amin(-1), blocks.amax(-1)

    def observer(self) -> Observer:
        return Extremes()


class AbsMax(Calibrator):
    """As far to either side as the largest magnitude."""

    name = "absmax"

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        highest = blocks.abs().amax(-1)
        return -highest, highest

    def observer(self) -> Observer:
        return Extremes()


class Percentile(Calibrator):
    """All but the outermost values: p percent of the magnitudes, or, with a zero point, p percent at either end.

    Between two values it interpolates linearly, as numpy's `percentile` does by default.
    """

    name = "percentile"
    p: float = Field(99.9, gt=50, le=100, description="percent of the values to cover")

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        ordered, order = blocks.sort(-1)
        reached = (torch.ones_like(blocks) if counts is None else counts.gather(-1, order)).double().cumsum(-1)
        ends = ordered[..., 0], ordered[..., -1]
        low, high = (_quantile(ordered, reached, share) for share in (1 - self.p / 100, self.p / 100))
        return torch.where(ends[0].isfinite(), low, ends[0]), torch.where(ends[1].isfinite(), high, ends[1])


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

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = blocks.amin(-1), blocks.amax(-1)
        least = torch.full_like(high, torch.inf)
        best = torch.ones_like(high)
        for step in range(int((1 - self.lowest) * self.steps + 1e-9)):
            share = 1 - step / self.steps
            powers = error(share * low, share * high).abs().pow(self.norm)
            found = (powers if counts is None else powers * counts).sum(-1)
            better = found < least
            least, best = torch.where(better, found, least), torch.where(better, share, best)
        return best * low, best * high


def _quantile(ordered: Tensor, reached: Tensor, share: float) -> Tensor:
    """The value at a share of the way from the first to the last; `reached` says how many lie up to each."""
    place = share * (reached[..., -1:] - 1)
    below, above = (torch.searchsorted(reached, rank, right=True) for rank in (place.floor(), place.ceil()))
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    return (low + (high - low) * (place - place.floor()).to(low.dtype)).squeeze(-1)
