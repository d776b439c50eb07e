"""Calibrators that leave values out, or average: `percentile`, `mse`, `entropy`, `moving_average`, and `max`."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Calibrator, Preset, hookimpl
from qsim_core.formats.rounding import power_of_two
from qsim_core.quantizers.calibrators import ErrorOf
from qsim_core.quantizers.observers import MovingExtremes, Observer, bin_exponent


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


class MovingAverage(Calibrator):
    """The lowest and highest value of each batch, averaged: new = momentum * old + (1 - momentum) * batch.

    The average starts with the values of the first batch. A scale that is computed anew for each tensor takes the
    tensor's own lowest and highest value. Source: the range tracking of RPTQ's reference (arXiv 2304.01089), whose
    momentum is 0.99.
    """

    name = "moving_average"
    momentum: float = Field(0.99, ge=0, lt=1, description="share of the old value in the new one")

    def range(self, blocks: Tensor, error: object, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        return blocks.amin(-1), blocks.amax(-1)

    def observer(self) -> Observer:
        return MovingExtremes(self.momentum)


class Entropy(Calibrator):
    """The range that minimizes the Kullback-Leibler divergence of the quantized magnitudes from the original ones.

    Magnitudes are counted in 1,024 to 2,048 bins, the bins of a static scale's histogram. A candidate range keeps the
    first k bins, where k is at least the number of levels. The bins beyond are added to the last kept bin. The kept
    bins are merged to 2^(bits - 1) levels, and each level is spread evenly over its non-empty bins. The range with the
    least divergence is chosen. It is symmetric about zero, also for a scale with a zero point. Source: NVIDIA's "8-bit
    inference with TensorRT" (GTC 2017), where the largest magnitude is divided into 2,048 bins.
    """

    name = "entropy"
    bits: int = Field(8, ge=2, le=10, description="bits of the format that is scaled")
    stride: int = Field(8, ge=1, description="bins between one candidate range and the next")

    def range(self, blocks: Tensor, error: object, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        magnitudes = blocks.abs()
        weights = torch.ones_like(magnitudes) if counts is None else counts
        flat, flat_weights = magnitudes.flatten(0, -2), weights.flatten(0, -2).double()
        ends = [self._end(values, counted) for values, counted in zip(flat, flat_weights, strict=True)]
        high = torch.stack(ends).view(magnitudes.shape[:-1])
        return -high, high

    def _end(self, values: Tensor, counts: Tensor) -> Tensor:
        largest = values.max()
        if not largest.isfinite() or largest == 0:
            return largest
        width = power_of_two(bin_exponent(largest))
        index = (values.double() / width).long()
        bins = int(index.max()) + 1
        histogram = torch.zeros(bins, dtype=torch.float64, device=values.device).scatter_add_(0, index, counts)
        levels = 2 ** (self.bits - 1)
        kept = torch.arange(bins, levels - 1, -self.stride).flip(0)
        divergences = torch.stack([_divergence(histogram, int(bins), levels) for bins in kept])
        best = len(kept) - 1 - int(divergences.flip(0).argmin())  # of equal divergences the widest range
        return torch.minimum(((kept[best].double() + 0.5) * width.cpu()).to(largest), largest)


def _divergence(histogram: Tensor, bins: int, levels: int) -> Tensor:
    """Compute the KL divergence of the first `bins` bins from the same bins merged to `levels`.

    The counts beyond these bins are added to the last one, but not to the merged levels.
    """
    truth = histogram[:bins].clone()
    truth[-1] += histogram[bins:].sum()
    filled = (truth > 0).double()
    level = torch.arange(bins, device=histogram.device) * levels // bins
    merged = torch.zeros(levels, dtype=torch.float64, device=histogram.device).scatter_add_(0, level, histogram[:bins])
    members = torch.zeros_like(merged).scatter_add_(0, level, filled)
    spread = (merged / members.clamp(min=1))[level] * filled
    if spread.sum() == 0:
        return torch.tensor(torch.inf, dtype=torch.float64, device=histogram.device)
    p, q = truth / truth.sum(), spread / spread.sum()
    return torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum()


def _quantile(ordered: Tensor, cumulative: Tensor, share: float) -> Tensor:
    """The quantile `share` (0 to 1) of ascending values [..., n] with cumulative counts [..., n]: [...]."""
    rank = share * (cumulative[..., -1:] - 1)
    low = ordered.gather(-1, torch.searchsorted(cumulative, rank.floor(), right=True))
    high = ordered.gather(-1, torch.searchsorted(cumulative, rank.ceil(), right=True))
    return (low + (high - low) * (rank - rank.floor()).to(low.dtype)).squeeze(-1)


@hookimpl
def qsim_calibrators() -> list[type[Calibrator] | Preset]:
    return [Percentile, MSE, MovingAverage, Entropy, Preset("max", "minmax", "from the lowest to the highest value")]
