"""GPTQ's error feedback: round a matrix column by column, each after the errors of those before it were made up for.

The paper (arXiv 2210.17323, section 3) keeps the weights W [N, K] up to date with the inverse of the Hessian H
[K, K]: with U the upper Cholesky factor of H^-1, a rounded column j subtracts (w - q) U[j, k] / U[j, j] from every
later column k. The same numbers come without any inverse. Let H = R R^T with R upper triangular (the Cholesky factor of
H turned upside down), so that U = R^-1, and let D = W - Q be all that rounding has changed. When the turn of column j
comes it stands at

    w_j + sum over i < j of D_i R[i, j] / R[j, j]

which takes one factorization instead of three, and reads what was changed instead of rewriting what is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core import DataError
from qsim_gptq.grids import Grid

RETRIES = 6
"""How often the damping is raised, ten times each, before a Hessian is given up."""
RUN = 32
"""Columns that are made up for one by one: more would be read again and again."""
LEAST = 1e-6
"""Where raising begins for a damping of 0."""


@dataclass(frozen=True)
class Factor:
    """What a Hessian says about the columns of a weight."""

    shares: Tensor
    """[K, K], in the order of `order`: what has changed in column i moves column j by [j, i], R[i, j] / R[j, j]."""
    order: Tensor | None
    """The columns in the order in which they are rounded; None: as they stand."""
    dead: Tensor
    """Columns whose input was always zero, booleans [K]."""
    notes: tuple[str, ...] = ()


def factorize(hessian: Tensor, percdamp: float, act_order: bool) -> Factor:
    """The factor of a Hessian [K, K] in its dtype; the factorization is float64's.

    Columns that saw only zeros get a diagonal of 1. `percdamp` times the mean of the diagonal is added to the
    diagonal; where no Cholesky factor exists it is raised tenfold, up to six times, and the note says so. With
    `act_order` columns come by descending diagonal. Raises `DataError` for a Hessian that is not finite or has no
    factor even then.
    """
    diagonal = hessian.diagonal().double()
    if not diagonal.isfinite().all():
        raise DataError("products of its inputs overflow; scale the calibration data down")
    dead = diagonal == 0
    diagonal = torch.where(dead, 1.0, diagonal)
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    turned_diagonal = (diagonal if order is None else diagonal[order]).flip(0)
    mean, damping, failed = float(diagonal.mean()), percdamp, torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(RETRIES + 1):
        upper = (hessian if order is None else hessian[order][:, order]).flip(0, 1).double().mT
        upper.diagonal().copy_(turned_diagonal + damping * mean)
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))  # in place, as LAPACK lays it out
        if not failed:
            shares = upper.div_(upper.diagonal().clone().unsqueeze(1)).to(hessian.dtype).flip(0, 1)
            notes = [f"no Cholesky factor with percdamp={percdamp:g}: damped by {damping:g}"] if attempt else []
            notes += [f"columns whose input was always 0, set to 0: {int(dead.sum())}"] if dead.any() else []
            return Factor(shares, order, dead, tuple(notes))
        tried, damping = damping, max(10 * damping, LEAST)
    raise DataError(f"its Hessian has no Cholesky factor, not even damped by {tried:g} times its mean diagonal")


def feed_back(weight: Tensor, factor: Factor, grid: Grid, block: int) -> Tensor:
    """The matrix [N, K] (float32 or float64) rounded to its grid, so that its products with the inputs change little.

    What all columns before a block of `block` columns do to it is one matrix product; so it goes on with the groups of
    columns in it, whose scales are fitted as they are reached, and with runs of a few columns in these, down to one
    matrix-vector product for each column of a run.
    """
    start = weight.masked_fill(factor.dead, 0.0) if factor.dead.any() else weight
    start = (start if factor.order is None else start[:, factor.order]).T.contiguous()  # a column is a row here
    columns = _Columns(grid.in_order(factor.order), factor.shares, start)
    n = grid.refits
    columns.round(0, len(start), (-(-block // n) * n, n, min(RUN, n)) if n else (block, RUN))
    result: Tensor = columns.quantized.T
    return result if factor.order is None else result[:, factor.order.argsort()]


class _Columns:
    """The columns of a matrix, [K, N], on their way to the grid."""

    def __init__(self, grid: Grid, shares: Tensor, start: Tensor) -> None:
        self.grid, self.shares, self.start = grid, shares, start
        self.moved, self.change, self.quantized = start.clone(), torch.empty_like(start), torch.empty_like(start)

    def round(self, first: int, end: int, sizes: Sequence[int]) -> None:
        """Round the columns from `first` to `end`, for which everything before `first` is made up for."""
        shares, start, moved, change = self.shares, self.start, self.moved, self.change
        if not sizes:
            here = slice(first, end)
            given = start[here], moved[here], change[here], self.quantized[here], shares[here, here]
            _round_columns(self.grid, first, *given)
            return
        for place in range(first, end, sizes[0]):
            here = slice(place, min(place + sizes[0], end))
            moved[here].addmm_(shares[here, first:place], change[first:place])
            if sizes[0] == self.grid.refits:
                self.grid.fit(place, _made_up_for(start[here], moved[here], shares[here, here]))
            self.round(here.start, here.stop, sizes[1:])


def _round_columns(
    grid: Grid, first: int, start: Tensor, moved: Tensor, change: Tensor, quantized: Tensor, shares: Tensor
) -> None:
    """Round columns from `first` on, [n, N] each: `moved` has all that came before them, `change` is written."""
    if grid.round_run(first, start, moved, change, quantized, shares):
        return
    rounded, so_far = [], change.T
    for place, (now, before, changed) in enumerate(zip(moved, start, change, strict=True)):
        if place:
            now.addmv_(so_far[:, :place], shares[place, :place])
        rounded.append(grid.round(first + place, now))
        torch.sub(before, rounded[-1], out=changed)
    torch.stack(rounded, out=quantized)


def _made_up_for(start: Tensor, moved: Tensor, shares: Tensor) -> Tensor:
    """The columns [n, N] of a group when its turn comes: where the product changes least, were they not rounded."""
    inverse = torch.linalg.solve_triangular(  # of n x n elements only
        shares, torch.eye(len(shares), dtype=shares.dtype, device=shares.device), upper=False, unitriangular=True
    )
    return torch.addmm(start, inverse, moved - start)
