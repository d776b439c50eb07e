"""What is remembered of the tensors that pass a site while a static scale is being chosen.

An observer takes values block by block, [B, m] at a time, and keeps what a calibrator needs: extremes, or a histogram.
Histograms of two halves of the data merge to that of the whole, bin for bin: bins are as wide as a power of two that
only the largest magnitude decides, and a wider bin is the sum of two narrower ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from qsim_core.formats.rounding import power_of_two

BINS = 4096
"""From -max|x| to max|x|; a value is known to 1/1024 of the largest at worst."""


def bin_exponent(largest: Tensor) -> Tensor:
    """log2 of the narrowest bins of which `BINS` cover magnitudes up to `largest`; at least -140."""
    needed = torch.frexp(largest).exponent - (BINS // 2).bit_length() + 1  # largest < BINS/2 * 2^needed
    return torch.where(largest > 0, needed, -140).clamp(min=-140)


class Observer(ABC):
    """Gathers values; two methods to write."""

    @abstractmethod
    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        """Take in values [B, m], the same B every time; where `counts` has 0, a zero that fills up a short block."""

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """Values that stand for all that was seen, [B, n], and how many each stands for (none: one)."""


class Extremes(Observer):
    """The lowest and the highest value of each block, zero among them where a block is filled up: scales cover it."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        low, high = values.amin(-1), values.amax(-1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def values(self) -> tuple[Tensor, Tensor | None]:
        assert self.low is not None and self.high is not None
        return torch.stack([self.low, self.high], -1), None

    def merge(self, other: Self) -> None:
        """Take in what another observer has seen."""
        self.update(other.values()[0])


class Histogram(Observer):
    """How many values fell into each bin of each block, and the extremes, exactly.

    Bin i holds [(i - 2048) w, (i - 1 - 2048) w + w) with w a power of two, the smallest that covers all magnitudes.
    """

    def __init__(self) -> None:
        self.extremes = Extremes()
        self.exponent: Tensor | None = None
        """log2 of the bins' width, [B]."""
        self.counts = torch.empty(0)

    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        self.extremes.update(values)
        largest = values.abs().amax(-1)
        needed = bin_exponent(largest)
        if self.exponent is None:
            self.exponent, self.counts = (
                needed,
                torch.zeros(len(values), BINS, dtype=torch.float64, device=values.device),
            )
        self._widen(torch.maximum(self.exponent, needed))
        index = (values.double() * power_of_two(-self.exponent).unsqueeze(-1)).floor().long() + BINS // 2
        each = torch.ones_like(values) if counts is None else counts
        self.counts.scatter_add_(1, index.clamp(0, BINS - 1), each.double())

    def _widen(self, exponent: Tensor) -> None:
        """Make the bins of each block as wide as 2^exponent by adding up neighbours."""
        assert self.exponent is not None
        center = BINS // 2
        places = torch.arange(BINS, device=self.counts.device) - center
        shift = (exponent - self.exponent).clamp(max=BINS.bit_length()).unsqueeze(-1)
        if bool((shift > 0).any()):
            index = (places >> shift) + center  # an arithmetic shift is floor division
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, index, self.counts)
        self.exponent = exponent

    def merge(self, other: Self) -> None:
        """Take in what another observer has seen; merging two halves gives the histogram of the whole."""
        assert self.exponent is not None and other.exponent is not None
        self.extremes.merge(other.extremes)
        widest = torch.maximum(self.exponent, other.exponent)
        self._widen(widest)
        theirs = Histogram()
        theirs.exponent, theirs.counts = other.exponent, other.counts
        theirs._widen(widest)
        self.counts = self.counts + theirs.counts

    def values(self) -> tuple[Tensor, Tensor | None]:
        """The bins' middles, held within the extremes, and the extremes themselves with no count."""
        assert self.exponent is not None
        ends, _ = self.extremes.values()
        middles = torch.arange(BINS, dtype=torch.float64, device=self.counts.device) - BINS // 2 + 0.5
        centers = (middles * power_of_two(self.exponent).unsqueeze(-1)).to(ends.dtype)
        centers = centers.clamp(ends[:, :1], ends[:, 1:])
        counts = torch.nn.functional.pad(self.counts, (1, 1))
        return torch.cat([ends[:, :1], centers, ends[:, 1:]], -1), counts


class MovingExtremes(Observer):
    """Extremes averaged over batches: new = momentum * old + (1 - momentum) * batch, starting at the first batch."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.ends: Tensor | None = None

    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        ends = torch.stack([values.amin(-1), values.amax(-1)], -1)
        self.ends = ends if self.ends is None else self.momentum * self.ends + (1 - self.momentum) * ends

    def values(self) -> tuple[Tensor, Tensor | None]:
        assert self.ends is not None
        return self.ends, None
