"""Exact rounding of tensors to number grids; pure functions, no options object, no state.

Every function keeps shape and device and leaves its input alone. Rounding is to nearest, ties to even; NaN
stays NaN. Half-precision inputs are computed in float32 and rounded back at the end, so that no value is rounded
twice on the way. Exponents are read from the bits or from `frexp`, never from `log2`, which is wrong near powers
of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_EXPONENT_BITS = 0x7F800000
FLOAT32_MANTISSA = 23


def working(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic is done in: float64 stays, every other float becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def round_to_integer(x: Tensor, low: int, high: int) -> Tensor:
    """Nearest integer, ties to even, saturating at `low` and `high`; there is no -0. ±Inf saturates."""
    return x.round().clamp(low, high) + 0.0


def round_to_float(x: Tensor, mantissa: int, min_exponent: int, maximum: float, saturate: bool) -> Tensor:
    """Nearest value of a binary float format with subnormals, ties to even.

    `mantissa` is the number of stored fraction bits, `min_exponent` that of the smallest normal value and of all
    subnormals, `maximum` the largest finite value. Past it a value saturates, or (`saturate=False`) becomes Inf
    where rounding with unbounded exponent leaves the range, as IEEE 754 section 4.3.1 has it. The sign of zero
    is kept. float32 and float64 in, the same dtype out.
    """
    bound = min(maximum * 2, torch.finfo(x.dtype).max)
    if x.dtype == torch.float32 and _magic_fits(mantissa, min_exponent, bound):
        rounded = _round_by_magic_number(x.clamp(-bound, bound), mantissa, min_exponent)
    else:
        rounded = round_to_float_reference(x.clamp(-bound, bound), mantissa, min_exponent)
    if saturate:
        return rounded.clamp(-maximum, maximum)
    return torch.where(rounded.abs() > maximum, torch.copysign(torch.full_like(rounded, torch.inf), x), rounded)


def round_to_float_reference(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
    """The obvious way, in float64: divide by the step of the value's binade, round to integer, multiply back."""
    wide = x.double()
    exponent = (torch.frexp(wide).exponent - 1).clamp(min=min_exponent)  # frexp: 0.5 <= |fraction| < 1
    step = torch.ldexp(torch.ones_like(wide), exponent - mantissa)
    return torch.where(wide.isnan(), wide, torch.copysign((wide / step).round() * step, wide)).to(x.dtype)


def _round_by_magic_number(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
    """The same in float32: adding 1.5 * 2^23 steps leaves the sum no bits below a step, so the adder rounds."""
    binade = (x.view(torch.int32) & FLOAT32_EXPONENT_BITS).view(torch.float32).clamp(min=2.0**min_exponent)
    magic = binade * (1.5 * 2.0 ** (FLOAT32_MANTISSA - mantissa))
    return torch.copysign((x + magic) - magic, x)


def _magic_fits(mantissa: int, min_exponent: int, bound: float) -> bool:
    """Whether every intermediate of the magic-number way is a normal, finite float32."""
    return mantissa <= 20 and min_exponent >= -126 and bound * 2.0 ** (FLOAT32_MANTISSA + 1 - mantissa) < 2.0**127
