"""Exact rounding of tensors to the values of a format, as pure functions.

Every function keeps shape and device, and does not change its input. NaN stays NaN. Callers compute a half-precision
tensor in float32 (`working`) and convert the result at the end. So no value is rounded twice on the way.
Exponents are read from the bits or by `frexp`; `log2` is wrong near powers of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qsim_core.formats.random_bits import uniform

Rounding = Literal["even", "away", "zero", "stochastic"]
"""The rounding modes:

    even, away   to nearest, with ties to the even neighbour or away from zero
    zero         toward zero
    stochastic   up with a probability, else down: the probability is the distance from the lower neighbour in steps
"""
ScaleRule = Literal["divide", "floor", "ceil", "even", "rceil"]
"""The rules that turn a block's largest magnitude into its scale: a quotient, or a power of two (see
`power_of_two_scale`)."""

FLOAT32_MANTISSA = 23
FLOAT64_BIAS, FLOAT64_MANTISSA = 1023, 52


@dataclass(frozen=True)
class Steps:
    """The values of a format as a rule that float32 code can follow: multiples of a step, from `low` to `high`.

    The step is 2^(e - mantissa) for magnitudes from 2^e to 2^(e + 1), if e is at least `min_exponent`. Below, it is
    2^(min_exponent - mantissa). With `fixed` it is 2^-mantissa everywhere. Values beyond the range become `overflow`
    (±Inf or NaN); None: they saturate.
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
        """The magnitude to which larger ones are clamped before rounding: twice `high`, or float32's largest."""
        return min(self.high * 2, torch.finfo(torch.float32).max)

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (-self.mantissa if self.fixed else self.min_exponent - self.mantissa)

    @property
    def significand(self) -> int:
        """The number of bits of the longest significand, with the hidden bit."""
        if not self.fixed:
            return self.mantissa + 1
        return int(max(self.high, -self.low) / self.smallest).bit_length()

    @property
    def fits(self) -> bool:
        """True if every intermediate of rounding by a magic number is a normal, finite float32."""
        if self.fixed and self.bound > self.smallest * 2.0**22:
            return False
        normal = self.min_exponent >= -126 and self.min_exponent - self.mantissa >= -126
        largest = self.bound * 2.0 ** (FLOAT32_MANTISSA + 1 - self.mantissa)
        return self.mantissa <= 20 and normal and largest < 2.0**127


def working(x: Tensor) -> Tensor:
    """Convert `x` to the dtype of its arithmetic: float64 stays, every other float becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divided(x: Tensor, by: float) -> Tensor:
    """Divide `x` by a number, rounded once. On a GPU torch multiplies by the reciprocal, which rounds twice."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device) if x.is_cuda else x / by


def whole(x: Tensor, rounding: Rounding = "even", seed: int = 0) -> Tensor:
    """Round `x` to whole numbers without bounds, in any rounding mode; ±Inf stays. This code defines the modes."""
    if rounding == "even":
        return x.round()
    if rounding == "zero":
        return x.trunc()
    if rounding == "away":
        truncated = x.trunc()
        return truncated + torch.copysign(((x - truncated).abs() >= 0.5).to(x.dtype), x)
    below = x.floor()
    return below + (uniform(x, seed) < x - below).to(x.dtype)


def round_to_integer(
    x: Tensor, low: float | Tensor, high: float | Tensor, rounding: Rounding = "even", seed: int = 0
) -> Tensor:
    """Round `x` to whole numbers, saturated at `low` and `high`: numbers, or tensors that broadcast.

    ±Inf saturates. -0 becomes 0.
    """
    return whole(x, rounding, seed).clamp_(low, high).add_(0.0)  # type: ignore[arg-type]


def power_of_two(exponent: Tensor) -> Tensor:
    """Compute 2^exponent in float64 from bits, for exponents -1022 to 1023; `exp2` and `ldexp` may err by an ulp."""
    return ((exponent.long() + FLOAT64_BIAS) << FLOAT64_MANTISSA).view(torch.float64)


def power_of_two_scale(magnitude: Tensor, rule: ScaleRule, largest: float, beyond: float) -> Tensor:
    """The scale, a power of two, that a rule gives for each block's largest magnitude.

    `largest` is the element format's largest value, and emax its exponent. `beyond` is the value that would follow
    it. Their difference is 2^(emax - m), where m is the number of fraction bits. The rules:

        floor   2^(floor(log2 magnitude) - emax)        OCP MX v1.0, section 6.3; the largest magnitude may saturate
        ceil    2^(ceil(log2 magnitude) - emax)
        even    as floor, after the magnitude is rounded to m fraction bits, halves up
        rceil   2^ceil(log2(magnitude / largest))       the quotient in the tensor's dtype; never saturates

    The scale is clamped to 2^-149 … 2^127. Zero gives 2^-149. Inf and NaN give NaN. Shape and dtype are kept.
    """
    emax = math.frexp(largest)[1] - 1
    value = divided(magnitude, largest) if rule == "rceil" else magnitude
    fraction, exponent = torch.frexp(value)  # 0.5 <= fraction < 1
    exponent = exponent - 1
    if rule in ("ceil", "rceil"):
        exponent = exponent + (fraction > 0.5)
    elif rule == "even":
        steps = 2.0**emax / (beyond - largest)
        exponent = exponent + (fraction >= 1 - 0.25 / steps)
    if rule != "rceil":
        exponent = exponent - emax
    exponent = torch.where(value.isinf(), 127, exponent)  # the quotient may overflow
    exponent = torch.where(value > 0, exponent, -149).clamp(-149, 127)
    return torch.where(magnitude.isfinite(), power_of_two(exponent).to(magnitude.dtype), torch.nan)
