"""Observers: they summarize the tensors at a site, so that a static scale can be chosen.

An observer takes values [B, m], one row for each block, and keeps what a calibrator needs: extremes, or a histogram.
The histograms of two halves of the data merge to the histogram of the whole, bin for bin. The width of a bin is a
power of two that depends on the largest magnitude alone. A wider bin is the sum of two narrower ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qsim_core.formats.rounding import power_of_two

BINS = 4096
"""The number of bins, from -max|x| to max|x|; a bin is at most 1/1024 of max|x| wide."""


def bin_exponent(largest: Tensor) -> Tensor:
    """The least log2 of a bin's width with which `BINS` bins cover magnitudes up to `largest`; at least -140."""
    needed = torch.frexp(largest).exponent - (BINS // 2).bit_length() + 1  # largest < BINS/2 * 2^needed
    return torch.where(largest > 0, needed, -140).clamp(min=-140)


class Observer(ABC):
    """Gathers values. An author writes two methods: `update` and `values`."""

    @abstractmethod
    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        """Take in values [B, m], with the same B every time. `counts` is 0 for a zero that fills up a short block."""

    def next_batch(self) -> None:  # noqa: B027 - most observers need not know
        """Note that the values that follow are of another calibration batch."""

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """Values [B, n] that represent all values so far, and the number that each represents (None: one)."""


class Extremes(Observer):
    """Keeps the lowest and the highest value of each block.

    The zeros that fill up a short block are among its values: the range of a scale includes zero in any case.
    """

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


class Histogram(Observer):
    """Counts the values of each block by bins, and keeps the exact extremes.

    Bin i holds the values from (i - 2048) * w up to, and without, (i - 2047) * w. The width w is the smallest power of
    two with which the bins cover all magnitudes.
    """

    def __init__(self) -> None:
        self.extremes = Extremes()
        self.exponent: Tensor | None = None
        """The log2 of the bins' width, [B]."""
        self.counts = torch.empty(0)

    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        """Add the values [B, n] of another batch, each as often as `counts` says; None: once."""
        self.extremes.update(values)
        largest = values.abs().amax(-1)
        needed = bin_exponent(largest)
        if self.exponent is None:
            self.exponent = needed
            self.counts = torch.zeros(len(values), BINS, dtype=torch.float64, device=values.device)
        self._widen(torch.maximum(self.exponent, needed))
        index = (values.double() * power_of_two(-self.exponent).unsqueeze(-1)).floor().long() + BINS // 2
        each = torch.ones_like(values) if counts is None else counts
        self.counts.scatter_add_(1, index.clamp(0, BINS - 1), each.double())

    def _widen(self, exponent: Tensor) -> None:
        """Widen the bins of each block to 2^exponent by adding up neighbours."""
        assert self.exponent is not None
        center = BINS // 2
        places = torch.arange(BINS, device=self.counts.device) - center
        shift = (exponent - self.exponent).clamp(max=BINS.bit_length()).unsqueeze(-1)
        if bool((shift > 0).any()):
            index = (places >> shift) + center  # an arithmetic shift is floor division
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, index, self.counts)
        self.exponent = exponent

    def values(self) -> tuple[Tensor, Tensor | None]:
        """The middles of the bins, clamped to the extremes, with their counts; and the extremes with count 0."""
        assert self.exponent is not None
        ends, _ = self.extremes.values()
        middles = torch.arange(BINS, dtype=torch.float64, device=self.counts.device) - BINS // 2 + 0.5
        centers = (middles * power_of_two(self.exponent).unsqueeze(-1)).to(ends.dtype)
        centers = centers.clamp(ends[:, :1], ends[:, 1:])
        counts = torch.nn.functional.pad(self.counts, (1, 1))
        return torch.cat([ends[:, :1], centers, ends[:, 1:]], -1), counts


class MovingExtremes(Observer):
    """Averages the extremes over batches: new = momentum * old + (1 - momentum) * batch, from the first batch on.

    All tensors of a batch have one lowest and one highest value: a matmul may be computed several times in it.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.ends: Tensor | None = None
        self.batch = Extremes()

    def update(self, values: Tensor, counts: Tensor | None = None) -> None:
        self.batch.update(values)

    def next_batch(self) -> None:
        if self.batch.low is not None:
            self.ends, self.batch = self.values()[0], Extremes()

    def values(self) -> tuple[Tensor, Tensor | None]:
        if self.batch.low is None:
            assert self.ends is not None
            return self.ends, None
        ends, _ = self.batch.values()
        return ends if self.ends is None else self.momentum * self.ends + (1 - self.momentum) * ends, None
