"""The range of a function of one number that a device tabulates, and how the other numbers are brought into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Restore = Callable[[Tensor], Tensor]


class Tails(NamedTuple):
    """The range outside which a function is nearly constant, or nearly x, and its values below and above."""

    low: float
    high: float
    below: float
    above: float | None
    """None: x itself; Inf: no limit, and numbers above the range are an error."""


TAILS: Mapping[str, Tails] = {
    "exp": Tails(-16, 0, 0.0, math.inf),
    "gelu": Tails(-8, 8, 0.0, None),
    "silu": Tails(-16, 16, 0.0, None),
    "mish": Tails(-16, 16, 0.0, None),
    "softplus": Tails(-16, 16, 0.0, None),
    "hardswish": Tails(-4, 4, 0.0, None),
    "relu": Tails(-8, 8, 0.0, None),
    "sigmoid": Tails(-16, 16, 0.0, 1.0),
    "hardsigmoid": Tails(-4, 4, 0.0, 1.0),
    "tanh": Tails(-8, 8, -1.0, 1.0),
    "erf": Tails(-4, 4, -1.0, 1.0),
}
"""The ranges of functions that are tabulated as they are."""


def by_exponent(kind: str, x: Tensor) -> tuple[Tensor, Restore, tuple[float, float]] | None:
    """Bring positive numbers into a range of two octaves or one by their exponents, as a device does by shifts.

    Gives the numbers in the range, the function that turns its results into those of `x`, and the range. None for a
    function that has no such rule. For exp the number is x log2 e less its whole part, and the result is shifted.
    """
    if kind == "exp2_of_fraction":
        whole = torch.floor(x)
        return x - whole, lambda y: torch.ldexp(y, whole.clamp(-2000, 2000).to(torch.int32)), (0.0, 1.0)
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent with 1/2 <= mantissa < 1
    if kind in ("rsqrt", "sqrt"):
        odd = exponent.remainder(2)
        half = (exponent + odd) // 2
        reduced = torch.ldexp(mantissa, -odd)  # in [1/4, 1)
        sign = -1 if kind == "rsqrt" else 1
        return reduced, lambda y: torch.ldexp(y, sign * half), (0.25, 1.0)
    if kind == "reciprocal":
        return mantissa, lambda y: torch.ldexp(y, -exponent), (0.5, 1.0)
    if kind == "log":
        return mantissa, lambda y: y + exponent * math.log(2), (0.5, 1.0)
    return None
