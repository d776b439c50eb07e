"""Floating point: `float(exponent, mantissa)` of any split, and `bf16` `fp16` `e4m3` `e5m2` `e2m1`."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core import Format, Preset, hookimpl
from qsim_core.numerics import round_to_float

NATIVE = {(8, 7): torch.bfloat16, (5, 10): torch.float16}
"""IEEE formats that torch converts float32 to exactly as `round_to_float` does, and faster."""


class Float(Format):
    """One sign bit, `exponent` and `mantissa` bits, subnormals; rounded to nearest, ties to even; NaN stays NaN.

    `specials` says which codes are no numbers: `ieee` gives the topmost exponent to Inf and NaN (IEEE 754), `fn`
    only the topmost code to NaN (OCP 8-bit FP v1.0, section 5: E4M3), `none` no code at all (OCP MX v1.0, 5.3:
    FP6 and FP4). The bias is 2^(exponent-1) - 1. A value past the largest finite one saturates where the format
    has no Inf, ±Inf too, and becomes Inf where it has one; `saturate` says otherwise.
    """

    name = "float"
    exponent: int = Field(ge=1, le=8, description="exponent bits")
    mantissa: int = Field(ge=0, le=14, description="stored fraction bits")
    specials: Literal["ieee", "fn", "none"] = Field("none", description="which codes are Inf and NaN")
    saturate: bool | None = Field(None, description="clamp what is too large; none: only where there is no Inf")

    @model_validator(mode="after")
    def _leaves_numbers(self) -> Self:
        if self.width > 16:
            raise ValueError(f"a float has at most 16 bits, not 1 + {self.exponent} + {self.mantissa}")
        if self.specials == "ieee" and self.exponent < 2:
            raise ValueError("with ieee specials and one exponent bit every value would be subnormal or Inf")
        if self.specials == "fn" and self.mantissa == 0 and self.exponent < 2:
            raise ValueError("with fn specials, one exponent bit and no mantissa there would be no value but zero")
        if self.max > torch.finfo(torch.float32).max:
            raise ValueError(
                f"its largest value {self.max:.2g} is beyond float32's; 8 exponent bits need specials=ieee"
            )
        return self

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        codes = int(2**self.mantissa)
        highest = 2**self.exponent - 1  # the exponent field of the largest finite value, and its fraction
        fraction = codes - 1
        if self.specials == "ieee":
            highest -= 1
        elif self.specials == "fn":
            highest, fraction = (highest, codes - 2) if codes > 1 else (highest - 1, 0)
        if highest == 0:
            return float(fraction * 2.0 ** (1 - self.bias - self.mantissa))
        return float((1 + fraction / codes) * 2.0 ** (highest - self.bias))

    @property
    def last_step(self) -> float:
        return 2.0 ** (max(math.frexp(self.max)[1] - 1, 1 - self.bias) - self.mantissa)

    @property
    def saturates(self) -> bool:
        return self.saturate if self.saturate is not None else self.specials != "ieee"

    def round(self, x: Tensor) -> Tensor:
        native = NATIVE.get((self.exponent, self.mantissa))
        if native and self.specials == "ieee" and not self.saturates and x.dtype == torch.float32:
            return x.to(native).to(x.dtype)
        return round_to_float(x, self.mantissa, 1 - self.bias, self.max, self.saturates)


@hookimpl
def qsim_quantizers() -> list[type[Format] | Preset]:
    return [
        Float,
        Preset("bf16", "float(8, mantissa=7, specials=ieee)", "bfloat16"),
        Preset("fp16", "float(5, mantissa=10, specials=ieee)", "IEEE 754 binary16"),
        Preset("e4m3", "float(4, mantissa=3, specials=fn)", "OCP 8-bit FP v1.0 E4M3, largest 448, saturating"),
        Preset("e5m2", "float(5, mantissa=2, specials=ieee)", "OCP 8-bit FP v1.0 E5M2, largest 57344, then Inf"),
        Preset("e2m1", "float(2, mantissa=1)", "OCP MX v1.0 FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6"),
    ]
