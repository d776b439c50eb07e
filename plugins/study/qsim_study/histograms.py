"""Histograms of the values at sites, with the values of the number format that they are rounded to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qsim_core import Format, QuantizedRows, Quantizer
from qsim_core.quantizers.scales import Scales
from qsim_core.simulation.recipe import matches
from qsim_core.sites.site import Site

BINS = 120
WIDEST = 8
"""Bits of the widest format of which the values are kept; those of wider ones lie closer than the bins."""
MARGIN = 0.04
"""The share of the format's range that is shown beyond each of its ends."""


class Histogram(BaseModel):
    """The values of one role at one site before they are quantized, counted in bins of equal width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    role: str
    quantizer: str
    scaled: bool = Field(description="true: values are divided by their scales, zero points added")
    low: float = Field(description="the lower end of the first bin")
    high: float = Field(description="the upper end of the last bin")
    counts: list[int]
    below: int = Field(description="values below the first bin")
    above: int = Field(description="values above the last bin")
    grid: list[float] = Field(description="the values of the format between both ends; none of a format over 8 bits")


class Histograms:
    """An observer of an audit, which counts the values at the sites that a pattern names."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = patterns
        self.found: dict[tuple[str, str], Histogram] = {}

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        """Count the rows of a tensor in, if its site is named and it is quantized."""
        if quantizer is None or not before.numel() or not any(matches(one, site.names) for one in self.patterns):
            return
        key = site.name, site.named(role)
        values, grid, scaled = in_units(before.float(), quantizer)
        if key not in self.found:
            low, high = _ends(values, grid, scaled)
            self.found[key] = Histogram(
                site=key[0],
                role=key[1],
                quantizer=str(quantizer),
                scaled=scaled,
                low=low,
                high=high,
                counts=[0] * BINS,
                below=0,
                above=0,
                grid=[value for value in grid if low <= value <= high],
            )
        self.found[key] = _with(self.found[key], values)


def in_units(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, list[float], bool]:
    """Rows divided by their scales, the values of the format there, and True; without scales the rows as they are."""
    scales, element = quantizer.scales(x), quantizer.rounds_to
    if scales is not None:
        scale = _of_each(x, quantizer, scales.scale)
        x = torch.where(scale == 0, 0.0, x / scale)
        if scales.zero is not None:
            x, element = x + _of_each(x, quantizer, scales.zero), element.full()
    grid = _values(element) if isinstance(element, Format) and element.width <= WIDEST else []
    return x, grid, scales is not None


def _of_each(x: Tensor, quantizer: Quantizer, numbers: Tensor) -> Tensor:
    """The scale or the zero point of each value."""
    return QuantizedRows(x, quantizer, lambda: Scales(numbers, None)).scale.to(x.dtype)


def _values(element: Format) -> list[float]:
    table = element.table()
    found: list[float] = table[table.isfinite()].unique().tolist()
    return found


def _ends(values: Tensor, grid: list[float], scaled: bool) -> tuple[float, float]:
    """The ends of the bins: the format's, or the values' own where nothing is scaled to the format."""
    if scaled and grid:
        low, high = grid[0], grid[-1]
    else:
        finite = values[values.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    margin = MARGIN * (high - low) or 0.5
    return low - margin, high + margin


def _with(histogram: Histogram, values: Tensor) -> Histogram:
    """The histogram with more values counted in; NaN is not counted."""
    low, high = histogram.low, histogram.high
    inside = torch.histc(values, BINS, low, high).long()
    counts = [before + more for before, more in zip(histogram.counts, inside.tolist(), strict=True)]
    below, above = histogram.below + int((values < low).sum()), histogram.above + int((values > high).sum())
    return histogram.model_copy(update={"counts": counts, "below": below, "above": above})
