"""The quantizer of a stack of matrices, such as the experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qsim_core.formats.codes import Encoded
from qsim_core.formats.quantizer import Around, Quantizer
from qsim_core.quantizers.scales import Scales


class Stacked(Around, Quantizer):
    """Quantizes each matrix of a stack [E, rows, K] by itself: a layer with E experts holds such a weight."""

    name = "stacked"
    each: Quantizer
    """The quantizer of one matrix."""

    def quantize(self, x: Tensor) -> Tensor:
        return torch.stack([self.each.quantize(matrix) for matrix in x])

    def encode(self, x: Tensor) -> Encoded:
        """Encode each matrix; codes, scales and zero points are stacked."""
        return Encoded.stack([self.each.encode(matrix) for matrix in x])

    def encode_at(self, values: Tensor, known: Scales, of_scales: Scales | None = None) -> Encoded:
        """Encode each matrix under the known scales of its rows, which stand one below the other."""
        parts = [_of_each(part, len(values)) for part in (known, of_scales)]
        return Encoded.stack([self.each.encode_at(*one) for one in zip(values, *parts, strict=True)])

    def decode(self, encoded: Encoded) -> Tensor:
        return torch.stack([self.each.decode(encoded[place]) for place in range(len(encoded.codes))])

    def passes(self, x: Tensor) -> Tensor | None:
        return _stacked([self.each.passes(matrix) for matrix in x])

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        return _stacked([self.each.gradient_passes(matrix) for matrix in x])

    def bits_per_element(self, shape: torch.Size) -> float | None:
        return self.each.bits_per_element(shape[1:])

    def scales(self, x: Tensor) -> Scales | None:
        """Give the scales of all rows [E * rows, B] one below the other; None: the quantizer has none."""
        found = [self.each.scales(matrix) for matrix in x]
        if not found or found[0] is None:
            return None
        rows = x.shape[1] if self.each.granularity == "tensor" else 1
        zeros = [scales.zero.repeat(rows, 1) for scales in found if scales.zero is not None]
        return Scales(
            torch.cat([scales.scale.repeat(rows, 1) for scales in found]), torch.cat(zeros) if zeros else None
        )

    @property
    def inner(self) -> Quantizer:
        return self.each


def _of_each(known: Scales | None, count: int) -> list[Scales | None]:
    """Split the scales of all rows into those of each matrix."""
    if known is None:
        return [None] * count
    scale, zero = ([None] * count if part is None else part.chunk(count) for part in known)
    return [Scales(*one) for one in zip(scale, zero, strict=True)]  # type: ignore[arg-type]


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts)  # type: ignore[arg-type]
