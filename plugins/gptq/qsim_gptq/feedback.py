"""The walk over columns: round a matrix column by column, and compensate the errors of earlier columns in later ones.

Let D be the values S that the walk starts from minus the rounded columns. Just before column j is rounded, its value is

    s_j + sum over i < j of D_i shares[j, i]

The walk reads the changes of earlier columns, and does not rewrite later columns after each step. The method chooses S
and the shares (`qsim_gptq.factors`); for GPTQ S is the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsim_gptq.factors import Factor
from qsim_gptq.grids import ColumnGrid

RUN = 32
"""Columns that are compensated one by one; larger runs would read the changes of their columns more often."""


def feed_back(weight: Tensor, factor: Factor, grid: ColumnGrid, block: int) -> Tensor:
    """Round a matrix [N, K] (float32 or float64) to its grid, so that its products with the inputs change little.

    One matrix product compensates a block of `block` columns for all columns before it. Blocks are divided into groups
    of columns, whose scales are fitted when they are reached, and groups into runs of a few columns. The same is done
    at each level. Within a run each column takes one matrix-vector product.
    """
    start = weight.masked_fill(factor.dead, 0.0) if factor.dead.any() else weight
    start = (start if factor.order is None else start[:, factor.order]).T.contiguous()  # columns stored as rows
    first = None if factor.first is None else start[0] + factor.first @ start
    start = start if factor.pull is None else start + factor.pull.T @ start
    columns = _Columns(grid.in_order(factor.order), factor.shares, start, first)
    n = grid.refits
    columns.round(0, len(start), (-(-block // n) * n, n, min(RUN, n)) if n else (block, RUN))
    result: Tensor = columns.quantized.T
    return result if factor.order is None else result[:, factor.order.argsort()]


class _Columns:
    """The columns of a matrix, [K, N], while they are rounded.

    `start` has the columns that the walk starts from, `moved` the compensated ones, `quantized` the rounded ones.
    `change` is `start` minus `quantized`. The first column is rounded from `first`, if that is given.
    """

    def __init__(self, grid: ColumnGrid, shares: Tensor, start: Tensor, first: Tensor | None = None) -> None:
        self.grid, self.shares, self.start, self.first = grid, shares, start, first
        self.moved, self.change, self.quantized = start.clone(), torch.empty_like(start), torch.empty_like(start)

    def round(self, first: int, end: int, sizes: Sequence[int]) -> None:
        """Round the columns from `first` to `end`, which are already compensated for all columns before `first`."""
        shares, start, moved, change = self.shares, self.start, self.moved, self.change
        if not sizes:
            here = slice(first, end)
            if first == 0 and self.first is not None:
                moved[0] = self.first
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
