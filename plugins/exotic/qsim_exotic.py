"""Formats that are neither integers nor floats: `log2(bits)` and `posit(bits, es)`."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core import Format, hookimpl


class Log2(Format):
    """Zero and powers of two, from 1 down; rounded to nearest in the *logarithm*.

    A value turns to the next at sqrt(2) times a power of two, and to zero below 1/sqrt(2) of the smallest. Code k is
    2^(k - last), code 0 is zero; with a sign the topmost code bit is the sign. What is above 1 saturates, ±Inf too.
    NaN stays NaN, though no code stands for it. Source: arXiv 1603.01025, with the full scale at 1.
    """

    name = "log2"
    bits: int = Field(4, ge=2, le=8, description="width of a code, sign included")
    signed: bool = Field(True, description="false: from 0 on, and one more bit of exponents")

    @model_validator(mode="after")
    def _fits_float32(self) -> Self:
        if not self.signed and self.bits > 7:
            raise ValueError("unsigned with 8 bits reaches below float32's range; 7 bits at most")
        return self

    def table(self) -> Tensor:
        codes = torch.arange(2 ** (self.bits - self.signed), dtype=torch.float64)
        values = torch.where(codes > 0, torch.ldexp(torch.ones_like(codes), codes - codes[-1]), 0.0)
        return torch.cat([values, -values]) if self.signed else values

    def boundaries(self, values: Tensor) -> Tensor:
        low, high = values[:-1], values[1:]
        return torch.where(high > 0, high, low) / math.sqrt(2)  # of the neighbour that is farther from zero


class Posit(Format):
    """Posits: sign, a run of bits for the regime, `es` bits of exponent, and a fraction of what is left.

    Rounded as the standard has it (Posit Standard, 2022): to the nearer neighbour as posits of one more bit see it,
    which is the nearest value wherever a fraction is left; ties to the even code; nothing but zero becomes zero, and
    what is too large saturates. NaN and ±Inf become NaR, which is NaN here.
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
        between = finer[1::2].sort().values[1:-1]  # the odd codes are what one more bit adds, also past the ends
        zero = len(between) // 2
        between[zero - 1 : zero + 1] = 0.0  # nothing but zero rounds to zero
        return between

    def round(self, x: Tensor) -> Tensor:
        return torch.where(x.isinf(), torch.nan, super().round(x))


def posits(bits: int, es: int) -> Tensor:
    """The value of each code of posit(bits, es), float64; NaN for NaR."""
    half = 2 ** (bits - 1)
    positive = torch.tensor([0.0, *(_positive(code, bits, es) for code in range(1, half))], dtype=torch.float64)
    return torch.cat([positive, torch.tensor([torch.nan], dtype=torch.float64), -positive[1:].flip(0)])


def _positive(code: int, bits: int, es: int) -> float:
    """(1 + fraction) * 2^(regime * 2^es + exponent), read from the bits after the sign."""
    word = format(code, f"0{bits - 1}b")
    run = len(word) - len(word.lstrip(word[0]))
    regime = run - 1 if word[0] == "1" else -run
    rest = word[run + 1 :]
    exponent = int(rest[:es].ljust(es, "0") or "0", 2)  # bits cut off are zeros
    fraction = rest[es:]
    significand = 1 + int(fraction or "0", 2) / 2 ** len(fraction)
    return math.ldexp(significand, (regime << es) + exponent)


@hookimpl
def qsim_quantizers() -> list[type[Format]]:
    return [Log2, Posit]
