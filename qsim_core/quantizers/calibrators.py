"""Calibrators: each chooses the range that a scale covers. `minmax` and `absmax` cover every value."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

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
