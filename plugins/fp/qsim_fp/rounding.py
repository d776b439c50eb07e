"""Rounding to a binary float format with subnormals: in float32 by magic numbers, and the obvious way in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from qsim_core.formats.rounding import FLOAT32_MANTISSA, Rounding, Steps, power_of_two, whole

FLOAT32_EXPONENT_BITS = 0x7F800000


def round_to_float(
    x: Tensor, mantissa: int, min_exponent: int, largest: float, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """Round `x` to a binary float format with subnormals, as if the format had more exponents past the largest value.

    `mantissa` is the number of stored fraction bits, at least 1. `min_exponent` is the exponent of the smallest
    normal value and of all subnormals. `x` is float32 or float64; the result has the same dtype.
    A magnitude past twice `largest` becomes twice `largest`, which the caller saturates or overflows. The sign of
    zero is kept.
    """
    bound = min(largest * 2, torch.finfo(x.dtype).max)
    x = x.clamp(-bound, bound)
    if x.dtype != torch.float32 or not Steps(mantissa, min_exponent, -largest, largest).fits:
        return round_to_float_reference(x, mantissa, min_exponent, rounding, seed)
    if rounding == "even":
        return round_by_magic_number(x, mantissa, min_exponent)
    step = _binade(x, min_exponent) * 2.0**-mantissa
    return torch.copysign(whole(x / step, rounding, seed) * step, x)


def round_to_float_reference(
    x: Tensor, mantissa: int, min_exponent: int, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """Round as `round_to_float` in the obvious way: divide by the step, round to an integer, multiply, in float64."""
    wide = x.double()
    exponent = (torch.frexp(wide).exponent - 1).clamp(min=min_exponent)  # frexp has 0.5 <= |fraction| < 1
    step = power_of_two(exponent - mantissa)
    rounded = torch.copysign(whole(wide / step, rounding, seed) * step, wide)
    return torch.where(wide.isnan(), wide, rounded).to(x.dtype)


def round_by_magic_number(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
    """Round to nearest even in float32. The sum with 1.5 * 2^23 steps has no bits below a step, so adding rounds."""
    magic = _binade(x, min_exponent) * (1.5 * 2.0 ** (FLOAT32_MANTISSA - mantissa))
    return torch.copysign((x + magic) - magic, x)


def _binade(x: Tensor, min_exponent: int) -> Tensor:
    """The power of two at or below |x|, at least 2^min_exponent; float32."""
    return (x.view(torch.int32) & FLOAT32_EXPONENT_BITS).view(torch.float32).clamp(min=2.0**min_exponent)
