"""Operations between products as a device computes them: softmax by tables, norms by Newton's method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import RecipeError, natural_order
from qsim_core.formats.rounding import working
from qsim_core.operations.functions import OperationCall
from qsim_core.operations.written_out import parts_of, written_out


class Operation(Component):
    """Computes operations between products in another way. An author writes one method: `compute`.

    The gradient is that of torch's own operation.
    """

    kind: ClassVar[str] = "operation"
    hook: ClassVar[str] = "qsim_operations"
    computes: ClassVar[frozenset[str]] = frozenset()
    """The kinds of operations that it computes; empty: any."""

    @abstractmethod
    def compute(self, call: OperationCall) -> Tensor:
        """Compute an operation on its operands, which stay as they are; the result has the shape of torch's."""

    def check(self, call: OperationCall) -> None:
        """Raise `RecipeError` if it does not compute this kind of operation."""
        if self.computes and not self.computes.intersection(call.kinds):
            raise RecipeError(f"{self} computes {', '.join(sorted(self.computes, key=natural_order))}")


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
