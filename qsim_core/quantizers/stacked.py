"""The quantizer of a stack of matrices, such as the experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qsim_core.formats.quantizer import Quantizer


class Stacked(Quantizer):
    """Quantizes each matrix of a stack [E, rows, K] by itself: a layer with E experts holds such a weight."""

    name = "stacked"
    each: Quantizer
    """The quantizer of one matrix."""

    def quantize(self, x: Tensor) -> Tensor:
        return torch.stack([self.each.quantize(matrix) for matrix in x])

    def passes(self, x: Tensor) -> Tensor | None:
        return _stacked([self.each.passes(matrix) for matrix in x])

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        return _stacked([self.each.gradient_passes(matrix) for matrix in x])

    def bits_per_element(self, shape: torch.Size) -> float | None:
        return self.each.bits_per_element(shape[1:])

    @property
    def draws(self) -> bool:
        return self.each.draws


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts)  # type: ignore[arg-type]
