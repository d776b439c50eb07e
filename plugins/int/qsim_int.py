"""Integers: `int(bits, narrow=true)` and the presets `int2` … `int16`."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from qsim_core import Format, Preset, hookimpl
from qsim_core.numerics import round_to_integer


class Int(Format):
    """Signed two's-complement integers, rounded to nearest, ties to even, saturating; NaN stays NaN.

    Narrow, the default, is symmetric: -(2^(bits-1) - 1) to 2^(bits-1) - 1. The full range has the lowest code
    -2^(bits-1) too; a scale still maps the largest magnitude to 2^(bits-1) - 1.
    """

    name = "int"
    bits: int = Field(8, ge=2, le=16, description="width of a code, sign included")
    narrow: bool = Field(True, description="leave out the lowest code, so that the range is symmetric")

    @property
    def max(self) -> float:
        return float(2 ** (self.bits - 1) - 1)

    @property
    def width(self) -> int:
        return self.bits

    @property
    def last_step(self) -> float:
        return 1.0

    def round(self, x: Tensor) -> Tensor:
        high = 2 ** (self.bits - 1) - 1
        return round_to_integer(x, -high if self.narrow else -high - 1, high)


@hookimpl
def qsim_quantizers() -> list[type[Format] | Preset]:
    names = [Preset(f"int{bits}", f"int({bits})", f"±{2 ** (bits - 1) - 1}, narrow range") for bits in range(2, 17)]
    return [Int, *names]
