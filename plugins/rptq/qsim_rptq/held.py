"""What stands at a site: quantizers that hold what calibration found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core import Format
from qsim_core.formats.quantizer import SiteQuantizer, laid_out_as
from qsim_core.formats.rounding import round_to_integer, working

SMALLEST, LARGEST = 1e-4, 1e4
"""The bounds of a scale, and of a zero point from above and below (quantizer.py of the reference)."""


@dataclass(frozen=True, eq=False)
class Clustered(SiteQuantizer):
    """A scale and a zero point for each channel, the same for all channels of a cluster.

    `scale` and `zero` are [K] for rows x K, or [heads, 1, K] and [heads, K, 1] for an operand of attention,
    [..., heads, tokens, K] or the other way round; one whose batch and heads are one axis will do too.
    """

    element: Format
    scale: Tensor
    zero: Tensor
    clusters: int

    @classmethod
    def covering(cls, low: Tensor, high: Tensor, element: Format, clusters: int) -> Clustered:
        """scale = (high - low) / 2^bits within 1e-4 … 1e4, zero = round(-(high + low) / (2 scale)) within ±1e4.

        Of 2^bits steps the last has no code: what is above the middle of it saturates, as in the reference.
        """
        scale = ((high - low) / (element.max - element.min + 1)).clamp(SMALLEST, LARGEST)
        zero = ((high + low) * (-0.5 / scale)).clamp(-LARGEST, LARGEST).round()
        return cls(element, scale, zero, clusters)

    def same_as(self, other: Clustered) -> bool:
        """Whether both round every value alike."""
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
