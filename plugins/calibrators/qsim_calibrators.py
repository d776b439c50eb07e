"""Calibrators beside the core's `minmax`, `absmax`, `percentile` and `mse`: `max`, `entropy`, `moving_average`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qsim_core import Calibrator, Preset, hookimpl
from qsim_core.formats.rounding import power_of_two
from qsim_core.quantizers.observers import MovingExtremes, Observer, bin_exponent


class MovingAverage(Calibrator):
    """The extremes of each batch, averaged: new = momentum * old + (1 - momentum) * batch, from the first batch on.

    For a scale that is found anew for each tensor it is the tensor's extremes. Source: the range tracking of RPTQ's
    reference (arXiv 2304.01089), whose momentum is 0.99.
    """

    name = "moving_average"
    momentum: float = Field(0.99, ge=0, lt=1, description="share of the old value that stays")

    def range(self, blocks: Tensor, error: object, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        return blocks.amin(-1), blocks.amax(-1)

    def observer(self) -> Observer:
        return MovingExtremes(self.momentum)


class Entropy(Calibrator):
    """The range under which quantized magnitudes are distributed most like the true ones (Kullback-Leibler).

    Magnitudes fall into 1,024 to 2,048 bins, those of a static scale's histogram. For each number of bins to keep, from
    that of the levels on, those beyond are counted into the last one kept; the kept ones are merged to 2^(bits - 1)
    levels and spread evenly over their non-empty bins again. The range ends where the divergence is least. A zero point
    is not considered: the range reaches as far to either side. Source: NVIDIA's "8-bit inference with TensorRT" (GTC
    2017), whose bins divide the largest magnitude by 2,048.
    """

    name = "entropy"
    bits: int = Field(8, ge=2, le=10, description="of the format that is to be scaled")
    stride: int = Field(8, ge=1, description="bins from one candidate to the next")

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
        best = len(kept) - 1 - int(divergences.flip(0).argmin())  # of equals the widest
        return torch.minimum(((kept[best].double() + 0.5) * width.cpu()).to(largest), largest)


def _divergence(histogram: Tensor, bins: int, levels: int) -> Tensor:
    """KL divergence of the first `bins` bins, the rest counted into the last, from their merging to `levels`."""
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


@hookimpl
def qsim_calibrators() -> list[type[Calibrator] | Preset]:
    return [MovingAverage, Entropy, Preset("max", "minmax", "from the lowest to the highest value")]
