"""The quantizer that holds the scales and zero points of clusters of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core import Format
from qsim_core.formats.quantizer import SiteQuantizer, laid_out_as
from qsim_core.formats.rounding import round_to_integer, working

SMALLEST, LARGEST = 1e-4, 1e4
"""The bounds of a scale (quantizer.py of the reference)."""


@dataclass(frozen=True, eq=False)
class Clustered(SiteQuantizer):
    """A scale and a zero point for each channel, the same for all channels of a cluster.

    `scale` and `zero` are [K] for rows x K. For an operand of attention, [..., heads, tokens, K], they are
    [heads, 1, K]; with tokens last they are [heads, K, 1]. Batch and heads may be one axis.
    """

    element: Format
    scale: Tensor
    zero: Tensor
    clusters: int

    @classmethod
    def covering(cls, low: Tensor, high: Tensor, element: Format, clusters: int) -> Clustered:
        """Cover a range: scale = (high - low) / 2^bits in 1e-4 … 1e4, zero = round(-(high + low) / (2 scale)).

        Of 2^bits steps the last has no code. Values above its middle saturate, as in the reference. The reference
        also holds the zero point in ±1e4; so a channel whose values are all near 3 becomes 1, and it is not done here.
        """
        scale = ((high - low) / (element.max - element.min + 1)).clamp(SMALLEST, LARGEST)
        zero = ((high + low) * (-0.5 / scale)).round()
        return cls(element, scale, zero, clusters)

    def same_as(self, other: Clustered) -> bool:
        """Tell if both round every value alike."""
        alike = self.element == other.element and self.scale.shape == other.scale.shape
        return alike and torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)

    def quantize(self, x: Tensor) -> Tensor:
        units, scale, zero = self._units(x)
        low, high = self.element.min - zero, self.element.max - zero
        rounded = round_to_integer(units, low, high, self.element.rounding, self.element.seed)
        return laid_out_as(x, (rounded * scale).reshape(x.shape))

    def passes(self, x: Tensor) -> Tensor:
        units, _, zero = self._units(x)
        return self.element.passes(units + zero).reshape(x.shape)

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = working(x)
        if self.scale.dim() == 3 and x.dim() == 3:
            wide = wide.unflatten(0, (-1, len(self.scale)))
        scale, zero = (t.to(wide.device, wide.dtype) for t in (self.scale, self.zero))
        return wide / scale, scale, zero

    def bits_per_element(self, shape: torch.Size) -> float:
        return float(self.element.width)

    def __str__(self) -> str:
        return f"rptq({self.element}, {self.clusters} cluster{'s' * (self.clusters != 1)})"
