"""Numbers taken apart: whole significands and exponents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qsim_core import Format
from qsim_core.formats.format import table_of

ZERO_EXPONENT = -126
"""The exponent of zero in a matrix unit."""
LONGEST_SHIFT = 62
"""A shift of 64-bit numbers that leaves nothing of them."""
LOWEST_SCALE = -127
"""The lowest exponent of e8m0."""


class Terms(NamedTuple):
    """Numbers as whole significands and exponents: x = significand · 2^(exponent - digits)."""

    significand: Tensor
    exponent: Tensor
    digits: int

    @classmethod
    def of(cls, values: Tensor, number_format: Format) -> Terms:
        """Take apart values of a float format. Subnormal numbers have its lowest exponent; ±Inf and NaN become 0."""
        digits, min_exponent = float_rule(number_format) or (0, 0)
        return cls.in_register(torch.where(values.isfinite(), values, 0.0).double(), digits, min_exponent)

    @classmethod
    def in_register(cls, values: Tensor, digits: int, min_exponent: int) -> Terms:
        """Take apart finite float64 values with so many binary digits after the first, and this lowest exponent."""
        exponent = exponent_of(values).clamp(min=min_exponent)
        significand = (values * powers_of_two(digits - exponent)).long()
        return cls(significand, torch.where(values == 0, ZERO_EXPONENT, exponent), digits)

    def aligned(self, highest: Tensor, fraction: int) -> Tensor:
        """Align to an exponent and cut off toward zero: trunc(x · 2^(fraction - highest)) as int64."""
        up, down = max(fraction - self.digits, 0), max(self.digits - fraction, 0)
        magnitude = (self.significand.abs() << up) >> (highest - self.exponent + down).clamp(max=LONGEST_SHIFT)
        return magnitude * self.significand.sign()

    def map(self, function: Callable[[Tensor], Tensor]) -> Terms:
        """Apply a change of shape to significands and exponents."""
        return Terms(function(self.significand), function(self.exponent), self.digits)

    def split(self, count: int, axis: int = -1) -> list[Terms]:
        """Cut along an axis into parts of `count` numbers; the last part may be short."""
        parts = zip(self.significand.split(count, axis), self.exponent.split(count, axis), strict=True)
        return [Terms(significand, exponent, self.digits) for significand, exponent in parts]

    def raised(self, exponent: Tensor) -> Terms:
        """Multiply by powers of two, which are given by their exponents."""
        return self._replace(exponent=self.exponent + exponent)

    def times(self, other: Terms) -> Terms:
        """Multiply exactly, without normalizing; shapes are broadcast."""
        digits = self.digits + other.digits
        return Terms(self.significand * other.significand, self.exponent + other.exponent, digits)


def exponent_of(values: Tensor) -> Tensor:
    """The exponent e of each value, 2^e ≤ |x| < 2^(e + 1), as int64; that of 0 is -1."""
    return torch.frexp(values).exponent.long() - 1


def powers_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of each exponent from -1022 to 1023, in float64."""
    return ((exponent + 1023) << 52).view(torch.float64)


def float_rule(number_format: Format) -> tuple[int, int] | None:
    """The binary digits after the first and the lowest exponent of a float format's values; None for another format."""
    if number_format.powers_of_two:
        return 0, LOWEST_SCALE
    steps = number_format.steps
    return None if steps is None or steps.fixed else (steps.mantissa, steps.min_exponent)


def same_values(one: Format, other: Format) -> bool:
    """Tell if two formats have the same finite values, however they round and overflow."""
    return torch.equal(table_of(one).finite, table_of(other).finite)
