"""Operands as whole numbers, and exact sums of their products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qsim_core import Format, RecipeError
from qsim_core.formats.format import table_of

FLOAT32_WHOLE = 2.0**24
"""Whole numbers below are exact in float32, and so are sums whose magnitudes add up to less."""
LARGEST_CODE = 2**15
DIGITS = range(9)
"""Binary digits after the point that a format may have."""
MARGIN = 1.001
"""Covers the rounding of a bound that is computed in float32."""


@functools.lru_cache(maxsize=256)
def digits_of(number_format: Format) -> int:
    """The binary digits after the point of a format's values: in units of 2^-digits they are whole numbers.

    Raises `RecipeError` if these take more than 16 bits: such values have no integer multiplier.
    """
    values = table_of(number_format).finite
    for digits in DIGITS:
        codes = values * 2.0**digits
        if torch.equal(codes, codes.round()) and float(codes.abs().max()) < LARGEST_CODE:
            return digits
    raise RecipeError(f"{number_format} has values that are not whole in any unit of 16 bits")


def bound_of(left: Tensor, right: Tensor) -> float:
    """A bound on the sum of magnitudes of any row of `left` times any row of `right`: the product of their norms.

    By the inequality of Cauchy and Schwarz it bounds partial sums in any order too. A row with NaN does not count.
    """
    norms = (torch.linalg.vector_norm(rows, dim=-1).nan_to_num(0.0) for rows in (left, right))
    largest = [float(norm.max()) if norm.numel() else 0.0 for norm in norms]
    return MARGIN * largest[0] * largest[1]


def exact_product(left: Tensor, right: Tensor, bound: float) -> Tensor:
    """Multiply whole numbers `[..., M, K]` and `[..., N, K]` exactly, in float32 if the sums are short enough."""
    if bound >= FLOAT32_WHOLE:
        left, right = left.double(), right.double()
    return left @ right.transpose(-1, -2)
