"""A format for probabilities: evenly spaced levels from 0 to 1, both included."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qsim_core import Format
from qsim_core.formats.rounding import round_to_integer


class UnitInterval(Format):
    """The levels k / (2^bits - 1) from 0 to 1, as float32 has them. NaN stays NaN, and all other values saturate.

    RPTQ (arXiv 2304.01089) quantizes attention's probabilities so, without a scale: `cast(unit_interval(8))`.
    """

    name = "unit_interval"
    bits: int = Field(8, ge=2, le=16, description="width of a code")

    @property
    def levels(self) -> int:
        """The number of steps between 0 and 1."""
        return (1 << self.bits) - 1

    def table(self) -> Tensor:
        return (torch.arange(2**self.bits).float() / self.levels).double()

    def round(self, x: Tensor) -> Tensor:
        codes = round_to_integer(x * self.levels, 0, self.levels, self.rounding, self.seed)
        return (codes.float() / self.levels).to(x.dtype)
