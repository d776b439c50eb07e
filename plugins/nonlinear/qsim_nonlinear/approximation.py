"""Approximations of functions of one number, alone and inside a softmax or a norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qsim_core import Operation, OperationCall, RecipeError
from qsim_core.formats.rounding import working
from qsim_nonlinear.written_out import parts_of, written_out


class Approximation(Operation):
    """Approximates functions of one number. An author writes one method: `approximate`.

    An operation of one number, such as gelu, is approximated itself. Of softmax the function exp is, and of a norm the
    function rsqrt.
    """

    inner: ClassVar[tuple[str, ...]] = ("exp", "rsqrt")
    """The functions of one number that are approximated inside a softmax or a norm."""

    @abstractmethod
    def approximate(self, kind: str, exact: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Approximate a function of one number.

        `kind` is its name, such as `exp`. `exact` computes it. `x` holds float32 or float64 numbers.
        """

    def compute(self, call: OperationCall) -> Tensor:
        x = call.input
        if call.is_pointwise:
            found = self.approximate(call.operation, lambda t: call.of([t]), working(x))
            return found.to(x.dtype)

        def replaced(part: str) -> Callable[[Tensor], Tensor]:
            exact = getattr(torch, part)
            return lambda t: self.approximate(part, exact, t)

        return written_out(call, {part: replaced(part) for part in parts_of(call) if part in self.inner})

    def check(self, call: OperationCall) -> None:
        super().check(call)
        if not call.is_pointwise and not set(self.inner).intersection(parts_of(call)):
            raise RecipeError(f"{self} approximates functions of one number, and softmax and norms by theirs")
