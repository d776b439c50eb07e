"""Factors of Hessians: for each method, the numbers that the walk over the columns needs (`qsim_gptq.feedback`).

GPTQ (arXiv 2210.17323, section 3) updates the weights W [N, K] with the inverse of the Hessian H [K, K]. Let U be
the upper Cholesky factor of H^-1. After column j is rounded, (w - q) U[j, k] / U[j, j] is subtracted from every later
column k.

This module computes the same numbers without an inverse. Let H = R R^T with R upper triangular. R is the Cholesky
factor of H with rows and columns in reverse order, so U = R^-1. Let D = W - Q be the changes made by rounding. Just
before column j is rounded, its value is

    w_j + sum over i < j of D_i R[i, j] / R[j, j]

This takes one factorization instead of three.

GPTAQ and Qronos know that the inputs x have drifted from those of the original model, x + d. Let C be the sum of d x^T.
Both are the same walk, which starts from other values S than the weights, D = S - Q:

    GPTAQ   P = alpha triu(C U^T, 1) U;   S = W (I - P)^-1;   I + the shares = (I - P) (U / diag U - P)^-1
    Qronos  S = W + W C H^-1, the weights with the least error; its first column is rounded from w_0 + W C_0 / H_00
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from qsim_core import DataError

RETRIES = 6
"""Attempts with a tenfold damping each, before `Root.of` raises an error."""
SMALLEST_DAMPING = 1e-6
"""Damping of the first retry if `percdamp` is 0."""
STEPS = 30
"""Multiplications by the Hessian in which the power method estimates the largest eigenvalue."""


@dataclass(frozen=True)
class Factor:
    """The factor of a Hessian, in the form that `feed_back` needs."""

    shares: Tensor
    """[K, K], in the order of `order`: column j moves by [j, i] times the change of column i."""
    order: Tensor | None
    """The columns in the order in which they are rounded; None: from first to last."""
    dead: Tensor
    """Booleans [K]: columns whose input was always zero."""
    notes: tuple[str, ...] = ()
    pull: Tensor | None = None
    """[K, K]: the walk starts from W + W pull; None: from W. It has the order of `order`, as `first` has."""
    first: Tensor | None = None
    """[K]: the first column is rounded from w_0 + W first; None: from where the walk starts."""


@dataclass(frozen=True)
class Root:
    """R of a damped Hessian R R^T [K, K], in float64."""

    turned: Tensor
    """The upper Cholesky factor of the Hessian with rows and columns in reverse order: R^T in that order."""
    order: Tensor | None
    dead: Tensor
    notes: tuple[str, ...]

    @classmethod
    def of(cls, hessian: Tensor, percdamp: float, act_order: bool, by_largest: bool = False) -> Root:
        """Factorize a Hessian.

        Columns whose input was always zero get a diagonal of 1. `percdamp` times the mean of the diagonal is added to
        the diagonal; with `by_largest` it is times the largest eigenvalue. If no Cholesky factor exists, the damping
        is raised tenfold, up to six times, and a note is added. With `act_order` columns are sorted by descending
        diagonal. Raises `DataError` if the Hessian is not finite, or if it has no factor after all retries.
        """
        diagonal = hessian.diagonal().double()
        if not diagonal.isfinite().all():
            raise DataError("products of its inputs overflow; scale the calibration data down")
        dead = diagonal == 0
        diagonal = torch.where(dead, 1.0, diagonal)
        order = diagonal.argsort(descending=True, stable=True) if act_order else None
        turned_diagonal = (diagonal if order is None else diagonal[order]).flip(0)
        unit = _largest_eigenvalue(hessian) if by_largest else float(diagonal.mean())
        damping, failed = percdamp, torch.empty((), dtype=torch.int32, device=hessian.device)
        for attempt in range(RETRIES + 1):
            upper = in_order(hessian, order).flip(0, 1).double().mT
            upper.diagonal().copy_(turned_diagonal + damping * unit)
            torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))  # in place: the tensor has LAPACK's layout
            if not failed:
                notes = [f"no Cholesky factor with percdamp={percdamp:g}: damped by {damping:g}"] if attempt else []
                notes += [f"columns whose input was always 0, set to 0: {int(dead.sum())}"] if dead.any() else []
                return cls(upper, order, dead, tuple(notes))
            tried, damping = damping, max(10 * damping, SMALLEST_DAMPING)
        kind = "largest eigenvalue" if by_largest else "mean diagonal"
        raise DataError(f"its Hessian has no Cholesky factor, not even damped by {tried:g} times its {kind}")

    @property
    def lower(self) -> Tensor:
        """R^T."""
        return self.turned.flip(0, 1)

    def shares(self, dtype: torch.dtype) -> Tensor:
        """[j, i] = R[i, j] / R[j, j], in a dtype."""
        return (self.turned / self.turned.diagonal().unsqueeze(1)).to(dtype).flip(0, 1)


def factorize(hessian: Tensor, percdamp: float, act_order: bool) -> Factor:
    """The factor of a Hessian for GPTQ, in the Hessian's dtype. Raises `DataError`."""
    root = Root.of(hessian, percdamp, act_order)
    return Factor(root.shares(hessian.dtype), root.order, root.dead, root.notes)


def gptaq(hessian: Tensor, drift: Tensor, percdamp: float, act_order: bool, alpha: float) -> Factor:
    """The factor for GPTAQ; `drift` is C [K, K]. Raises `DataError`."""
    root = Root.of(hessian, percdamp, act_order)
    lower, c = root.lower, in_order(drift, root.order).double()
    seen = solve_triangular(lower, c, upper=False, left=False).triu(1)  # C U^T
    p = alpha * solve_triangular(lower.mT, seen, upper=True, left=False)
    one = torch.eye(len(p), dtype=p.dtype, device=p.device)
    plain = root.shares(p.dtype).mT  # (U / diag U)^-1
    inverse = solve_triangular(one - p, one, upper=True, unitriangular=True)
    shares = solve_triangular(one - plain @ p, one - p, upper=True, left=False, unitriangular=True) @ plain
    kind = hessian.dtype
    return Factor(shares.mT.to(kind), root.order, root.dead, root.notes, (inverse @ p).to(kind))


def qronos(hessian: Tensor, drift: Tensor, percdamp: float, act_order: bool) -> Factor:
    """The factor for Qronos; `drift` is C [K, K], `percdamp` a share of the largest eigenvalue. Raises `DataError`."""
    root = Root.of(hessian, percdamp, act_order, by_largest=True)
    c, first = in_order(drift, root.order), 0 if root.order is None else int(root.order[0])
    pull = _divided(c, root.lower)
    diagonal = hessian[first, first] if hessian[first, first] else hessian.new_ones(())
    return Factor(root.shares(hessian.dtype), root.order, root.dead, root.notes, pull, c[:, 0] / diagonal)


def in_order(square: Tensor, order: Tensor | None) -> Tensor:
    """Rows and columns in an order."""
    return square if order is None else square[order][:, order]


def _divided(c: Tensor, lower: Tensor) -> Tensor:
    """C H^-1 for H = R R^T and `lower` = R^T."""
    half = solve_triangular(lower, c.double(), upper=False, left=False)
    quotient: Tensor = solve_triangular(lower.mT, half, upper=True, left=False)
    return quotient.to(c.dtype)


def _largest_eigenvalue(hessian: Tensor) -> float:
    """Estimate it by the power method, from the column with the largest diagonal."""
    vector = hessian[:, int(hessian.diagonal().argmax())].double()
    square = hessian.double()
    for _ in range(STEPS):
        vector = square @ (vector / vector.norm())
    return float(vector.norm())
