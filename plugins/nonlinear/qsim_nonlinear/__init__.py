"""Functions of one number as chips compute them: tables, piecewise lines, Newton's method, polynomials."""

from __future__ import annotations

from qsim_core import Operation, hookimpl
from qsim_nonlinear.approximation import Approximation
from qsim_nonlinear.newton import Newton
from qsim_nonlinear.polynomials import IBert
from qsim_nonlinear.tables import Piecewise, Table

__all__ = ["Approximation", "IBert", "Newton", "Piecewise", "Table"]


@hookimpl
def qsim_operations() -> list[type[Operation]]:
    return [Table, Piecewise, Newton, IBert]
