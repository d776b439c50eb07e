"""Formats that are neither integers nor floats: `log2(bits)` and `posit(bits, es)`."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core import Format, hookimpl


class Log2(Format):
    """Zero and the powers of two up to 1; rounded to nearest in the *logarithm*.

    The boundary between two powers of two is sqrt(2) times the lower one. Values below 1/sqrt(2) of the smallest power
    become zero. Code k is 2^(k - last), code 0 is zero; if there is a sign, it is the topmost bit of the code. Values
    above 1 saturate, ±Inf too. NaN stays NaN, although it has no code. Source: arXiv 1603.01025, with full scale 1.
    """

    name = "log2"
    bits: int = Field(4, ge=2, le=8, description="width of a code, sign included")
    signed: bool = Field(True, description="false: values start at 0, and the exponent has one bit more")

    @model_validator(mode="after")
    def _fits_float32(self) -> Self:
        if not self.signed and self.bits > 7:
            raise ValueError("8 unsigned bits reach below float32's range; take 7 bits at most")
        return self

    def table(self) -> Tensor:
        codes = torch.arange(2 ** (self.bits - self.signed), dtype=torch.float64)
        values = torch.where(codes > 0, torch.ldexp(torch.ones_like(codes), codes - codes[-1]), 0.0)
        return torch.cat([values, -values]) if self.signed else values

    def boundaries(self, values: Tensor) -> Tensor:
        low, high = values[:-1], values[1:]
        return torch.where(high > 0, high, low) / math.sqrt(2)  # from the neighbour that is farther from zero


class Posit(Format):
    """Posits: a sign, a run of bits for the regime, `es` bits of exponent, and the remaining bits as the fraction.

    Rounding follows the Posit Standard (2022). The boundary between two neighbours is the posit with one more bit that
    lies between them. If the code has fraction bits, this rounds to the nearest value. Ties go to the even code. Only
    zero becomes zero, and values that are too large saturate. NaN and ±Inf become NaR, which is NaN in qsim.
    """

    name = "posit"
    has_nan: ClassVar[bool] = True
    bits: int = Field(8, ge=3, le=16, description="width of a code")
    es: int = Field(2, ge=0, le=4, description="exponent bits; 2 in the standard")

    @model_validator(mode="after")
    def _fits_float32(self) -> Self:
        largest = (self.bits - 2) << self.es
        if largest > 126:
            raise ValueError(f"its largest value, 2^{largest}, is beyond float32's range; lower bits or es")
        return self

    def table(self) -> Tensor:
        return posits(self.bits, self.es)

    def boundaries(self, values: Tensor) -> Tensor:
        finer = posits(self.bits + 1, self.es)
        between = finer[1::2].sort().values[1:-1]  # one more bit adds the odd codes; the outermost two are dropped
        zero = len(between) // 2
        between[zero - 1 : zero + 1] = 0.0  # only zero rounds to zero
        return between

    def round(self, x: Tensor) -> Tensor:
        return torch.where(x.isinf(), torch.nan, super().round(x))


def posits(bits: int, es: int) -> Tensor:
    """Return the value of each code of posit(bits, es) in float64, with NaN for NaR."""
    half = 2 ** (bits - 1)
    positive = torch.tensor([0.0, *(_positive(code, bits, es) for code in range(1, half))], dtype=torch.float64)
    return torch.cat([positive, torch.tensor([torch.nan], dtype=torch.float64), -positive[1:].flip(0)])


def _positive(code: int, bits: int, es: int) -> float:
    """Compute (1 + fraction) * 2^(regime * 2^es + exponent) from the bits after the sign."""
    word = format(code, f"0{bits - 1}b")
    run = len(word) - len(word.lstrip(word[0]))
    regime = run - 1 if word[0] == "1" else -run
    rest = word[run + 1 :]
    exponent = int(rest[:es].ljust(es, "0") or "0", 2)  # missing bits are zeros
    fraction = rest[es:]
    significand = 1 + int(fraction or "0", 2) / 2 ** len(fraction)
    return math.ldexp(significand, (regime << es) + exponent)


@hookimpl
def qsim_quantizers() -> list[type[Format]]:
    return [Log2, Posit]
