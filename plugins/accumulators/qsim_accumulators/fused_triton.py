"""The fused dot product on a GPU, in Triton, with the bits of the reference in Python."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsim_accumulators.terms import ZERO_EXPONENT, Terms

ROWS, COLUMNS = 16, 64
"""The outputs of a program."""


@triton.jit
def _aligned(significand, below, up: tl.constexpr, down: tl.constexpr):
    """Compute trunc(x 2^(fraction - top)); `below` is top less the exponent of x. Magnitudes have 31 bits at most."""
    magnitude = tl.abs(significand) << up
    magnitude >>= tl.minimum(below + down, 31)
    return tl.where(significand < 0, -magnitude, magnitude)


@triton.jit
def _value(significand, exponent, infinite, kept: tl.constexpr):
    """The float32 value of running sums."""
    unit = ((exponent - kept + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    finite = (significand.to(tl.float64) * unit).to(tl.float32)
    return tl.where(infinite != 0, infinite, finite)


@triton.jit
def _fused(
    x, of_x, w, of_w, y, rows, columns,
    STEPS: tl.constexpr, N: tl.constexpr, FRACTION: tl.constexpr, KEPT: tl.constexpr,
    UP: tl.constexpr, DOWN: tl.constexpr, SUM_UP: tl.constexpr, SUM_DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Add up products of x [K, rows] and w [K, columns] as `Sums` in fused.cpp does: a running sum in every place.

    A product is shifted up or down by UP or DOWN digits to have
    FRACTION of them, and a running sum by SUM_UP or SUM_DOWN.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    significand = tl.zeros((ROWS, COLUMNS), tl.int32)
    exponent = tl.full((ROWS, COLUMNS), ZERO, tl.int32)
    infinite = tl.zeros((ROWS, COLUMNS), tl.float32)
    x, of_x, w, of_w = x + row, of_x + row, w + column, of_w + column
    for _ in range(STEPS):
        top = exponent
        next_x, next_w = of_x, of_w
        for _ in range(N):
            ours = tl.load(next_x, mask=row_inside, other=ZERO)
            theirs = tl.load(next_w, mask=column_inside, other=ZERO)
            top = tl.maximum(top, ours[:, None] + theirs[None, :])
            next_x, next_w = next_x + rows, next_w + columns
        total = _aligned(significand, top - exponent, SUM_UP, SUM_DOWN).to(tl.int64)
        for _ in range(N):
            ours = tl.load(of_x, mask=row_inside, other=ZERO)
            theirs = tl.load(of_w, mask=column_inside, other=ZERO)
            left = tl.load(x, mask=row_inside, other=0)
            right = tl.load(w, mask=column_inside, other=0)
            below = top - (ours[:, None] + theirs[None, :])
            total += _aligned(left[:, None] * right[None, :], below, UP, DOWN)
            x, of_x, w, of_w = x + rows, of_x + rows, w + columns, of_w + columns
        magnitude = tl.abs(total)
        length = (magnitude.to(tl.float64).to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
        found = top - FRACTION + length
        lowest = tl.maximum(found, ZERO)
        shift = top - FRACTION + KEPT - lowest
        cut = (magnitude << tl.maximum(shift, 0)) >> tl.minimum(tl.maximum(-shift, 0), 63)
        cut = tl.where(total == 0, 0, cut).to(tl.int32)
        over = (total != 0) & (found > 127) & (infinite == 0)
        infinite = tl.where(over, tl.where(total < 0, -float("inf"), float("inf")), infinite)
        significand = tl.where(total < 0, -cut, cut)
        exponent = tl.where(cut == 0, ZERO, lowest)
    target = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(target, _value(significand, exponent, infinite, KEPT), mask=row_inside[:, None] & column_inside[None, :])


def fused_products(left: Terms, right: Terms, n: int, fraction: int, kept: int) -> Tensor:
    """Multiply finite terms [M, K] and [N, K] in float32 [M, N], n products in a step.

    `fraction` and `kept` are the binary digits of aligned terms and of the register. Products and aligned terms have to
    fit 31 bits.
    """
    (rows, length), columns = left.significand.shape, len(right.significand)
    steps, digits = -(-length // n), left.digits + right.digits
    operands = [
        torch.nn.functional.pad(tensor.T.int(), (0, 0, 0, steps * n - length), value=fill).contiguous()
        for terms in (left, right)
        for tensor, fill in ((terms.significand, 0), (terms.exponent, ZERO_EXPONENT))
    ]
    y = torch.empty(rows, columns, device=left.significand.device, dtype=torch.float32)
    _fused[triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)](
        *operands,
        y,
        rows,
        columns,
        STEPS=steps,
        N=n,
        FRACTION=fraction,
        KEPT=kept,
        UP=max(fraction - digits, 0),
        DOWN=max(digits - fraction, 0),
        SUM_UP=max(fraction - kept, 0),
        SUM_DOWN=max(kept - fraction, 0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ZERO=ZERO_EXPONENT,
    )
    return y
