"""Calibrators: each chooses the range that a scale covers, from the lowest to the highest value.

`minmax` and `absmax` cover every value, `percentile` all but a few values, and `mse` the range with the least error.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.quantizers.observers import Extremes, Histogram, Observer


class ErrorOf(Protocol):
    """The quantization error of a scheme under a range, which `Calibrator.range` may compare for several ranges."""

    def __call__(self, lowest: Tensor, highest: Tensor, /) -> Tensor:
        """Give quantized minus original values [..., B, n] for ranges from `lowest` [..., B] to `highest` [..., B].

        The error has the unit of the values, and is not divided by the scale. Scales are what the scheme makes of the
        range: by its rule, and rounded. A scheme without a zero point does not use `lowest`. For a static scale the
        error is that of each value which stands for others: multiply a sum over it by `counts`.
        """


class Calibrator(Component):
    """Chooses the range that a scale covers. An author writes one method: `range`.

    The same calibrator serves a scale that is found anew for each tensor, and a static scale that is found once in
    calibration data. For a static scale `observer` gathers the values of all data, and `range` gets values with counts.
    """

    kind: ClassVar[str] = "calibrator"
    hook: ClassVar[str] = "qsim_calibrators"

    @abstractmethod
    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose the lowest and the highest value to cover, [..., B] each, for blocks [..., B, n].

        For a scale without a zero point the blocks hold magnitudes, and the lowest value of the range is not used.
        `error(lowest, highest)` gives the quantized minus the original values under a range, [..., B, n]: see
        `ErrorOf`. `counts` has the shape of the blocks: the number of values that each element stands for (None: one).
        It is 0 for a zero that fills up a short last block. For a block with NaN or ±Inf the range must not be finite,
        so that it shows.
        """

    def whole(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Give the range of all values, before any choice: the scales of the scales cover it."""
        return blocks.amin(-1), blocks.amax(-1)

    def observer(self) -> Observer:
        """Make an observer that gathers the values for a static scale; by default a histogram."""
        return Histogram()


class MinMax(Calibrator):
    """Covers from the lowest to the highest value."""

    name = "minmax"

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.whole(blocks)

    def observer(self) -> Observer:
        return Extremes()


class AbsMax(Calibrator):
    """Covers the same distance on both sides of zero: the largest magnitude."""

    name = "absmax"

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.whole(blocks)

    def whole(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        highest = blocks.abs().amax(-1)
        return -highest, highest

    def observer(self) -> Observer:
        return Extremes()


class Percentile(Calibrator):
    """Covers all but the outermost values: p percent of the magnitudes, or with a zero point p percent at each end.

    It interpolates linearly between two values, as numpy's `percentile` does by default.
    """

    name = "percentile"
    p: float = Field(99.9, gt=50, le=100, description="percent of the values to cover")

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        ordered, order = blocks.sort(-1)
        counts_in_order = torch.ones_like(blocks) if counts is None else counts.gather(-1, order)
        cumulative = counts_in_order.double().cumsum(-1)
        lowest, highest = ordered[..., 0], ordered[..., -1]
        low = _quantile(ordered, cumulative, 1 - self.p / 100)
        high = _quantile(ordered, cumulative, self.p / 100)
        return torch.where(lowest.isfinite(), low, lowest), torch.where(highest.isfinite(), high, highest)


class MSE(Calibrator):
    """Covers the part of the whole range, from minimum to maximum, that makes the quantization error least.

    The candidates are 1, 1 - 1/steps, 1 - 2/steps, … times the whole range, down to the share `lowest`, which is left
    out. The first candidate with the least sum of |error|^norm is taken. Source: the grid search of GPTQ's
    reference implementation (arXiv 2210.17323); the defaults are its norm 2.4, 100 steps and 0.2.
    """

    name = "mse"
    norm: float = Field(2.4, gt=0, description="power of the error")
    steps: PositiveInt = Field(100, description="number of candidates from the whole range down to zero")
    lowest: float = Field(0.2, ge=0, lt=1, description="share of the range where the search ends")

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = blocks.amin(-1), blocks.amax(-1)
        least = torch.full_like(high, torch.inf)
        best = torch.ones_like(high)
        for step in range(int((1 - self.lowest) * self.steps + 1e-9)):
            share = 1 - step / self.steps
            powers = error(share * low, share * high).abs().pow(self.norm)
            if counts is not None:
                powers = powers * counts
            total = powers.sum(-1)
            better = total < least
            least = torch.where(better, total, least)
            best = torch.where(better, share, best)
        return best * low, best * high


def _quantile(ordered: Tensor, cumulative: Tensor, share: float) -> Tensor:
    """The quantile `share` (0 to 1) of ascending values [..., n] with cumulative counts [..., n]: [...]."""
    rank = share * (cumulative[..., -1:] - 1)
    low = ordered.gather(-1, torch.searchsorted(cumulative, rank.floor(), right=True))
    high = ordered.gather(-1, torch.searchsorted(cumulative, rank.ceil(), right=True))
    return (low + (high - low) * (rank - rank.floor()).to(low.dtype)).squeeze(-1)
