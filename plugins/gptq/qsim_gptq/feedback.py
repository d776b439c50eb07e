"""GPTQ's error feedback: round a matrix column by column, and compensate the errors of earlier columns in later ones.

The paper (arXiv 2210.17323, section 3) updates the weights W [N, K] with the inverse of the Hessian H [K, K]. Let U be
the upper Cholesky factor of H^-1. After column j is rounded, (w - q) U[j, k] / U[j, j] is subtracted from every later
column k.

This module computes the same numbers without an inverse. Let H = R R^T with R upper triangular. R is the Cholesky
factor of H with rows and columns in reverse order, so U = R^-1. Let D = W - Q be the changes made by rounding. Just
before column j is rounded, its value is

    w_j + sum over i < j of D_i R[i, j] / R[j, j]

This takes one factorization instead of three. It reads the changes of earlier columns, and does not rewrite later
columns after each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core import DataError
from qsim_gptq.grids import ColumnGrid

RETRIES = 6
"""Attempts with a tenfold damping each, before `factorize` raises an error."""
RUN = 32
"""Columns that are compensated one by one; larger runs would read the changes of their columns more often."""
SMALLEST_DAMPING = 1e-6
"""Damping of the first retry if `percdamp` is 0."""


@dataclass(frozen=True)
class Factor:
    """A Hessian's factor, in the form that `feed_back` needs."""

    shares: Tensor
    """[K, K], in the order of `order`: column j moves by [j, i] = R[i, j] / R[j, j] times the change of column i."""
    order: Tensor | None
    """The columns in the order in which they are rounded; None: from first to last."""
    dead: Tensor
    """Booleans [K]: columns whose input was always zero."""
    notes: tuple[str, ...] = ()


def factorize(hessian: Tensor, percdamp: float, act_order: bool) -> Factor:
    """Factorize a Hessian [K, K] in float64, and return the factor in the Hessian's dtype.

    Columns whose input was always zero get a diagonal of 1. `percdamp` times the mean of the diagonal is added to the
    diagonal. If no Cholesky factor exists, the damping is raised tenfold, up to six times, and a note is added. With
    `act_order` columns are sorted by descending diagonal. Raises `DataError` if the Hessian is not finite, or if it
    has no factor after all retries.
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
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))  # in place: the tensor has LAPACK's layout
        if not failed:
            shares = upper.div_(upper.diagonal().clone().unsqueeze(1)).to(hessian.dtype).flip(0, 1)
            notes = [f"no Cholesky factor with percdamp={percdamp:g}: damped by {damping:g}"] if attempt else []
            notes += [f"columns whose input was always 0, set to 0: {int(dead.sum())}"] if dead.any() else []
            return Factor(shares, order, dead, tuple(notes))
        tried, damping = damping, max(10 * damping, SMALLEST_DAMPING)
    raise DataError(f"its Hessian has no Cholesky factor, not even damped by {tried:g} times its mean diagonal")


def feed_back(weight: Tensor, factor: Factor, grid: ColumnGrid, block: int) -> Tensor:
    """Round a matrix [N, K] (float32 or float64) to its grid, so that its products with the inputs change little.

    One matrix product compensates a block of `block` columns for all columns before it. Blocks are divided into groups
    of columns, whose scales are fitted when they are reached, and groups into runs of a few columns. The same is done
    at each level. Within a run each column takes one matrix-vector product.
    """
    start = weight.masked_fill(factor.dead, 0.0) if factor.dead.any() else weight
    start = (start if factor.order is None else start[:, factor.order]).T.contiguous()  # columns stored as rows
    columns = _Columns(grid.in_order(factor.order), factor.shares, start)
    n = grid.refits
    columns.round(0, len(start), (-(-block // n) * n, n, min(RUN, n)) if n else (block, RUN))
    result: Tensor = columns.quantized.T
    return result if factor.order is None else result[:, factor.order.argsort()]


class _Columns:
    """The columns of a matrix, [K, N], while they are rounded.

    `start` has the original columns, `moved` the compensated ones, `quantized` the rounded ones. `change` is `start`
    minus `quantized`.
    """

    def __init__(self, grid: ColumnGrid, shares: Tensor, start: Tensor) -> None:
        self.grid, self.shares, self.start = grid, shares, start
        self.moved, self.change, self.quantized = start.clone(), torch.empty_like(start), torch.empty_like(start)

    def round(self, first: int, end: int, sizes: Sequence[int]) -> None:
        """Round the columns from `first` to `end`, which are already compensated for all columns before `first`."""
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
                self.grid.fit(place, _compensated(start[here], moved[here], shares[here, here]))
            self.round(here.start, here.stop, sizes[1:])


def _round_columns(
    grid: ColumnGrid, first: int, start: Tensor, moved: Tensor, change: Tensor, quantized: Tensor, shares: Tensor
) -> None:
    """Round the n columns from `first` on, and write `change` and `quantized`; all tensors but `shares` are [n, N].

    `moved` is already compensated for the columns before `first`.
    """
    if grid.round_run(first, start, moved, change, quantized, shares):
        return
    rounded, so_far = [], change.T
    for place, (now, before, changed) in enumerate(zip(moved, start, change, strict=True)):
        if place:
            now.addmv_(so_far[:, :place], shares[place, :place])
        rounded.append(grid.round(first + place, now))
        torch.sub(before, rounded[-1], out=changed)
    torch.stack(rounded, out=quantized)


def _compensated(start: Tensor, moved: Tensor, shares: Tensor) -> Tensor:
    """Return the columns [n, N] of a group, compensated for all columns before it, with no column of it rounded yet.

    These are the values of the group for which the layer's output changes least.
    """
    inverse = torch.linalg.solve_triangular(  # of n x n elements only
        shares, torch.eye(len(shares), dtype=shares.dtype, device=shares.device), upper=False, unitriangular=True
    )
    return torch.addmm(start, inverse, moved - start)
