"""Exact rounding of tensors to number grids; pure functions, no options object, no state.

Every function keeps shape and device and leaves its input alone. NaN stays NaN. Half-precision inputs are computed
in float32 and rounded back at the end, so that no value is rounded twice on the way. Exponents are read from the
bits or from `frexp`, never from `log2`, which is wrong near powers of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qsim_core.formats.random_bits import uniform

Rounding = Literal["even", "away", "zero", "stochastic"]
"""To nearest with ties to even or away from zero, toward zero, or up with the probability of the distance passed."""
ScaleRule = Literal["divide", "floor", "ceil", "even", "rceil"]

FLOAT32_EXPONENT_BITS = 0x7F800000
FLOAT32_MANTISSA = 23
FLOAT64_BIAS, FLOAT64_MANTISSA = 1023, 52


@dataclass(frozen=True)
class Steps:
    """The values of a format as a rule that float32 can follow: multiples of a step, from `low` to `high`.

    The step is 2^(e - mantissa) for values from 2^e to 2^(e + 1), from e = `min_exponent` on, and that of
    `min_exponent` below it. With `fixed` it is so for all values. `overflow` is what comes beyond; None: they saturate.
    """

    mantissa: int
    min_exponent: int
    low: float
    high: float
    fixed: bool = False
    overflow: float | None = None
    signed_zero: bool = False

    @property
    def bound(self) -> float:
        """The largest magnitude that rounding has to tell apart."""
        return min(self.high * 2, torch.finfo(torch.float32).max)

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (-self.mantissa if self.fixed else self.min_exponent - self.mantissa)

    @property
    def significand(self) -> int:
        """Bits of the longest significand, the hidden one counted."""
        if not self.fixed:
            return self.mantissa + 1
        return int(max(self.high, -self.low) / self.smallest).bit_length()

    @property
    def fits(self) -> bool:
        """Whether float32 holds every intermediate of rounding by a magic number as a normal, finite value."""
        if self.fixed and self.bound > self.smallest * 2.0**22:
            return False
        return _magic_fits(self.mantissa, self.min_exponent, self.bound)


def working(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic is done in: float64 stays, every other float becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def divided(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once. Of a number torch takes the reciprocal on a GPU and multiplies, which rounds twice."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device) if x.is_cuda else x / by


def whole(x: Tensor, rounding: Rounding = "even", seed: int = 0) -> Tensor:
    """`x` rounded to whole numbers, without bounds; ±Inf stays. What every rounding mode means is said here."""
    if rounding == "even":
        return x.round()
    if rounding == "zero":
        return x.trunc()
    if rounding == "away":
        inner = x.trunc()
        return inner + torch.copysign(((x - inner).abs() >= 0.5).to(x.dtype), x)
    below = x.floor()
    return below + (uniform(x, seed) < x - below).to(x.dtype)


def round_to_integer(
    x: Tensor, low: float | Tensor, high: float | Tensor, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """Whole numbers, saturating at `low` and `high` (numbers, or tensors to broadcast); there is no -0. ±Inf
    saturates."""
    return whole(x, rounding, seed).clamp_(low, high).add_(0.0)  # type: ignore[arg-type]


def round_to_float(
    x: Tensor, mantissa: int, min_exponent: int, largest: float, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """A value of a binary float format with subnormals, as if exponents went on past the largest.

    `mantissa` is the number of stored fraction bits, at least 1, and `min_exponent` the exponent of the smallest
    normal value and of all subnormals. What lies past twice `largest` comes back as twice `largest`: more than a
    format can hold in any case, and for the caller to limit. The sign of zero is kept. float32 and float64 in, the
    same dtype out.
    """
    bound = min(largest * 2, torch.finfo(x.dtype).max)
    x = x.clamp(-bound, bound)
    if x.dtype != torch.float32 or not _magic_fits(mantissa, min_exponent, bound):
        return round_to_float_reference(x, mantissa, min_exponent, rounding, seed)
    if rounding == "even":
        return _round_by_magic_number(x, mantissa, min_exponent)
    step = _binade(x, min_exponent) * 2.0**-mantissa
    return torch.copysign(whole(x / step, rounding, seed) * step, x)


def round_to_float_reference(
    x: Tensor, mantissa: int, min_exponent: int, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """The obvious way, in float64: divide by the step of the value's binade, round to integer, multiply back."""
    wide = x.double()
    exponent = (torch.frexp(wide).exponent - 1).clamp(min=min_exponent)  # frexp: 0.5 <= |fraction| < 1
    step = power_of_two(exponent - mantissa)
    rounded = torch.copysign(whole(wide / step, rounding, seed) * step, wide)
    return torch.where(wide.isnan(), wide, rounded).to(x.dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, made from bits (`exp2` and `ldexp` may miss by an ulp); exponents from -1022 to 1023."""
    return ((exponent.long() + FLOAT64_BIAS) << FLOAT64_MANTISSA).view(torch.float64)


def power_of_two_scale(magnitude: Tensor, rule: ScaleRule, largest: float, beyond: float) -> Tensor:
    """The power of two that a scale rule makes of a block's largest magnitude.

    With emax the exponent of `largest`, the element format's largest value, `beyond` the value that would come next,
    and m the number of fraction bits there (their difference is 2^(emax - m)):

        floor   2^(floor(log2 magnitude) - emax)                  OCP MX v1.0, section 6.3; the largest may saturate
        ceil    2^(ceil(log2 magnitude) - emax)
        even    as floor, after rounding the magnitude to m fraction bits, halves up
        rceil   2^ceil(log2(magnitude / largest))                 the quotient in the tensor's dtype; never saturates

    Clamped to 2^-149 … 2^127. Zero gives 2^-149, Inf and NaN give NaN. Shape and dtype are kept.
    """
    top = math.frexp(largest)[1] - 1
    value = divided(magnitude, largest) if rule == "rceil" else magnitude
    fraction, exponent = torch.frexp(value)  # 0.5 <= fraction < 1
    exponent = exponent - 1
    if rule in ("ceil", "rceil"):
        exponent = exponent + (fraction > 0.5)
    elif rule == "even":
        steps = 2.0**top / (beyond - largest)
        exponent = exponent + (fraction >= 1 - 0.25 / steps)
    if rule != "rceil":
        exponent = exponent - top
    exponent = torch.where(value.isinf(), 127, exponent)  # a quotient may overflow
    exponent = torch.where(value > 0, exponent, -149).clamp(-149, 127)
    return torch.where(magnitude.isfinite(), power_of_two(exponent).to(magnitude.dtype), torch.nan)


def _round_by_magic_number(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
    """To nearest even in float32: adding 1.5 * 2^23 steps leaves the sum no bits below a step, so the adder rounds."""
    magic = _binade(x, min_exponent) * (1.5 * 2.0 ** (FLOAT32_MANTISSA - mantissa))
    return torch.copysign((x + magic) - magic, x)


def _binade(x: Tensor, min_exponent: int) -> Tensor:
    """The power of two at or below |x|, at least 2^min_exponent; float32."""
    return (x.view(torch.int32) & FLOAT32_EXPONENT_BITS).view(torch.float32).clamp(min=2.0**min_exponent)


def _magic_fits(mantissa: int, min_exponent: int, bound: float) -> bool:
    """Whether every intermediate of the float32 ways is a normal, finite float32."""
    normal = min_exponent >= -126 and min_exponent - mantissa >= -126
    return mantissa <= 20 and normal and bound * 2.0 ** (FLOAT32_MANTISSA + 1 - mantissa) < 2.0**127
