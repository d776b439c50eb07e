"""Integers and fixed point: `int(bits, narrow, signed, fraction, convention)`, `int2` … `int16`, `uint2` … `uint16`."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core import Format, Preset, hookimpl
from qsim_core.formats.rounding import Steps, round_to_integer

BF16_BITS = 16
"""The width at which `--precision` takes bfloat16. Integers stand for the widths below it."""


class Int(Format):
    """Two's-complement integers, or multiples of 2^-fraction; rounded to nearest, ties to even, saturating.

    The default range is signed and narrow, so it is symmetric: -(2^(bits-1) - 1) to 2^(bits-1) - 1. The full range
    also has the lowest code, -2^(bits-1). The unsigned range is 0 to 2^bits - 1. A scale with a zero point always uses
    the full range. NaN stays NaN, although it has no code. There is no -0.

    `convention` names the value to which a scale maps the largest magnitude of its block. `max` is the largest value
    (7 for 4 bits). `gptq` is half the span of the codes (7.5 with the full range). That is GPTQ's symmetric grid,
    arXiv 2210.17323, which clips the largest magnitude. `power_of_two` is the power of two above the largest value
    (8: fixed point over [-1, 1)).
    """

    name = "int"
    bits: int = Field(8, ge=2, le=16, description="width of a code, sign included")
    narrow: bool = Field(True, description="leave out the lowest code of a signed range, so that it is symmetric")
    signed: bool = Field(True, description="false: values start at 0")
    fraction: int = Field(0, ge=0, le=16, description="binary digits after the point")
    convention: Literal["max", "gptq", "power_of_two"] = Field(
        "max", description="the value to which a scale maps the largest magnitude"
    )

    @model_validator(mode="after")
    def _conventions_fit(self) -> Self:
        if self.convention == "gptq" and (self.narrow or not self.signed):
            raise ValueError("convention gptq needs signed integers with the full range: add narrow=false")
        return self

    @property
    def is_integer(self) -> bool:
        return self.fraction == 0

    @property
    def steps(self) -> Steps:
        return Steps(self.fraction, 0, self.min, self.max, fixed=True)

    def full(self) -> Int:
        return self.replace(narrow=False, convention="max") if self.signed else self

    def table(self) -> Tensor:
        code = torch.arange(2**self.bits, dtype=torch.float64)
        if self.signed:
            code = torch.where(code < 2 ** (self.bits - 1), code, code - 2**self.bits)
            if self.narrow:
                code[2 ** (self.bits - 1)] = torch.nan
        return code * 2.0**-self.fraction

    @property
    def reach(self) -> float:
        if self.convention == "gptq":
            return (self.max - self.min) / 2
        return self.max if self.convention == "max" else self.beyond

    def round(self, x: Tensor) -> Tensor:
        unit = 2.0**self.fraction
        rounded = round_to_integer(
            x * unit if self.fraction else x, self.min * unit, self.max * unit, self.rounding, self.seed
        )
        return rounded / unit if self.fraction else rounded


@hookimpl
def qsim_quantizers() -> list[type[Format] | Preset]:
    widths = range(2, 17)
    signed = [
        Preset(
            f"int{bits}",
            f"int({bits})",
            f"±{2 ** (bits - 1) - 1}, narrow range",
            stands_for_bits=bits if bits < BF16_BITS else None,
        )
        for bits in widths
    ]
    unsigned = [Preset(f"uint{bits}", f"int({bits}, signed=false)", f"0 to {2**bits - 1}") for bits in widths]
    return [Int, *signed, *unsigned]
